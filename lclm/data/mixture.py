"""Which entry of a stage's mixture each row comes from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lclm_kernels.native import assign_rows as assign_by_weight

__all__ = ["Entry", "MixtureEntry", "assign_rows", "check_entries"]

SHARE_TOLERANCE = 1e-6
SHARE_UNITS = 10**12  # shares are rounded to 1e-12: 5e-5 rows of error after 10^8 rows
PACKINGS = ("exact", "concat", "best-fit")


class Entry(Protocol):
    """What a mixture entry has; `lclm.config.MixtureEntry` and `MixtureEntry` both fit."""

    @property
    def prefix(self) -> str: ...
    @property
    def packing(self) -> str: ...
    @property
    def piece_length(self) -> int: ...
    @property
    def share(self) -> float: ...


@dataclass(frozen=True)
class MixtureEntry:
    """One part of a stage: an indexed prefix, how its documents become rows, its share."""

    prefix: str
    packing: str  # exact | concat | best-fit
    piece_length: int  # tokens, exact only; 0: seq_length
    share: float  # of the stage's tokens


def assign_rows(shares: Sequence[float], num_rows: int) -> np.ndarray:
    """Entry of each row, int16 [num_rows]; after any number of rows within one row of each share.

    Raises:
        ValueError: a share is not positive, or they do not add up to 1 within 1e-6.
    """
    for number, share in enumerate(shares):
        if not share > 0:
            raise ValueError(
                f"mixture.{number}.share is {share}; a share must be greater than 0: leave the "
                "entry out instead"
            )
    total = sum(shares)
    if not abs(total - 1) <= SHARE_TOLERANCE:
        raise ValueError(
            f"mixture: the shares add up to {total:.9g}; they must add up to 1 (within "
            f"{SHARE_TOLERANCE:g})"
        )
    weights = np.array([round(share / total * SHARE_UNITS) for share in shares], np.int64)
    if weights.min() < 1:
        raise ValueError(f"mixture: share {min(shares)} is below the resolution 1 / {SHARE_UNITS}")
    return assign_by_weight(weights // np.gcd.reduce(weights), num_rows)


def check_entries(entries: Sequence[Entry], seq_length: int) -> list[int]:
    """Check the packing rules of a stage and return the piece length of each entry, in tokens.

    Raises:
        ValueError: an unknown packing, a piece length that does not divide seq_length, two packings
            of one prefix, one prefix concatenated twice or cut twice to the same length.
    """
    piece_lengths: list[int] = []
    seen: dict[str, list[tuple[str, int]]] = {}
    for number, entry in enumerate(entries):
        where = f"mixture.{number} ({entry.prefix})"
        if entry.packing not in PACKINGS:
            raise ValueError(f"{where}: packing={entry.packing!r}; use one of {PACKINGS}")
        length = entry.piece_length or seq_length
        if entry.packing != "exact" and length != seq_length:
            raise ValueError(
                f"{where}: piece_length({length}) has no effect with packing {entry.packing}; "
                "remove it"
            )
        if length < 1 or seq_length % length:
            raise ValueError(
                f"{where}: piece_length({length}) must divide seq_length({seq_length}); change one "
                "of them"
            )
        others = seen.setdefault(entry.prefix, [])
        if any(packing != entry.packing for packing, _ in others):
            raise ValueError(
                f"{where}: all entries of one prefix in a stage share one packing; it is given as "
                f"{others[0][0]} and as {entry.packing}"
            )
        if (entry.packing, length) in others:
            raise ValueError(
                f"{where}: packing {entry.packing} with pieces of {length} tokens is given twice; "
                "add the shares into one entry"
            )
        others.append((entry.packing, length))
        piece_lengths.append(length)
    if not entries:
        raise ValueError("mixture: has no entries; a stage needs at least one")
    return piece_lengths
