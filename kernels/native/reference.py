"""The NumPy twin of pack.cpp: the same results, used where the library is not built.

Integer arithmetic only. A "place" is an index into the stream of documents given.
"""

import numpy as np


def pack_concat(
    lengths: np.ndarray, start_offset: int, row_length: int, num_rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[int, int]] | None:
    """Cut a stream of documents into rows; see `ops.pack_concat`. None: documents ran out."""
    total = num_rows * row_length
    document_start = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, dtype=np.int64, out=document_start[1:])
    document_start -= start_offset
    if total and document_start[-1] < total:
        return None
    first, last = np.searchsorted(document_start, (0, total), side="left")
    rows = np.arange(num_rows + 1, dtype=np.int64) * row_length
    borders = np.unique(np.concatenate([rows, document_start[first:last]]))
    starts = borders[:-1]
    # side="right": of several documents that start here, all but the last are empty
    place = np.searchsorted(document_start, starts, side="right").astype(np.int64) - 1
    offset = starts - document_start[place]
    row_start = np.searchsorted(starts, rows, side="left").astype(np.int64)
    next_place = min(int(np.searchsorted(document_start, total, side="right")) - 1, len(lengths))
    next_offset = total - int(document_start[next_place]) if next_place < len(lengths) else 0
    length = np.diff(borders).astype(np.int32)
    upcoming = (next_place, next_offset)
    return row_start, place.astype(np.int32), offset.astype(np.int32), length, upcoming
