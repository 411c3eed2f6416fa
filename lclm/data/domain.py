"""The documents of one prefix in the order a run reads them.

A document ordinal counts documents over all epochs: ordinal = epoch * num_docs + place, where
num_docs counts the documents that are trained on. The order of an epoch and the choice of held-out
documents depend on the seed, the document lengths and the epoch, on nothing else.
"""

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lclm.data.indexed import IndexedReader, read_metadata
from lclm.data.remote import fetch_prefix, is_remote
from lclm_kernels.native import seeded_order as sort_by_key


class Cursor(NamedTuple):
    """Where a stage starts in a domain: the first document not used up, and tokens used of it."""

    ordinal: int = 0
    offset: int = 0


def seeded_order(num_items: int, *key: object) -> np.ndarray:
    """A permutation of 0 .. num_items - 1 that depends on num_items and key only, int32.

    Items are sorted by SplitMix64 of their number, started at a SHA-256 of the key: unlike
    numpy.random, whose streams may change from version to version.
    """
    digest = hashlib.sha256("\x1f".join(str(part) for part in key).encode()).digest()
    return sort_by_key(int.from_bytes(digest[:8], "little"), num_items)


def prefix_key(prefix: str) -> str:
    """What tells the files of a prefix from others, however it is spelled."""
    return prefix if is_remote(prefix) else os.path.realpath(f"{prefix}.bin").removesuffix(".bin")


def distinct_names(prefixes: Iterable[str]) -> dict[str, str]:
    """Names of domains for metrics, by prefix; those of different files differ.

    A name is `domain` of `<prefix>.json`, else the last part of the prefix. Where several prefixes
    have one name, each takes the last parts of its own path that are enough to tell them apart.
    """
    own = {prefix: _own_name(prefix) for prefix in dict.fromkeys(prefixes)}
    first = {prefix_key(prefix): prefix for prefix in reversed(own)}
    names = {prefix: own[prefix] for prefix in reversed(first.values())}
    num_parts = 2
    while len(set(names.values())) < len(names) and num_parts <= max(map(len, first)):
        shared = [name for name, count in Counter(names.values()).items() if count > 1]
        for key, prefix in first.items():
            if names[prefix] in shared:
                names[prefix] = "/".join(key.split("/")[-num_parts:])
        num_parts += 1
    return {prefix: names[first[prefix_key(prefix)]] for prefix in own}


def _own_name(prefix: str) -> str:
    metadata = read_metadata(Path(f"{fetch_prefix(prefix)}.json"))
    return str(metadata.get("domain") or prefix.rsplit("/", 1)[-1])


class Domain:
    """One prefix: which documents are trained on, and their order in each epoch.

    Attributes:
        prefix: as given.
        name: of `distinct_names` of this prefix alone; others may have it too.
        reader: the indexed files.
        key: of the seed and the document lengths; decides every order.
        num_docs: documents trained on in one epoch.
        num_held_out: documents never trained on.
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
        self.reader = IndexedReader(fetch_prefix(prefix))
        num_docs = len(self.reader)
        if num_docs == 0:
            raise ValueError(
                f"{prefix}: holds no document with tokens; take it out of the mixture or write it "
                "again from input that is not empty"
            )
        self.name = _own_name(prefix)
        lengths_hash = hashlib.sha256(np.ascontiguousarray(self.reader.lengths).data).hexdigest()
        self.key = (seed, lengths_hash)
        wanted = max(round(held_out_fraction * num_docs), 1) if held_out_fraction > 0 else 0
        self.num_held_out = min(wanted, num_docs - 1)
        self.num_docs = num_docs - self.num_held_out  # trained on in one epoch

    @functools.cached_property
    def held_out_docs(self) -> np.ndarray:
        """int32 [num_held_out], document numbers of the reader in seeded order."""
        if self.num_held_out == 0:
            return np.empty(0, np.int32)
        return seeded_order(len(self.reader), "held out", *self.key)[: self.num_held_out].copy()

    @functools.cached_property
    def train_docs(self) -> np.ndarray:
        """int32 [num_docs], document numbers of the reader, rising."""
        if self.num_held_out == 0:
            return np.arange(self.num_docs, dtype=np.int32)
        is_trained = np.ones(len(self.reader), bool)
        is_trained[self.held_out_docs] = False
        return np.flatnonzero(is_trained).astype(np.int32)

    @functools.cached_property
    def train_lengths(self) -> np.ndarray:
        """int32 [num_docs], tokens of train_docs."""
        return self.reader.lengths[self.train_docs] if self.num_held_out else self.reader.lengths

    def stream(self, first_ordinal: int, last_ordinal: int) -> np.ndarray:
        """Document numbers of the ordinals [first, last), int32."""
        parts = []
        for epoch in range(first_ordinal // self.num_docs, -(-last_ordinal // self.num_docs)):
            start = epoch * self.num_docs
            order = seeded_order(self.num_docs, "epoch", *self.key, epoch)
            parts.append(order[max(first_ordinal - start, 0) : last_ordinal - start])
        if not parts:
            return np.empty(0, np.int32)
        places = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return self.train_docs[places] if self.num_held_out else places
