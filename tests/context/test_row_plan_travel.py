"""What travels under a row plan, against brute force; which plan is chosen."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from lclm.context.plan.cost import (
    GATHER,
    RING,
    Comm,
    CostModel,
    least_worst_share,
    predict,
    predict_seconds,
    traffic_share,
)
from lclm.context.plan.layouts import (
    RowPlan,
    balanced_plan,
    build_row_plan,
    candidate_plans,
    default_chunk,
    mixed_plan,
    plan_row,
)
from lclm.context.plan.lengths import read_histogram
from lclm.context.plan.rates import LINKS, Rate

HISTOGRAM = Path(__file__).parents[2] / "benchmarks" / "data" / "doc_lengths_magi.csv"
CP_SIZES = [1, 2, 3, 4, 6, 8]
ROWS = {
    "one document": [96],
    "one-token documents": [1] * 96,
    "ends on every chunk border": [12] * 8,
    "ragged": [5, 1, 1, 37, 2, 17, 33],
    "giant with crumbs": [1, 94, 1],
}


def plans(lengths: list[int], cp_size: int) -> list[RowPlan]:
    return [
        build_row_plan("contiguous", lengths, cp_size),
        build_row_plan("zigzag", lengths, cp_size),
        balanced_plan(np.array(lengths), cp_size, 4),
        balanced_plan(np.array(lengths), cp_size, 1),
        mixed_plan(np.array(lengths), cp_size, 4),
    ]


def visible(lengths: list[int]) -> np.ndarray:
    """bool [T, T], [query, key], by definition."""
    doc = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(doc))
    return (doc[:, None] == doc[None, :]) & (place[None, :] <= place[:, None])


@pytest.mark.parametrize("cp_size", CP_SIZES)
@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS.keys())
def test_areas_and_travels_by_brute_force(lengths: list[int], cp_size: int) -> None:
    mask = visible(lengths)
    for plan in plans(lengths, cp_size):
        for query_rank in range(cp_size):
            queries = plan.positions(query_rank)
            assert plan.areas[query_rank].sum() == mask[queries].sum()
            for key_rank in range(cp_size):
                keys = plan.positions(key_rank)
                block = mask[np.ix_(queries, keys)]
                assert plan.areas[query_rank, key_rank] == block.sum()
                seen = set() if key_rank == query_rank else set(keys[block.any(axis=0)].tolist())
                spans = plan.travels(query_rank, key_rank)
                assert {at for start, end in spans for at in range(start, end)} == seen
                assert all(start < end for start, end in spans)
                assert all(a[1] < b[0] for a, b in pairwise(spans))
                assert plan.received[query_rank, key_rank] == len(seen)


@pytest.mark.parametrize("cp_size", [2, 3, 4, 8])
@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS.keys())
def test_travel_intervals_point_at_visible_keys(lengths: list[int], cp_size: int) -> None:
    mask = visible(lengths)
    for plan in plans(lengths, cp_size):
        for query_rank in range(cp_size):
            queries = plan.positions(query_rank)
            for key_rank in set(range(cp_size)) - {query_rank}:
                spans = plan.travels(query_rank, key_rank)
                keys = np.array([at for start, end in spans for at in range(start, end)], dtype=int)
                lo, hi = plan.travel_intervals(query_rank, key_rank)
                for query, first, end in zip(queries, lo, hi, strict=True):
                    held = set(plan.positions(key_rank).tolist())
                    truth = set(np.flatnonzero(mask[query]).tolist()) & held
                    assert first <= end and set(keys[first:end].tolist()) == truth


@pytest.mark.parametrize("cp_size", CP_SIZES)
def test_what_travels_is_what_the_ranks_receive(cp_size: int) -> None:
    for plan in plans(ROWS["ragged"], cp_size):
        moved = np.zeros((cp_size, cp_size), dtype=np.int64)
        for query_rank, key_rank in np.ndindex(cp_size, cp_size):
            held = plan.positions(key_rank).tolist()
            for start, end in plan.travels(query_rank, key_rank):
                assert set(range(start, end)) <= set(held)  # a rank sends only what it holds
                moved[query_rank, key_rank] += end - start
        assert (moved == plan.received).all() and not moved.diagonal().any()


@pytest.mark.parametrize("cp_size", CP_SIZES)
def test_balanced_spans_lie_on_the_grid(cp_size: int) -> None:
    plan = balanced_plan(np.array(ROWS["ragged"]), cp_size, 4)
    assert all(border % 4 == 0 for spans in plan.chunks for span in spans for border in span)
    assert [len(plan.positions(rank)) for rank in range(cp_size)] == [96 // cp_size] * cp_size


def test_one_document_is_balanced_at_any_size() -> None:
    for cp_size in (2, 4, 32):
        plan = balanced_plan(np.array([cp_size * 64 * 16]), cp_size, 64)
        assert predict(plan, CostModel()).area_imbalance < 1.001


def test_traffic_shares() -> None:
    plan = build_row_plan("contiguous", [8, 24], 4)
    assert traffic_share(plan).tolist() == pytest.approx([0, 0, 8 / 24, 16 / 24])
    assert least_worst_share(plan) == pytest.approx(16 / 24)
    assert least_worst_share(build_row_plan("contiguous", [8] * 4, 4)) == 0
    assert traffic_share(build_row_plan("contiguous", [8], 1)).tolist() == [0]


def test_plan_row_takes_what_is_predicted_to_be_fastest() -> None:
    lengths, cp_size, chunk = [9000, 500, 6884], 8, 128
    plans_by_name = candidate_plans(lengths, cp_size, chunk)
    assert list(plans_by_name) == ["balanced", "mixed", "contiguous", "zigzag"]
    slow_link = CostModel(replace(LINKS["nvlink"], message=Rate(5e-6, 1e6)))
    chosen = set()
    for cost in (CostModel(), slow_link):
        seconds = {name: predict(plan, cost).seconds for name, plan in plans_by_name.items()}
        best = min(seconds, key=lambda name: seconds[name])
        chosen.add(best)
        plan = plan_row(lengths, cp_size, chunk, cost)
        assert plan.digest() == plans_by_name[best].digest()
    assert len(chosen) == 2  # a slow link changes the choice
    assert build_row_plan("auto", lengths, cp_size, chunk).digest() == (
        plan_row(lengths, cp_size, chunk).digest()
    )


@pytest.mark.parametrize("link", LINKS)
def test_the_chosen_plan_is_never_slower_than_a_simple_one(link: str) -> None:
    """On rows with and without long documents; some are fastest with a mixture."""
    histogram = read_histogram(HISTOGRAM)
    rng = np.random.default_rng(3)
    rows = [histogram.draw_row(rng, 32768, longest) for longest in (8192, 8192, 16384, 30000)]
    rows += [np.array([32768]), np.array([24000, 8768]), np.full(8, 4096)]
    cost, chosen = CostModel(LINKS[link], is_recomputed=True), set()
    for lengths in rows:
        for cp_size in (4, 16):
            found = {
                name: predict(plan, cost).seconds
                for name, plan in candidate_plans(lengths, cp_size, 128).items()
            }
            best = predict(plan_row(lengths, cp_size, 128, cost), cost).seconds
            assert best == min(found.values())
            chosen |= {name for name, seconds in found.items() if seconds == best}
    assert {"balanced", "mixed"} < chosen


@pytest.mark.parametrize(
    "comm", [RING, GATHER, Comm("ulysses_ring", 2), Comm("ulysses", 8)], ids=str
)
def test_plans_fit_the_communication_mode(comm: Comm) -> None:
    lengths, cost = [9000, 500, 6884], CostModel(LINKS["infiniband"])
    plan = plan_row(lengths, 8, 128, cost, comm)
    assert plan.cp_size == 8
    inners = candidate_plans(lengths, 8 // comm.ulysses_size, 128).values()
    least = min(predict_seconds(p.split(comm.ulysses_size), cost, comm) for p in inners)
    assert predict_seconds(plan, cost, comm) == least
    assert (
        comm.name != "ulysses" or plan.digest() == build_row_plan("contiguous", lengths, 8).digest()
    )
    with pytest.raises(ValueError, match="3 context ranks do not divide into groups of 2"):
        plan_row([96], 3, 4, cost, Comm("ulysses_ring", 2))


def test_mixed_plan_is_even_where_documents_are_long() -> None:
    """One giant document: every rank has the same area to the pair, as in zigzag."""
    plan = mixed_plan(np.array([4096]), 4, 64)
    assert plan.digest() == build_row_plan("zigzag", [4096], 4).digest()
    assert len(set(plan.areas.sum(axis=1).tolist())) == 1
    short = np.array([100] * 40 + [96])
    assert mixed_plan(short, 4, 64).digest() == balanced_plan(short, 4, 64).digest()


def test_plan_row_without_rates_keeps_area_even() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        lengths = rng.multinomial(16384 - 6, np.ones(6) / 6) + 1
        plan = plan_row(lengths, 32, 128)
        even = predict(balanced_plan(lengths, 32, 128), CostModel()).area_imbalance
        assert predict(plan, CostModel()).area_imbalance <= max(1.05, even)


@pytest.mark.parametrize(
    ("row_length", "cp_size", "chunk"),
    [(65536, 8, 128), (524288, 32, 512), (512, 8, 64), (96, 4, 8), (9, 3, 1), (1 << 20, 64, 1024)],
)
def test_default_chunk(row_length: int, cp_size: int, chunk: int) -> None:
    assert default_chunk(row_length, cp_size) == chunk
    plan = build_row_plan("auto", [row_length - 3, 3], cp_size)
    assert plan.digest() == plan_row([row_length - 3, 3], cp_size, chunk).digest()


def test_zigzag_is_no_candidate_off_the_grid() -> None:
    assert list(candidate_plans([96], 4, 24)) == ["balanced", "mixed", "contiguous"]


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: plan_row([96], 0, 4), "cp_size is 0"),
        (lambda: plan_row([96], 4, 0), "chunk is 0"),
        (lambda: plan_row([96], 4, 25), r"96 tokens is not a multiple of .* = 4 \* 25 = 100"),
        (lambda: plan_row([96], 4, 5), r"96 tokens is not a multiple of .* = 4 \* 5 = 20"),
        (lambda: plan_row([90, 0, 6], 4, 4), r"doc_lengths\[1\] is 0"),
        (lambda: build_row_plan("auto", [97], 4), "row of 97 tokens"),
    ],
)
def test_bad_input_is_refused(build, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build()
