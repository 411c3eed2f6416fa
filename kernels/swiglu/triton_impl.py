"""SwiGLU in Triton: one pass over memory forward, one backward.

Letters: F feed-forward size; R rows.
"""

import torch
import triton
import triton.language as tl

from ..backend import on_device

BLOCK_F = 2048  # 16 bf16 per thread and array: two 16-byte loads
NUM_WARPS = 4


@triton.jit
def _load_gate_and_up(x_ptr, size, x_stride_r, BLOCK_F: tl.constexpr):
    """(row, columns [BLOCK_F], which of them exist, gate, up) of this program, in fp32."""
    i_row = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < size
    p_x = x_ptr + i_row * x_stride_r + o_f
    b_gate = tl.load(p_x, mask=m_f, other=0.0).to(tl.float32)
    b_up = tl.load(p_x + size, mask=m_f, other=0.0).to(tl.float32)
    return i_row, o_f, m_f, b_gate, b_up


@triton.jit
def swiglu_fwd_kernel(x_ptr, y_ptr, size, x_stride_r, BLOCK_F: tl.constexpr):
    """y [R, F] of one row's BLOCK_F columns; x [R, 2F] holds gate, then up."""
    i_row, o_f, m_f, b_gate, b_up = _load_gate_and_up(x_ptr, size, x_stride_r, BLOCK_F)
    b_y = b_gate * tl.sigmoid(b_gate) * b_up
    tl.store(y_ptr + i_row * size + o_f, b_y.to(y_ptr.dtype.element_ty), mask=m_f)


@triton.jit
def swiglu_bwd_kernel(dy_ptr, x_ptr, dx_ptr, size, dy_stride_r, x_stride_r, BLOCK_F: tl.constexpr):
    """dx [R, 2F] from dy [R, F] and the forward's input; the activation is computed again."""
    i_row, o_f, m_f, b_gate, b_up = _load_gate_and_up(x_ptr, size, x_stride_r, BLOCK_F)
    b_dy = tl.load(dy_ptr + i_row * dy_stride_r + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_sigmoid = tl.sigmoid(b_gate)
    b_silu = b_gate * b_sigmoid
    b_dgate = b_dy * b_up * (b_sigmoid + b_silu * (1.0 - b_sigmoid))
    p_dx = dx_ptr + i_row * (2 * size) + o_f
    tl.store(p_dx, b_dgate.to(dx_ptr.dtype.element_ty), mask=m_f)
    tl.store(p_dx + size, (b_dy * b_silu).to(dx_ptr.dtype.element_ty), mask=m_f)


def swiglu_fwd_triton(x_R2F: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, [R, F] in x's dtype; x's last dim is contiguous."""
    num_rows, size = x_R2F.shape[0], x_R2F.shape[1] // 2
    y = torch.empty((num_rows, size), dtype=x_R2F.dtype, device=x_R2F.device)
    if y.numel():
        grid = (num_rows, triton.cdiv(size, BLOCK_F))
        with on_device(x_R2F.device):
            swiglu_fwd_kernel[grid](
                x_R2F, y, size, x_R2F.stride(0), BLOCK_F=BLOCK_F, num_warps=NUM_WARPS
            )
    return y


def swiglu_bwd_triton(dy_RF: torch.Tensor, x_R2F: torch.Tensor) -> torch.Tensor:
    """Return dx [R, 2F] in x's dtype; the last dims of dy and x are contiguous."""
    num_rows, size = dy_RF.shape
    dx = torch.empty((num_rows, 2 * size), dtype=x_R2F.dtype, device=x_R2F.device)
    if dx.numel():
        with on_device(x_R2F.device):
            swiglu_bwd_kernel[(num_rows, triton.cdiv(size, BLOCK_F))](
                *(dy_RF, x_R2F, dx, size, dy_RF.stride(0), x_R2F.stride(0)),
                BLOCK_F=BLOCK_F,
                num_warps=NUM_WARPS,
            )
    return dx
