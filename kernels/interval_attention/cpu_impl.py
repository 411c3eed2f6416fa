"""Interval attention on CPU: a plan's parts, each through PyTorch's fused CPU attention.

Letters: T query tokens, S key tokens, N query heads, K kv heads, H head size; P tiles of a part,
R rows and C keys of a tile. The operator rounds its result and its gradients to the inputs' dtype,
so bf16 and fp16 inputs are cast to fp32 first and what leaves is rounded once. It takes K heads for
N query heads as they are. Its causal mask starts top-left, which for squares is the only one; zero
rows or keys would kill the process, and no part has any.
"""

import torch

from ..tensors import with_contiguous_rows
from .call import BackwardCall, ForwardCall
from .plan import Part

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _prepare(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return with_contiguous_rows(x.to(dtype))


def _tiles(x: torch.Tensor, start: int, length: int, part: Part, step: int) -> torch.Tensor:
    """View of x [tokens, heads, H] as [P, heads, length, H]."""
    token, head, last = x.stride()
    return x.as_strided(
        (part.num_tiles, x.shape[1], length, x.shape[2]),
        (step * token, head, token, last),
        x.storage_offset() + start * token,
    )


def _row_tiles(x_TNH: torch.Tensor, part: Part) -> torch.Tensor:
    return _tiles(x_TNH, part.row_start, part.num_rows, part, part.row_step)


def _key_tiles(x_SKH: torch.Tensor, part: Part) -> torch.Tensor:
    return _tiles(x_SKH, part.key_start, part.num_keys, part, part.key_step)


def _lse_tiles(lse_NT: torch.Tensor, part: Part) -> torch.Tensor:
    """View of lse [N, T] as [P, N, R]."""
    head, token = lse_NT.stride()
    return lse_NT.as_strided(
        (part.num_tiles, lse_NT.shape[0], part.num_rows),
        (part.row_step * token, head, token),
        lse_NT.storage_offset() + part.row_start * token,
    )


def cpu_fwd(call: ForwardCall) -> None:
    """See `ForwardCall`; if fresh, a row's first part is written, not merged."""
    q_TNH, k_SKH, v_SKH, plan, scale, out_TNH, lse_NT, is_fresh = call
    q, k, v = (_prepare(x, out_TNH.dtype) for x in (q_TNH, k_SKH, v_SKH))
    for index, part in enumerate(plan.parts):
        bias = plan.bias(index, q.device, q.dtype)
        tiles = (_row_tiles(q, part), _key_tiles(k, part), _key_tiles(v, part))
        part_out, part_lse = _FLASH(*tiles, 0.0, part.is_causal, attn_mask=bias, scale=scale)
        out, lse = _row_tiles(out_TNH, part), _lse_tiles(lse_NT, part)
        if is_fresh and part.is_first:
            out.copy_(part_out)
            lse.copy_(part_lse)
            continue
        # share = exp(part_lse) / (exp(part_lse) + exp(lse)); 1 where lse is -inf
        share = torch.sigmoid(part_lse - lse)
        out.lerp_(part_out.to(out.dtype), share[..., None])
        lse.copy_(torch.logaddexp(lse, part_lse))


def cpu_bwd(call: BackwardCall) -> None:
    """See `BackwardCall`; the operator computes delta from dout and out itself."""
    sources = (call.dout_TNH, call.q_TNH, call.k_SKH, call.v_SKH, call.out_TNH)
    dout, q, k, v, out = (_prepare(x, call.dq_TNH.dtype) for x in sources)
    for index, part in enumerate(call.plan.parts):
        dq, dk, dv = _FLASH_BACKWARD(
            *(_row_tiles(dout, part), _row_tiles(q, part)),
            *(_key_tiles(k, part), _key_tiles(v, part)),
            *(_row_tiles(out, part), _lse_tiles(call.lse_NT, part), 0.0, part.is_causal),
            attn_mask=call.plan.bias(index, q.device, q.dtype),
            scale=call.scale,
        )
        _row_tiles(call.dq_TNH, part).add_(dq)
        _key_tiles(call.dk_SKH, part).add_(dk)
        _key_tiles(call.dv_SKH, part).add_(dv)
