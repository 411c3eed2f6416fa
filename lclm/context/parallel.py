"""Deals the rows of a stage out to context ranks, and makes the attention that joins them again."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from lclm.context.gather import GatheredAttention
from lclm.context.plan.cost import Comm, CostModel
from lclm.context.plan.layouts import build_row_plan
from lclm.context.plan.row_plan import RowPlan
from lclm.context.ring import build_ring
from lclm.context.ulysses import build_ulysses
from lclm_kernels.interval_attention import interval_attention, make_plan


@dataclass(frozen=True)
class ContextParallel:
    """One layout and one communication mode; makes plan and attention of each row.

    Attributes:
        layout: see `lclm.context.plan.layouts.build_row_plan`.
        comm: how queries meet keys.
        cost: by which rows of the layout "auto" are dealt out; other layouts need none.
        num_heads: query and kv heads of a layer (of this tp rank).
        group: the context ranks.
        device: where tensors live.
        head_group, ring_group: of a ulysses_ring, see `build_ulysses`.
    """

    layout: str
    comm: Comm
    cost: CostModel | None
    num_heads: tuple[int, int]
    group: dist.ProcessGroup
    device: torch.device
    head_group: dist.ProcessGroup | None = None
    ring_group: dist.ProcessGroup | None = None

    def plan(self, doc_lengths: np.ndarray) -> RowPlan:
        """Deal out a row; equal on all ranks."""
        size = self.group.size()
        # one rank holds a row whole, whatever its length
        layout = self.layout if size > 1 else "contiguous"
        return build_row_plan(layout, doc_lengths, size, None, self.cost, self.comm)

    def attention(self, plan: RowPlan) -> Callable[..., torch.Tensor]:
        """Attention over the row of a plan, an `Attend` of the model; what depends on the mask is
        made here, once."""
        group, device = self.group, self.device
        if plan.cp_size == 1:  # every key is here
            own = make_plan(*plan.intervals(0), plan.row_length)
            return lambda q, k, v, scale, layer=None: interval_attention(q, k, v, own, scale)
        if self.comm.name == "gather":
            return GatheredAttention(plan, group, device)
        if self.comm.name == "ring":
            return build_ring(plan, group, device)
        parts = (self.head_group, self.ring_group)
        return build_ulysses(plan, *self.num_heads, group, device, *parts)
