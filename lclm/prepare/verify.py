"""Whether the files of a prefix are what their index and description say."""

import hashlib

import numpy as np

from lclm.data.indexed import IndexedReader, length_histogram

BLOCK_TOKENS = 1 << 22


def verify_prefix(prefix: str) -> tuple[int, str]:
    """Read every token of a prefix.

    Opening it checks sizes, offsets and borders; here ids, counts, histogram and dtype follow.

    Returns:
        The largest id and the SHA-256 of the .bin.

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
    if vocab_size is not None:
        reader.check_dtype()
    return max_id, digest.hexdigest()
