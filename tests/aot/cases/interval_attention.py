"""How the Triton kernels of interval attention are compiled at launch; see `compile_case.py`.

fp32 goes the same way on every architecture and is compiled for one. fp16 compiles to the
instructions of bf16 but for the names of the types, so one head size stands for all.
"""

import itertools

import torch
from compile_case import CompileCase, pointer_to

from lclm_kernels.interval_attention.tilings import (
    STATS_BLOCK,
    choose_tiling,
    delta_block,
    padded_head_dim,
)
from lclm_kernels.interval_attention.triton_bwd import (
    attention_delta_kernel,
    attention_dkdv_kernel,
    attention_dq_kernel,
    attention_stats_kernel,
)
from lclm_kernels.interval_attention.triton_fwd import UNSPECIALISED, attention_fwd_kernel

_HEAD_DIMS = (64, 96, 128, 256)  # of models people train; others are padded to one of these tiles
_KERNELS = {
    "fwd": attention_fwd_kernel,
    "carry": attention_fwd_kernel,
    "dq": attention_dq_kernel,
    "dkdv": attention_dkdv_kernel,
}
_INT32_POINTERS = ("lo_ptr", "hi_ptr", "from_ptr", "until_ptr", "tiles_ptr")
_QUERY_SOURCES, _KEY_SOURCES = ("q", "dout"), ("k", "v")


def compile_cases() -> list[CompileCase]:
    """Every configuration that `triton_impl` can launch at the head sizes listed here."""
    cases = [_stats_case()]
    sizes = [*itertools.product((torch.bfloat16, torch.float32), _HEAD_DIMS), (torch.float16, 128)]
    for dtype, head_dim in sizes:
        cases.append(_delta_case(dtype, head_dim))
        for direction in _KERNELS:
            if dtype.itemsize == 2:
                cases += [
                    _attention_case(direction, dtype, head_dim, True, (90,)),
                    _attention_case(direction, dtype, head_dim, False, (80,)),
                ]
            else:
                cases.append(_attention_case(direction, dtype, head_dim, False, (90,)))
    return cases


def _name(dtype: torch.dtype) -> str:
    return pointer_to(dtype)[1:]


def _attention_case(
    direction: str,
    dtype: torch.dtype,
    head_dim: int,
    use_tma: bool,
    architectures: tuple[int, ...],
) -> CompileCase:
    kernel = _KERNELS[direction]
    tiling = choose_tiling(direction, head_dim, dtype, use_tma)
    block_h = padded_head_dim(head_dim)
    constexprs = {
        "HEAD_DIM": head_dim,
        "BLOCK_H": block_h,
        "BLOCK_T": tiling.block_t,
        "BLOCK_S": tiling.block_s,
        "USE_TMA": use_tma,
        "PRECISION": "ieee",
    }
    has_carry = direction == "carry"
    if kernel is attention_fwd_kernel:
        constexprs |= {"HAS_CARRY": has_carry, "lse_stride_t": 1}

    def kind(name: str) -> str:
        if name in (*_QUERY_SOURCES, *_KEY_SOURCES):
            block = tiling.block_t if name in _QUERY_SOURCES else tiling.block_s
            if use_tma:
                return f"tensordesc<{_name(dtype)}[1,{block},{block_h}]>"
            return pointer_to(dtype)
        if name == "stats" and use_tma:
            return f"tensordesc<fp32[1,{tiling.block_t}]>"
        if name == "out_ptr" and not has_carry:
            return pointer_to(dtype)
        if name in _INT32_POINTERS:
            return "*i32"
        if name == "stats" or name.endswith("_ptr"):
            return "*fp32"
        return "fp32" if name.startswith("scale") else "i32"

    names = [name for name in kernel.arg_names if name not in constexprs]
    return CompileCase(
        name=f"interval_attention {direction} {_name(dtype)} "
        f"H{head_dim}{' TMA' if use_tma else ''}",
        kernel=kernel,
        signature={name: kind(name) for name in names},
        constexprs=constexprs,
        options={"num_warps": tiling.num_warps, "num_stages": tiling.num_stages},
        architectures=architectures,
        unaligned=tuple(UNSPECIALISED),
    )


def _delta_case(dtype: torch.dtype, head_dim: int) -> CompileCase:
    strides = ("dout_stride_t", "dout_stride_n", "out_stride_t", "out_stride_n", "delta_stride_n")
    return CompileCase(
        name=f"interval_attention delta {_name(dtype)} H{head_dim}",
        kernel=attention_delta_kernel,
        signature={
            "dout_ptr": pointer_to(dtype),
            "out_ptr": pointer_to(dtype),
            "delta_ptr": "*fp32",
            **dict.fromkeys((*strides, "num_queries"), "i32"),
        },
        constexprs={
            "delta_stride_t": 1,
            "HEAD_DIM": head_dim,
            "BLOCK_H": padded_head_dim(head_dim),
            "BLOCK_T": delta_block(head_dim),
        },
        options={"num_warps": 4},
        architectures=(90,),
        unaligned=("num_queries",),
    )


def _stats_case() -> CompileCase:
    strides = ("lse_stride_n", "delta_stride_n", "stats_stride")
    return CompileCase(
        name="interval_attention stats",
        kernel=attention_stats_kernel,
        signature={
            **dict.fromkeys(("lse_ptr", "delta_ptr", "stats_ptr"), "*fp32"),
            **dict.fromkeys(("lo_ptr", "hi_ptr"), "*i32"),
            **dict.fromkeys((*strides, "num_queries", "num_heads"), "i32"),
        },
        constexprs={"lse_stride_t": 1, "delta_stride_t": 1, "BLOCK_T": STATS_BLOCK},
        options={"num_warps": 4},
        unaligned=("num_queries", "num_heads"),
    )
