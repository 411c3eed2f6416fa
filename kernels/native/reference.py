"""The NumPy twin of pack.cpp: the same results, used where the library is not built.

Integer arithmetic only. A "place" is an index into the stream of documents given.
"""

import math

import numpy as np

__all__ = ["assign_rows", "pack_concat", "pack_exact"]


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


def pack_exact(
    lengths: np.ndarray, targets: np.ndarray, needs: np.ndarray
) -> tuple[list[tuple[np.ndarray, np.ndarray]], tuple[int, int, int]] | None:
    """Cut documents into exact pieces; see `ops.pack_exact`. None: documents ran out."""
    rest = lengths.astype(np.int64)
    start = np.zeros(len(lengths), np.int64)
    cuts = []
    num_used = 0
    for target, need in zip(targets.tolist(), needs.tolist()):
        count, rest = np.divmod(rest, target)
        running = np.cumsum(count)
        if need and (len(running) == 0 or running[-1] < need):
            return None
        if need:
            num_used = max(num_used, int(np.searchsorted(running, need, side="left")) + 1)
        cuts.append((count, running, start))
        start = start + count * target
    pieces = []
    num_unused_tokens = 0
    for (count, running, first), target, need in zip(cuts, targets.tolist(), needs.tolist()):
        num_documents = (
            int(np.searchsorted(running[:num_used], need, side="left")) + 1 if need else 0
        )
        count_here = count[:num_documents]
        place = np.repeat(np.arange(num_documents, dtype=np.int64), count_here)
        within = np.arange(len(place)) - np.repeat(running[:num_documents] - count_here, count_here)
        offset = np.repeat(first[:num_documents], count_here) + within * target
        pieces.append((place[:need].astype(np.int32), offset[:need].astype(np.int32)))
        num_unused_tokens += (int(count[:num_used].sum()) - need) * target
    return pieces, (num_used, int(rest[:num_used].sum()), num_unused_tokens)


def assign_rows(weights: np.ndarray, num_rows: int) -> np.ndarray:
    """Give rows to entries by Tijdeman's rule; see `ops.assign_rows`.

    After as many rows as the weights add up to (divided by their common divisor) every entry has
    exactly its share and the sequence repeats, so only one period is computed.
    """
    reduced = [int(weight) // math.gcd(*weights.tolist()) for weight in weights]
    total = sum(reduced)
    span = max(2 * len(reduced) - 2, 1)  # 1: a single entry takes every row
    lag = [0] * len(reduced)
    period = np.empty(min(total, num_rows), np.int16)
    for row in range(len(period)):
        best, best_slack = -1, 0
        for i, weight in enumerate(reduced):
            lag[i] += weight
            if span * lag[i] < total:
                continue
            slack = span * (total - lag[i]) - total
            if best < 0 or slack * reduced[best] < best_slack * weight:
                best, best_slack = i, slack
        period[row] = best
        lag[best] -= total
    return np.resize(period, num_rows)
