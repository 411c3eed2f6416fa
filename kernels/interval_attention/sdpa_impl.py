"""Interval attention on CUDA through the attention operators that come with PyTorch.

Letters: T query tokens, S key tokens, N query heads, K kv heads, H head size; P tiles of a part,
R rows and C keys of a tile. bf16 and fp16 parts without a mask run on the flash operator, which
takes K heads for N query heads as they are; masked parts and fp32 run on the memory-efficient one.
Each part's result is rounded to the inputs' dtype by the operator; the sums over parts are fp32.
"""

import torch
from torch.nn.functional import pad

from .parts import parts_bwd, parts_fwd
from .plan import IntervalPlan

__all__ = ["sdpa_bwd", "sdpa_fwd"]

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
_EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention.default
_EFFICIENT_BACKWARD = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default
_BIAS_ALIGNMENT = 16  # elements; the efficient operator loads the bias in vectors of up to 16
_LSE_ALIGNMENT = 32  # rows; the efficient operator's lse is padded so (kAlignLSE)
_MAX_FLASH_HEAD_DIM = 256


class _CudaDense:
    """The two CUDA operators behind one face; see `parts.DenseAttention`."""

    @staticmethod
    def fwd(q, k, v, bias, is_causal, scale):
        if _is_flash(q, bias):
            out, lse = _FLASH(q, k, v, 0.0, is_causal, False, scale=scale)[:2]
            return out, lse
        k, v = (_repeat_heads(x, q.shape[1]) for x in (k, v))
        bias = _align_bias(bias, q)
        out, lse = _EFFICIENT(q, k, v, bias, True, 0.0, is_causal, scale=scale)[:2]
        return out, lse[..., : q.shape[2]]

    @staticmethod
    def bwd(dout, q, k, v, out, lse, bias, is_causal, scale):
        # No dropout: the operators want the state of its random numbers and do not read it.
        no_state = torch.zeros((), dtype=torch.int64, device=q.device)
        if _is_flash(q, bias):
            sizes = (q.shape[2], k.shape[2])
            lse = lse.contiguous()  # read by address, without strides
            return _FLASH_BACKWARD(
                *(dout, q, k, v, out, lse, None, None, *sizes, 0.0, is_causal),
                *(no_state, no_state),
                scale=scale,
            )
        num_kv_heads = k.shape[1]
        k, v = (_repeat_heads(x, q.shape[1]) for x in (k, v))
        # inf: a padding row's softmax is 0
        lse = pad(lse, (0, -lse.shape[2] % _LSE_ALIGNMENT), value=float("inf"))
        dq, dk, dv, _ = _EFFICIENT_BACKWARD(
            *(dout, q, k, v, _align_bias(bias, q), out, lse, no_state, no_state, 0.0),
            [True, True, True, False],
            is_causal,
            scale=scale,
        )
        dk, dv = (x.unflatten(1, (num_kv_heads, -1)).float().sum(dim=2) for x in (dk, dv))
        return dq, dk, dv


def _is_flash(q: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return bias is None and q.dtype != torch.float32 and q.shape[-1] <= _MAX_FLASH_HEAD_DIM


def _repeat_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)


def _align_bias(bias: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    """[P, 1, R, C] -> view [P, N, R, C] whose rows start at aligned addresses."""
    if bias is None:
        return None
    num_keys = bias.shape[3]
    aligned = pad(bias, (0, -num_keys % _BIAS_ALIGNMENT))[..., :num_keys]
    return aligned.expand(-1, q.shape[1], -1, -1)


def _prepare(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if x.shape[-1] % 8:
        raise ValueError(
            f"interval_attention: implementation 'sdpa' needs a head size that is a multiple of 8, "
            f"got {x.shape[-1]}; use implementation='reference' or another head size"
        )
    return x.to(dtype).contiguous()


def sdpa_fwd(
    q_TNH: torch.Tensor,
    k_SKH: torch.Tensor,
    v_SKH: torch.Tensor,
    plan: IntervalPlan,
    scale: float,
    out_TNH: torch.Tensor,
    lse_NT: torch.Tensor,
    is_fresh: bool,
) -> None:
    """Merge the attention over these keys into (out, lse), fp32, in place."""
    q, k, v = (_prepare(x, q_TNH.dtype) for x in (q_TNH, k_SKH, v_SKH))
    parts_fwd(_CudaDense, q, k, v, plan, scale, out_TNH, lse_NT, is_fresh)


def sdpa_bwd(
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

    The operators compute delta from dout and out themselves.
    """
    dtype = q_TNH.dtype
    dout, q, k, v, out = (_prepare(x, dtype) for x in (dout_TNH, q_TNH, k_SKH, v_SKH, out_TNH))
    parts_bwd(_CudaDense, dout, q, k, v, out, lse_NT, plan, scale, dq_TNH, dk_SKH, dv_SKH)
