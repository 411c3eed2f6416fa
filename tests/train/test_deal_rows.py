"""Rows are dealt to data-parallel ranks so that they finish together."""

from __future__ import annotations

import numpy as np
import pytest

from lclm.train.micro_batch import deal_rows


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_every_row_once_in_equal_counts(num_ranks: int) -> None:
    costs = np.random.default_rng(num_ranks).pareto(1.0, 24).tolist()
    dealt = deal_rows(costs, num_ranks)
    assert [len(rows) for rows in dealt] == [24 // num_ranks] * num_ranks
    assert sorted(row for rows in dealt for row in rows) == list(range(24))
    for rows in dealt:
        assert [costs[row] for row in rows] == sorted((costs[row] for row in rows), reverse=True)


def test_by_hand() -> None:
    assert deal_rows([1, 9, 2, 8], 2) == [[1, 0], [3, 2]]
    assert deal_rows([5, 5, 5, 5], 2) == [[0, 2], [1, 3]]


def test_ranks_finish_closer_together_than_in_order() -> None:
    """Eight ranks, 64 rows with a few long ones among many short: mean over 20 batches."""
    random = np.random.default_rng(0)
    dealt_excess, ordered_excess = [], []
    for _ in range(20):
        costs = np.where(random.random(64) < 0.2, random.uniform(5, 20, 64), random.random(64))
        dealt = [costs[rows].sum() for rows in deal_rows(costs.tolist(), 8)]
        ordered = costs.reshape(8, 8).sum(0)
        dealt_excess.append(max(dealt) / costs.sum() * 8)
        ordered_excess.append(ordered.max() / costs.sum() * 8)
    assert np.mean(dealt_excess) < 1.2 < 1.6 < np.mean(ordered_excess)


def test_rows_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="zip"):
        deal_rows([1.0, 2.0, 3.0], 2)
