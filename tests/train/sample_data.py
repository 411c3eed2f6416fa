"""Small indexed domains for tests that train from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lclm.data.indexed import IndexedWriter
from tests.train.tiny import VOCAB_SIZE


def write_domain(prefix: Path, num_docs: int, max_length: int, seed: int) -> str:
    """Write documents of 1 to `max_length` tokens; return the prefix as text.

    Token i + 1 of a document is mostly token i plus a step of the document's own, so there is
    something to learn.
    """
    random = np.random.default_rng(seed)
    with IndexedWriter(str(prefix), VOCAB_SIZE) as writer:
        for _ in range(num_docs):
            length = int(random.integers(1, max_length + 1))
            steps = np.where(random.random(length) < 0.8, random.integers(1, 5), 7)
            writer.add_document((random.integers(VOCAB_SIZE) + np.cumsum(steps)) % VOCAB_SIZE)
    return str(prefix)


def write_lengths(prefix: Path, lengths: list[int]) -> str:
    """Write documents of the given lengths that hold nothing but zeros."""
    with IndexedWriter(str(prefix), VOCAB_SIZE) as writer:
        for length in lengths:
            writer.add_document(np.zeros(length, np.int64))
    return str(prefix)
