"""RoPE in one Triton launch, in place or into another tensor; the backward negates the sines.

Letters: T tokens, H head size, P heads of a group as they lie in memory, of which the first R are
rotated. Packed qkv is [T, K, G + 2, H] with P = G + 2 and R = G + 1 (the value head stays); queries
or keys alone are one group with P = R = N.
"""

import torch
import triton
import triton.language as tl

from ..backend import on_device

_TILE_ROWS = 32  # heads of tokens per program: 8 bf16 per thread and half at H 128


@triton.jit
def rope_kernel(
    x_ptr, out_ptr, cos_ptr, sin_ptr,
    num_tokens, num_heads, x_stride_t, x_stride_k, x_stride_p, out_stride_t, out_stride_k,
    out_stride_p,
    HEADS_PER_GROUP: tl.constexpr, ROTATED_PER_GROUP: tl.constexpr, HALF: tl.constexpr,
    IS_INVERSE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Turn BLOCK_N heads of BLOCK_T tokens; `num_heads` counts the heads that are visited."""
    o_t = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None, None]
    o_n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :, None]
    o_h = tl.arange(0, BLOCK_H)[None, None, :]
    o_k, o_p = (o_n // HEADS_PER_GROUP).to(tl.int64), o_n % HEADS_PER_GROUP
    m_table = (o_t < num_tokens) & (o_h < HALF)
    m_x = m_table & (o_n < num_heads)
    p_first = x_ptr + o_t * x_stride_t + o_k * x_stride_k + o_p * x_stride_p + o_h
    b_first = tl.load(p_first, mask=m_x, other=0.0)  # [BLOCK_T, BLOCK_N, BLOCK_H]
    b_second = tl.load(p_first + HALF, mask=m_x, other=0.0)
    b_cos = tl.load(cos_ptr + o_t * HALF + o_h, mask=m_table, other=0.0)  # [BLOCK_T, 1, BLOCK_H]
    b_sin = tl.load(sin_ptr + o_t * HALF + o_h, mask=m_table, other=0.0)
    if IS_INVERSE:
        b_sin = -b_sin
    b_first32, b_second32 = b_first.to(tl.float32), b_second.to(tl.float32)
    b_turned = (b_first32 * b_cos - b_second32 * b_sin).to(out_ptr.dtype.element_ty)
    b_turned_second = (b_second32 * b_cos + b_first32 * b_sin).to(out_ptr.dtype.element_ty)
    if ROTATED_PER_GROUP < HEADS_PER_GROUP:  # the others are copied
        is_rotated = o_p < ROTATED_PER_GROUP
        b_turned = tl.where(is_rotated, b_turned, b_first)
        b_turned_second = tl.where(is_rotated, b_turned_second, b_second)
    p_out = out_ptr + o_t * out_stride_t + o_k * out_stride_k + o_p * out_stride_p + o_h
    tl.store(p_out, b_turned, mask=m_x)
    tl.store(p_out + HALF, b_turned_second, mask=m_x)


def launch_config(head_dim: int, num_heads: int) -> tuple[dict[str, int], int]:
    """Return (tile sizes, num_warps) for so many visited heads.

    As many heads per tile as leave under 15 % of its rows empty, so that the table is read seldom.
    """
    block_n = 8
    while triton.cdiv(num_heads, block_n) * block_n > 1.15 * num_heads:
        block_n //= 2
    block_h = triton.next_power_of_2(head_dim // 2)
    rows = max(block_n, _TILE_ROWS * 64 // max(block_h, 64))
    tile = {"BLOCK_T": rows // block_n, "BLOCK_N": block_n, "BLOCK_H": block_h}
    return tile, 4


def rotate_triton(
    x_TKPH: torch.Tensor,
    out_TKPH: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_rotated: int,
    is_inverse: bool,
) -> None:
    """Write x with the first `num_rotated` heads of each group turned into out, which may be x.

    Args:
        x_TKPH, out_TKPH: [T, K, P, H], the last dim contiguous; the same tensor or disjoint.
        cos, sin: contiguous fp32 [T, H/2].
        num_rotated: R; in place the other P - R heads are not touched, else they are copied.
        is_inverse: turn the other way.
    """
    num_tokens, num_groups, heads_per_group, head_dim = x_TKPH.shape
    if x_TKPH.data_ptr() == out_TKPH.data_ptr():
        heads_per_group = num_rotated
    num_heads = num_groups * heads_per_group
    if num_tokens == 0 or num_heads == 0:
        return
    tile, num_warps = launch_config(head_dim, num_heads)
    grid = (triton.cdiv(num_tokens, tile["BLOCK_T"]), triton.cdiv(num_heads, tile["BLOCK_N"]))
    with on_device(x_TKPH.device):
        rope_kernel[grid](
            *(x_TKPH, out_TKPH, cos, sin, num_tokens, num_heads),
            *(*x_TKPH.stride()[:3], *out_TKPH.stride()[:3]),
            HEADS_PER_GROUP=heads_per_group,
            ROTATED_PER_GROUP=num_rotated,
            HALF=head_dim // 2,
            IS_INVERSE=is_inverse,
            **tile,
            num_warps=num_warps,
        )
