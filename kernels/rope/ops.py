"""Rotary position embedding: table and rotation.

Letters: T tokens, N heads, H head size. The pairing is "rotate half": element i turns with
element i + H/2, as in Hugging Face's Llama, so its weights need no permutation.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from .reference import rotate_reference

__all__ = ["apply_rope", "build_rope_table"]

_SCALING_KEYS = {
    "linear": {"type", "factor"},
    "llama3": {"type", "factor", "low_freq_factor", "high_freq_factor", "original_length"},
}


def build_rope_table(
    positions: torch.Tensor,
    head_dim: int,
    base: float,
    scaling: Mapping[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Build the cosines and sines of the rotation angles.

    The angles are computed in fp64: in fp32 the angle of position 500,000 is off by up to
    0.03 rad.

    Args:
        positions: int64 [T], position of each token in its document.
        head_dim: H, even.
        base: the base of the geometric series of wavelengths ("theta"), > 1.
        scaling: None, {"type": "linear", "factor"} (positions divided by factor,
            arXiv 2306.15595), or {"type": "llama3", "factor", "low_freq_factor",
            "high_freq_factor", "original_length"} (Llama 3.1: long wavelengths divided by factor,
            short ones kept, a linear blend between).

    Returns:
        (cos, sin), each fp32 [T, H/2] on the device of positions.

    Raises:
        ValueError: wrong dtype or shape of positions, odd head_dim, base <= 1, unknown scaling.
    """
    if positions.dtype != torch.int64 or positions.dim() != 1:
        raise ValueError(
            f"rope: positions must be int64 of one dim, got {positions.dtype} "
            f"{list(positions.shape)}; use positions.long().flatten()"
        )
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(f"rope: head_dim must be even and positive, got {head_dim}")
    if not base > 1.0:
        raise ValueError(f"rope: base must be greater than 1, got {base}; Llama 3 uses 500000")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
    frequencies = base ** (-exponents / head_dim)  # radians per token, [H/2]
    if scaling is not None:
        frequencies = _scale_frequencies(frequencies, scaling)
    angles = positions.to(torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def _scale_frequencies(frequencies: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    kind = scaling.get("type")
    if kind not in _SCALING_KEYS:
        raise ValueError(
            f"rope: scaling type {kind!r} is unknown; use one of {', '.join(_SCALING_KEYS)}"
        )
    if set(scaling) != _SCALING_KEYS[kind]:
        raise ValueError(
            f"rope: scaling of type {kind!r} takes exactly the keys "
            f"{sorted(_SCALING_KEYS[kind])}, got {sorted(scaling)}"
        )
    factor = float(scaling["factor"])
    if not factor >= 1.0:
        raise ValueError(f"rope: scaling factor must be at least 1, got {factor}")
    if kind == "linear":
        return frequencies / factor
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    if not 0.0 < low < high:
        raise ValueError(
            f"rope: scaling needs 0 < low_freq_factor < high_freq_factor, got {low} and {high}"
        )
    # Turns a frequency makes over the original context: fewer than `low` are interpolated in full,
    # more than `high` are kept, those between blend linearly in the number of turns.
    turns = scaling["original_length"] * frequencies / (2.0 * math.pi)
    kept_share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept_share + (1.0 - kept_share) / factor)


class _RopeFunction(torch.autograd.Function):
    """The rotation; its gradient is the inverse rotation, so only the table is saved."""

    @staticmethod
    def forward(ctx, x_TNH, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate_reference(x_TNH, cos, sin)

    @staticmethod
    def backward(ctx, dout_TNH):
        cos, sin = ctx.saved_tensors
        return rotate_reference(dout_TNH, cos, -sin), None, None


def apply_rope(x_TNH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys.

    Args:
        x_TNH: [T, N, H], any floating dtype, any strides.
        cos, sin: [T, H/2] from `build_rope_table`.

    Returns:
        [T, N, H] in x's dtype; the arithmetic is in fp32 or wider.

    Raises:
        ValueError: the shapes do not belong together.
    """
    if x_TNH.dim() != 3 or x_TNH.shape[-1] % 2:
        raise ValueError(f"rope: x must be [T, N, H] with even H, got {list(x_TNH.shape)}")
    table_shape = (x_TNH.shape[0], x_TNH.shape[2] // 2)
    if cos.shape != table_shape or sin.shape != table_shape:
        raise ValueError(
            f"rope: cos and sin must be {list(table_shape)} for x {list(x_TNH.shape)}, got "
            f"{list(cos.shape)} and {list(sin.shape)}; build the table from this shard's positions"
        )
    return _RopeFunction.apply(x_TNH, cos, sin)
