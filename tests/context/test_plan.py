"""Row plans against brute force: which keys every query of every rank sees."""

import subprocess
import sys

import numpy as np
import pytest

from lclm.context.plan.layouts import (
    RowPlan,
    build_row_plan,
)

CP_SIZES = [1, 2, 3, 4, 6, 8]
ROW_LENGTH = 96  # a multiple of 2 * cp for every size above
ROWS = {
    "one document": [96],
    "one-token documents": [1] * 96,
    "ends on every chunk border": [12] * 8,
    "ends on some chunk borders": [24, 12, 60],
    "ragged": [5, 1, 1, 37, 2, 17, 33],
    "giant with crumbs": [1, 94, 1],
    "border token alone": [47, 1, 48],
}
LAYOUTS = ["contiguous", "zigzag"]


def visible_keys(doc_lengths: list[int]) -> list[set[int]]:
    """For each token of the row, the set of positions it may see, by definition."""
    document = [number for number, length in enumerate(doc_lengths) for _ in range(length)]
    return [
        {key for key in range(query + 1) if document[key] == document[query]}
        for query in range(len(document))
    ]


@pytest.mark.parametrize("cp_size", CP_SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS.keys())
def test_intervals_are_the_visible_keys(lengths: list[int], layout: str, cp_size: int) -> None:
    plan = build_row_plan(layout, lengths, cp_size)
    truth = visible_keys(lengths)
    for query_rank in range(cp_size):
        queries = plan.positions(query_rank)
        lo, hi = plan.intervals(query_rank)
        assert lo.dtype == hi.dtype == np.int32
        for query, first, end in zip(queries, lo, hi, strict=True):
            assert set(range(first, end)) == truth[query]
        for key_rank in range(cp_size):
            keys = plan.positions(key_rank)
            lo, hi = plan.intervals(query_rank, key_rank)
            assert (np.diff(lo) >= 0).all() and (np.diff(hi) >= 0).all()
            for query, first, end in zip(queries, lo, hi, strict=True):
                assert first <= end
                assert set(keys[first:end].tolist()) == truth[query] & set(keys.tolist())


@pytest.mark.parametrize("cp_size", CP_SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_holds_its_share_once(layout: str, cp_size: int) -> None:
    plan = build_row_plan(layout, ROWS["ragged"], cp_size)
    held = [plan.positions(rank) for rank in range(cp_size)]
    assert all(len(positions) == ROW_LENGTH // cp_size for positions in held)
    assert all((np.diff(positions) > 0).all() for positions in held if len(positions) > 1)
    assert sorted(np.concatenate(held).tolist()) == list(range(ROW_LENGTH))


@pytest.mark.parametrize("cp_size", CP_SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_order_restores_the_row(layout: str, cp_size: int) -> None:
    plan = build_row_plan(layout, ROWS["ragged"], cp_size)
    in_rank_order = np.concatenate([plan.positions(rank) for rank in range(cp_size)])
    order = plan.gather_order()
    assert order.dtype == np.int64
    assert in_rank_order[order].tolist() == list(range(ROW_LENGTH))


@pytest.mark.parametrize("cp_size", CP_SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS.keys())
def test_area_counts_pairs(lengths: list[int], layout: str, cp_size: int) -> None:
    plan = build_row_plan(layout, lengths, cp_size)
    truth = visible_keys(lengths)
    for rank in range(cp_size):
        assert plan.areas[rank].sum() == sum(len(truth[query]) for query in plan.positions(rank))


def test_zigzag_balances_one_document() -> None:
    plan = build_row_plan("zigzag", [96], 4)
    assert {plan.areas[rank].sum() for rank in range(4)} == {96 * 97 // 2 // 4}
    assert plan.chunks[1] == ((12, 24), (72, 84))
    assert plan.chunks[3] == ((36, 60),)  # its two stretches touch


def test_digest_tells_plans_apart() -> None:
    digest = build_row_plan("zigzag", [40, 56], 2).digest()
    assert digest == build_row_plan("zigzag", np.array([40, 56], dtype=np.int32), 2).digest()
    assert digest != build_row_plan("zigzag", [41, 55], 2).digest()
    assert digest != build_row_plan("contiguous", [40, 56], 2).digest()


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: build_row_plan("contiguous", [], 2), "at least one document"),
        (lambda: build_row_plan("contiguous", [[4, 4]], 2), "shape"),
        (lambda: build_row_plan("contiguous", [4.0, 4.0], 2), "integers"),
        (lambda: build_row_plan("contiguous", [4, 0, 4], 2), r"doc_lengths\[1\] is 0"),
        (lambda: build_row_plan("contiguous", [4, -1, 5], 2), r"doc_lengths\[1\] is -1"),
        (lambda: build_row_plan("contiguous", [2**31], 2), "at most"),
        (lambda: build_row_plan("contiguous", [8], 0), "cp_size is 0"),
        (lambda: build_row_plan("zigzag", [8], -1), "cp_size is -1"),
        (lambda: build_row_plan("contiguous", [7, 2], 2), "row of 9 tokens .* contiguous"),
        (lambda: build_row_plan("zigzag", [7, 3], 2), r"row of 10 tokens .* 2 \* cp_size = 4"),
        (lambda: build_row_plan("striped", [8], 2), "striped.*contiguous, zigzag"),
        (lambda: RowPlan(np.array([9]), 2, (((0, 4),), ((4, 8),))), "sum to 9 .* hold 8"),
        (lambda: RowPlan(np.array([8]), 2, (((0, 5),), ((5, 8),))), "rank 0 holds 5"),
        (lambda: RowPlan(np.array([8]), 2, (((4, 6), (0, 2)), ((2, 4), (6, 8)))), "not sorted"),
        (lambda: RowPlan(np.array([8]), 2, (((0, 4),), ((2, 6),))), "cover the row"),
        (lambda: RowPlan(np.array([8]), 2, (((0, 8),),)), "has 1 ranks"),
    ],
)
def test_bad_input_is_refused(build, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build()


def test_rank_outside_the_plan_is_refused() -> None:
    plan = build_row_plan("contiguous", [8], 2)
    with pytest.raises(ValueError, match="rank 2"):
        plan.intervals(0, 2)
    with pytest.raises(ValueError, match="rank -1"):
        plan.positions(-1)


def test_planning_needs_no_torch() -> None:
    script = "import sys, lclm.context.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
