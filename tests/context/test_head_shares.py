"""How heads and tokens are shared out before anything is sent."""

from __future__ import annotations

import re

import pytest
import torch

from lclm.context.exchange import KeyExchange
from lclm.context.plan.cost import kv_copies
from lclm.context.plan.layouts import build_row_plan


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "size", "copies"),
    [(8, 8, 4, 1), (8, 4, 4, 1), (8, 2, 4, 2), (8, 1, 8, 8), (12, 3, 2, 2), (6, 2, 3, 3)],
)
def test_kv_heads_are_repeated_as_little_as_need_be(
    num_heads: int, num_kv_heads: int, size: int, copies: int
) -> None:
    assert kv_copies(num_heads, num_kv_heads, size) == copies


def test_query_heads_that_cannot_be_shared_are_refused() -> None:
    message = "8 query heads (of this tp rank) cannot be shared by 3 ranks"
    with pytest.raises(ValueError, match=re.escape(message)):
        kv_copies(8, 2, 3)


def test_ranks_merge_into_larger_ones() -> None:
    plan = build_row_plan("zigzag", [40, 24], 4)  # eight stretches of 8
    merged = plan.merged(2)
    assert merged.chunks == (((0, 16), (48, 64)), ((16, 48),))
    assert merged.doc_lengths.tolist() == [40, 24]
    assert plan.merged(4).chunks == (((0, 64),),)
    with pytest.raises(ValueError, match="4 context ranks do not divide into groups of 3"):
        plan.merged(3)


def test_a_plan_for_more_ranks_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="plan is for 2 ranks, the group has 1"):
        KeyExchange(build_row_plan("contiguous", [8], 2), None, torch.device("cpu"))
