"""Which entry of a stage's mixture each row comes from."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lclm_kernels.native import assign_rows as assign_by_weight

__all__ = ["Entry", "MixtureEntry", "Share", "assign_rows", "check_entries", "share_ends"]

SHARE_TOLERANCE = 1e-6
SHARE_UNITS = 10**12  # shares are rounded to 1e-12: 5e-5 rows of error after 10^8 rows
PACKINGS = ("exact", "concat", "best-fit")

Share = float | tuple[float, float]  # constant, or at the start and at the end of a stage


class Entry(Protocol):
    """What a mixture entry has; `lclm.config.MixtureEntry` and `MixtureEntry` both fit."""

    @property
    def prefix(self) -> str: ...
    @property
    def packing(self) -> str: ...
    @property
    def piece_length(self) -> int: ...
    @property
    def share(self) -> Share: ...


@dataclass(frozen=True)
class MixtureEntry:
    """One part of a stage: an indexed prefix, how its documents become rows, its share."""

    prefix: str
    packing: str  # exact | concat | best-fit
    piece_length: int  # tokens, exact only; 0: seq_length
    share: Share  # of the stage's tokens


def share_ends(share: Share) -> tuple[float, float]:
    """A share at the start and at the end of its stage."""
    return share if isinstance(share, tuple) else (share, share)


def assign_rows(shares: Sequence[Share], num_rows: int) -> np.ndarray:
    """Entry of each row, int16 [num_rows]; after any number of rows within one row of each share.

    A share (a, b) goes linearly from a to b over the stage. After n of N rows its entry has had
    within one row of the integral n a + n^2 (b - a) / 2N.

    Raises:
        ValueError: a constant share is not positive, one end of a share is negative or both are 0,
            or the shares do not add up to 1 within 1e-6 at both ends.
    """
    ends = [share_ends(share) for share in shares]
    for number, pair in enumerate(ends):
        if not (all(share >= 0 for share in pair) and any(pair)):
            raise ValueError(
                f"mixture.{number}.share is {shares[number]}; a share must be greater than 0, at "
                "one end of the stage at least: leave the entry out instead"
            )
    starts, lasts = ([pair[end] for pair in ends] for end in (0, 1))
    for name, parts in (("start", starts), ("end", lasts)):
        if not abs(sum(parts) - 1) <= SHARE_TOLERANCE:
            where = "" if starts == lasts else f" at the stage's {name}"
            raise ValueError(
                f"mixture: the shares add up to {sum(parts):.9g}{where}; they must add up to 1 "
                f"(within {SHARE_TOLERANCE:g})"
            )
    if starts != lasts and len(shares) > 1:
        return _assign_changing(np.array(starts), np.array(lasts), num_rows)
    weights = np.array([round(share / sum(starts) * SHARE_UNITS) for share in starts], np.int64)
    if weights.min() < 1:
        raise ValueError(f"mixture: share {min(starts)} is below the resolution 1 / {SHARE_UNITS}")
    return assign_by_weight(weights // np.gcd.reduce(weights), num_rows)


def _assign_changing(starts: np.ndarray, lasts: np.ndarray, num_rows: int) -> np.ndarray:
    """Rows by Tijdeman's rule (Discrete Mathematics 32, 1980) where shares change.

    An entry's target is the sum of its shares so far. With n entries and s = 1 / (2n - 2), row
    number c of an entry, from 0, may come when the target reaches c + s and is due when it reaches
    c + 1 - s. Of those that may come, the one due first comes. No count is then further from its
    target than 1 - s, whatever the shares, as long as they add up to 1 in every row: so they do
    here, in whole numbers, and rounding moves a target by less than num_rows / unit rows.
    """
    num_entries = len(starts)
    span = 2 * num_entries - 2
    unit = min(SHARE_UNITS, 2**62 // num_rows) // span * span  # one row; sums stay in int64
    at = (np.arange(num_rows) + 0.5) / num_rows  # the share of a row is the mean over it
    border, upper = np.zeros(num_rows, np.int64), np.zeros(num_rows)
    releases, dues = [], []
    for number, (start, last) in enumerate(zip(starts / starts.sum(), lasts / lasts.sum())):
        upper += start + (last - start) * at
        below, border = border, np.rint(np.minimum(upper, 1) * unit).astype(np.int64)
        if number == num_entries - 1:
            border[:] = unit
        target = np.cumsum(border - below)
        rows_before = np.arange(target[-1] // unit + 1) * unit
        releases.append(np.searchsorted(target, rows_before + unit // span))
        dues.append(np.searchsorted(target, rows_before + unit - unit // span))
    release = np.concatenate(releases)
    entry = np.repeat(np.arange(num_entries), [len(rows) for rows in releases])
    order = np.argsort(release, kind="stable")
    first = np.searchsorted(release[order], np.arange(num_rows + 1)).tolist()
    keys = (np.concatenate(dues) * num_entries + entry)[order].tolist()  # ties: the first entry
    waiting: list[int] = []
    entry_of_row = np.empty(num_rows, np.int16)
    for row in range(num_rows):
        for key in keys[first[row] : first[row + 1]]:
            heapq.heappush(waiting, key)
        entry_of_row[row] = heapq.heappop(waiting) % num_entries
    return entry_of_row


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
