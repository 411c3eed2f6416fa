"""The solver that deals chunks to ranks: the C++ and NumPy plans are one plan, and a good one."""

import numpy as np
import pytest

from lclm_kernels.native.context_plan import (
    Ledger,
    assign_chunks,
    improve,
    make_row,
    rank_cost,
)
from lclm_kernels.native.ops import load_native

IMPLEMENTATIONS = ["reference"] + (["native"] if load_native() else [])


def ragged_row(rng: np.random.Generator, row_length: int, longest: int) -> np.ndarray:
    """Documents of log-uniform lengths that fill a row."""
    lengths: list[int] = []
    while (left := row_length - sum(lengths)) > 0:
        drawn = int(np.exp(rng.uniform(0, np.log(longest))))
        lengths.append(min(max(drawn, 1), left))
    return np.array(lengths)


def odd_rows(num_ranks: int, chunk: int) -> list[np.ndarray]:
    """Rows at the edges: one document, single tokens, documents that end on chunk borders."""
    row_length, before_border = num_ranks * chunk * 12, max(chunk - 1, 1)
    return [
        np.array([row_length]),
        np.ones(row_length, dtype=np.int64),
        np.full(row_length // chunk, chunk),
        np.array([1, row_length - 2, 1]),
        np.array([row_length // 2, 1, row_length // 2 - 1]),
        np.array([before_border, 2, row_length - before_border - 2]),
        np.full(4, row_length // 4),
    ]


def received_tokens(lengths: np.ndarray, owner: np.ndarray, num_ranks: int) -> np.ndarray:
    """Keys each rank sees and does not hold, counted token by token."""
    doc = np.repeat(np.arange(len(lengths)), lengths)
    chunk = len(doc) // len(owner)
    holder, received = np.repeat(owner, chunk), []
    for rank in range(num_ranks):
        last = np.full(len(lengths), -1)
        np.maximum.at(last, doc[holder == rank], np.flatnonzero(holder == rank))
        seen = np.arange(len(doc)) <= last[doc]
        received.append(int((seen & (holder != rank)).sum()))
    return np.array(received)


def areas(lengths: np.ndarray, owner: np.ndarray, num_ranks: int) -> np.ndarray:
    """Visible pairs of each rank, counted token by token."""
    place = np.concatenate([np.arange(1, length + 1) for length in lengths])
    holder = np.repeat(owner, len(place) // len(owner))
    return np.bincount(holder, weights=place, minlength=num_ranks)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6, 8, 13])
@pytest.mark.parametrize("chunk", [1, 16])
def test_native_and_numpy_give_one_plan(num_ranks: int, chunk: int, implementation: str) -> None:
    rng = np.random.default_rng(num_ranks * 1000 + chunk)
    rows = odd_rows(num_ranks, chunk)
    for longest in (4, 60, 2000):
        rows.append(ragged_row(rng, num_ranks * chunk * int(rng.integers(1, 24)), longest))
    for lengths in rows:
        owner = assign_chunks(lengths, num_ranks, chunk, implementation)
        reference = assign_chunks(lengths, num_ranks, chunk, "reference")
        np.testing.assert_array_equal(owner, reference)
        share = len(owner) // num_ranks
        assert np.bincount(owner, minlength=num_ranks).tolist() == [share] * num_ranks


def test_ledger_counts_what_ranks_receive_through_exchanges() -> None:
    """The incremental account of area and traffic equals a count of tokens after every change."""
    rng = np.random.default_rng(7)
    num_ranks, chunk = 4, 8
    for longest in (30, 200):
        lengths = ragged_row(rng, num_ranks * chunk * 8, longest)
        row = make_row(lengths, num_ranks, chunk)
        ledger = Ledger(row, rng.permutation(np.repeat(np.arange(num_ranks), row.quota)))
        for round_number in range(40):
            truth = received_tokens(lengths, ledger.owner, num_ranks)
            np.testing.assert_array_equal(ledger.traffic, truth)
            area = np.bincount(ledger.owner, weights=row.area, minlength=num_ranks)
            np.testing.assert_array_equal(ledger.area, area)
            cost = rank_cost(row, ledger.area, ledger.traffic).sum()
            worst = int(np.argmax(ledger.costs()))
            if not improve(row, ledger, worst, round_number):
                a = int(rng.choice(np.flatnonzero(ledger.owner == 0)))
                b = int(rng.choice(np.flatnonzero(ledger.owner != 0)))
                ledger.exchange(a, b)
            else:
                assert ledger.costs().sum() < cost  # the predicted gain was a real one


def test_plans_are_balanced_and_quiet() -> None:
    """Bounds the planner is built to; the published-histogram figures are in benchmarks/."""
    rng = np.random.default_rng(3)
    for num_ranks in (8, 32):
        balance, worst_share = [], []
        for _ in range(6):
            lengths = ragged_row(rng, 65536, 16384)
            owner = assign_chunks(lengths, num_ranks, 128)
            area = areas(lengths, owner, num_ranks)
            balance.append(area.max() / area.mean())
            ring = (num_ranks - 1) * 65536 // num_ranks
            worst_share.append(received_tokens(lengths, owner, num_ranks).max() / ring)
        assert np.mean(balance) <= 1.05 and max(balance) <= 1.15
        assert np.mean(worst_share) <= 0.30


def test_documents_that_fit_stay_whole() -> None:
    lengths = np.full(64, 1024)
    owner = assign_chunks(lengths, 8, 128)
    assert received_tokens(lengths, owner, 8).tolist() == [0] * 8
    assert len(set(areas(lengths, owner, 8))) == 1


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="implementation='cuda'"):
        assign_chunks(np.array([8]), 2, 2, "cuda")
