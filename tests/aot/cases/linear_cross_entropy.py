"""Every way in which the trainer compiles the cross-entropy kernel."""

import torch
from compile_case import CompileCase, pointer_to

from lclm_kernels.linear_cross_entropy.reference import IGNORED_LABEL
from lclm_kernels.linear_cross_entropy.triton_impl import BLOCK_V, NUM_WARPS, cross_entropy_kernel

# name, READS_STATS, WRITES_GRADIENT
_LAUNCHES = (
    ("loss and gradient", False, True),
    ("statistics", False, False),
    ("gradient", True, True),
)


def compile_cases() -> list[CompileCase]:
    """Whole vocabulary; the two halves under tensor parallelism; evaluation is `statistics`."""
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        for name, reads_stats, writes_gradient in _LAUNCHES:
            signature = {
                "logits_ptr": pointer_to(dtype),
                "labels_ptr": "*i64",
                "weights_ptr": "*fp32",
                "stats_ptr": "*fp32",
                **dict.fromkeys(("num_tokens", "vocab_size", "vocab_start"), "i32"),
            }
            constexprs = {
                "IGNORED": IGNORED_LABEL,
                "READS_STATS": reads_stats,
                "WRITES_GRADIENT": writes_gradient,
                "BLOCK_V": BLOCK_V,
            }
            cases.append(
                CompileCase(
                    f"linear_cross_entropy {name} {str(dtype).removeprefix('torch.')}",
                    cross_entropy_kernel,
                    signature,
                    constexprs,
                    {"num_warps": NUM_WARPS},
                )
            )
    return cases
