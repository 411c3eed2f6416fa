"""Predicted time of context-parallel attention under a row plan, rank by rank.

The ring of the exchange: at step 0 a rank works on its own keys, at step s on those received from
rank r - s. The transfer of step s + 1 runs under the work of step s; what it takes longer is
exposed, and so is what the machine cannot do beside attention. The backward fetches the keys again
and sends their gradients home one step later. What other ways for queries to meet keys take is in
`lclm.context.plan.comm`.
"""

from dataclasses import dataclass, fields

import numpy as np

from lclm.context.plan.rates import LINKS, Machine
from lclm.context.plan.row_plan import RowPlan


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

    def forward_seconds(self, area: np.ndarray) -> np.ndarray:
        """Two matmuls (QK, PV) of 2 * head_dim flops per visible pair and query head."""
        return self.machine.forward.time(4 * self.num_heads * self.head_dim * area)

    def backward_seconds(self, area: np.ndarray) -> np.ndarray:
        """Five matmuls (QK again, dP, dV, dK, dQ)."""
        return self.machine.backward.time(10 * self.num_heads * self.head_dim * area)

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
    received_bytes: np.ndarray  # int64, forward and backward
    sent_bytes: np.ndarray  # int64
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
    kv, gradients = cost.kv_bytes, cost.kv_gradient_bytes
    forward, backward = cost.forward_seconds(area), cost.backward_seconds(area)
    packed = cost.machine.copy.time(sent * kv)
    message = cost.machine.message
    hidden = cost.machine.hidden
    exposed = _exposed(forward, packed + message.time(np.maximum(received, sent) * kv), hidden)
    incoming, outgoing = received * kv + sent * gradients, sent * kv + received * gradients
    exposed += _exposed(backward, packed + message.time(np.maximum(incoming, outgoing)), hidden)
    added = cost.machine.copy.time(sent * gradients)  # gradients that came home
    return Prediction(
        area=area.sum(axis=1),
        received_bytes=(received * kv + incoming).sum(axis=1),
        sent_bytes=(sent * kv + outgoing).sum(axis=1),
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


def _exposed(compute: np.ndarray, transfer: np.ndarray, hidden: float) -> np.ndarray:
    """Seconds that messages cost each rank; compute and transfer in seconds, [R, steps]."""
    transfer, compute = transfer[:, 1:], compute[:, :-1]
    return (transfer - hidden * np.minimum(transfer, compute)).sum(axis=1)
