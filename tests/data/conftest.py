"""Small indexed files for the data tests."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from lclm.data.indexed import IndexedWriter

WritePrefix = Callable[..., str]


@pytest.fixture
def write_prefix(tmp_path: Path) -> WritePrefix:
    """write_prefix(name, lengths): documents whose tokens are all different, 1, 2, 3, ..."""

    def write(name: str, lengths: Sequence[int], **metadata: object) -> str:
        prefix = str(tmp_path / name)
        tokens = np.arange(1, sum(lengths) + 1)
        with IndexedWriter(prefix, vocab_size=max(70000, sum(lengths) + 2)) as writer:
            writer.metadata.update(metadata)
            for start, length in zip(np.cumsum([0, *lengths]), lengths):
                writer.add_document(tokens[start : start + length])
        return prefix

    return write
