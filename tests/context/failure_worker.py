"""What the processes do in tests of ranks that die, stop or disagree."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lclm.context import ring
from lclm.context.exchange import GRADIENTS, KEYS, Message, Transfer
from lclm.context.gather import GatheredAttention
from lclm.context.measure import measure_machine
from lclm.context.plan.cost import CostModel
from lclm.context.plan.layouts import build_row_plan
from lclm.context.plan.row_plan import RowPlan
from lclm.context.ring import ContextAttention, build_ring
from lclm.context.ulysses import build_ulysses

CPU = torch.device("cpu")
HEADS = (6, 2)
ROW = 48


def build(
    mode: str, plan: RowPlan, group: dist.ProcessGroup
) -> ContextAttention | GatheredAttention:
    """Attention of a mode on a row of `ROW` tokens."""
    if mode == "gather":
        return GatheredAttention(plan, group, CPU)
    if mode == "ring":
        return build_ring(plan, group, CPU)
    return build_ulysses(plan, *HEADS, group, CPU)


def local_tensors(group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Random q, k and v of one rank."""
    heads = (HEADS[0], HEADS[1], HEADS[1])
    return [torch.randn(ROW // group.size(), n, 8) for n in heads]


def lose_rank(lost: int, how: str, mode: str) -> None:
    """Attend again and again; after the first time rank `lost` is killed or stopped.

    In the ring only neighbours share a document: with rank 0 lost, rank 2 misses rank 1, which went
    because of rank 0.
    """
    group = dist.new_group(timeout=timedelta(seconds=6))
    plan = build_row_plan("contiguous", [ROW // 2, ROW // 2], group.size())
    attend = build(mode, plan, group)
    tensors = local_tensors(group)
    attend(*tensors, 1.0)
    dist.barrier()
    if dist.get_rank() == lost:
        os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)
    for _ in range(1000):
        attend(*tensors, 1.0)


def disagreements() -> list[str]:
    """Rank 1 deals out the row differently, or by another mode; this rank's error texts."""
    group = dist.group.WORLD
    texts = []
    for mode in ("ring", "ulysses", "gather"):
        layout = "contiguous" if dist.get_rank() == 1 else "zigzag"
        attend = build(mode, build_row_plan(layout, [5, ROW - 5], group.size()), group)
        with pytest.raises(ValueError, match="row plan") as caught:
            attend(*local_tensors(group), 1.0)
        texts.append(str(caught.value))
    mode = "gather" if dist.get_rank() == 1 else "ring"
    attend = build(mode, build_row_plan("zigzag", [5, ROW - 5], group.size()), group)
    with pytest.raises(ValueError, match=f"by {mode}") as caught:
        attend(*local_tensors(group), 1.0)
    return [*texts, str(caught.value)]


def measured() -> tuple[dict[str, Any], float]:
    """What this rank holds after the ranks have measured, and the seconds it took."""
    start = time.perf_counter()
    cost = CostModel(num_heads=4, num_kv_heads=2, head_dim=16)
    machine = measure_machine(cost, dist.group.WORLD, CPU, torch.float32)
    return machine.dump(), time.perf_counter() - start


def order_of_work() -> tuple[list[str], list[str]]:
    """What this rank does in a ring forward and backward on one document, in order.

    A message that starts is "keys" or "gradients", "in" or "out"; "attend" is attention over the
    keys of one step.
    """
    group = dist.group.WORLD
    attend = build("ring", build_row_plan("contiguous", [ROW], group.size()), group)
    tensors = [x.requires_grad_() for x in local_tensors(group)]
    attend(*tensors, 1.0)
    events: list[str] = []
    names = {KEYS: "keys", GRADIENTS: "gradients"}
    start, run, run_back = dist.batch_isend_irecv, ring.forward, ring.backward

    def note(event: str, call: Callable) -> Callable:
        return lambda *args, **kwargs: (events.append(event), call(*args, **kwargs))[1]

    def note_start(operations: list[dist.P2POp]) -> list[dist.Work]:
        for operation in operations:
            direction = "out" if operation.op is dist.isend else "in"
            events.append(f"{names[operation.tag]} {direction}")
        return start(operations)

    dist.batch_isend_irecv = note_start
    ring.forward, ring.backward = note("attend", run), note("attend", run_back)
    try:
        out = attend(*tensors, 1.0)
        first = list(events)
        events.clear()
        out.sum().backward()
    finally:
        dist.batch_isend_irecv, ring.forward, ring.backward = start, run, run_back
    return first, events


def three_ranks() -> tuple[list[str], tuple[list[str], list[str]], tuple[dict[str, Any], float]]:
    """`disagreements`, `order_of_work` and `measured` in one set of processes."""
    return disagreements(), order_of_work(), measured()


def arrive_early() -> tuple[bool, float]:
    """Whether a committed transfer arrives though nobody waits for it, and what arrives."""
    rank, group = dist.get_rank(), dist.group.WORLD
    sent = torch.full((1 << 20,), float(rank))
    received = torch.empty_like(sent)
    transfer = Transfer(
        "test", group, KEYS, [Message(1 - rank, sent)], [Message(1 - rank, received)]
    )
    transfer.commit()
    for _ in range(600):
        if received[-1] == 1 - rank:
            break
        time.sleep(0.1)
    arrived = bool((received == 1 - rank).all())
    (found,) = transfer.wait()
    transfer.finish()
    return arrived, float(found.mean())


def misuse() -> list[str]:
    """What a transfer says to calls out of order."""
    group, rank = dist.group.WORLD, dist.get_rank()

    def build_transfer() -> Transfer:
        value, room = torch.ones(2), torch.zeros(2)
        return Transfer("t", group, KEYS, [Message(1 - rank, value)], [Message(1 - rank, room)])

    def refusal(call: Callable[[], object]) -> str:
        with pytest.raises(RuntimeError) as caught:
            call()
        return str(caught.value)

    transfer = build_transfer()
    texts = [refusal(transfer.wait), refusal(transfer.finish)]
    transfer.commit()
    texts += [refusal(transfer.commit), refusal(transfer.finish)]
    assert transfer.wait()[0].tolist() == [1.0, 1.0]
    texts += [refusal(transfer.wait)]
    transfer.finish()
    return [*texts, refusal(transfer.finish)]


def misused_layers() -> list[str]:
    """What attention says when a recomputed layer has no first forward, and to a second one."""
    group = dist.group.WORLD
    attend = build("ring", build_row_plan("zigzag", [ROW], group.size()), group)
    tensors = local_tensors(group)
    with pytest.raises(RuntimeError) as early:
        attend(*tensors, 1.0, 3)
    with torch.no_grad():
        attend(*tensors, 1.0, 3)
        with pytest.raises(RuntimeError) as twice:
            attend(*tensors, 1.0, 3)
    attend(*tensors, 1.0, 3)
    with pytest.raises(RuntimeError) as used_up:
        attend(*tensors, 1.0, 3)
    return [str(error.value) for error in (early, twice, used_up)]


def two_ranks() -> tuple[tuple[bool, float], list[str], list[str]]:
    """`arrive_early`, `misuse` and `misused_layers` in one set of processes."""
    return arrive_early(), misuse(), misused_layers()
