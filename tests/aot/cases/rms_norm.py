"""Every way in which the trainer compiles the RMSNorm kernels."""

import torch
from compile_case import CompileCase, pointer_to

from lclm_kernels.rms_norm.triton_impl import (
    bwd_stages,
    launch_config,
    rms_norm_bwd_kernel,
    rms_norm_fwd_kernel,
)

# (D, dtype): Llama-3-8B, 70B, 405B, a small model whose rows share a program
_LAUNCHES = (
    (4096, torch.bfloat16),
    (8192, torch.bfloat16),
    (16384, torch.bfloat16),
    (512, torch.bfloat16),
    (4096, torch.float32),
)


def compile_cases() -> list[CompileCase]:
    """Forward and backward by row size."""
    cases = []
    for size, dtype in _LAUNCHES:
        tile, num_warps = launch_config(size)
        pointer = pointer_to(dtype)
        name = f"D{size} {str(dtype).removeprefix('torch.')}"
        fwd = {"x_ptr": pointer, "weight_ptr": pointer, "y_ptr": pointer, "rrms_ptr": "*fp32"}
        fwd |= {"num_rows": "i32", "x_stride_r": "i32", "eps": "fp32"}
        bwd = dict.fromkeys(("dy_ptr", "x_ptr", "weight_ptr", "dx_ptr"), pointer)
        bwd |= dict.fromkeys(("rrms_ptr", "dweight_ptr"), "*fp32")
        bwd |= dict.fromkeys(("num_rows", "dy_stride_r", "x_stride_r"), "i32")
        sizes = {"SIZE": size, **tile}
        options = {"num_warps": num_warps}
        cases += [
            CompileCase(f"rms_norm fwd {name}", rms_norm_fwd_kernel, fwd, sizes, options),
            CompileCase(
                f"rms_norm bwd {name}",
                rms_norm_bwd_kernel,
                bwd,
                {**sizes, "NUM_STAGES": bwd_stages(size)},
                options,
            ),
        ]
    return cases
