"""Measures what the cost model needs on a run's own ranks: attention, copies, links between ranks.

Every rank measures at the same time, as it will train, and the slowest rank's rates count, so that
all ranks hold the same numbers. Two sizes of each give a fixed time and a rate.
"""

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from lclm.context.exchange import HEADS, KEYS, Message, Transfer, start_all_to_all
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
    bench = _Bench(cost, group, device, dtype)
    near = _near_ranks(group)
    first = group.rank() // near * near
    dist.barrier()
    rates = {
        **bench.attention_rates(),
        "copy": bench.copy_rate(),
        "message": bench.link_rate(bench.message),
        "gather": bench.link_rate(bench.gather),
        "scatter": bench.link_rate(bench.scatter),
        "all_to_all": bench.link_rate(partial(bench.all_to_all, range(group.size()))),
        "near_all_to_all": bench.link_rate(partial(bench.all_to_all, range(first, first + near))),
    }
    # the largest fixed time, the smallest rate, the least overlap, the fewest neighbours of all
    slow = [[rate.seconds, 1 / rate.per_second] for rate in rates.values()]
    slowest = torch.tensor([*slow, [-bench.overlap(), -near]], dtype=torch.float64, device=device)
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


def _rate(few: float, few_seconds: float, many: float, many_seconds: float) -> Rate:
    """The line through two points; all of the larger one's time is rate where noise turns it."""
    if many_seconds <= few_seconds:
        return Rate(0.0, many / many_seconds)
    per_second = (many - few) / (many_seconds - few_seconds)
    return Rate(max(0.0, few_seconds - few / per_second), per_second)


def _finish(transfer: Transfer) -> None:
    transfer.wait()
    transfer.finish()


@dataclass(frozen=True)
class _Bench:
    """What is measured, on one rank."""

    cost: CostModel
    group: dist.ProcessGroup
    device: torch.device
    dtype: torch.dtype

    def least_seconds(self, work: Work, is_short: bool = False) -> float:
        times = []
        for _ in range(1 + (MANY_REPEATS if is_short else FEW_REPEATS)):
            self._wait()
            start = time.perf_counter()
            work()
            self._wait()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def attention_rates(self) -> dict[str, Rate]:
        """Causal attention of one document, forward and backward."""

        def seconds(tokens: int) -> list[float]:
            return [self.least_seconds(w, tokens == FEW_TOKENS) for w in self.attention(tokens)]

        few = many = seconds(FEW_TOKENS)
        tokens = FEW_TOKENS
        while tokens < MANY_TOKENS and many[0] < ENOUGH_SECONDS[self.device.type]:
            tokens *= 2
            many = seconds(tokens)
        areas = [n * (n + 1) // 2 for n in (FEW_TOKENS, tokens)]
        flops = {"forward": self.cost.forward_flops, "backward": self.cost.backward_flops}
        return {
            name: _rate(each * areas[0], few[place], each * areas[1], many[place])
            for place, (name, each) in enumerate(flops.items())
        }

    def attention(self, tokens: int) -> tuple[Work, Work]:
        """One forward and one backward of a document."""
        cost, device = self.cost, self.device
        heads = (cost.num_heads, cost.num_kv_heads, cost.num_kv_heads)
        q, k, v = (
            torch.ones(tokens, n, cost.head_dim, dtype=self.dtype, device=device) for n in heads
        )
        ends = np.arange(1, tokens + 1, dtype=np.int32)
        plan = make_plan(np.zeros_like(ends), ends, tokens)
        out, lse = forward(q, k, v, plan, 1.0)
        delta = torch.zeros_like(lse)
        dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=device) for x in (q, k, v))
        back = partial(backward, out, q, k, v, out, lse, delta, plan, 1.0, dq, dk, dv)
        return partial(forward, q, k, v, plan, 1.0), back

    def overlap(self) -> float:
        """A message beside attention of about its length, against one after the other."""
        transfer = self.far_transfer(MANY_BYTES[self.device.type])
        alone = self.least_seconds(lambda: _finish(transfer()))
        tokens, attention = FEW_TOKENS // 2, 0.0
        while attention < alone and tokens < MANY_TOKENS:
            tokens *= 2
            attend, _ = self.attention(tokens)
            attention = self.least_seconds(attend)

        def both() -> None:
            started = transfer()
            attend()
            _finish(started)

        saved = alone + attention - self.least_seconds(both)
        return min(1.0, max(0.0, saved / min(alone, attention)))

    def copy_rate(self) -> Rate:
        """Tokens' keys sorted into another order; more of them than a cache holds."""
        shape, itemsize = (self.cost.num_kv_heads, self.cost.head_dim), self.dtype.itemsize
        num_tokens = -(-2 * MANY_BYTES[self.device.type] // (shape[0] * shape[1] * itemsize))
        x = torch.ones(num_tokens, *shape, dtype=self.dtype, device=self.device)
        order = torch.arange(num_tokens, device=self.device).flip(0)
        seconds = self.least_seconds(partial(x.index_select, 0, order))
        return Rate(0.0, x.numel() * itemsize / seconds)

    def link_rate(self, build: Callable[[int], Work]) -> Rate:
        """Of work that `build` makes for a number of bytes that this rank sends."""
        few, many = FEW_BYTES, MANY_BYTES[self.device.type]
        few_seconds = self.least_seconds(build(few), is_short=True)
        return _rate(few, few_seconds, many, self.least_seconds(build(many)))

    def message(self, num_bytes: int) -> Work:
        transfer = self.far_transfer(num_bytes)
        return lambda: _finish(transfer())

    def far_transfer(self, num_bytes: int) -> Callable[[], Transfer]:
        """To the rank half around the ring: of another node, where the group is on several."""
        half, rank, size = self.group.size() // 2, self.group.rank(), self.group.size()
        sent = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        sends = [Message((rank + half) % size, sent)]
        receives = [Message((rank - half) % size, torch.empty_like(sent))]

        def start() -> Transfer:
            transfer = Transfer("measurement of links", self.group, KEYS, sends, receives)
            transfer.commit()
            return transfer

        return start

    def _shard_and_whole(self, num_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = self.group.size()
        shard = torch.zeros(max(1, num_bytes // (4 * (size - 1))), device=self.device)
        return shard, shard.repeat(size)

    def gather(self, num_bytes: int) -> Work:
        shard, whole = self._shard_and_whole(num_bytes)
        return lambda: dist.all_gather_into_tensor(whole, shard, group=self.group)

    def scatter(self, num_bytes: int) -> Work:
        shard, whole = self._shard_and_whole(num_bytes)
        return lambda: dist.reduce_scatter_tensor(shard, whole, group=self.group)

    def all_to_all(self, ranks: range, num_bytes: int) -> Work:
        """All-to-all among some ranks of the group, all of which do it."""
        each = max(1, num_bytes // max(1, len(ranks) - 1))
        sent = torch.zeros(len(ranks), each, dtype=torch.uint8, device=self.device)
        buffers = (sent, torch.empty_like(sent), ranks)
        what = "measurement of links"
        return lambda: _finish(start_all_to_all(what, self.group, HEADS, *buffers))
