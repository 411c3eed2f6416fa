"""The `.idx` file of Megatron's indexed format.

Little endian: 9 bytes `MMIDIDX\\0\\0`, u64 version 1, u8 dtype code, u64 number of sequences N, u64
number of document borders D, int32[N] sequence lengths, int64[N] byte offsets, int64[D] borders
counted in sequences.
"""

import struct
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
# Megatron's codes (datasets/indexed_dataset.py, DType); 6 and 7 are floats and hold no tokens
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODES = {np.dtype(kind): code for code, kind in _DTYPES.items()}
MAX_DOCUMENT = 2**31 - 1  # lengths are int32
INDEX_BLOCK = 1 << 22  # documents worked on at once


def read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """dtype, lengths int32 [N], byte offsets int64 [N], borders int64 [D] of an .idx file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size or head[: len(MAGIC)] != MAGIC:
        raise ValueError(
            f"{path}: starts with {head[: len(MAGIC)]!r}, an index starts with {MAGIC!r}; this is "
            "not an index of Megatron's format: write it with tools/preprocess_data.py"
        )
    _, version, code, num_sequences, num_borders = _HEADER.unpack(head)
    if version != VERSION:
        raise ValueError(
            f"{path}: index version {version}, only version {VERSION} can be read; write it again"
        )
    if code not in _DTYPES:
        raise ValueError(
            f"{path}: dtype code {code}, token files have one of {sorted(_DTYPES)}; write it again"
        )
    needed = _HEADER.size + num_sequences * 12 + num_borders * 8
    # Megatron appends one int8 mode per sequence to multimodal files
    if size not in (needed, needed + num_sequences):
        raise ValueError(
            f"{path}: has {size} bytes, its header asks for {needed}; the file is cut short or "
            "damaged: copy or write it again"
        )
    raw = np.memmap(path, mode="r")
    at = _HEADER.size
    lengths = np.frombuffer(raw, "<i4", num_sequences, at)
    pointers = np.frombuffer(raw, "<i8", num_sequences, at + num_sequences * 4)
    borders = np.frombuffer(raw, "<i8", num_borders, at + num_sequences * 12)
    is_ordered = num_borders > 0 and borders[0] == 0 and borders[-1] == num_sequences
    if not is_ordered or (np.diff(borders) < 0).any() or (lengths < 0).any():
        raise ValueError(
            f"{path}: document borders must rise from 0 to the {num_sequences} sequences and no "
            "length may be negative; the file is damaged: write it again"
        )
    return np.dtype(_DTYPES[code]), lengths, pointers, borders


def are_starts(pointers: np.ndarray, lengths: np.ndarray, itemsize: int) -> bool:
    """Whether each pointer is the bytes of all sequences before it; in blocks, to save memory."""
    start = 0
    for at in range(0, len(lengths), INDEX_BLOCK):
        ends = np.cumsum(lengths[at : at + INDEX_BLOCK], dtype=np.int64) * itemsize + start
        block = pointers[at : at + INDEX_BLOCK]
        if block[0] != start or not np.array_equal(block[1:], ends[:-1]):
            return False
        start = int(ends[-1])
    return True


def documents_of(
    path: Path, lengths: np.ndarray, borders: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lengths int32 and first tokens int64 of the documents that have tokens."""
    ends = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, dtype=np.int64, out=ends[1:])
    token_borders = ends[borders]
    document_lengths = np.diff(token_borders)
    if len(document_lengths) and document_lengths.max() > MAX_DOCUMENT:
        raise ValueError(
            f"{path}: document {document_lengths.argmax()} has {document_lengths.max()} tokens in "
            f"several sequences; at most {MAX_DOCUMENT} can be read: split it"
        )
    has_tokens = document_lengths > 0
    return document_lengths[has_tokens].astype(np.int32), token_borders[:-1][has_tokens]


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """The .idx of documents of these lengths, written piece by piece: there may be 10^9."""
    filled = [lengths[at : at + INDEX_BLOCK] for at in range(0, len(lengths), INDEX_BLOCK)]
    num_sequences = sum(int(np.count_nonzero(block)) for block in filled)
    with open(path, "wb") as file:
        head = (MAGIC, VERSION, _CODES[dtype], num_sequences, len(lengths) + 1)
        file.write(_HEADER.pack(*head))
        for block in filled:
            file.write(block[block > 0].astype("<i4").tobytes())
        start = 0
        for block in filled:
            ends = np.cumsum(block[block > 0], dtype=np.int64) + start
            starts = np.append(start, ends[:-1]) if len(ends) else ends
            file.write((starts * dtype.itemsize).astype("<i8").tobytes())
            start = int(ends[-1]) if len(ends) else start
        border = 0
        file.write(struct.pack("<q", 0))
        for block in filled:
            borders = np.cumsum(block > 0, dtype=np.int64) + border
            file.write(borders.astype("<i8").tobytes())
            border = int(borders[-1])
