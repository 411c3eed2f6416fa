"""Shares of a mixture: exact, checked, and independent of how they are written."""

import numpy as np
import pytest

from lclm.data.mixture import MixtureEntry, assign_rows, check_entries

# ProLong's second stage (arXiv 2410.02660, table 9): shares of its twelve parts
PROLONG_512K = (0.15, 0.15, 0.05, 0.25, 0.03, 0.10, 0.10, 0.04, 0.04, 0.03, 0.03, 0.03)


def test_every_prefix_of_prolongs_mixture_is_within_one_row():
    rows = assign_rows(PROLONG_512K, 20_000)
    counts = np.cumsum(rows[:, None] == np.arange(12), axis=0)
    expected = np.arange(1, 20_001)[:, None] * np.array(PROLONG_512K)
    assert np.abs(counts - expected).max() < 1


def test_equal_shares_take_turns():
    assert assign_rows([0.5, 0.5], 4).tolist() == [0, 1, 0, 1]
    assert assign_rows([1.0], 3).tolist() == [0, 0, 0]


def test_longer_stages_start_with_the_same_rows():
    shares = [0.2, 0.7, 0.1]
    assert np.array_equal(assign_rows(shares, 1000)[:333], assign_rows(shares, 333))


def test_shares_that_are_not_decimal():
    rows = assign_rows([1 / 3, 1 / 3, 1 / 3], 9)
    assert np.bincount(rows).tolist() == [3, 3, 3]


@pytest.mark.parametrize("shares", [[0.5, 0.4999999], [0.3, 0.7000005]])
def test_shares_within_the_tolerance(shares):
    assert len(assign_rows(shares, 10)) == 10


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([0.5, 0.49], "add up to 0.99; they must add up to 1"),
        ([0.5, 0.500002], "add up to 1.000002"),
        ([1.2, -0.2], r"mixture\.1\.share is -0\.2"),
        ([1.0, 0.0], r"mixture\.1\.share is 0"),
        ([float("nan"), 1.0], "greater than 0"),
        ([1.0, 1e-13], "below the resolution"),
    ],
)
def test_bad_shares(shares, message):
    with pytest.raises(ValueError, match=message):
        assign_rows(shares, 10)


def test_piece_lengths():
    entries = [MixtureEntry("a", "exact", 16, 0.5), MixtureEntry("b", "concat", 0, 0.5)]
    assert check_entries(entries, 64) == [16, 64]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "no entries"),
        ([("a", "best", 0)], "packing='best'"),
        ([("a", "exact", 48)], r"piece_length\(48\) must divide seq_length\(64\)"),
        ([("a", "exact", 128)], r"piece_length\(128\) must divide"),
        ([("a", "exact", -64)], r"piece_length\(-64\) must divide"),
        ([("a", "concat", 32)], "no effect with packing concat"),
        ([("a", "exact", 64), ("a", "concat", 0)], "as exact and as concat"),
        ([("a", "concat", 0), ("a", "concat", 64)], "given twice"),
        ([("a", "exact", 64), ("a", "exact", 0)], "given twice"),
    ],
)
def test_bad_entries(entries, message):
    with pytest.raises(ValueError, match=message):
        check_entries([MixtureEntry(*entry, share=1.0) for entry in entries], 64)
