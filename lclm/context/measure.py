"""Measures what the cost model needs on the ranks at hand: attention, copies, links between ranks.

Every rank measures at the same time, as it will train, and the slowest rank's rates count, so that
all ranks hold the same numbers. Two sizes of each give a fixed time and a rate.
"""

import os
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from lclm.context.exchange import HEADS, KEYS, Message, Transfer
from lclm.context.plan.cost import CostModel
from lclm.context.plan.rates import Machine, Rate
from lclm_kernels.interval_attention import backward, forward, make_plan

# Runs of long and of short work, after one that does not count; the fastest counts. As many on
# every rank, for a link needs all.
FEW_REPEATS, MANY_REPEATS = 4, 20
# Bytes that a rank sends: for the fixed time and for the rate.
FEW_BYTES, MANY_BYTES = 4096, {"cpu": 1 << 22, "cuda": 1 << 27}
# Tokens of attention: for the fixed time, and the most for the rate, which the first doubling that
# takes ENOUGH_SECONDS gives.
FEW_TOKENS, MANY_TOKENS = 64, 1 << 14
ENOUGH_SECONDS = {"cpu": 0.02, "cuda": 0.002}

Work = Callable[[], object]


def measure_machine(
    cost: CostModel, group: dist.ProcessGroup, device: torch.device, dtype: torch.dtype
) -> Machine:
    """Measure for about a second; all processes of the world must call it at the same time.

    Args:
        cost: gives the heads of a rank; its machine is not looked at.
        group: context ranks, at least 2; each process of the world is in one such group.
        device: where tensors live.
        dtype: of q, k and v.

    Returns:
        The same on every process of the world. Another call gives somewhat other numbers.

    Raises:
        ExchangeError: a rank is lost.
    """
    rank, size = group.rank(), group.size()
    near = _near_ranks(group)
    first = rank // near * near
    dist.barrier()
    forward_rate, backward_rate = _measure_attention(cost, device, dtype)
    neighbours = range(first, first + near)
    rates = {
        "forward": forward_rate,
        "backward": backward_rate,
        "copy": _measure_copy(cost, device, dtype),
        "message": _measure_link(lambda n: _message(n, group, device), device),
        "gather": _measure_link(lambda n: _gather(n, group, device), device),
        "scatter": _measure_link(lambda n: _scatter(n, group, device), device),
        "all_to_all": _measure_link(lambda n: _all_to_all(n, range(size), group, device), device),
        "near_all_to_all": _measure_link(
            lambda n: _all_to_all(n, neighbours, group, device), device
        ),
    }
    overlap = _measure_overlap(cost, group, device, dtype)
    # the largest fixed time, the smallest rate, the least overlap, the fewest neighbours of all
    slow = [[rate.seconds, 1 / rate.per_second] for rate in rates.values()] + [[-overlap, -near]]
    slowest = torch.tensor(slow, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    *agreed, (least_overlap, most) = slowest.tolist()
    found = {
        name: Rate(seconds, 1 / each) for name, (seconds, each) in zip(rates, agreed, strict=True)
    }
    near = round(-most)
    if near == 1:
        found["near_all_to_all"] = found["all_to_all"]
    return Machine(**found, near_ranks=near, overlap=abs(least_overlap))


def _near_ranks(group: dist.ProcessGroup) -> int:
    """Context ranks of a node, where all nodes have equally many of the group; else 1."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))  # torchrun sets it
    nodes = Counter(rank // per_node for rank in dist.get_process_group_ranks(group))
    return min(nodes.values()) if len(set(nodes.values())) == 1 else 1


def _least_seconds(work: Work, is_short: bool, device: torch.device) -> float:
    times = []
    for _ in range(1 + (MANY_REPEATS if is_short else FEW_REPEATS)):
        _wait_for(device)
        start = time.perf_counter()
        work()
        _wait_for(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rate(few: float, few_seconds: float, many: float, many_seconds: float) -> Rate:
    """The line through two points; all of the larger one's time is rate where noise turns it."""
    if many_seconds <= few_seconds:
        return Rate(0.0, many / many_seconds)
    per_second = (many - few) / (many_seconds - few_seconds)
    return Rate(max(0.0, few_seconds - few / per_second), per_second)


def _measure_attention(
    cost: CostModel, device: torch.device, dtype: torch.dtype
) -> tuple[Rate, Rate]:
    """Causal attention of one document, forward and backward."""
    few = _attention_seconds(FEW_TOKENS, cost, device, dtype)
    tokens, many = FEW_TOKENS, few
    while tokens < MANY_TOKENS and many[0] < ENOUGH_SECONDS[device.type]:
        tokens *= 2
        many = _attention_seconds(tokens, cost, device, dtype)
    areas = [n * (n + 1) // 2 for n in (FEW_TOKENS, tokens)]
    rates = []
    for place, matmuls in enumerate((4, 10)):  # flops per pair and number of a query head
        work = [matmuls * cost.num_heads * cost.head_dim * area for area in areas]
        rates.append(_rate(work[0], few[place], work[1], many[place]))
    return rates[0], rates[1]


def _attention_seconds(
    tokens: int, cost: CostModel, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Seconds of one forward and of one backward."""
    ahead, back = _attention(tokens, cost, device, dtype)
    is_short = tokens == FEW_TOKENS
    return _least_seconds(ahead, is_short, device), _least_seconds(back, is_short, device)


def _attention(
    tokens: int, cost: CostModel, device: torch.device, dtype: torch.dtype
) -> tuple[Work, Work]:
    """One forward and one backward of a document."""
    heads = (cost.num_heads, cost.num_kv_heads, cost.num_kv_heads)
    q, k, v = (torch.ones(tokens, n, cost.head_dim, dtype=dtype, device=device) for n in heads)
    ends = np.arange(1, tokens + 1, dtype=np.int32)
    plan = make_plan(np.zeros_like(ends), ends, tokens)
    out, lse = forward(q, k, v, plan, 1.0)
    delta = torch.zeros_like(lse)
    dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=device) for x in (q, k, v))
    back = partial(backward, out, q, k, v, out, lse, delta, plan, 1.0, dq, dk, dv)
    return partial(forward, q, k, v, plan, 1.0), back


def _measure_overlap(
    cost: CostModel, group: dist.ProcessGroup, device: torch.device, dtype: torch.dtype
) -> float:
    """A message beside attention of about its length, against one after the other."""
    transfer = _far_transfer(MANY_BYTES[device.type], group, device)
    tokens = FEW_TOKENS
    alone = _least_seconds(lambda: _finish(transfer()), False, device)
    while True:
        attend, _ = _attention(tokens, cost, device, dtype)
        attention = _least_seconds(attend, False, device)
        if attention >= alone or tokens >= MANY_TOKENS:
            break
        tokens *= 2

    def both() -> None:
        started = transfer()
        attend()
        _finish(started)

    saved = alone + attention - _least_seconds(both, False, device)
    return min(1.0, max(0.0, saved / min(alone, attention)))


def _measure_copy(cost: CostModel, device: torch.device, dtype: torch.dtype) -> Rate:
    """Tokens' keys sorted into another order; more of them than a cache holds."""
    shape = (cost.num_kv_heads, cost.head_dim)
    num_tokens = -(-2 * MANY_BYTES[device.type] // (shape[0] * shape[1] * dtype.itemsize))
    x = torch.ones(num_tokens, *shape, dtype=dtype, device=device)
    order = torch.arange(num_tokens, device=device).flip(0)
    seconds = _least_seconds(partial(x.index_select, 0, order), False, device)
    return Rate(0.0, x.numel() * dtype.itemsize / seconds)


def _measure_link(build: Callable[[int], Work], device: torch.device) -> Rate:
    """Of work that `build` makes for a number of bytes that this rank sends."""
    few, many = FEW_BYTES, MANY_BYTES[device.type]
    few_seconds = _least_seconds(build(few), True, device)
    return _rate(few, few_seconds, many, _least_seconds(build(many), False, device))


def _message(num_bytes: int, group: dist.ProcessGroup, device: torch.device) -> Work:
    transfer = _far_transfer(num_bytes, group, device)
    return lambda: _finish(transfer())


def _far_transfer(
    num_bytes: int, group: dist.ProcessGroup, device: torch.device
) -> Callable[[], Transfer]:
    """To the rank half around the ring: of another node, where the group is on several."""
    half, rank, size = group.size() // 2, group.rank(), group.size()
    sent = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    sends = [Message((rank + half) % size, sent)]
    receives = [Message((rank - half) % size, received)]
    return lambda: _start(KEYS, group, sends, receives)


def _gather(num_bytes: int, group: dist.ProcessGroup, device: torch.device) -> Work:
    count = max(1, num_bytes // (4 * (group.size() - 1)))
    shard = torch.zeros(count, device=device)
    whole = shard.new_empty(count * group.size())
    return lambda: dist.all_gather_into_tensor(whole, shard, group=group)


def _scatter(num_bytes: int, group: dist.ProcessGroup, device: torch.device) -> Work:
    count = max(1, num_bytes // (4 * (group.size() - 1)))
    whole = torch.zeros(count * group.size(), device=device)
    shard = whole.new_empty(count)
    return lambda: dist.reduce_scatter_tensor(shard, whole, group=group)


def _all_to_all(
    num_bytes: int, ranks: range, group: dist.ProcessGroup, device: torch.device
) -> Work:
    """All-to-all among some ranks of the group, all of which do it."""
    peers = [rank for rank in ranks if rank != group.rank()]
    each = max(1, num_bytes // max(1, len(peers)))
    sent = torch.zeros(len(peers), each, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    sends = [Message(peer, part) for peer, part in zip(peers, sent, strict=True)]
    receives = [Message(peer, part) for peer, part in zip(peers, received, strict=True)]
    return lambda: _finish(_start(HEADS, group, sends, receives))


def _start(
    tag: int, group: dist.ProcessGroup, sends: list[Message], receives: list[Message]
) -> Transfer:
    transfer = Transfer("measurement of links", group, tag, sends, receives)
    transfer.commit()
    return transfer


def _finish(transfer: Transfer) -> None:
    transfer.wait()
    transfer.finish()
