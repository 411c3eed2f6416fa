"""Best-fit packing and seeded orders: dispatch to best_fit.cpp or to the twins in this file."""

import bisect
import itertools
from typing import NamedTuple

import numpy as np

from lclm_kernels.native.ops import check_lengths, choose_library

MAX_ITEMS = 2**31 - 1  # numbers are int32


class BestFitRows(NamedTuple):
    """Rows of whole documents; row r is the pieces row_start[r] .. row_start[r + 1]."""

    row_start: np.ndarray  # int64 [rows + 1]
    place: np.ndarray  # int32 [pieces], index into the stream
    offset: np.ndarray  # int32 [pieces], tokens into the document
    length: np.ndarray  # int32 [pieces]
    num_documents: int  # used; the next stage starts after them
    num_dropped: int  # documents longer than a row that drop_long left out
    num_dropped_tokens: int
    num_unused_tokens: int  # of the last document, beyond the last row


def pack_best_fit(
    lengths: np.ndarray,
    row_length: int,
    num_rows: int,
    drop_long: bool = False,
    implementation: str = "auto",
) -> BestFitRows | None:
    """Put each document into the row with the least room that holds it, else into a new row.

    Documents come in stream order; packing ends before the first that fits nowhere when num_rows
    rows are open, so nothing is skipped and a next stage goes on there. A document longer than a
    row is cut from the front into pieces of a row; what is left is packed like a document.

    Args:
        lengths: int32 [documents], tokens of each document in stream order.
        row_length: tokens a row holds; what no document fills is left for the caller to pad.
        num_rows: rows wanted.
        drop_long: leave documents longer than a row out instead of cutting them.
        implementation: auto, native or reference.

    Returns:
        The rows, or None when the documents do not open so many.

    Raises:
        ValueError: lengths of another type, a number out of range, an implementation that is not
            there.
    """
    lengths = check_lengths(lengths)
    if not 1 <= row_length <= MAX_ITEMS or not 0 <= num_rows <= MAX_ITEMS:
        raise ValueError(
            f"native: row_length({row_length}) must be 1 to {MAX_ITEMS} and num_rows({num_rows}) "
            f"0 to {MAX_ITEMS}"
        )
    library = choose_library(implementation)
    if library is None:
        return _pack_best_fit_twin(lengths, row_length, num_rows, drop_long)
    row_of_piece = np.empty(len(lengths) + num_rows, np.int32)
    stats = np.empty(5, np.int64)
    request = (lengths.ctypes.data, len(lengths), row_length, num_rows, int(drop_long))
    if library.lclm_pack_best_fit(*request, row_of_piece.ctypes.data, stats.ctypes.data) != 0:
        return None
    num_documents, num_pieces, *counts = stats.tolist()
    num_unused = counts[-1]
    if num_unused:  # the last of the long documents found no row for its end
        lengths = lengths[:num_documents].copy()
        lengths[np.flatnonzero(lengths > row_length)[-1]] -= num_unused
    row_start = np.empty(num_rows + 1, np.int64)
    place, offset, length = (np.empty(num_pieces, np.int32) for _ in range(3))
    outputs = (item.ctypes.data for item in (row_start, place, offset, length))
    request = (lengths.ctypes.data, num_documents, *request[2:])
    library.lclm_sort_best_fit(*request, row_of_piece.ctypes.data, num_pieces, *outputs)
    return BestFitRows(row_start, place, offset, length, num_documents, *counts)


def _pack_best_fit_twin(
    lengths: np.ndarray, row_length: int, num_rows: int, drop_long: bool
) -> BestFitRows | None:
    # rows with room left: (room, number that falls with each use, row), sorted
    open_rows: list[tuple[int, int, int]] = []
    uses = itertools.count(0, -1)
    num_open = 0

    def take(tokens: int) -> int:
        nonlocal num_open
        at = bisect.bisect_left(open_rows, (tokens,))
        if at < len(open_rows):
            room, _, row = open_rows.pop(at)
        elif num_open < num_rows:
            room, row = row_length, num_open
            num_open += 1
        else:
            return -1
        if room > tokens:
            bisect.insort(open_rows, (room - tokens, next(uses), row))
        return row

    pieces: list[tuple[int, int, int, int]] = []  # row, place, offset, length
    num_dropped = num_dropped_tokens = num_unused = 0
    num_documents = len(lengths)
    for number, tokens in enumerate(lengths.tolist()):
        is_long = tokens > row_length
        if is_long and drop_long:
            num_dropped += 1
            num_dropped_tokens += tokens
            continue
        if is_long and num_open == num_rows:
            num_documents = number
            break
        at = 0
        while at < tokens:
            size = min(tokens - at, row_length)
            row = take(size)
            if row < 0:
                break
            pieces.append((row, number, at, size))
            at += size
        if at < tokens and not is_long:
            num_documents = number
            break
        num_unused += tokens - at
    if num_open < num_rows:
        return None
    pieces.sort(key=lambda piece: piece[0])
    table = np.array(pieces, np.int64).reshape(-1, 4)
    row_start = np.searchsorted(table[:, 0], np.arange(num_rows + 1)).astype(np.int64)
    place, offset, length = (np.ascontiguousarray(table[:, n], np.int32) for n in (1, 2, 3))
    return BestFitRows(
        row_start, place, offset, length, num_documents, num_dropped, num_dropped_tokens, num_unused
    )


def seeded_order(start: int, num_items: int, implementation: str = "auto") -> np.ndarray:
    """The numbers 0 .. num_items - 1 sorted by SplitMix64 of each, started at `start`.

    SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) gives every number another key.

    Args:
        start: 0 to 2^64 - 1.
        num_items: less than 2^31.
        implementation: auto, native or reference.

    Returns:
        int32 [num_items].

    Raises:
        ValueError: too many items, or an implementation that is not there.
    """
    if not 0 <= num_items <= MAX_ITEMS:
        raise ValueError(f"native: {num_items} items; an order has 0 to {MAX_ITEMS}")
    library = choose_library(implementation)
    if library is None:
        mixed = np.arange(1, num_items + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed += np.uint64(start)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
        return np.argsort(mixed, kind="stable").astype(np.int32)
    order = np.empty(num_items, np.int32)
    library.lclm_seeded_order(start, num_items, order.ctypes.data)
    return order
