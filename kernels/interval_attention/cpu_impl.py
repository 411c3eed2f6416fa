"""Interval attention on CPU through PyTorch's fused CPU attention.

Letters: T query tokens, S key tokens, N query heads, K kv heads, H head size.
The operator rounds its result and its gradients to the inputs' dtype, so bf16 and fp16 inputs are
cast to fp32 first and what leaves is rounded once. It takes K heads for N query heads as they are.
"""

import torch

from .parts import parts_bwd, parts_fwd
from .plan import IntervalPlan

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class _CpuFlash:
    """PyTorch's CPU flash attention. Its causal mask starts top-left, which for squares is the
    only one; zero rows or keys would kill the process, and no part has any."""

    @staticmethod
    def fwd(q, k, v, bias, is_causal, scale):
        return _FLASH(q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale)

    @staticmethod
    def bwd(dout, q, k, v, out, lse, bias, is_causal, scale):
        return _FLASH_BACKWARD(dout, q, k, v, out, lse, 0.0, is_causal, attn_mask=bias, scale=scale)


def _prepare(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def cpu_fwd(
    q_TNH: torch.Tensor,
    k_SKH: torch.Tensor,
    v_SKH: torch.Tensor,
    plan: IntervalPlan,
    scale: float,
    out_TNH: torch.Tensor,
    lse_NT: torch.Tensor,
    is_fresh: bool,
) -> None:
    """Merge the attention over these keys into (out, lse), fp32 or fp64, in place."""
    q, k, v = (_prepare(x, out_TNH.dtype) for x in (q_TNH, k_SKH, v_SKH))
    parts_fwd(_CpuFlash, q, k, v, plan, scale, out_TNH, lse_NT, is_fresh)


def cpu_bwd(
    dout_TNH: torch.Tensor,
    q_TNH: torch.Tensor,
    k_SKH: torch.Tensor,
    v_SKH: torch.Tensor,
    out_TNH: torch.Tensor,
    lse_NT: torch.Tensor,
    plan: IntervalPlan,
    scale: float,
    dq_TNH: torch.Tensor,
    dk_SKH: torch.Tensor,
    dv_SKH: torch.Tensor,
) -> None:
    """Add the gradients of these keys' part of the row to dq, dk, dv.

    The operator computes delta from dout and out itself.
    """
    dtype = dq_TNH.dtype
    dout, q, k, v, out = (_prepare(x, dtype) for x in (dout_TNH, q_TNH, k_SKH, v_SKH, out_TNH))
    parts_bwd(_CpuFlash, dout, q, k, v, out, lse_NT, plan, scale, dq_TNH, dk_SKH, dv_SKH)
