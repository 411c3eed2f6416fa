"""Ring attention: keys pass by the queries, step by step, and the softmax goes on where it was.

Every rank keeps its queries; the keys that they see arrive along the row plan while attention works
on those that came before. Forward carries (out, lse) in fp32 from step to step; backward works with
the out, lse and delta of the whole row, so that each step's gradients are exact (Liu et al., Ring
Attention, arXiv 2310.01889; the carried form needs no merge of rounded partial outputs).
"""

from typing import Any, Protocol

import torch
import torch.distributed as dist

from lclm.context.agreement import Agreement
from lclm.context.exchange import KeyExchange, Transfer
from lclm.context.plan.row_plan import RowPlan
from lclm_kernels.interval_attention import backward, forward

Tensors = tuple[torch.Tensor, ...]


class DistributedAttention(Protocol):
    """Attention of local queries over keys of all ranks of a group: forward and backward.

    `_ContextAttentionFunction` makes it differentiable. What forward saves, backward needs: q, k,
    v, out and lse, in whatever arrangement of tokens and heads the implementation uses inside.
    """

    def forward(
        self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, Tensors]:
        """Return out `[T, N, H]` in q's dtype and `saved`."""

    def recover_saved(self, local: Tensors) -> Tensors:
        """Make `saved` again from the local q, k, v and out, and the saved lse."""

    def backward(self, dout_TNH: torch.Tensor, saved: Tensors, scale: float) -> Tensors:
        """Return dq, dk and dv of the local tokens."""


class RingAttention:
    """The ring of one row on one rank; intervals of every step are made here, once.

    Args:
        plan: one rank for each rank of the group.
        group: None where the plan has one rank.
        device: where the tensors live.
    """

    def __init__(
        self, plan: RowPlan, group: dist.ProcessGroup | None, device: torch.device
    ) -> None:
        self._exchange = KeyExchange(plan, group, device)
        self._is_alone = not any(step.num_received for step in self._exchange.steps)

    def forward(
        self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, Tensors]:
        """See `DistributedAttention`; saved are q, k, v, out and lse of the local tokens."""
        wide = torch.promote_types(q_TNH.dtype, torch.float32)
        # The first keys may be written instead of merged where no precision is lost by it.
        is_fresh = self._is_alone or q_TNH.dtype == wide
        out = q_TNH.new_zeros(0) if is_fresh else q_TNH.new_zeros(q_TNH.shape, dtype=wide)
        lse = q_TNH.new_full(q_TNH.shape[1::-1], float("-inf"), dtype=wide)
        for step, k, v in self._exchange.fetch(k_TKH, v_TKH, is_eager=True):
            if step.number == 0 and is_fresh:
                out, lse = forward(q_TNH, k, v, step.intervals, scale)
            elif step.num_received:
                forward(q_TNH, k, v, step.intervals, scale, carry=(out, lse))
            del k, v
        out = out.to(q_TNH.dtype)
        return out, (q_TNH, k_TKH, v_TKH, out, lse)

    def recover_saved(self, local: Tensors) -> Tensors:
        """See `DistributedAttention`; nothing travels."""
        return local

    def backward(self, dout_TNH: torch.Tensor, saved: Tensors, scale: float) -> Tensors:
        """See `DistributedAttention`; the gradients are fp32 (fp64 for fp64)."""
        q, k_TKH, v_TKH, out, lse = saved
        delta = (dout_TNH.to(lse.dtype) * out.to(lse.dtype)).sum(dim=-1).t()
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        own = lse.new_zeros(2, *k_TKH.shape)
        before: tuple[Transfer, torch.Tensor] | None = None
        for step, k, v in self._exchange.fetch(k_TKH, v_TKH, is_eager=False):
            grads = own if step.number == 0 else lse.new_zeros(2, *k.shape)
            if step.num_received:
                row = (out, lse, delta, step.intervals, scale)
                backward(dout_TNH, q, k, v, *row, dq, grads[0], grads[1])
            del k, v
            if step.number:
                after = (self._exchange.gradients(step, grads), step.sent)
                _add_home(before, own)
                before = after
            del grads
        _add_home(before, own)
        return dq, own[0], own[1]


def _add_home(arrival: tuple[Transfer, torch.Tensor] | None, own_2TKH: torch.Tensor) -> None:
    """Add gradients that other ranks found for the local tokens of an index."""
    if arrival is None:
        return
    transfer, index = arrival
    (grads,) = transfer.wait()
    own_2TKH.index_add_(1, index, grads)
    transfer.finish()


class _ContextAttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        attention: DistributedAttention,
        scale: float,
        known: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        if known is None:
            out, saved = attention.forward(q_TNH, k_TKH, v_TKH, scale)
        else:
            out = known[0]
            saved = (q_TNH, k_TKH, v_TKH, *known)
        ctx.save_for_backward(*saved)
        ctx.arguments = (attention, scale, known is not None)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        attention, scale, is_local = ctx.arguments
        saved = ctx.saved_tensors
        if is_local:
            saved = attention.recover_saved(saved)
        found = attention.backward(grads[0], saved, scale)
        return (*(grad.to(grads[0].dtype) for grad in found), None, None, None)


class ContextAttention:
    """Attention of one micro-batch over the ranks of a context group; see `lclm.model.row.Attend`.

    Before the first exchange the ranks compare their plans. A layer that is computed twice, first
    without gradients and again in the backward pass, gives its number: the first time its out and
    lse are saved here, the second time they are taken from here and nothing is sent.
    """

    def __init__(self, attention: DistributedAttention, agree: Agreement) -> None:
        self._attention, self._agree = attention, agree
        self._known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(
        self,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        scale: float,
        recomputed_layer: int | None = None,
    ) -> torch.Tensor:
        """Output `[T, N, H]` of the T local tokens.

        Raises:
            ValueError: the ranks hold different plans, or heads that the group cannot share.
            RuntimeError: a layer is computed again before the first time, or a third time.
            ExchangeError: a rank is lost.
        """
        self._agree()
        layer, known = recomputed_layer, None
        if layer is not None and torch.is_grad_enabled():
            known = self._known.pop(layer, None)
            if known is None:
                raise RuntimeError(
                    f"context attention: layer {layer} is recomputed, but its first forward "
                    "(without gradients) has not run or its result is used up"
                )
        elif layer is not None:
            if layer in self._known:
                raise RuntimeError(
                    f"context attention: layer {layer} ran twice without gradients; one object "
                    "serves one micro-batch"
                )
            out, saved = self._attention.forward(q_TNH, k_TKH, v_TKH, scale)
            self._known[layer] = (out, saved[-1])
            return out
        return _ContextAttentionFunction.apply(q_TNH, k_TKH, v_TKH, self._attention, scale, known)


def build_ring(plan: RowPlan, group: dist.ProcessGroup, device: torch.device) -> ContextAttention:
    """Ring attention of one row over a group with one rank per rank of the plan."""
    agree = Agreement(plan, "ring", (group,), device)
    return ContextAttention(RingAttention(plan, group, device), agree)
