"""The documents of one prefix in the order a run reads them.

A document ordinal counts documents over all epochs: ordinal = epoch * num_docs + place, where
num_docs counts the documents that are trained on. The order of an epoch and the choice of held-out
documents depend on the seed, the document lengths and the epoch, on nothing else.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from lclm.data.indexed import IndexedReader

__all__ = ["Cursor", "Domain", "seeded_order"]


class Cursor(NamedTuple):
    """Where a stage starts in a domain: the first document not used up, and tokens used of it."""

    ordinal: int = 0
    offset: int = 0


def seeded_order(num_items: int, *key: object) -> np.ndarray:
    """A permutation of 0 .. num_items - 1 that depends on num_items and key only, int64.

    Items are sorted by SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) of their number, started at a
    SHA-256 of the key: unlike numpy.random, whose streams may change from version to version.
    """
    digest = hashlib.sha256("\x1f".join(str(part) for part in key).encode()).digest()
    start = np.uint64(int.from_bytes(digest[:8], "little"))
    mixed = np.arange(1, num_items + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return np.argsort(mixed, kind="stable")


class Domain:
    """One prefix: which documents are trained on, and their order in each epoch.

    Attributes:
        prefix: as given.
        name: `domain` of `<prefix>.json`, else the last part of the prefix.
        reader: the indexed files.
        train_docs, held_out_docs: int64, document numbers of the reader. held_out_docs is in
            seeded order.
    """

    def __init__(self, prefix: str, seed: int, held_out_fraction: float) -> None:
        """Open the files and set documents apart.

        Raises:
            ValueError: the files cannot be read or hold no document, or the fraction is not in
                [0, 1).
        """
        if not 0 <= held_out_fraction < 1:
            raise ValueError(
                f"data.held_out_fraction({held_out_fraction}) must be at least 0 and less than 1"
            )
        self.prefix = prefix
        self.reader = IndexedReader(prefix)
        num_docs = len(self.reader)
        if num_docs == 0:
            raise ValueError(
                f"{prefix}: holds no document with tokens; take it out of the mixture or write it "
                "again from input that is not empty"
            )
        self.name = str(self.reader.metadata.get("domain") or prefix.rsplit("/", 1)[-1])
        lengths_hash = hashlib.sha256(self.reader.lengths.tobytes()).hexdigest()
        self._key = (seed, lengths_hash)
        num_held_out = round(held_out_fraction * num_docs)
        if held_out_fraction > 0 and num_docs >= 2:
            num_held_out = min(max(num_held_out, 1), num_docs - 1)
        else:
            num_held_out = 0
        self.held_out_docs = seeded_order(num_docs, "held out", *self._key)[:num_held_out]
        is_trained = np.ones(num_docs, bool)
        is_trained[self.held_out_docs] = False
        self.train_docs = np.flatnonzero(is_trained)
        self.train_lengths = self.reader.lengths[self.train_docs]

    @property
    def num_docs(self) -> int:
        """Documents trained on in one epoch."""
        return len(self.train_docs)

    def stream(self, first_ordinal: int, last_ordinal: int) -> np.ndarray:
        """Document numbers of the ordinals [first, last), int64."""
        parts = []
        for epoch in range(first_ordinal // self.num_docs, -(-last_ordinal // self.num_docs)):
            start = epoch * self.num_docs
            order = seeded_order(self.num_docs, "epoch", *self._key, epoch)
            parts.append(order[max(first_ordinal - start, 0) : last_ordinal - start])
        return self.train_docs[np.concatenate(parts)] if parts else np.empty(0, np.int64)
