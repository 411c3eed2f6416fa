"""Tile tables of the Triton kernels against the mask itself, key by key and row by row."""

import numpy as np
import pytest

from lclm_kernels.interval_attention import make_plan
from lclm_kernels.interval_attention.tiles import (
    ALIGNMENT,
    build_key_bounds,
    build_key_tiles,
    build_query_tiles,
)
from tests.kernels.masks import MASKS, document_intervals, visible_TS

SIZES = [(128, 64), (16, 16), (32, 128)]


def random_plan(seed):
    """Intervals that never decrease over non-empty rows; some rows empty, at any place."""
    rng = np.random.default_rng(seed)
    num_queries, num_keys = rng.integers(1, 200, 2)
    lo = np.sort(rng.integers(0, num_keys + 1, num_queries))
    hi = np.maximum(lo, np.sort(rng.integers(0, num_keys + 1, num_queries)))
    is_empty = rng.random(num_queries) < rng.choice([0.0, 0.02, 0.5])
    lo[is_empty] = rng.integers(0, num_keys + 1, is_empty.sum())
    hi[is_empty] = lo[is_empty]
    return make_plan(lo.astype(np.int32), hi.astype(np.int32), int(num_keys))


PLANS = {**MASKS, **{f"seed {seed}": random_plan(seed) for seed in range(60)}}


def bounds_of(plan):
    lo, hi = plan.lo.numpy(), plan.hi.numpy()
    return lo, hi, np.flatnonzero(hi > lo)


def check_table(table, seen, block, step, alignment):
    """seen: bool [rows of the tiles' side, rows of the other side]."""
    assert table.dtype == np.int32
    num_steps = []
    for tile, begin, full_begin, full_end, end in table.astype(int):
        rows = seen[tile * block : (tile + 1) * block]
        columns = np.flatnonzero(rows.any(axis=0))
        if len(columns) == 0:
            assert begin == full_begin == full_end == end
            num_steps.append(0)
            continue
        assert begin == columns[0] // alignment * alignment and end == columns[-1] + 1
        assert begin <= full_begin <= full_end <= end
        assert (full_begin - begin) % step == 0 and (full_end - full_begin) % step == 0
        assert rows[:, full_begin:full_end].all()
        is_full = rows[:, begin:end].all(axis=0)
        most = max((end - begin) // step - 1, 0) if is_full.all() else 0
        assert (full_end - full_begin) // step >= most
        num_steps.append((full_end - begin) // step + -(-(end - full_end) // step))
    assert num_steps == sorted(num_steps, reverse=True)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("block", "step"), SIZES)
def test_tiles_are_what_the_mask_needs(name, block, step):
    plan = PLANS[name]
    seen = visible_TS(plan).numpy()
    queries = build_query_tiles(*bounds_of(plan), block, step)
    assert sorted(queries[:, 0]) == list(range(-(-plan.num_queries // block)))
    check_table(queries, seen, block, step, alignment=1)
    lo, hi, rows = bounds_of(plan)
    keys = build_key_tiles(lo, hi, plan.num_keys, rows, block, step)
    is_needed = [seen[:, start : start + block].any() for start in range(0, plan.num_keys, block)]
    assert sorted(keys[:, 0]) == np.flatnonzero(is_needed).tolist()
    check_table(keys, seen.T, block, step, ALIGNMENT)


@pytest.mark.parametrize("name", PLANS)
def test_rows_that_see_a_key(name):
    plan = PLANS[name]
    lo, hi, rows = bounds_of(plan)
    first, behind = build_key_bounds(lo, hi, plan.num_keys, rows)
    assert first.dtype == behind.dtype == np.int32 and len(first) == plan.num_keys
    places = np.arange(plan.num_queries)
    inside = (places >= first[:, None]) & (places < behind[:, None]) & (hi > lo)
    assert np.array_equal(inside, visible_TS(plan).numpy().T)


def ragged_plan(num_tokens, is_windowed):
    """Many documents, whole or seen through a window, as one rank of a ring holds them."""
    rng = np.random.default_rng(7)
    lengths = rng.multinomial(num_tokens, rng.dirichlet(np.ones(50))).tolist()
    lo, hi = document_intervals(lengths)
    if is_windowed:
        lo = np.maximum(lo, hi - 300)
    start, end = num_tokens // 5, num_tokens // 2
    lo, hi = (np.clip(bound, start, end) - start for bound in (lo, hi))
    return make_plan(lo, hi, end - start)


@pytest.mark.parametrize("is_windowed", [False, True])
def test_bounds_of_keys_are_those_of_a_search(is_windowed):
    plan = ragged_plan(20_000, is_windowed)
    lo, hi, rows = bounds_of(plan)
    keys = np.arange(plan.num_keys)
    first = np.append(rows, len(lo))[np.searchsorted(hi[rows], keys, "right")]
    behind = np.append(-1, rows)[np.searchsorted(lo[rows], keys, "right")] + 1
    result = build_key_bounds(lo, hi, plan.num_keys, rows)
    assert np.array_equal(result, [first, np.maximum(first, behind)])


@pytest.mark.parametrize("length", [1024, 8192])
def test_a_causal_document_is_masked_at_its_diagonal_only(length):
    """What lies off the diagonal is full; only tiles of 128 x 128 on it take a mask."""
    lo, hi = document_intervals([length])
    rows = np.arange(length)
    for table in (
        build_query_tiles(lo, hi, rows, 128, 128),
        build_key_tiles(lo, hi, length, rows, 128, 128),
    ):
        _, begin, full_begin, full_end, end = table.astype(int).T
        assert ((end - begin) - (full_end - full_begin) == 128).all()


def test_tables_are_made_once_per_device_and_counted():
    plan = MASKS["some rows empty"]
    device = plan.lo.device
    tiles = plan.query_tiles(4, 16, device)
    assert tiles is plan.query_tiles(4, 16, device)
    assert tiles is not plan.query_tiles(2, 16, device)
    assert tiles.table.shape == (2, 5) and tiles.num_seen == 2
    assert plan.query_tiles(1, 16, device).num_seen == 3
    assert MASKS["all rows empty"].key_tiles(16, 16, device).num_seen == 0
