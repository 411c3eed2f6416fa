"""Ulysses attention: an all-to-all swaps a part of the tokens for a part of the heads.

Each rank then holds all tokens of its group for some heads, attends, and the dual all-to-all brings
the output home (Jacobs et al., DeepSpeed Ulysses, arXiv 2309.14509). Over a group of groups, a ring
runs between ranks that hold the same heads (Fang and Zhao, arXiv 2405.07719): `ulysses x ring`.

Letters: U ranks that share heads, T local tokens, N query heads, K kv heads, H head size.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from lclm.context.agreement import Agreement
from lclm.context.exchange import HEADS, start_all_to_all
from lclm.context.plan.cost import kv_copies
from lclm.context.plan.row_plan import RowPlan
from lclm.context.ring import ContextAttention, RingAttention, Tensors


class HeadExchange:
    """The all-to-all of U ranks and its dual.

    Args:
        positions: sorted global positions of each rank's tokens, int64 `[T]` each.
        group: the U ranks.
        device: where the tensors live.
    """

    def __init__(
        self, positions: Sequence[np.ndarray], group: dist.ProcessGroup, device: torch.device
    ) -> None:
        self._group = group
        order = np.argsort(np.concatenate(positions), kind="stable")
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        self._order = torch.from_numpy(order).to(device)
        self._inverse = torch.from_numpy(inverse).to(device)

    def to_heads(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors `[T, n, H]` to `[U * T, n / U, H]`, tokens in global order.

        Each n must be a multiple of U. The tensors travel as one message per pair of ranks.
        """
        size = self._group.size()
        split = [x.unflatten(1, (size, -1)) for x in parts]  # [T, U, n / U, H]
        by_rank = torch.cat(split, dim=2).transpose(0, 1).contiguous()
        received = self._all_to_all(by_rank).flatten(0, 1).index_select(0, self._order)
        return list(received.split([x.shape[2] for x in split], dim=1))

    def to_tokens(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The dual of `to_heads`: tensors `[U * T, n / U, H]` to `[T, n, H]`."""
        size = self._group.size()
        by_rank = torch.cat(list(parts), dim=1).index_select(0, self._inverse)
        received = self._all_to_all(by_rank.unflatten(0, (size, -1)))  # [U, T, n / U, H]
        split = received.transpose(0, 1).split([x.shape[1] for x in parts], dim=2)
        return [x.flatten(1, 2) for x in split]

    def _all_to_all(self, by_rank: torch.Tensor) -> torch.Tensor:
        """Row j of the first dim goes to rank j; row j of the result is from rank j."""
        received, rank = torch.empty_like(by_rank), self._group.rank()
        what = "all-to-all over heads"
        transfer = start_all_to_all(what, self._group, HEADS, by_rank, received)
        received[rank].copy_(by_rank[rank])
        transfer.wait()
        transfer.finish()
        return received


class UlyssesAttention:
    """Attention with heads shared among U ranks, around that of the ranks with the same heads.

    kv heads that U does not divide are repeated to the least common multiple; gradients of the
    copies are summed in fp32.

    Args:
        heads: the exchange among the U ranks.
        inner: attention over the ranks with the same heads.
        copies: how often each kv head is repeated, see `kv_copies`.
    """

    def __init__(self, heads: HeadExchange, inner: RingAttention, copies: int) -> None:
        self._heads, self._inner, self._copies = heads, inner, copies

    def forward(
        self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, Tensors]:
        """See `DistributedAttention`; saved are the tensors of this rank's heads."""
        q, k, v = self._heads.to_heads([q_TNH, self._repeat(k_TKH), self._repeat(v_TKH)])
        out, saved = self._inner.forward(q, k, v, scale)
        (local,) = self._heads.to_tokens([out])
        return local, saved

    def recover_saved(self, local: Tensors) -> Tensors:
        """See `DistributedAttention`; q, k, v and out travel again."""
        q_TNH, k_TKH, v_TKH, out_TNH, lse = local
        parts = [q_TNH, self._repeat(k_TKH), self._repeat(v_TKH), out_TNH]
        return (*self._heads.to_heads(parts), lse)

    def backward(self, dout_TNH: torch.Tensor, saved: Tensors, scale: float) -> Tensors:
        """See `DistributedAttention`."""
        (dout,) = self._heads.to_heads([dout_TNH])
        dq, dk, dv = self._inner.backward(dout, saved, scale)
        dq = dq.to(dout.dtype)
        if self._copies == 1:
            # Each is final: rounding it before it goes home is rounding it once.
            dq, dk, dv = self._heads.to_tokens([dq, dk.to(dq.dtype), dv.to(dq.dtype)])
            return dq, dk, dv
        (dq,) = self._heads.to_tokens([dq])
        dk, dv = (
            x.unflatten(1, (-1, self._copies)).sum(dim=2) for x in self._heads.to_tokens([dk, dv])
        )
        return dq, dk, dv

    def _repeat(self, x_TKH: torch.Tensor) -> torch.Tensor:
        return x_TKH.repeat_interleave(self._copies, dim=1) if self._copies > 1 else x_TKH


def build_ulysses(
    plan: RowPlan,
    num_heads: int,
    num_kv_heads: int,
    group: dist.ProcessGroup,
    device: torch.device,
    head_group: dist.ProcessGroup | None = None,
    ring_group: dist.ProcessGroup | None = None,
) -> ContextAttention:
    """Ulysses attention of one row, or ulysses x ring.

    Args:
        plan: one rank for each rank of the group.
        num_heads, num_kv_heads: query and kv heads of the layers (of this tp rank).
        group: the whole context group of R ranks.
        head_group: ranks that share heads, U that follow one another in `group`; None: all.
        ring_group: ranks of equal place in their head groups, R / U of them; None: just this one.

    Raises:
        ValueError: U does not divide the query heads.
    """
    head_group = group if head_group is None else head_group
    size = head_group.size()
    first = group.rank() - head_group.rank()
    positions = [plan.positions(rank) for rank in range(first, first + size)]
    merged = plan.merged(size)
    copies = kv_copies(num_heads, num_kv_heads, size)
    attention = UlyssesAttention(
        HeadExchange(positions, head_group, device),
        RingAttention(merged, ring_group, device),
        copies,
    )
    groups = (group,) if ring_group is None else (group, ring_group)
    return ContextAttention(attention, Agreement(plan, f"ulysses of {size}", groups, device))
