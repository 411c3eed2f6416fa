"""Interval attention on NVIDIA GPUs from compute capability 8.0 on: launches of the Triton kernels.

Letters: T query tokens, S key tokens, N query heads, K kv heads, G = N / K, H head size.
"""

import contextlib
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ..backend import on_device
from ..tensors import with_contiguous_rows
from .call import BackwardCall, ForwardCall
from .tilings import (
    STATS_BLOCK,
    TMA_ALIGNMENT,
    Tiling,
    choose_tiling,
    delta_block,
    padded_head_dim,
    use_tma_for,
)
from .triton_bwd import (
    attention_delta_kernel,
    attention_dkdv_kernel,
    attention_dq_kernel,
    attention_stats_kernel,
)
from .triton_fwd import attention_fwd_kernel

_LOG2_E = 1.4426950408889634


def triton_fwd(call: ForwardCall) -> None:
    """See `ForwardCall`; if fresh, every element of out and lse is written."""
    q_TNH, k_SKH, v_SKH, plan, scale, out_TNH, lse_NT, is_fresh = call
    device, head_dim = q_TNH.device, q_TNH.shape[2]
    num_queries, num_keys = plan.num_queries, plan.num_keys
    num_kv_heads = k_SKH.shape[1]
    num_groups = q_TNH.shape[1] // num_kv_heads
    if is_fresh and not num_keys:
        out_TNH.zero_()
        lse_NT.fill_(float("-inf"))
        return
    use_tma = use_tma_for(device, q_TNH.dtype, head_dim)
    direction = "fwd" if is_fresh else "carry"
    tiling = choose_tiling(direction, head_dim, q_TNH.dtype, use_tma)
    tiles = plan.query_tiles(tiling.block_t, tiling.block_s, device)
    num_tiles = len(tiles.table) if is_fresh else tiles.num_seen
    if not num_tiles:
        return
    lo, hi = plan.bounds(device)
    q = _Source(q_TNH, tiling.block_t, use_tma)
    k, v = (_Source(x, tiling.block_s, use_tma) for x in (k_SKH, v_SKH))
    with on_device(device), _columns_together(out_TNH) as (out,):
        attention_fwd_kernel[(num_tiles * num_groups * num_kv_heads,)](
            *(q.argument, k.argument, v.argument, out, lse_NT, lo, hi, tiles.table),
            *(*q.strides, *k.strides, *v.strides, *out.stride()[:2], *lse_NT.stride()),
            *(num_queries, num_keys, num_tiles, num_kv_heads, num_groups, scale * _LOG2_E),
            HAS_CARRY=not is_fresh,
            **_constexprs(tiling, head_dim, use_tma),
        )


def triton_delta(dout_TNH: torch.Tensor, out_TNH: torch.Tensor) -> torch.Tensor:
    """Sum over H of dout * out, fp32 [N, T], in one pass over both."""
    num_queries, num_heads, head_dim = out_TNH.shape
    delta = torch.empty(num_heads, num_queries, dtype=torch.float32, device=out_TNH.device)
    if delta.numel():
        dout, out = (with_contiguous_rows(x) for x in (dout_TNH, out_TNH))
        block = delta_block(head_dim)
        with on_device(out.device):
            attention_delta_kernel[(triton.cdiv(num_queries, block), num_heads)](
                *(dout, out, delta, *dout.stride()[:2], *out.stride()[:2], *delta.stride()),
                num_queries,
                HEAD_DIM=head_dim,
                BLOCK_H=padded_head_dim(head_dim),
                BLOCK_T=block,
                num_warps=4,
            )
    return delta


def triton_bwd(call: BackwardCall) -> None:
    """See `BackwardCall`. Deterministic."""
    dout_TNH, q_TNH, k_SKH, v_SKH, _, lse_NT, delta_NT, plan, scale, *accumulators = call
    device, head_dim = q_TNH.device, q_TNH.shape[2]
    num_kv_heads = k_SKH.shape[1]
    num_groups = q_TNH.shape[1] // num_kv_heads
    counts = (plan.num_queries, plan.num_keys)
    use_tma = use_tma_for(device, q_TNH.dtype, head_dim)
    dq_tiling, dkdv_tiling = (
        choose_tiling(direction, head_dim, q_TNH.dtype, use_tma) for direction in ("dq", "dkdv")
    )
    key_tiles = plan.key_tiles(dkdv_tiling.block_s, dkdv_tiling.block_t, device)
    query_tiles = plan.query_tiles(dq_tiling.block_t, dq_tiling.block_s, device)
    if not query_tiles.num_seen:
        return
    dout_TNH = dout_TNH.to(q_TNH.dtype)
    lo, hi = plan.bounds(device)
    with on_device(device), _columns_together(*accumulators) as (dq, dk, dv):
        stats = _build_stats(lse_NT, delta_NT, lo, hi)

        def arguments(tiling: Tiling) -> tuple[list[Any], list[int]]:
            rows = [_Source(x, tiling.block_t, use_tma) for x in (q_TNH, dout_TNH)]
            keys = [_Source(x, tiling.block_s, use_tma) for x in (k_SKH, v_SKH)]
            sources = [rows[0], *keys, rows[1]]
            strides = [stride for source in sources for stride in source.strides]
            stats_argument = stats
            if use_tma:
                block = [1, tiling.block_t]
                stats_argument = TensorDescriptor.from_tensor(stats, block)
            return [*(s.argument for s in sources), stats_argument], [*strides, stats.stride(0)]

        sources, strides = arguments(dq_tiling)
        num_tiles = query_tiles.num_seen
        attention_dq_kernel[(num_tiles * num_groups * num_kv_heads,)](
            *(*sources, dq, lo, hi, query_tiles.table),
            *(*strides, *dq.stride()[:2]),
            *(*counts, num_tiles, num_kv_heads, num_groups, scale),
            **_constexprs(dq_tiling, head_dim, use_tma),
        )
        sources, strides = arguments(dkdv_tiling)
        num_tiles = key_tiles.num_seen
        attention_dkdv_kernel[(num_tiles * num_kv_heads,)](
            *(*sources, dk, dv, *plan.key_bounds(device), key_tiles.table),
            *(*strides, *dk.stride()[:2], *dv.stride()[:2]),
            *(*counts, num_tiles, num_kv_heads, num_groups, scale),
            **_constexprs(dkdv_tiling, head_dim, use_tma),
        )


class _Source:
    """q, k, v or dout [tokens, heads, H] as a kernel reads it; copied only if it cannot be read."""

    def __init__(self, x: torch.Tensor, block: int, use_tma: bool) -> None:
        if x.stride(2) != 1 or (use_tma and not _is_aligned(x)):
            x = x.clone(memory_format=torch.contiguous_format)
        if use_tma:
            shape = (x.shape[1], x.shape[0], x.shape[2])
            strides = (x.stride(1), x.stride(0), 1)
            block_shape = [1, block, padded_head_dim(x.shape[2])]
            self.argument: Any = TensorDescriptor(x, list(shape), list(strides), block_shape)
            self.strides: tuple[int, int] = (0, 0)  # not read
        else:
            self.argument = x
            self.strides = (x.stride(0), x.stride(1))


def _is_aligned(x: torch.Tensor) -> bool:
    """Whether TMA can read x: 16-byte aligned, and no dim lies upon itself."""
    strides = (x.stride(0), x.stride(1))
    return x.data_ptr() % TMA_ALIGNMENT == 0 and all(
        stride > 0 and stride * x.element_size() % TMA_ALIGNMENT == 0 for stride in strides
    )


def _build_stats(
    lse_NT: torch.Tensor, delta_NT: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor
) -> torch.Tensor:
    """fp32 [2N, T + padding] as attention_stats_kernel writes it.

    A step may start at any row, so a whole block must exist behind the last one.
    """
    num_heads, num_queries = lse_NT.shape
    num_blocks = num_queries // STATS_BLOCK + 2
    shape = (2 * num_heads, num_blocks * STATS_BLOCK)
    stats = torch.empty(shape, dtype=torch.float32, device=lse_NT.device)
    with on_device(stats.device):
        attention_stats_kernel[(num_blocks, num_heads)](
            *(lse_NT, delta_NT, lo, hi, stats),
            *(*lse_NT.stride(), *delta_NT.stride(), stats.stride(0), num_queries, num_heads),
            BLOCK_T=STATS_BLOCK,
            num_warps=4,
        )
    return stats


def _constexprs(tiling: Tiling, head_dim: int, use_tma: bool) -> dict[str, Any]:
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_H": padded_head_dim(head_dim),
        "BLOCK_T": tiling.block_t,
        "BLOCK_S": tiling.block_s,
        "USE_TMA": use_tma,
        "PRECISION": "ieee",
        "num_warps": tiling.num_warps,
        "num_stages": tiling.num_stages,
    }


@contextlib.contextmanager
def _columns_together(*accumulators: torch.Tensor):
    """The accumulators with contiguous columns; what had to be copied is written back."""
    together = [with_contiguous_rows(x) for x in accumulators]
    yield together
    for x, copied in zip(accumulators, together):
        if copied is not x:
            x.copy_(copied)
