"""Predicted time of context-parallel attention under a row plan, by communication mode.

The modes in which queries meet the keys of other ranks:

- ring: only keys that some query of a rank sees travel to it, under the attention on those before;
- ulysses: an all-to-all swaps tokens for heads and another one brings the output home; no attention
  overlaps it, but every rank then has equal work whatever the row plan;
- ulysses_ring: neighbours share heads by all-to-all, and a ring runs between ranks with the same
  heads;
- gather: every rank collects the keys of the whole row, and gradients are reduce-scattered.

Where a layer is computed twice (recompute), ring and ulysses keep its output from the first time:
a ring sends nothing again, ulysses sends what its backward needs. Gather does it all again.

The ring, rank by rank: at step 0 a rank works on its own keys, at step s on those received from
rank r - s. The transfer of step s + 1 runs under the work of step s; what it takes longer is
exposed, and so is what the machine cannot do beside attention. The backward fetches the keys again
and sends their gradients home one step later.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np

from lclm.context.plan.rates import LINKS, Machine
from lclm.context.plan.row_plan import RowPlan

# What the gathered keys of all layers that are kept may take, bytes: they are as long as the row on
# every rank, so where rows are long another mode must do.
GATHERED_BYTES = 2**30
# Times that differ by less are taken for equal: rates are not measured more exactly.
SAME_TIME = 1.05


@dataclass(frozen=True)
class Comm:
    """A communication mode: its name in `parallel.cp_comm`, and how many neighbours share heads."""

    name: str
    ulysses_size: int = 1

    def __str__(self) -> str:
        return f"{self.name}({self.ulysses_size})" if self.name == "ulysses_ring" else self.name


RING = Comm("ring")
GATHER = Comm("gather")


@dataclass(frozen=True)
class CostModel:
    """A machine and the shape of one attention layer of one tensor-parallel rank.

    Defaults are H100s joined by NVLink and a Llama-3-8B layer in bf16.

    Raises:
        ValueError: a size that is not positive.
    """

    machine: Machine = LINKS["nvlink"]
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    number_bytes: int = 2  # of q, k, v and out
    gradient_bytes: int = 4  # of dK and dV, which travel in fp32
    kept_layers: int = 1  # layers whose keys are kept for the backward pass at one time
    is_recomputed: bool = False  # whether the layer is computed again in the backward pass

    def __post_init__(self) -> None:
        for field in fields(self)[1:-1]:
            if getattr(self, field.name) <= 0:
                raise ValueError(
                    f"cost model: {field.name} is {getattr(self, field.name)}; it must be positive"
                )

    @property
    def forward_flops(self) -> int:
        """Of a visible pair: two matmuls (QK, PV) of 2 * head_dim per query head."""
        return 4 * self.num_heads * self.head_dim

    @property
    def backward_flops(self) -> int:
        """Of a visible pair: five matmuls (QK again, dP, dV, dK, dQ)."""
        return 10 * self.num_heads * self.head_dim

    @property
    def kv_bytes(self) -> int:
        """K and V of a token."""
        return 2 * self.num_kv_heads * self.head_dim * self.number_bytes

    @property
    def kv_gradient_bytes(self) -> int:
        """dK and dV of a token."""
        return 2 * self.num_kv_heads * self.head_dim * self.gradient_bytes


@dataclass(frozen=True, eq=False)
class Prediction:
    """One layer's attention, forward and backward, under a plan; arrays are [R] by rank."""

    area: np.ndarray  # int64, visible pairs
    compute_seconds: np.ndarray  # float64
    exposed_seconds: np.ndarray  # float64, waiting for transfers

    @property
    def seconds(self) -> float:
        """Time of the slowest rank."""
        return float((self.compute_seconds + self.exposed_seconds).max())

    @property
    def area_imbalance(self) -> float:
        """Largest area over mean area; 1 is perfect."""
        return float(self.area.max() / self.area.mean())


def predict(plan: RowPlan, cost: CostModel) -> Prediction:
    """Predict one attention layer, forward and backward, as a ring under a row plan."""
    area = _by_step(plan.areas)
    received, sent = _by_step(plan.received), _by_step(plan.received, is_sender=True)
    kv, gradients, machine = cost.kv_bytes, cost.kv_gradient_bytes, cost.machine
    forward = machine.forward.time(cost.forward_flops * area)
    backward = machine.backward.time(cost.backward_flops * area)
    packed = machine.copy.time(sent * kv)
    message, overlap = machine.message, machine.overlap
    exposed = _exposed(forward, packed + message.time(np.maximum(received, sent) * kv), overlap)
    incoming, outgoing = received * kv + sent * gradients, sent * kv + received * gradients
    exposed += _exposed(backward, packed + message.time(np.maximum(incoming, outgoing)), overlap)
    added = machine.copy.time(sent * gradients)  # gradients that came home
    return Prediction(
        area=area.sum(axis=1),
        compute_seconds=(forward + backward + added).sum(axis=1),
        exposed_seconds=exposed,
    )


def traffic_share(plan: RowPlan) -> np.ndarray:
    """Keys each rank receives over those of a full ring, (R - 1) * T / R; float64 [R]."""
    ring = (plan.cp_size - 1) * plan.row_length // plan.cp_size
    return plan.received.sum(axis=1) / max(1, ring)


def least_worst_share(plan: RowPlan) -> float:
    """What the worst rank's share is at least, in any layout of equal tokens per rank.

    The rank that holds the end of the longest document sees all of it and holds at most T / R.
    """
    held = plan.row_length // plan.cp_size
    ring = (plan.cp_size - 1) * held
    return max(0, int(plan.doc_lengths.max()) - held) / max(1, ring)


def _by_step(matrix: np.ndarray, is_sender: bool = False) -> np.ndarray:
    """Reorder [query rank, key rank] to [rank, step]; as sender, a rank's row is its keys'."""
    ranks = np.arange(len(matrix))[:, None]
    steps = np.arange(len(matrix))[None, :]
    if is_sender:
        return matrix[(ranks + steps) % len(matrix), ranks]
    return matrix[ranks, (ranks - steps) % len(matrix)]


def _exposed(compute: np.ndarray, transfer: np.ndarray, overlap: float) -> np.ndarray:
    """Seconds that messages cost each rank; compute and transfer in seconds, [R, steps]."""
    transfer, compute = transfer[:, 1:], compute[:, :-1]
    return (transfer - overlap * np.minimum(transfer, compute)).sum(axis=1)


def kv_copies(num_heads: int, num_kv_heads: int, size: int) -> int:
    """How often each kv head is repeated so that `size` ranks can share query and kv heads.

    Raises:
        ValueError: the query heads do not divide by `size`.
    """
    if num_heads % size:
        raise ValueError(
            f"ulysses: {num_heads} query heads (of this tp rank) cannot be shared by {size} ranks, "
            "even with repeated kv heads; the ranks that share heads must divide the query "
            "heads: use cp_comm 'ring', or 'ulysses_ring' with a smaller cp_ulysses"
        )
    return math.lcm(num_kv_heads, size) // num_kv_heads


def candidate_comms(row_length: int, cp_size: int, cost: CostModel) -> list[Comm]:
    """The modes that rows of a length can use on `cp_size` ranks, the preferred one first."""
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
    if comm.ulysses_size == 1:
        return predict(plan, cost).seconds
    copies = kv_copies(cost.num_heads, cost.num_kv_heads, comm.ulysses_size)
    cost = replace(cost, num_kv_heads=cost.num_kv_heads * copies)
    inside = replace(
        cost,
        num_heads=cost.num_heads // comm.ulysses_size,
        num_kv_heads=cost.num_kv_heads // comm.ulysses_size,
    )
    held = plan.row_length // plan.cp_size
    exchanged = _all_to_all_seconds(held, cost, comm.ulysses_size, has_copies=copies > 1)
    return exchanged + predict(plan.merged(comm.ulysses_size), inside).seconds


def choose_fastest(seconds: Mapping[Comm, float]) -> Comm:
    """The fastest mode, or the preferred one where that is about as fast; see `compare_comms`."""
    preferred, fastest = next(iter(seconds)), min(seconds, key=lambda comm: seconds[comm])
    return preferred if seconds[preferred] <= SAME_TIME * seconds[fastest] else fastest


def _all_to_all_seconds(held: int, cost: CostModel, size: int, has_copies: bool) -> float:
    """All-to-alls of a rank with `held` tokens: q, k, v and out, and what the backward sends."""
    q = cost.num_heads * cost.head_dim * cost.number_bytes  # also of out, dout and dq
    gradients = cost.kv_gradient_bytes if has_copies else cost.kv_bytes
    per_token = [q + cost.kv_bytes, q, q, q + gradients]
    if cost.is_recomputed:
        per_token.append(2 * q + cost.kv_bytes)
    link, copy = cost.machine.all_to_all_among(size), cost.machine.copy
    leaving = (size - 1) / size
    # each is packed by rank and sorted into global order
    return sum(
        float(link.time(held * each * leaving) + copy.time(2 * held * each)) for each in per_token
    )


def _gather_seconds(plan: RowPlan, cost: CostModel) -> float:
    """All-gather, attention on the whole row's keys, reduce-scatter of its gradients in fp32."""
    machine, length = cost.machine, plan.row_length
    away = length - length // plan.cp_size
    area = plan.areas.sum(axis=1).max()
    forward = machine.gather.time(away * cost.kv_bytes) + machine.copy.time(length * cost.kv_bytes)
    forward += machine.forward.time(cost.forward_flops * area)
    gradients = cost.kv_gradient_bytes
    # dK and dV are rounded and stacked, then cast and sorted into rank order
    backward = machine.copy.time(2 * length * (cost.kv_bytes + gradients))
    work = machine.backward.time(cost.backward_flops * area)
    backward += machine.scatter.time(away * gradients) + work
    return float((2 if cost.is_recomputed else 1) * forward + backward)
