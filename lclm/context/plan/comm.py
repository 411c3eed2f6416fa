"""The ways in which queries meet the keys of other ranks, and what each is predicted to take.

- ring: only keys that some query of a rank sees travel to it, under the attention on those before;
- ulysses: an all-to-all trades tokens for heads and another one brings the output home; nothing
  hides it, but every rank then has equal work whatever the row plan;
- ulysses_ring: neighbours trade heads, and a ring runs between ranks with the same heads;
- gather: every rank collects the keys of the whole row, and gradients are reduce-scattered.

Where a layer is computed twice (recompute), ring and ulysses keep its output from the first time:
a ring sends nothing again, ulysses trades what its backward needs. Gather does it all again.
"""

import math
from dataclasses import dataclass, replace

from lclm.context.plan.cost import CostModel, predict
from lclm.context.plan.row_plan import RowPlan

# What the gathered keys of all layers that are kept may take, bytes: they are as long as the row on
# every rank, so where rows are long another way must do.
GATHERED_BYTES = 2**30


@dataclass(frozen=True)
class Comm:
    """A way, by its name in `parallel.cp_comm`, and how many neighbouring ranks share heads."""

    name: str
    shared: int = 1

    def __str__(self) -> str:
        return f"{self.name}({self.shared})" if self.name == "ulysses_ring" else self.name


RING = Comm("ring")
GATHER = Comm("gather")


def kv_copies(num_heads: int, num_kv_heads: int, size: int) -> int:
    """How often each kv head is repeated so that `size` ranks can share query and kv heads.

    Raises:
        ValueError: the query heads do not divide by `size`.
    """
    if num_heads % size:
        raise ValueError(
            f"ulysses: {num_heads} query heads (of this tp rank) cannot be shared by {size} ranks, "
            "also not with repeated kv heads; the ranks that share heads must divide the query "
            "heads: use cp_comm 'ring', or 'ulysses_ring' with a smaller cp_ulysses"
        )
    return math.lcm(num_kv_heads, size) // num_kv_heads


def candidate_comms(row_length: int, cp_size: int, cost: CostModel) -> list[Comm]:
    """The ways that rows of a length can go on `cp_size` ranks, the preferred one first."""
    sharing = [n for n in range(2, cp_size) if cp_size % n == 0 and cost.num_heads % n == 0]
    comms = [RING, *(Comm("ulysses_ring", n) for n in sharing)]
    if cost.num_heads % cp_size == 0:
        comms.append(Comm("ulysses", cp_size))
    if row_length * cost.kv_bytes * cost.kept_layers <= GATHERED_BYTES:
        comms.append(GATHER)
    return comms


def predict_seconds(plan: RowPlan, cost: CostModel, comm: Comm = RING) -> float:
    """Time of one layer's attention, forward and backward, on the slowest rank."""
    if comm.name == "gather":
        return _gather_seconds(plan, cost)
    if comm.shared == 1:
        return predict(plan, cost).seconds
    copies = kv_copies(cost.num_heads, cost.num_kv_heads, comm.shared)
    cost = replace(cost, num_kv_heads=cost.num_kv_heads * copies)
    inside = replace(
        cost,
        num_heads=cost.num_heads // comm.shared,
        num_kv_heads=cost.num_kv_heads // comm.shared,
    )
    held = plan.row_length // plan.cp_size
    traded = _trade_seconds(held, cost, comm.shared, has_copies=copies > 1)
    return traded + predict(plan.merged(comm.shared), inside).seconds


def _trade_seconds(held: int, cost: CostModel, shared: int, has_copies: bool) -> float:
    """All-to-alls of a rank with `held` tokens: q, k, v and out, and what the backward trades."""
    q = cost.num_heads * cost.head_dim * cost.number_bytes  # also of out, dout and dq
    gradients = cost.kv_gradient_bytes if has_copies else cost.kv_bytes
    sizes = [q + cost.kv_bytes, q, q, q + gradients]
    if cost.is_recomputed:
        sizes.append(2 * q + cost.kv_bytes)
    link, copy = cost.machine.trade_among(shared), cost.machine.copy
    leaving = (shared - 1) / shared
    # each is packed by rank and sorted into global order
    return sum(
        float(link.time(held * size * leaving) + copy.time(2 * held * size)) for size in sizes
    )


def _gather_seconds(plan: RowPlan, cost: CostModel) -> float:
    """All-gather, attention on the whole row's keys, reduce-scatter of its gradients in fp32."""
    machine, length = cost.machine, plan.row_length
    away = length - length // plan.cp_size
    area = plan.areas.sum(axis=1)
    forward = machine.gather.time(away * cost.kv_bytes) + machine.copy.time(length * cost.kv_bytes)
    forward += cost.forward_seconds(area).max()
    gradients = cost.kv_gradient_bytes
    # dK and dV are rounded and stacked, then cast and sorted into rank order
    backward = machine.copy.time(2 * length * (cost.kv_bytes + gradients))
    backward += machine.scatter.time(away * gradients) + cost.backward_seconds(area).max()
    return float((2 if cost.is_recomputed else 1) * forward + backward)
