"""Whether the files of a prefix are what their index and description say."""

import hashlib
from dataclasses import dataclass

import numpy as np

from lclm.data.indexed import IndexedReader, dtype_for_vocab, length_histogram

BLOCK_TOKENS = 1 << 22


@dataclass(frozen=True)
class Verified:
    """What was read."""

    num_documents: int
    num_tokens: int
    max_id: int
    sha256: str  # of the .bin


def verify_prefix(prefix: str) -> Verified:
    """Read every token of a prefix.

    Opening it checks sizes, offsets and borders; here ids, counts, histogram and dtype follow.

    Raises:
        ValueError: an id lies outside the vocabulary, or `<prefix>.json` describes other files.
    """
    reader = IndexedReader(prefix)
    metadata = reader.metadata
    vocab_size = metadata.get("vocab_size")
    digest = hashlib.sha256()
    max_id, at = -1, 0
    with open(f"{prefix}.bin", "rb") as file:
        while block := file.read(BLOCK_TOKENS * reader.dtype.itemsize):
            digest.update(block)
            tokens = np.frombuffer(block, reader.dtype)
            is_bad = tokens < 0 if vocab_size is None else (tokens < 0) | (tokens >= vocab_size)
            if is_bad.any():
                place = at + int(is_bad.argmax())
                ends = np.cumsum(reader.lengths, dtype=np.int64)
                document = int(np.searchsorted(ends, place, side="right"))
                raise ValueError(
                    f"{prefix}.bin: token {place} (document {document}) is "
                    f"{tokens[place - at]}, the vocabulary has {vocab_size}; the file is damaged "
                    "or of another tokenizer: write it again"
                )
            max_id = max(max_id, int(tokens.max()))
            at += len(tokens)
    expected = {
        "documents": len(reader),
        "length_histogram": length_histogram(reader.lengths),
        "dtype": reader.dtype.name,
    }
    for name, value in expected.items():
        if name in metadata and metadata[name] != value:
            raise ValueError(
                f"{prefix}.json: {name} is {metadata[name]}, the files have {value}; they do not "
                "belong together: write the prefix again"
            )
    if vocab_size is not None and dtype_for_vocab(int(vocab_size)) != reader.dtype:
        raise ValueError(
            f"{prefix}: holds {reader.dtype}, a vocabulary of {vocab_size} asks for "
            f"{dtype_for_vocab(int(vocab_size))}; write it again"
        )
    return Verified(len(reader), at, max_id, digest.hexdigest())
