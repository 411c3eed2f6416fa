"""Which entry of a stage's mixture each row comes from."""

import heapq
from collections.abc import Sequence

import numpy as np

from lclm_kernels.native import assign_rows as assign_by_weight

SHARE_UNITS = 10**12  # shares are rounded to 1e-12: 5e-5 rows of error after 10^8 rows


def assign_rows(shares: Sequence[tuple[float, float]], num_rows: int) -> np.ndarray:
    """Entry of each row, int16 [num_rows]; after any number of rows within one row of each share.

    A share (a, b) goes linearly from a to b over the stage. After n of N rows its entry has had
    within one row of the integral n a + n^2 (b - a) / 2N.

    Args:
        shares: of each entry, at the stage's start and at its end, as `lclm.config.check_mixture`
            lets them through.
        num_rows: of the stage.

    Raises:
        ValueError: a constant share is below 1e-12.
    """
    starts, lasts = ([pair[end] for pair in shares] for end in (0, 1))
    if starts != lasts and len(shares) > 1:
        return _assign_changing(np.array(starts), np.array(lasts), num_rows)
    weights = np.array([round(share / sum(starts) * SHARE_UNITS) for share in starts], np.int64)
    if weights.min() < 1:
        raise ValueError(f"mixture: share {min(starts)} is below the resolution 1 / {SHARE_UNITS}")
    return assign_by_weight(weights // np.gcd.reduce(weights), num_rows)


def _assign_changing(starts: np.ndarray, lasts: np.ndarray, num_rows: int) -> np.ndarray:
    """Rows by Tijdeman's rule (Discrete Mathematics 32, 1980) where shares change.

    An entry's target is the sum of its shares so far. With n entries and s = 1 / (2n - 2), row
    number c of an entry, from 0, may come when the target reaches c + s and is due when it reaches
    c + 1 - s. Of those that may come, the one due first comes. No count is then further from its
    target than 1 - s, whatever the shares, as long as they add up to 1 in every row: so they do
    here, in whole numbers, and rounding moves a target by less than num_rows / unit rows.
    """
    num_entries = len(starts)
    span = 2 * num_entries - 2
    unit = min(SHARE_UNITS, 2**62 // num_rows) // span * span  # one row; sums stay in int64
    at = (np.arange(num_rows) + 0.5) / num_rows  # the share of a row is the mean over it
    border, upper = np.zeros(num_rows, np.int64), np.zeros(num_rows)
    releases, dues = [], []
    for number, (start, last) in enumerate(zip(starts / starts.sum(), lasts / lasts.sum())):
        upper += start + (last - start) * at
        below, border = border, np.rint(np.minimum(upper, 1) * unit).astype(np.int64)
        if number == num_entries - 1:
            border[:] = unit
        target = np.cumsum(border - below)
        rows_before = np.arange(target[-1] // unit + 1) * unit
        releases.append(np.searchsorted(target, rows_before + unit // span))
        dues.append(np.searchsorted(target, rows_before + unit - unit // span))
    release = np.concatenate(releases)
    entry = np.repeat(np.arange(num_entries), [len(rows) for rows in releases])
    order = np.argsort(release, kind="stable")
    first = np.searchsorted(release[order], np.arange(num_rows + 1)).tolist()
    keys = (np.concatenate(dues) * num_entries + entry)[order].tolist()  # ties: the first entry
    waiting: list[int] = []
    entry_of_row = np.empty(num_rows, np.int16)
    for row in range(num_rows):
        for key in keys[first[row] : first[row + 1]]:
            heapq.heappush(waiting, key)
        entry_of_row[row] = heapq.heappop(waiting) % num_entries
    return entry_of_row
