"""Tile tables of interval attention: which keys a tile of queries needs, and the reverse.

Letters: T query tokens, S key tokens. Pure NumPy, from lo and hi of a validated plan alone.

A row of a table, int32, is (tile, begin, full_begin, full_end, end):
- tile: the block of rows [tile * block, (tile + 1) * block) of its own side;
- [begin, end): what of the other side some row of the tile sees, cut to the first and last;
- [full_begin, full_end): the part of it that needs no mask, empty or made of whole steps, which
  begins whole steps behind begin. Steps need not start at multiples of the step.
Rows are ordered by their number of steps, most first; equal ones by tile.

Both lo and hi never decrease over the rows that see something, so the first and the last of them in
a tile give its bounds, and a key is seen by one range of such rows. An empty row may lie between
them; a range that holds one is not full.
"""

import numpy as np

# Ranges of queries begin at multiples of this: TMA reads fp32 numbers of queries in 16-byte units.
ALIGNMENT = 4
TILE_COLUMNS = ("tile", "begin", "full_begin", "full_end", "end")


def build_query_tiles(
    lo: np.ndarray, hi: np.ndarray, rows: np.ndarray, block: int, step: int
) -> np.ndarray:
    """Which keys each tile of queries needs.

    Args:
        lo, hi: int32 [T]; rows: int64, the rows that see something, rising.
        block: queries of a tile; step: keys of a step.

    Returns:
        int32 [ceil(T / block), 5]; tiles that see nothing come last, with an empty range.
    """
    edges = np.arange(0, len(lo) + block, block)
    edges[-1] = len(lo)
    place = np.searchsorted(rows, edges)
    first, behind = place[:-1], place[1:]
    is_seen = behind > first
    table = np.zeros((len(first), len(TILE_COLUMNS)), dtype=np.int64)
    table[:, 0] = np.arange(len(first))
    top, bottom = rows[first[is_seen]], rows[behind[is_seen] - 1]
    num_rows = edges[1:] - edges[:-1]
    is_whole = (behind - first == num_rows)[is_seen]
    table[is_seen, 1:] = _ranges(lo[top], hi[bottom], lo[bottom], hi[top], is_whole, step)
    return _longest_first(table, step)


def build_key_tiles(
    lo: np.ndarray, hi: np.ndarray, num_keys: int, rows: np.ndarray, block: int, step: int
) -> np.ndarray:
    """Which queries each tile of keys needs.

    Args:
        lo, hi, rows: as in `build_query_tiles`; num_keys: S.
        block: keys of a tile; step: queries of a step.

    Returns:
        int32 [tiles that somebody sees, 5].
    """
    # int32 as lo and hi are: searchsorted would convert all of them to a wider type
    starts = np.arange(0, num_keys, block, dtype=np.int32)
    ends = np.minimum(starts + block, num_keys).astype(np.int32)
    seen_lo, seen_hi = _at(rows, lo, hi)
    first = np.searchsorted(seen_hi, starts, "right")  # hi > start
    behind = np.searchsorted(seen_lo, ends, "left")  # lo < end
    is_seen = behind > first
    starts, ends = starts[is_seen], ends[is_seen]
    first, behind = first[is_seen], behind[is_seen]
    full_first = np.searchsorted(seen_hi, ends, "left")  # hi >= end
    full_behind = np.searchsorted(seen_lo, starts, "right")  # lo <= start
    is_full = full_behind > full_first
    full_first = np.where(is_full, full_first, first)
    full_last = np.where(is_full, full_behind, first + 1) - 1
    is_whole = is_full & (rows[full_last] - rows[full_first] == full_last - full_first)
    begin, end = rows[first], rows[behind - 1] + 1
    begin -= begin % ALIGNMENT
    table = np.empty((len(first), len(TILE_COLUMNS)), dtype=np.int64)
    table[:, 0] = starts // block
    table[:, 1:] = _ranges(begin, end, rows[full_first], rows[full_last] + 1, is_whole, step)
    return _longest_first(table, step)


def build_key_bounds(
    lo: np.ndarray, hi: np.ndarray, num_keys: int, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The queries that see each key: those of [first, behind) that see anything. int32 [S] each.

    A key that nobody sees has first == behind.
    """
    if not len(rows):
        nobody = np.full(num_keys, len(lo), dtype=np.int32)
        return nobody, nobody
    # Sums in place: at 512K keys it is the memory of temporaries that takes the time.
    seen_lo, seen_hi = _at(rows, lo, hi)
    # Of rows with one hi the first counts. A key below the lowest hi of a stretch has the first row
    # of the stretch as its first; from there on, one row more per key.
    bottom, top, row, _ = _stretches(seen_hi, rows, np.append(True, seen_hi[1:] != seen_hi[:-1]))
    counts = np.diff(top, prepend=0)
    first = np.arange(num_keys, dtype=np.int32)
    begun = first[: top[-1]]
    begun += (row + 1 - bottom).repeat(counts)
    np.maximum(begun, row.repeat(counts), out=begun)
    first[top[-1] :] = len(lo)
    # Of rows with one lo the last counts. From the lowest lo of a stretch on, one row more per key,
    # up to the last row of the stretch.
    bottom, _, row, last = _stretches(seen_lo, rows, np.append(seen_lo[1:] != seen_lo[:-1], True))
    counts = np.diff(bottom, append=num_keys)
    behind = np.arange(1, num_keys + 1, dtype=np.int32)
    begun = behind[bottom[0] :]
    begun += (row - bottom).repeat(counts)
    np.minimum(begun, (last + 1).repeat(counts), out=begun)
    behind[: bottom[0]] = 0
    return first, np.maximum(first, behind, out=behind)


def _stretches(
    bound: np.ndarray, rows: np.ndarray, is_kept: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Bound and row at both ends of each stretch of kept rows in which both rise by 1 a row.

    int32: (first bound, last bound, first row, last row). There are few stretches in the masks that
    occur: one per document, empty range or jump of a window.
    """
    if not is_kept.all():
        bound, rows = bound[is_kept], rows[is_kept]
    is_start = np.ones(len(rows) + 1, dtype=bool)
    np.not_equal(np.diff(bound), 1, out=is_start[1:-1])
    if rows[-1] - rows[0] >= len(rows):
        is_start[1:-1] |= np.diff(rows) != 1
    edges = np.flatnonzero(is_start)
    start, end = edges[:-1], edges[1:] - 1
    first, last = (rows[x].astype(np.int32) for x in (start, end))
    return bound[start], bound[end], first, last


def _at(rows: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (lo, hi) if len(rows) == len(lo) else (lo[rows], hi[rows])


def _ranges(
    begin: np.ndarray,
    end: np.ndarray,
    full_begin: np.ndarray,
    full_end: np.ndarray,
    is_whole: np.ndarray,
    step: int,
) -> np.ndarray:
    """(begin, full_begin, full_end, end) with the full range cut to whole steps from begin on."""
    begin, end, full_begin, full_end = (
        x.astype(np.int64) for x in (begin, end, full_begin, full_end)
    )
    full_begin = begin - (begin - full_begin) // step * step  # up to the next step
    num_full = np.where(is_whole, np.maximum(full_end - full_begin, 0) // step, 0)
    full_begin = np.where(num_full > 0, full_begin, begin)
    return np.stack([begin, full_begin, full_begin + num_full * step, end], axis=1)


def _longest_first(table: np.ndarray, step: int) -> np.ndarray:
    begin, full_end, end = table[:, 1], table[:, 3], table[:, 4]
    num_steps = (full_end - begin) // step + -(-(end - full_end) // step)
    return table[np.argsort(-num_steps, kind="stable")].astype(np.int32)
