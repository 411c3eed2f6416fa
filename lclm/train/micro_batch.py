"""From a row of documents to what one rank computes on: its tokens, labels and row context."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lclm.config import Config
from lclm.context.parallel import ContextParallel
from lclm.context.plan import RowPlan
from lclm.data.labels import IGNORED_LABEL, build_label_weights, build_labels
from lclm.data.stage_rows import Row
from lclm.mesh import Mesh
from lclm.model.row import RowContext
from lclm_kernels.rope import SCALING_KEYS, build_rope_table


@dataclass(frozen=True)
class MicroBatch:
    """One row's part on this rank; T is the number of local tokens."""

    tokens_BT: torch.Tensor
    """int64 `[1, T]`."""
    labels_T: torch.Tensor
    """int64 `[T]`, -100 where there is no label."""
    label_weights_T: torch.Tensor | None
    """float32 `[T]`, factor of each label's loss; None: all 1."""
    num_labels: int
    """Labels on this rank, those of weight 0 left out."""
    domain: str
    """Name of the domain that the row was drawn from."""
    row: RowContext

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on a device. Copies from pinned memory queue up like kernels; none waits."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        weights = self.label_weights_T
        return replace(
            self,
            tokens_BT=move(self.tokens_BT),
            labels_T=move(self.labels_T),
            label_weights_T=None if weights is None else move(weights),
            row=replace(self.row, cos_TH=move(self.row.cos_TH), sin_TH=move(self.row.sin_TH)),
        )


class MicroBatchBuilder:
    """Builds micro-batches for one rank of a mesh, at one RoPE base."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        context: ContextParallel,
        rope_base: float,
    ) -> None:
        scaling = config.model.rope_scaling
        self._scaling = None
        if scaling:
            self._scaling = scaling.model_dump(include={"type", *SCALING_KEYS[scaling.type]})
        self._head_size = config.model.head_size
        self._mesh, self._context = mesh, context
        self._rope_base = rope_base

    def __call__(self, row: Row, is_counted: bool = True) -> MicroBatch:
        """The micro-batch of a row on this rank's device; see `prepare`."""
        return self.prepare(row, is_counted).to(self._mesh.device)

    def prepare(self, row: Row, is_counted: bool = True) -> MicroBatch:
        """Shard a row in host memory (pinned where the device is a GPU) and plan its attention.

        Labels are made on the whole row, so none is lost at a chunk border. A row that is not
        counted has no labels: it keeps ranks in step and changes no sum.
        """
        labels = build_labels(row.tokens, row.doc_lengths)
        weights = None
        if row.token_weights is not None:
            weights = build_label_weights(row.token_weights, row.doc_lengths, labels)
        if not is_counted:
            labels[:] = IGNORED_LABEL
        plan = self._context.plan(row.attention_lengths)
        positions = plan.positions(self._mesh.cp_rank)
        local_labels = labels[positions]
        return MicroBatch(
            tokens_BT=self._pin(torch.from_numpy(row.tokens[positions])[None]),
            labels_T=self._pin(torch.from_numpy(local_labels)),
            label_weights_T=(
                None if weights is None else self._pin(torch.from_numpy(weights[positions]))
            ),
            num_labels=int((local_labels != IGNORED_LABEL).sum()),
            domain=row.domain,
            row=self._row_context(plan, positions),
        )

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory() if self._mesh.device.type == "cuda" else tensor

    def _row_context(self, plan: RowPlan, positions: np.ndarray) -> RowContext:
        in_document = positions - plan.first_visible(positions)
        cos, sin = build_rope_table(
            torch.from_numpy(in_document), self._head_size, self._rope_base, self._scaling
        )
        return RowContext(self._pin(cos), self._pin(sin), self._context.attention(plan))


def deal_rows(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Deal the rows of a global batch out to data-parallel ranks by what they cost.

    Equal counts, longest first: each round hands one row to every rank, the longest of the round to
    the rank with least so far. So ranks finish together, and their n-th micro-batches are alike.
    The loss is a sum over all rows, so which rank computes a row changes nothing (ProLong sorts
    within a step for the same reason, arXiv 2410.02660, table 15).

    Args:
        costs: predicted cost of each row, in any unit.
        num_ranks: ranks; must divide the number of rows.

    Returns:
        Row numbers of each rank, in the order of computing.
    """
    order = sorted(range(len(costs)), key=lambda row: (-costs[row], row))
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    for start in range(0, len(order), num_ranks):
        ranks = sorted(range(num_ranks), key=lambda rank: (totals[rank], rank))
        for rank, row in zip(ranks, order[start : start + num_ranks], strict=True):
            dealt[rank].append(row)
            totals[rank] += costs[row]
    return dealt


def iterate_global_batch(
    rows: Sequence[Row], build: MicroBatchBuilder, mesh: Mesh
) -> Iterator[MicroBatch]:
    """The micro-batches of this data-parallel rank: rows dp_rank, dp_rank + dp_size, ...

    Where the rows do not divide by dp_size, ranks that run out get the last row, not counted.
    """
    num_rounds = -(-len(rows) // mesh.dp_size)
    for number in range(mesh.dp_rank, num_rounds * mesh.dp_size, mesh.dp_size):
        yield build(rows[min(number, len(rows) - 1)], is_counted=number < len(rows))
