"""What one process of a parity test does: attention of many rows in every mode, and its errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist

from lclm.context.exchange import DIGESTS, KEYS
from lclm.context.gather import GatheredAttention
from lclm.context.plan.layouts import balanced_plan, build_row_plan
from lclm.context.plan.row_plan import RowPlan
from lclm.context.ring import build_ring
from lclm.context.ulysses import build_ulysses
from lclm_kernels.interval_attention import interval_attention, make_plan

CPU = torch.device("cpu")
CHUNK = 8
CHUNKS_PER_RANK = 6
HEAD_SIZE = 16
NAMES = ("out", "dq", "dk", "dv")
# Query and kv heads. Repeated kv heads: 2 at 3 ranks thrice, 3 at 2 ranks and 1 at 4 ranks.
HEADS = {2: [(4, 2), (12, 3)], 3: [(6, 2)], 4: [(4, 2), (8, 1)], 6: [(12, 4)], 8: [(8, 2)]}


def random_plan(random: np.random.Generator, lengths: list[int], cp_size: int) -> RowPlan:
    """Chunks dealt to ranks at random, equally many to each."""
    owners = random.permutation(np.repeat(np.arange(cp_size), CHUNKS_PER_RANK))
    spans = [
        tuple((int(n) * CHUNK, int(n + 1) * CHUNK) for n in np.flatnonzero(owners == rank))
        for rank in range(cp_size)
    ]
    return RowPlan(np.array(lengths), cp_size, tuple(spans))


def documents(random: np.random.Generator, cp_size: int) -> dict[str, list[int]]:
    """Document lengths of rows of `cp_size * CHUNKS_PER_RANK * CHUNK` tokens."""
    row = cp_size * CHUNKS_PER_RANK * CHUNK
    cuts = np.sort(random.choice(np.arange(1, row), size=3 * cp_size, replace=False))
    ragged = np.diff([0, *cuts.tolist(), row]).tolist()
    return {
        "ragged": ragged,
        "one document": [row],
        "single tokens": [1] * row,
        "single tokens and one long": [1] * 11 + [row - 18] + [1] * 7,
        "ends on chunk borders": [CHUNK, 3 * CHUNK, row - 10 * CHUNK, 6 * CHUNK],
    }


def cases(cp_size: int) -> Iterator[tuple[str, RowPlan]]:
    """Plans to compare on, by name; equal on every rank."""
    random = np.random.default_rng(cp_size)
    for name, lengths in documents(random, cp_size).items():
        yield f"{name}, zigzag", build_row_plan("zigzag", lengths, cp_size)
        yield f"{name}, random chunks", random_plan(random, lengths, cp_size)
        if name in ("ragged", "ends on chunk borders"):
            yield f"{name}, contiguous", build_row_plan("contiguous", lengths, cp_size)
            yield f"{name}, balanced", balanced_plan(np.array(lengths), cp_size, CHUNK)


class Groups:
    """The context group and its parts; made once per process."""

    def __init__(self) -> None:
        self.whole = dist.group.WORLD
        size = self.whole.size()
        # eight ranks split in two manners, four and six in one
        self.split = {
            inner: self._split(inner) for inner in (2, 4) if 1 < size / inner == size // inner
        }

    def _split(self, inner: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        size, rank = self.whole.size(), self.whole.rank()
        heads = [dist.new_group(range(n, n + inner)) for n in range(0, size, inner)]
        rings = [dist.new_group(range(n, size, inner)) for n in range(inner)]
        return heads[rank // inner], rings[rank % inner]

    def modes(self, plan: RowPlan, num_heads: int, num_kv_heads: int) -> Iterator:
        """(name, function that builds the attention)."""
        shape = (plan, num_heads, num_kv_heads, self.whole, CPU)
        yield "ring", lambda: build_ring(plan, self.whole, CPU)
        yield "ulysses", lambda: build_ulysses(*shape)
        for inner, (heads, rings) in self.split.items():
            yield f"ulysses{inner} x ring", lambda h=heads, r=rings: build_ulysses(*shape, h, r)


def row_tensors(plan: RowPlan, num_heads: int, num_kv_heads: int) -> list[torch.Tensor]:
    """q, k, v and the gradient of out for the whole row, fp32, equal on every rank."""
    generator = torch.Generator().manual_seed(plan.row_length + num_heads)
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    return [torch.randn(plan.row_length, n, HEAD_SIZE, generator=generator) for n in heads]


def run_attention(
    attend: Callable[..., torch.Tensor], tensors: list[torch.Tensor], is_recomputed: bool = False
) -> list[torch.Tensor]:
    """out, dq, dk, dv; as Megatron-core recomputes a layer if that is asked for."""
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    scale = HEAD_SIZE**-0.5
    layer = (7,) if is_recomputed else ()
    if is_recomputed:
        with torch.no_grad():
            first = attend(q, k, v, scale, *layer)
    out = attend(q, k, v, scale, *layer)
    if is_recomputed:
        assert torch.equal(first, out)
    out.backward(tensors[3])
    return [out.detach(), q.grad, k.grad, v.grad]


def one_process(plan: RowPlan, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """out, dq, dk, dv of the whole row."""
    whole = RowPlan(plan.doc_lengths, 1, (((0, plan.row_length),),))
    intervals = make_plan(*whole.intervals(0), plan.row_length)

    def attend(q, k, v, scale):
        return interval_attention(q, k, v, intervals, scale)

    return run_attention(attend, tensors)


@contextmanager
def sent_bytes() -> Iterator[dict[int, int]]:
    """Bytes handed to sends while the block runs, by tag."""
    counts: dict[int, int] = {}
    start = dist.batch_isend_irecv

    def counting(operations):
        for operation in operations:
            if operation.op is dist.isend:
                size = operation.tensor.numel() * operation.tensor.element_size()
                counts[operation.tag] = counts.get(operation.tag, 0) + size
        return start(operations)

    dist.batch_isend_irecv = counting
    try:
        yield counts
    finally:
        dist.batch_isend_irecv = start


def squares(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> np.ndarray:
    """float64 `[4, 2]`: squared norm of the difference and of what is wanted, per tensor."""
    pairs = zip(found, wanted, strict=True)
    return np.array(
        [
            [float((f - w).double().square().sum()), float(w.double().square().sum())]
            for f, w in pairs
        ]
    )


def parity(groups: Groups) -> dict[str, np.ndarray]:
    """This rank's `squares` of every case and mode against one process, fp32."""
    rank, size = groups.whole.rank(), groups.whole.size()
    found = {}
    for number, (name, plan) in enumerate(cases(size)):
        mine = torch.from_numpy(plan.positions(rank))
        heads = HEADS[size][number % len(HEADS[size])]
        tensors = row_tensors(plan, *heads)
        if number % 2:
            # As where the shard of the last rank holds no label: it sends no gradient of its own.
            tensors[3][torch.from_numpy(plan.positions(size - 1))] = 0
        wanted = [x[mine] for x in one_process(plan, tensors)]
        local = [x[mine] for x in tensors]
        where = f"{name}, {heads[0]}/{heads[1]} heads"
        attend = GatheredAttention(plan, groups.whole, CPU)
        found[f"gather: {where}"] = squares(run_attention(attend, local), wanted)
        for mode, build in groups.modes(plan, *heads):
            found[f"{mode}: {where}"] = squares(run_attention(build(), local), wanted)
            again = run_attention(build(), local, is_recomputed=True)
            found[f"{mode} recomputed: {where}"] = squares(again, wanted)
    return found


def parity_bf16(groups: Groups) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`squares` against fp64 of every mode in bf16, and of one process in bf16."""
    rank, size = groups.whole.rank(), groups.whole.size()
    found = {}
    for name, plan in cases(size):
        if not name.startswith(("ragged, random", "one document, zigzag")):
            continue
        mine = torch.from_numpy(plan.positions(rank))
        heads = HEADS[size][-1]
        rounded = [x.bfloat16() for x in row_tensors(plan, *heads)]
        wanted = [x[mine] for x in one_process(plan, [x.double() for x in rounded])]
        alone = squares([x[mine] for x in one_process(plan, rounded)], wanted)
        local = [x[mine] for x in rounded]
        for mode, build in groups.modes(plan, *heads):
            for again in (False, True):
                error = squares(run_attention(build(), local, again), wanted)
                found[f"{mode}, again {again}: {name}"] = (error, alone)
    return found


def compare() -> tuple[dict, dict, dict]:
    """All comparisons of one set of processes: `parity`, `parity_bf16` and `traffic`."""
    groups = Groups()
    return parity(groups), parity_bf16(groups), traffic()


def traffic() -> dict[str, tuple[dict[int, int], dict[int, int], dict[int, int]]]:
    """Bytes this rank sends in the ring, by tag: first forward, recomputed forward, backward."""
    group = dist.group.WORLD
    found = {}
    for name, plan in cases(group.size()):
        mine = torch.from_numpy(plan.positions(group.rank()))
        q, k, v, dout = (x[mine] for x in row_tensors(plan, 4, 2))
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        attend = build_ring(plan, group, CPU)
        with sent_bytes() as first, torch.no_grad():
            attend(q, k, v, 0.25, 0)
        with sent_bytes() as again:
            out = attend(q, k, v, 0.25, 0)
        with sent_bytes() as back:
            out.backward(dout)
        first.pop(DIGESTS)
        assert set(first) <= {KEYS}
        found[name] = (first, again, back)
    return found
