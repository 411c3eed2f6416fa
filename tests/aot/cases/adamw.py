"""Every way in which the trainer compiles the AdamW kernel."""

import triton.language as tl
from compile_case import CompileCase

from lclm_kernels.adamw.triton_impl import BLOCK, NUM_WARPS, adamw_kernel


def compile_cases() -> list[CompileCase]:
    """Moments in fp32 and in bf16, tensors on multiples of 16 bytes and anywhere."""
    signature = {
        "addresses_ptr": "*i64",
        "sizes_ptr": "*i64",
        "block_tensor_ptr": "*i32",
        "first_block_ptr": "*i32",
        "num_tensors": "i32",
    }
    scalars = ("beta1_complement", "beta2", "beta2_complement", "keep", "step_size")
    signature |= dict.fromkeys((*scalars, "root_correction", "eps"), "fp32")
    return [
        CompileCase(
            f"adamw moments {name} {'aligned' if is_aligned else 'unaligned'}",
            adamw_kernel,
            signature,
            {"STATE_DTYPE": dtype, "IS_ALIGNED": is_aligned, "BLOCK": BLOCK},
            {"num_warps": NUM_WARPS},
            unaligned=("num_tensors",),
        )
        for name, dtype in (("fp32", tl.float32), ("bf16", tl.bfloat16))
        for is_aligned in (True, False)
    ]
