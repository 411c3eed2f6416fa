"""RMSNorm in Triton.

Letters: D model size; R rows. The backward keeps several rows in flight: a program walks over rows
of its own with loads ahead of the arithmetic, and sums its share of the weight gradient in fp32;
the shares of all programs are added in a second step, in a fixed order.
"""

import torch
import triton
import triton.language as tl

from ..backend import IS_INTERPRETED, on_device

_TILE_ELEMENTS = 4096  # 16 per thread at 8 warps
_PROGRAMS_PER_MULTIPROCESSOR = 2
_INTERPRETED_PROGRAMS = 3  # few, so that tests see programs with several rows


@triton.jit
def rms_norm_fwd_kernel(
    x_ptr, weight_ptr, y_ptr, rrms_ptr,
    num_rows, x_stride_r, eps,
    SIZE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y [R, D] and the reciprocal rms [R] of BLOCK_R rows of x."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_r, m_d = o_r < num_rows, o_d < SIZE
    b_x = tl.load(x_ptr + o_r * x_stride_r + o_d, mask=m_r & m_d, other=0.0)  # [BLOCK_R, BLOCK_D]
    b_weight = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_wide = b_x.to(tl.float32)
    b_mean = tl.sum(b_wide * b_wide, axis=1, keep_dims=True) / SIZE
    b_rrms = tl.rsqrt(b_mean + eps)
    b_normed = (b_wide * b_rrms).to(x_ptr.dtype.element_ty)  # rounded, as Llama does
    b_y = b_normed.to(tl.float32) * b_weight
    tl.store(y_ptr + o_r * SIZE + o_d, b_y.to(y_ptr.dtype.element_ty), mask=m_r & m_d)
    tl.store(rrms_ptr + o_r, b_rrms, mask=m_r)


@triton.jit
def rms_norm_bwd_kernel(
    dy_ptr, x_ptr, weight_ptr, rrms_ptr, dx_ptr, dweight_ptr,
    num_rows, dy_stride_r, x_stride_r,
    SIZE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """dx [R, D] of every num_programs-th block of rows, and their part of dweight, fp32 [D]."""
    i_program = tl.program_id(0)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_d = o_d < SIZE
    if NUM_STAGES > 1:
        b_weight = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_dweight = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    num_blocks = tl.cdiv(num_rows, BLOCK_R)
    for i_block in tl.range(i_program, num_blocks, tl.num_programs(0), num_stages=NUM_STAGES):
        o_r = (i_block * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]).to(tl.int64)
        m_r = o_r < num_rows
        b_x = tl.load(x_ptr + o_r * x_stride_r + o_d, mask=m_r & m_d, other=0.0).to(tl.float32)
        b_dy = tl.load(dy_ptr + o_r * dy_stride_r + o_d, mask=m_r & m_d, other=0.0).to(tl.float32)
        b_rrms = tl.load(rrms_ptr + o_r, mask=m_r, other=0.0)
        b_normed = b_x * b_rrms  # [BLOCK_R, BLOCK_D]
        b_dweight += b_dy * b_normed  # before the sum over the row: dy need not be kept through it
        if NUM_STAGES == 1:
            b_weight = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_dnormed = b_dy * b_weight
        b_share = tl.sum(b_dnormed * b_normed, axis=1, keep_dims=True) / SIZE
        b_dx = b_rrms * (b_dnormed - b_normed * b_share)
        tl.store(dx_ptr + o_r * SIZE + o_d, b_dx.to(dx_ptr.dtype.element_ty), mask=m_r & m_d)
    p_dweight = dweight_ptr + i_program.to(tl.int64) * SIZE + tl.arange(0, BLOCK_D)
    tl.store(p_dweight, tl.sum(b_dweight, axis=0), mask=tl.arange(0, BLOCK_D) < SIZE)


def bwd_stages(size: int) -> int:
    """Loads ahead of the arithmetic in the backward.

    Long rows need their registers themselves: they also read the weight, which lies in a cache,
    again for each row.
    """
    return 2 if size <= 8192 else 1


def launch_config(size: int) -> tuple[dict[str, int], int]:
    """Return (tile sizes, num_warps) of both kernels for rows of `size` elements."""
    block_d = triton.next_power_of_2(size)
    block_r = max(1, _TILE_ELEMENTS // block_d)
    num_warps = min(16, max(8, block_d // 512))
    return {"BLOCK_R": block_r, "BLOCK_D": block_d}, num_warps


def rms_norm_fwd_triton(
    x_RD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (y [R, D] in x's dtype, reciprocal rms fp32 [R, 1]); x's last dim is contiguous."""
    num_rows, size = x_RD.shape
    y = torch.empty(x_RD.shape, dtype=x_RD.dtype, device=x_RD.device)
    rrms = torch.empty((num_rows, 1), dtype=torch.float32, device=x_RD.device)
    if y.numel():
        tile, num_warps = launch_config(size)
        with on_device(x_RD.device):
            rms_norm_fwd_kernel[(triton.cdiv(num_rows, tile["BLOCK_R"]),)](
                *(x_RD, weight_D, y, rrms, num_rows, x_RD.stride(0), eps),
                SIZE=size,
                **tile,
                num_warps=num_warps,
            )
    return y, rrms


def rms_norm_bwd_triton(
    dy_RD: torch.Tensor, x_RD: torch.Tensor, weight_D: torch.Tensor, rrms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (dx [R, D] in x's dtype, dweight [D] in the weight's dtype, summed in fp32).

    The last dims of dy and x are contiguous.
    """
    num_rows, size = x_RD.shape
    dx = torch.empty(x_RD.shape, dtype=x_RD.dtype, device=x_RD.device)
    if dx.numel() == 0:
        return dx, torch.zeros_like(weight_D)
    tile, num_warps = launch_config(size)
    num_programs = min(triton.cdiv(num_rows, tile["BLOCK_R"]), _max_programs(x_RD.device))
    parts = torch.empty((num_programs, size), dtype=torch.float32, device=x_RD.device)
    with on_device(x_RD.device):
        rms_norm_bwd_kernel[(num_programs,)](
            *(dy_RD, x_RD, weight_D, rrms, dx, parts),
            *(num_rows, dy_RD.stride(0), x_RD.stride(0)),
            SIZE=size,
            **tile,
            NUM_STAGES=bwd_stages(size),
            num_warps=num_warps,
        )
    return dx, parts.sum(dim=0).to(weight_D.dtype)


def _max_programs(device: torch.device) -> int:
    if IS_INTERPRETED:
        return _INTERPRETED_PROGRAMS
    properties = torch.cuda.get_device_properties(device)
    return _PROGRAMS_PER_MULTIPROCESSOR * properties.multi_processor_count
