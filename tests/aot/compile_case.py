"""How a Triton kernel is compiled ahead of time, without a GPU, for every way it is launched.

An operator with Triton kernels has a module in `cases/`, named like it, with one function,
`compile_cases() -> list[CompileCase]`, built from the same functions that choose tiles and warps
at launch. The tests compile every case and hold it to a budget of registers and memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


def pointer_to(dtype: torch.dtype) -> str:
    """Triton's name for a pointer to a tensor of this dtype."""
    return _POINTERS[dtype]


@dataclass(frozen=True)
class CompileCase:
    """One kernel as one launch of the trainer compiles it."""

    name: str
    """Unique, e.g. "rope bf16 H128"; the key of its line in the budget."""
    kernel: Any
    """The function decorated with triton.jit."""
    signature: Mapping[str, str]
    """Triton type of every argument that is not a constexpr: "*bf16", "i32", "fp32",
    "tensordesc<bf16[64, 128]>"."""
    constexprs: Mapping[str, Any]
    """Value of every constexpr argument."""
    options: Mapping[str, int] = field(default_factory=dict)
    """num_warps, num_stages, maxnreg: as at launch."""
    architectures: tuple[int, ...] = (90, 80)
    """Compute capabilities, ten times."""
    unaligned: tuple[str, ...] = ()
    """Integer arguments that need not be divisible by 16 (pointers are always taken to be)."""
