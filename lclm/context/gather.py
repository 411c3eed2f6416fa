"""Context-parallel attention by gathering keys: simple, exact, and the oracle of the ring.

Every rank collects the keys and values of the whole row, in global order, and attends with its own
queries. The backward pass is the dual: gradients of all keys are summed over the ranks and each
rank keeps its own (as in Llama 3's training, arXiv 2407.21783, section 3.3.2).
"""

from typing import Any

import torch
import torch.distributed as dist

from lclm.context.agreement import Agreement
from lclm.context.plan.row_plan import RowPlan
from lclm_kernels.interval_attention import interval_attention, make_plan


class _GatherFromContextRegion(torch.autograd.Function):
    """Shards `[T / R, ...]` of all ranks of a group to the row `[T, ...]` in global order.

    `order` is `RowPlan.gather_order`. The gradient is summed over the ranks and cut back to the
    local `[T / R, ...]`.
    """

    @staticmethod
    def forward(
        ctx: Any, shard: torch.Tensor, order: torch.Tensor, group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.save_for_backward(order)
        ctx.group = group
        ctx.num_local = shard.shape[0]
        by_rank = shard.new_empty(shard.shape[0] * group.size(), *shard.shape[1:])
        dist.all_gather_into_tensor(by_rank, shard.contiguous(), group=group)
        return by_rank.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (order,) = ctx.saved_tensors
        grad = grads[0]
        # Sum in fp32: every rank adds a term to each key's gradient.
        by_rank = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
        by_rank.index_copy_(0, order, grad.float())
        local = by_rank.new_empty(ctx.num_local, *grad.shape[1:])
        dist.reduce_scatter_tensor(local, by_rank, group=ctx.group)
        return local.to(grad.dtype), None, None


class GatheredAttention:
    """Attention of this rank's queries over keys gathered from all context ranks.

    Args:
        plan: of the row; intervals of the local queries in the whole row's keys are made here.
        group: one rank for each rank of the plan.
        device: where the tensors live.
    """

    def __init__(self, plan: RowPlan, group: dist.ProcessGroup, device: torch.device) -> None:
        self._intervals = make_plan(*plan.intervals(group.rank()), plan.row_length)
        self._order = torch.from_numpy(plan.gather_order()).to(device)
        self._group = group
        self._agree = Agreement(plan, "gather", (group,), device)

    def __call__(
        self,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        scale: float,
        recomputed_layer: int | None = None,
    ) -> torch.Tensor:
        """Output `[T, N, H]` for the T local tokens; a recomputed layer gathers again.

        Raises:
            ValueError: the ranks hold different plans.
            ExchangeError: a rank is lost.
        """
        self._agree()
        kv = torch.stack([k_TKH, v_TKH], dim=1)
        k, v = _GatherFromContextRegion.apply(kv, self._order, self._group).unbind(1)
        return interval_attention(q_TNH, k, v, self._intervals, scale)
