"""Every way in which the trainer compiles the RoPE kernel."""

import torch
from compile_case import CompileCase, pointer_to

from lclm_kernels.rope.triton_impl import launch_config, rope_kernel

# (name, query heads per kv head, kv heads of a tp rank, head size, dtype)
_MODELS = (
    ("Llama-3-8B", 4, 8, 128, torch.bfloat16),
    ("Llama-3-8B", 4, 8, 128, torch.float32),
    ("Llama-3-70B tp 8", 8, 1, 128, torch.bfloat16),
    ("H64", 4, 8, 64, torch.bfloat16),
    ("H96", 4, 8, 96, torch.bfloat16),
    ("H256", 4, 8, 256, torch.bfloat16),
)
_STRIDES = [f"{name}_stride_{axis}" for name in ("x", "out") for axis in "tkp"]


def compile_cases() -> list[CompileCase]:
    """Forward (in place on packed qkv) and backward (into another tensor) of some models."""
    cases = []
    for name, group_size, num_kv_heads, head_dim, dtype in _MODELS:
        for is_backward in (False, True):
            num_rotated = group_size + 1
            visited = group_size + 2 if is_backward else num_rotated
            tile, num_warps = launch_config(head_dim, num_kv_heads * visited)
            kind = f"{'bwd' if is_backward else 'fwd'} {str(dtype).removeprefix('torch.')}"
            signature = dict.fromkeys(("x_ptr", "out_ptr"), pointer_to(dtype))
            signature |= dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32")
            signature |= dict.fromkeys(("num_tokens", "num_heads", *_STRIDES), "i32")
            constexprs = {
                "HEADS_PER_GROUP": visited,
                "ROTATED_PER_GROUP": num_rotated,
                "HALF": head_dim // 2,
                "IS_INVERSE": is_backward,
                **tile,
            }
            cases.append(
                CompileCase(
                    f"rope {name} {kind}",
                    rope_kernel,
                    signature,
                    constexprs,
                    {"num_warps": num_warps},
                    unaligned=("num_heads",),
                )
            )
    return cases
