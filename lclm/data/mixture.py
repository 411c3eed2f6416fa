"""Which entry of a stage's mixture each row comes from."""

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

SHARE_UNITS = 10**12  # shares are rounded to 1e-12: 5e-5 rows of error after 10^8 rows
MAX_ENTRIES = 32767  # entries are numbered in int16


def assign_rows(shares: Sequence[tuple[float, float]], num_rows: int) -> np.ndarray:
    """Entry of each row, int16 [num_rows]; after any number of rows within one row of each share.

    A share (a, b) goes linearly from a to b over the stage. After n of N rows its entry has had
    within one row of the integral n a + n^2 (b - a) / 2N.

    Args:
        shares: of each entry, at the stage's start and at its end, as `lclm.config.check_mixture`
            lets them through.
        num_rows: of the stage.

    Raises:
        ValueError: a constant share is below 1e-12, or there are too many entries.
    """
    if len(shares) > MAX_ENTRIES:
        raise ValueError(f"mixture: has {len(shares)} entries; at most {MAX_ENTRIES} are possible")
    starts, lasts = ([pair[end] for pair in shares] for end in (0, 1))
    if starts != lasts and len(shares) > 1:
        return _assign_changing(np.array(starts), np.array(lasts), num_rows)
    weights = np.array([round(share / sum(starts) * SHARE_UNITS) for share in starts], np.int64)
    if weights.min() < 1:
        raise ValueError(f"mixture: share {min(starts)} is below the resolution 1 / {SHARE_UNITS}")
    return _assign_constant(weights.tolist(), num_rows)


def _take_turns(turns: Sequence[Iterator[tuple[int, int]]], num_rows: int) -> np.ndarray:
    """Entry of each row, int16 [num_rows], by Tijdeman's rule (Discrete Mathematics 32, 1980).

    An entry's target is the sum of its shares so far. With n entries and s = 1 / (2n - 2), row
    number c of an entry, from 0, may come when the target reaches c + s and is due when it reaches
    c + 1 - s; turns gives, per entry and c, the row from which it may come and when it is due. Of
    those that may come, the one due first comes, of several the first entry's. No count is then
    further from its target than 1 - s, whatever the shares, as long as they add up to 1 in every
    row.
    """
    coming = [(*next(turn), number) for number, turn in enumerate(turns)]
    heapq.heapify(coming)
    waiting: list[tuple[int, int]] = []
    entry_of_row = np.empty(num_rows, np.int16)
    for row in range(num_rows):
        while coming and coming[0][0] <= row:
            heapq.heappush(waiting, heapq.heappop(coming)[1:])
        entry = heapq.heappop(waiting)[1]
        entry_of_row[row] = entry
        for release, due in itertools.islice(turns[entry], 1):
            heapq.heappush(coming, (release, due, entry))
    return entry_of_row


def _assign_constant(weights: Sequence[int], num_rows: int) -> np.ndarray:
    """Rows where shares stay as these weights, exact.

    After as many rows as the weights add up to (divided by their common divisor) every entry has
    exactly its share and the sequence repeats, so only one period is computed.
    """
    divisor = math.gcd(*weights)
    weights = [weight // divisor for weight in weights]
    total, span = sum(weights), max(2 * len(weights) - 2, 1)  # 1: one entry takes every row
    scale = max(weights) ** 2  # times that differ do so by 1 or more once multiplied by it

    def turns(weight: int) -> Iterator[tuple[int, int]]:
        for count in itertools.count():
            release = -(-total * (count * span + 1) // (weight * span)) - 1
            yield release, (count * span + span - 1) * scale // weight

    period = _take_turns([turns(weight) for weight in weights], min(total, num_rows))
    return np.resize(period, num_rows)


def _assign_changing(starts: np.ndarray, lasts: np.ndarray, num_rows: int) -> np.ndarray:
    """Rows where shares change.

    The shares of a row add up to 1 in whole numbers, and rounding moves a target by less than
    num_rows / unit rows.
    """
    num_entries = len(starts)
    span = 2 * num_entries - 2
    unit = min(SHARE_UNITS, 2**62 // num_rows) // span * span  # one row; sums stay in int64
    at = (np.arange(num_rows) + 0.5) / num_rows  # the share of a row is the mean over it
    border, upper = np.zeros(num_rows, np.int64), np.zeros(num_rows)
    turns = []
    for number, (start, last) in enumerate(zip(starts / starts.sum(), lasts / lasts.sum())):
        upper += start + (last - start) * at
        below, border = border, np.rint(np.minimum(upper, 1) * unit).astype(np.int64)
        if number == num_entries - 1:
            border[:] = unit
        target = np.cumsum(border - below)
        rows_before = np.arange(target[-1] // unit + 1) * unit
        release = np.searchsorted(target, rows_before + unit // span)
        due = np.searchsorted(target, rows_before + unit - unit // span)
        turns.append(zip(release.tolist(), due.tolist()))
    return _take_turns(turns, num_rows)
