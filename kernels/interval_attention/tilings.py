"""Tiles of the Triton kernels of interval attention, and what the kernels do not serve.

H head size. Needs no Triton, so that a refusal can be given where there is none.
"""

import functools
from dataclasses import dataclass

import torch

from ..backend import IS_INTERPRETED

MAX_HEAD_DIM = 256
MIN_BLOCK_H = 64
TMA_ALIGNMENT = 16  # bytes, of addresses and strides
STATS_BLOCK = 256  # rows of a program of attention_stats_kernel
_MIN_CAPABILITY = (8, 0)  # bf16 on tensor cores
_TMA_CAPABILITIES = ((9, 0), (12, 0))  # from, below: GeForce has TMA from 12.0 on, with 99 KiB


@dataclass(frozen=True)
class Tiling:
    """Tile of one attention kernel: queries x keys, and how its program runs."""

    block_t: int
    block_s: int
    num_warps: int
    num_stages: int


# 16-bit inputs: by pass and way of reading, then by padded head size. Chosen by what Triton 3.6.0
# makes of them (tests/aot): the largest tiles that keep the accumulators in registers and leave
# shared memory for two stages. A program has 227 KiB on sm_90, those that read by pointers stay
# below the 99 KiB of sm_86 and sm_89. fp32 is exact (no tf32) and goes without tensor cores.
_FWD_BY_POINTERS = {
    64: Tiling(128, 64, 8, 2),
    128: Tiling(64, 64, 4, 2),
    256: Tiling(64, 32, 8, 2),
}
_TILINGS: dict[tuple[str, str], dict[int, Tiling]] = {
    ("fwd", "tma"): {
        64: Tiling(128, 128, 8, 3),
        128: Tiling(128, 128, 8, 2),
        256: Tiling(128, 64, 8, 2),
    },
    ("carry", "tma"): {  # fwd with a carry, which its end reads beside the result
        64: Tiling(128, 128, 8, 3),
        128: Tiling(128, 128, 8, 2),
        256: Tiling(64, 64, 8, 2),
    },
    ("dq", "tma"): {
        64: Tiling(128, 128, 8, 2),
        128: Tiling(128, 64, 8, 2),
        256: Tiling(64, 64, 8, 2),
    },
    ("dkdv", "tma"): {
        64: Tiling(64, 128, 8, 2),
        128: Tiling(64, 128, 8, 2),
        256: Tiling(32, 64, 8, 2),
    },
    ("fwd", "pointers"): _FWD_BY_POINTERS,
    ("carry", "pointers"): _FWD_BY_POINTERS,
    ("dq", "pointers"): {
        64: Tiling(128, 64, 8, 2),
        128: Tiling(128, 32, 8, 2),
        256: Tiling(32, 32, 8, 2),
    },
    ("dkdv", "pointers"): {
        64: Tiling(32, 128, 8, 2),
        128: Tiling(32, 64, 8, 2),
        256: Tiling(16, 32, 8, 2),
    },
}
_FP32_STEPS = {64: 32, 128: 16, 256: 16}  # beside tiles of 32 rows


def refuse_triton(head_dim: int, scale: float, device: torch.device) -> str:
    """Why the kernels cannot serve this call, as a clause for `backend.choose`; empty if they can.

    The dtype is the candidate's matter.
    """
    if head_dim > MAX_HEAD_DIM:
        return f"takes head sizes up to {MAX_HEAD_DIM}, the tensors have {head_dim}"
    if scale < 0:
        return f"takes scale >= 0, got {scale}"
    if device.type == "cuda" and _capability(device) < _MIN_CAPABILITY:
        major, minor = _capability(device)
        return f"needs compute capability 8.0 or newer, {device} has {major}.{minor}"
    return ""


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def use_tma_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether tiles of this dtype and head size are read by TMA; the interpreter imitates it.

    fp32 is not: without tensor cores the tiles go through registers, and those would spill.
    """
    if dtype.itemsize != 2 or head_dim * dtype.itemsize % TMA_ALIGNMENT:
        return False
    if device.type == "cpu":
        return IS_INTERPRETED
    first, behind = _TMA_CAPABILITIES
    return first <= _capability(device) < behind


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile: H rounded up to a power of two, 64 at least."""
    return max(MIN_BLOCK_H, 1 << (head_dim - 1).bit_length())


def choose_tiling(direction: str, head_dim: int, dtype: torch.dtype, use_tma: bool) -> Tiling:
    """The tile of the kernel "fwd", "carry" (fwd with a carry), "dq" or "dkdv"."""
    if dtype.itemsize != 2:
        step = _FP32_STEPS[padded_head_dim(head_dim)]
        return Tiling(step, 32, 8, 1) if direction == "dkdv" else Tiling(32, step, 8, 1)
    return _TILINGS[direction, "tma" if use_tma else "pointers"][padded_head_dim(head_dim)]


def delta_block(head_dim: int) -> int:
    """Rows of a program of attention_delta_kernel: 8,192 elements of each input."""
    return 8192 // padded_head_dim(head_dim)
