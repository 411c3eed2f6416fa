"""Predicted time of context-parallel attention under a row plan, rank by rank.

The ring of the exchange: at step 0 a rank works on its own keys, at step s on those received from
rank r - s. The transfer of step s + 1 runs under the work of step s; what it takes longer is
exposed. The backward fetches the keys again and sends their gradients home one step later.
"""

from dataclasses import dataclass, fields

import numpy as np

from lclm.context.row_plan import RowPlan


@dataclass(frozen=True)
class CostModel:
    """Rates of the machine and the shape of one attention layer.

    Defaults are H100s joined by NVLink and a Llama-3-8B layer in bf16: published FlashAttention-3
    rates on document-masked rows of 32K tokens (584 forward, 425 backward TFLOP/s) and what
    transfers between two GPUs are reported to reach (370 GB/s).
    """

    forward_flops_per_second: float = 584e12
    backward_flops_per_second: float = 425e12
    link_bytes_per_second: float = 370e9  # each direction, per rank
    step_seconds: float = 5e-6  # to start one transfer
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    kv_bytes: int = 2  # per number of K and V
    gradient_bytes: int = 4  # per number of dK and dV, which travel in fp32

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(
                    f"cost model: {field.name} is {getattr(self, field.name)}; it must be positive"
                )

    @property
    def forward_seconds_per_pair(self) -> float:
        """Two matmuls (QK, PV) of 2 * head_dim flops per visible pair and query head."""
        return 4 * self.num_heads * self.head_dim / self.forward_flops_per_second

    @property
    def backward_seconds_per_pair(self) -> float:
        """Five matmuls (QK again, dP, dV, dK, dQ)."""
        return 10 * self.num_heads * self.head_dim / self.backward_flops_per_second

    @property
    def kv_numbers(self) -> int:
        """Numbers of K and V per token."""
        return 2 * self.num_kv_heads * self.head_dim


# Machines by the link between ranks. One 400 Gb/s InfiniBand port per rank brings about 45 GB/s.
LINKS = {
    "nvlink": CostModel(),
    "infiniband": CostModel(link_bytes_per_second=45e9, step_seconds=20e-6),
}


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
    """Predict one attention layer, forward and backward, under a row plan."""
    area = _by_step(plan.areas)
    received, sent = _by_step(plan.received), _by_step(plan.received, is_sender=True)
    kv, gradients = cost.kv_numbers * cost.kv_bytes, cost.kv_numbers * cost.gradient_bytes
    forward = area * cost.forward_seconds_per_pair
    backward = area * cost.backward_seconds_per_pair
    exposed = _exposed(forward, received * kv, sent * kv, cost)
    incoming, outgoing = received * kv + sent * gradients, sent * kv + received * gradients
    exposed += _exposed(backward, incoming, outgoing, cost)
    return Prediction(
        area=area.sum(axis=1),
        received_bytes=(received * kv + incoming).sum(axis=1),
        sent_bytes=(sent * kv + outgoing).sum(axis=1),
        compute_seconds=(forward + backward).sum(axis=1),
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


def _exposed(
    compute: np.ndarray, incoming: np.ndarray, outgoing: np.ndarray, cost: CostModel
) -> np.ndarray:
    """Seconds each rank waits; compute in seconds and bytes are [R, steps]."""
    transfer = np.maximum(incoming, outgoing) / cost.link_bytes_per_second
    transfer = np.where(transfer > 0, transfer + cost.step_seconds, 0.0)
    return np.maximum(0.0, transfer[:, 1:] - compute[:, :-1]).sum(axis=1)
