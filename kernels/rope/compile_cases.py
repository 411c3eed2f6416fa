"""Every way in which the trainer compiles the RoPE kernel."""

import torch

from ..compile_case import CompileCase, pointer_to
from .triton_impl import launch_config, rope_kernel

__all__ = ["compile_cases"]

# (name, query heads per kv head, kv heads of a tp rank, head size)
_MODELS = (
    ("Llama-3-8B", 4, 8, 128),
    ("Llama-3-70B tp 8", 8, 1, 128),
    ("Llama-2-7B", 1, 32, 128),
    ("H64", 4, 8, 64),
    ("H96", 4, 8, 96),
    ("H256", 4, 8, 256),
)
_STRIDES = [f"{name}_stride_{axis}" for name in ("x", "out") for axis in "tkp"]


def compile_cases() -> list[CompileCase]:
    """Forward (in place on packed qkv) and backward (into another tensor) of some models."""
    cases = []
    for name, group_size, num_kv_heads, head_dim in _MODELS:
        for dtype in (torch.bfloat16, torch.float32):
            for is_backward in (False, True):
                num_rotated = group_size + 1
                visited = group_size + 2 if is_backward else num_rotated
                tile, num_warps = launch_config(head_dim, num_kv_heads * visited)
                kind = f"{str(dtype).removeprefix('torch.')} {'bwd' if is_backward else 'fwd'}"
                cases.append(
                    CompileCase(
                        name=f"rope {name} {kind}",
                        kernel=rope_kernel,
                        signature={
                            "x_ptr": pointer_to(dtype),
                            "out_ptr": pointer_to(dtype),
                            "cos_ptr": "*fp32",
                            "sin_ptr": "*fp32",
                            "num_tokens": "i32",
                            "num_heads": "i32",
                            **dict.fromkeys(_STRIDES, "i32"),
                        },
                        constexprs={
                            "HEADS_PER_GROUP": visited,
                            "ROTATED_PER_GROUP": num_rotated,
                            "HALF": head_dim // 2,
                            "IS_INVERSE": is_backward,
                            **tile,
                        },
                        options={"num_warps": num_warps},
                        unaligned=("num_heads",),
                    )
                )
    return cases
