"""Every way in which the trainer compiles the SwiGLU kernels."""

import torch
from compile_case import CompileCase, pointer_to

from lclm_kernels.swiglu.triton_impl import BLOCK_F, NUM_WARPS, swiglu_bwd_kernel, swiglu_fwd_kernel


def compile_cases() -> list[CompileCase]:
    """Forward and backward; the tile is the same for every size."""
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        pointer = pointer_to(dtype)
        name = str(dtype).removeprefix("torch.")
        fwd = dict.fromkeys(("x_ptr", "y_ptr"), pointer)
        fwd |= dict.fromkeys(("size", "x_stride_r"), "i32")
        bwd = dict.fromkeys(("dy_ptr", "x_ptr", "dx_ptr"), pointer)
        bwd |= dict.fromkeys(("size", "dy_stride_r", "x_stride_r"), "i32")
        tile, options = {"BLOCK_F": BLOCK_F}, {"num_warps": NUM_WARPS}
        cases += [
            CompileCase(f"swiglu fwd {name}", swiglu_fwd_kernel, fwd, tile, options),
            CompileCase(f"swiglu bwd {name}", swiglu_bwd_kernel, bwd, tile, options),
        ]
    return cases
