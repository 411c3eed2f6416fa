"""What communication modes are predicted to take: counted by hand, and which one is chosen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lclm.context.plan.cost import (
    GATHER,
    RING,
    Comm,
    CostModel,
    candidate_comms,
    choose_fastest,
    predict,
    predict_seconds,
)
from lclm.context.plan.layouts import build_row_plan, compare_comms
from lclm.context.plan.rates import LINKS, Machine, Rate, load_machine, read_machine

# One pair of a head takes one second, forward and backward; a byte takes one second on a link.
SLOW = Machine(
    forward=Rate(0, 4),
    backward=Rate(0, 10),
    copy=Rate(0, 8),
    message=Rate(0.5, 1),
    gather=Rate(1, 1),
    scatter=Rate(2, 1),
    all_to_all=Rate(3, 1),
    near_all_to_all=Rate(3, 2),
    near_ranks=2,
    overlap=1.0,
)
ONE_HEAD = CostModel(SLOW, num_heads=1, num_kv_heads=1, head_dim=1)
TWO_HEADS = replace(ONE_HEAD, num_heads=2)


def test_ring_counted_by_hand() -> None:
    """Two ranks, one document of 8: rank 0 holds 0..3, rank 1 holds 4..7 and needs 0..3."""
    result = predict(build_row_plan("contiguous", [8], 2), ONE_HEAD)
    assert result.area.tolist() == [10, 26]
    # 4 tokens: 4 bytes of K and V each, twice, and 8 bytes of gradients back, which rank 0 adds
    assert result.compute_seconds.tolist() == [20.0 + 4.0, 52.0]
    # transfers of 16 bytes forward and 32 backward, each under 10 seconds of work on own keys, each
    # after rank 0 has packed 16 bytes
    assert result.exposed_seconds.tolist() == [6.5 + 2 + 22.5 + 2, 6.5 + 22.5]
    assert result.seconds == 81.0
    assert result.area_imbalance == pytest.approx(26 / 18)


def test_messages_that_do_not_hide_cost_their_time() -> None:
    half = replace(ONE_HEAD, machine=replace(SLOW, overlap=0.5))
    result = predict(build_row_plan("contiguous", [8], 2), half)
    # every transfer is longer than the 10 seconds of work beside it, half of which it hides under
    assert result.exposed_seconds.tolist() == [18.5 - 5 + 34.5 - 5, 16.5 - 5 + 32.5 - 5]


def test_gather_counted_by_hand() -> None:
    plan = build_row_plan("contiguous", [8], 2)
    # 4 tokens of 4 bytes come, 8 are copied; 4 tokens of 8 bytes are reduced; two copies of all
    forward, backward = 1 + 16 + 4 + 26, 2 * 8 * (4 + 8) / 8 + 2 + 32 + 26
    assert predict_seconds(plan, ONE_HEAD, GATHER) == forward + backward
    again = replace(ONE_HEAD, is_recomputed=True)
    assert predict_seconds(plan, again, GATHER) == 2 * forward + backward


def test_ulysses_counted_by_hand() -> None:
    """Both ranks do all 36 pairs of one of two heads; the kv head is repeated."""
    plan, comm = build_row_plan("contiguous", [8], 2), Comm("ulysses", 2)
    # bytes per token: q, out, dout and dq 4 each, K and V 8; dK and dV of the copies 16 in fp32
    sizes = [4 + 8, 4, 4, 4 + 16]
    exchanged = sum(3 + 4 * size / 2 / 2 + 2 * 4 * size / 8 for size in sizes)
    assert predict_seconds(plan, TWO_HEADS, comm) == 36 + 36 + exchanged
    more = 3 + 4 * 16 / 2 / 2 + 2 * 4 * 16 / 8
    again = replace(TWO_HEADS, is_recomputed=True)
    assert predict_seconds(plan, again, comm) == 36 + 36 + exchanged + more
    four = replace(TWO_HEADS, num_heads=4)
    near, far = (
        replace(four, machine=replace(SLOW, near_ranks=near, near_all_to_all=Rate(0, 1e9)))
        for near in (4, 2)
    )
    plan = build_row_plan("contiguous", [8], 4)
    assert predict_seconds(plan, near, Comm("ulysses", 4)) < predict_seconds(
        plan, far, Comm("ulysses", 4)
    )


def test_ulysses_ring_is_a_ring_of_fewer_ranks_with_fewer_heads() -> None:
    cost = CostModel(num_heads=8, num_kv_heads=4)
    free = Rate(0, float("inf"))
    no_exchange = replace(cost, machine=replace(cost.machine, all_to_all=free, copy=free))
    inner = replace(no_exchange, num_heads=4, num_kv_heads=2)
    plan = build_row_plan("zigzag", [40, 24], 4)
    found = predict_seconds(plan, no_exchange, Comm("ulysses_ring", 2))
    assert found == predict(plan.merged(2), inner).seconds


def test_modes_that_heads_and_memory_allow() -> None:
    def names(row_length: int, cp_size: int, **changes: int) -> list[str]:
        cost = replace(CostModel(num_heads=12, num_kv_heads=4), **changes)
        return [str(comm) for comm in candidate_comms(row_length, cp_size, cost)]

    assert names(4096, 2) == ["ring", "ulysses", "gather"]
    assert names(4096, 4) == ["ring", "ulysses_ring(2)", "ulysses", "gather"]
    assert names(4096, 5) == ["ring", "gather"]
    assert names(4096, 8) == ["ring", "ulysses_ring(2)", "ulysses_ring(4)", "gather"]
    # 512K tokens of 2 KiB are as much as may be gathered, but not for two layers
    assert names(1 << 19, 5) == ["ring", "gather"]
    assert names(1 << 19, 5, kept_layers=2) == ["ring"]


def test_the_machine_decides() -> None:
    """NVLink hides a ring; between nodes neighbours share heads; a slow start of attention calls
    for few calls."""
    rows = [np.array([60000, 4000, 1536]), np.array([65536])]
    cost = CostModel(is_recomputed=True)
    slow_start = replace(cost.machine, forward=Rate(1, 584e12), backward=Rate(1, 425e12))
    best = {}
    for name, machine in {**LINKS, "slow start": slow_start}.items():
        found = compare_comms("auto", rows, 16, replace(cost, machine=machine))
        assert next(iter(found)) == RING and len(found) == 6
        best[name] = str(choose_fastest(found))
        assert found == compare_comms("auto", rows, 16, replace(cost, machine=machine))
    assert best == {
        "nvlink": "ring",
        "infiniband": "ulysses_ring(8)",
        "slow start": "ulysses",
    }


def test_a_mode_that_is_hardly_faster_is_not_preferred() -> None:
    modes = (RING, Comm("ulysses_ring", 2), Comm("ulysses", 4))
    assert choose_fastest(dict(zip(modes, (1.04, 1.0, 1.0), strict=True))) == RING
    assert choose_fastest(dict(zip(modes, (1.06, 1.0, 1.04), strict=True))) == modes[1]
    assert choose_fastest(dict(zip(modes, (1.06, 1.01, 1.0), strict=True))) == modes[2]


def test_a_machine_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"made_for": {}, "machine": SLOW.dump()}))
    assert read_machine(path) == SLOW
    assert "message 1e-09 GB/s after 500000 us" in SLOW.summary()
    for broken in ({}, {"machine": {}}, {"machine": {**SLOW.dump(), "copy": 3}}, []):
        path.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match="holds no rates of a training run"):
            read_machine(path)
    with pytest.raises(ValueError, match="is not a file"):
        read_machine(tmp_path / "absent.json")


def test_rates_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"copy is .* must be positive"):
        load_machine({**SLOW.dump(), "copy": [0, 0]})
    with pytest.raises(ValueError, match=r"overlap is 1\.5"):
        load_machine({**SLOW.dump(), "overlap": 1.5})
    with pytest.raises(ValueError, match="near_ranks is 0"):
        replace(SLOW, near_ranks=0)
    with pytest.raises(ValueError, match="head_dim is 0"):
        CostModel(head_dim=0)
