"""Shares of a mixture: exact, checked, and independent of how they are written."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lclm.config import check_mixture
from lclm.data.mixture import _assign_constant, assign_rows
from tests.data_fixtures import mixture_entry

# ProLong's second stage (arXiv 2410.02660, table 9): shares of its twelve parts
PROLONG_512K = (0.15, 0.15, 0.05, 0.25, 0.03, 0.10, 0.10, 0.04, 0.04, 0.03, 0.03, 0.03)


def rows_of(shares, num_rows):
    """Entry of each row of a stage whose mixture passed its checks."""
    entries = [mixture_entry(f"{n}", "concat", 0, share) for n, share in enumerate(shares)]
    check_mixture("stage.0", entries, 64)
    return assign_rows([entry.share_ends for entry in entries], num_rows)


def test_every_prefix_of_prolongs_mixture_is_within_one_row():
    rows = rows_of(PROLONG_512K, 20_000)
    counts = np.cumsum(rows[:, None] == np.arange(12), axis=0)
    expected = np.arange(1, 20_001)[:, None] * np.array(PROLONG_512K)
    assert np.abs(counts - expected).max() < 1


def test_equal_shares_take_turns():
    assert rows_of([0.5, 0.5], 4).tolist() == [0, 1, 0, 1]
    assert rows_of([1.0], 3).tolist() == [0, 0, 0]


def test_longer_stages_start_with_the_same_rows():
    shares = [0.2, 0.7, 0.1]
    assert np.array_equal(rows_of(shares, 1000)[:333], rows_of(shares, 333))


def test_shares_that_are_not_decimal():
    rows = rows_of([1 / 3, 1 / 3, 1 / 3], 9)
    assert np.bincount(rows).tolist() == [3, 3, 3]


def rows_by_hand(weights, num_rows):
    """Tijdeman's rule row by row: of entries that lag by 1 / (2n - 2), the one overdue first."""
    total, span = sum(weights), max(2 * len(weights) - 2, 1)
    lag, rows = [0] * len(weights), []
    for _ in range(num_rows):
        lag = [old + weight for old, weight in zip(lag, weights)]
        late = [i for i, tokens in enumerate(lag) if span * tokens >= total]
        rows.append(min(late, key=lambda i: Fraction(span * (total - lag[i]) - total, weights[i])))
        lag[rows[-1]] -= total
    return rows


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(0, 400))
def test_every_prefix_is_within_one_row_of_its_share(weights, num_rows):
    rows = _assign_constant(weights, num_rows)
    assert rows.dtype == np.int16 and len(rows) == num_rows
    counts = [0] * len(weights)
    for number, entry in enumerate(rows.tolist(), start=1):
        counts[entry] += 1
        for weight, count in zip(weights, counts):
            assert abs(count - Fraction(number * weight, sum(weights))) < 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 10**13), min_size=1, max_size=12), st.integers(0, 300))
def test_constant_shares_equal_a_plain_loop(weights, num_rows):
    assert _assign_constant(weights, num_rows).tolist() == rows_by_hand(weights, num_rows)


@pytest.mark.parametrize("shares", [[0.5, 0.4999999], [0.3, 0.7000005]])
def test_shares_within_the_tolerance(shares):
    assert len(rows_of(shares, 10)) == 10


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([0.5, 0.49], "stage.0.mixture: the shares add up to 0.990000; they must add up to 1"),
        ([0.5, 0.500002], "add up to 1.000002"),
        ([1.2, -0.2], "a share is a number above 0 and at most 1"),
        ([1.0, 0.0], "a share is a number above 0 .* leave an entry without share out"),
        ([float("nan"), 1.0], "a share is a number above 0"),
        ([1.0, 1e-13], "below the resolution"),
        ([1 / 40_000] * 40_000, "at most 32767"),
        ([(0.5, 0.6), 0.5], "add up to 1.100000 at the stage's end"),
        ([(0.4, 0.5), (0.5, 0.5)], "add up to 0.900000 at the stage's start"),
        ([(0.0, 0.0), 1.0], "one of them above 0; leave an entry without share out"),
        ([(0.2, -0.1), (0.8, 1.1)], "a share is a number above 0"),
        ([(0.5, float("nan")), 0.5], "a share is a number above 0"),
        ([], "add up to 0.000000"),
    ],
)
def test_bad_shares(shares, message):
    with pytest.raises(ValueError, match=message):
        rows_of(shares, 10)


def far_from_target(rows, starts, lasts):
    """Most rows that a count is ever away from the integral of its share, exact."""
    counts = np.cumsum(rows[:, None] == np.arange(len(starts)), axis=0).tolist()
    starts, lasts = ([Fraction(share) / sum(ends) for share in ends] for ends in (starts, lasts))
    farthest = Fraction(0)
    for num_rows, row in enumerate(counts, start=1):
        for count, start, last in zip(row, starts, lasts):
            target = start * num_rows + (last - start) * Fraction(num_rows**2, 2 * len(rows))
            farthest = max(farthest, abs(count - target))
    return farthest


weights = st.lists(st.integers(0, 20), min_size=8, max_size=8)


@settings(max_examples=100, deadline=None)
@given(weights, weights, st.integers(2, 8), st.integers(1, 300))
def test_changing_shares_stay_within_one_row_of_their_integral(starts, lasts, count, num_rows):
    starts, lasts = starts[:count], lasts[:count]
    starts[0], lasts[-1] = starts[0] + 1, lasts[-1] + 1
    starts, lasts = ([w + (a + b == 0) for w, a, b in zip(ends, starts, lasts)]
                     for ends in (starts, lasts))  # fmt: skip
    pairs = list(zip(np.array(starts) / sum(starts), np.array(lasts) / sum(lasts)))
    rows = rows_of([(float(a), float(b)) for a, b in pairs], num_rows)
    assert rows.dtype == np.int16 and len(rows) == num_rows
    bound = 1 - Fraction(1, 2 * count - 2)  # Tijdeman's
    assert far_from_target(rows, starts, lasts) <= bound + Fraction(num_rows, 10**11)


def test_a_share_that_starts_at_nothing():
    rows = rows_of([(0.0, 1.0), (1.0, 0.0)], 8)
    # targets of the first entry: n^2 / 16
    assert rows.tolist() == [1, 1, 0, 1, 0, 1, 0, 0]


def test_prolongs_mixture_that_moves_to_long_documents():
    """Constant and changing shares together over many rows: doubles, exact to 1e-9 rows here."""
    num_rows = 100_000
    first = np.array(PROLONG_512K)
    last = np.array([0.35, 0.35, 0.05, 0.05, 0.03, 0.03, 0.02, 0.03, 0.02, 0.03, 0.03, 0.01])
    shares = [a if a == b else (a, b) for a, b in zip(first.tolist(), last.tolist())]
    rows = rows_of(shares, num_rows)
    counts = np.cumsum(rows[:, None] == np.arange(12), axis=0)
    n = np.arange(1, num_rows + 1)[:, None]
    assert np.abs(counts - n * first - (last - first) * (n / num_rows) * n / 2).max() < 1
    assert np.array_equal(counts[-1], np.rint((first + last) / 2 * num_rows))


def test_pairs_of_equal_ends_are_constant_shares():
    assert assign_rows([(1.0, 1.0000001)], 3).tolist() == [0, 0, 0]
    constant = rows_of([0.2, 0.7, 0.1], 500)
    assert np.array_equal(rows_of([(0.2, 0.2), 0.7, (0.1, 0.1)], 500), constant)


def test_piece_lengths():
    entries = [mixture_entry("a", "exact", 16, 0.5), mixture_entry("b", "concat", 0, 0.5)]
    assert check_mixture("stage.0", entries, 64) == [16, 64]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("a", "best", 0)], "packing\n.*'exact', 'concat' or 'best-fit'"),
        ([("a", "exact", 48)], r"piece_length\(48\) must divide seq_length\(64\)"),
        ([("a", "exact", 128)], r"piece_length\(128\) must divide"),
        ([("a", "exact", -64)], "piece_length\n.*greater than or equal to 0"),
        ([("a", "concat", 32)], r"piece_length\(32\) has no effect with packing concat"),
        ([("a", "concat", 64)], "no effect with packing concat"),
        ([("a", "exact", 64), ("a", "concat", 0)], r"packing\(concat\): .* with packing\(exact\)"),
        ([("a", "concat", 0), ("a", "concat", 0)], "given twice"),
        ([("a", "exact", 64), ("a", "exact", 0)], "given twice"),
    ],
)
def test_bad_entries(entries, message):
    share = 1 / len(entries)
    with pytest.raises(ValueError, match=message):
        check_mixture("stage.0", [mixture_entry(*entry, share) for entry in entries], 64)
