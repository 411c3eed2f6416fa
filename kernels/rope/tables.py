"""Tables of rotation angles, plain and for contexts longer than a model was trained on.

Letters: T tokens, H head size. Raising the base itself (Llama 2 Long, arXiv 2309.16039, section
4.1: "adjusted base frequency") needs no scaling: give `base`.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

# Keys of a scaling besides "type".
SCALING_KEYS = {
    "linear": ("factor",),
    "ntk": ("factor",),
    "yarn": ("factor", "original_length", "beta_fast", "beta_slow"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_length"),
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
        scaling: None, or a mapping with "type" and the keys of that type:
            linear: factor; positions divided by it (arXiv 2306.15595).
            ntk: factor; see `scale_base_ntk`.
            yarn: factor, original_length, beta_fast, beta_slow; see `_scale_yarn`.
            llama3: factor, low_freq_factor, high_freq_factor, original_length; Llama 3.1: long
            wavelengths divided by factor, short ones kept, a linear blend between.

    Returns:
        (cos, sin), each fp32 [T, H/2] on the device of positions; with yarn times its temperature.

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
    magnitude = 1.0
    if scaling is None:
        frequencies = _frequencies(head_dim, base)
    else:
        _check_scaling(scaling)
        frequencies, magnitude = _SCALINGS[scaling["type"]](head_dim, base, scaling)
    angles = positions.to(torch.float64)[:, None] * frequencies.to(positions.device)
    return (angles.cos() * magnitude).float(), (angles.sin() * magnitude).float()


def scale_base_ntk(base: float, head_dim: int, factor: float) -> float:
    """Return the base at which the slowest pair turns `factor` times slower and the fastest stays.

    The "NTK-aware" rule, base * factor^(H / (H - 2)) (arXiv 2309.00071, section 3.1): the same as
    training with a raised base.
    """
    return base * factor ** (head_dim / (head_dim - 2))


def _frequencies(head_dim: int, base: float) -> torch.Tensor:
    """Radians per token of each pair, fp64 [H/2], fastest first."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64)
    return base ** (-exponents / head_dim)


def _scale_linear(
    head_dim: int, base: float, scaling: Mapping[str, Any]
) -> tuple[torch.Tensor, float]:
    return _frequencies(head_dim, base) / scaling["factor"], 1.0


def _scale_ntk(
    head_dim: int, base: float, scaling: Mapping[str, Any]
) -> tuple[torch.Tensor, float]:
    if head_dim <= 2:
        raise ValueError(f"rope: ntk scaling needs head_dim above 2, got {head_dim}")
    return _frequencies(head_dim, scale_base_ntk(base, head_dim, scaling["factor"])), 1.0


def _scale_yarn(
    head_dim: int, base: float, scaling: Mapping[str, Any]
) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv 2309.00071, sections 3.2 to 3.4).

    Pairs that turn more than beta_fast times over the original context are kept, those that turn
    less than beta_slow times are divided by factor, and those between blend linearly in the number
    of the pair; the ends of the blend are rounded outwards to whole pairs, as YaRN's own code and
    transformers do. cos and sin are multiplied by 0.1 ln(factor) + 1: attention gets sharper.
    """
    fast, slow = float(scaling["beta_fast"]), float(scaling["beta_slow"])
    if not 0.0 < slow < fast:
        raise ValueError(f"rope: yarn needs 0 < beta_slow < beta_fast, got {slow} and {fast}")

    def pair_with(num_turns: float) -> float:
        per_turn = scaling["original_length"] / (2.0 * math.pi * num_turns)
        return head_dim * math.log(per_turn) / (2.0 * math.log(base))

    first = max(math.floor(pair_with(fast)), 0)
    last = min(math.ceil(pair_with(slow)), head_dim - 1)
    width = last - first or 0.001  # a step instead of a division by zero
    pairs = torch.arange(head_dim // 2, dtype=torch.float64)
    scaled_share = ((pairs - first) / width).clamp(0.0, 1.0)
    factor = float(scaling["factor"])
    frequencies = _frequencies(head_dim, base)
    scaled = frequencies * (scaled_share / factor + 1.0 - scaled_share)
    return scaled, 0.1 * math.log(factor) + 1.0


def _scale_llama3(
    head_dim: int, base: float, scaling: Mapping[str, Any]
) -> tuple[torch.Tensor, float]:
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    if not 0.0 < low < high:
        raise ValueError(
            f"rope: scaling needs 0 < low_freq_factor < high_freq_factor, got {low} and {high}"
        )
    # Turns a frequency makes over the original context: fewer than `low` are interpolated in full,
    # more than `high` are kept, those between blend linearly in the number of turns.
    frequencies = _frequencies(head_dim, base)
    turns = scaling["original_length"] * frequencies / (2.0 * math.pi)
    kept_share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept_share + (1.0 - kept_share) / float(scaling["factor"])), 1.0


_SCALINGS = {
    "linear": _scale_linear,
    "ntk": _scale_ntk,
    "yarn": _scale_yarn,
    "llama3": _scale_llama3,
}


def _check_scaling(scaling: Mapping[str, Any]) -> None:
    kind = scaling.get("type")
    if kind not in SCALING_KEYS:
        raise ValueError(
            f"rope: scaling type {kind!r} is unknown; use one of {', '.join(SCALING_KEYS)}"
        )
    if set(scaling) != {"type", *SCALING_KEYS[kind]}:
        raise ValueError(
            f"rope: scaling of type {kind!r} takes exactly the keys "
            f"{sorted(['type', *SCALING_KEYS[kind]])}, got {sorted(scaling)}"
        )
    if not scaling["factor"] >= 1.0:
        raise ValueError(f"rope: scaling factor must be at least 1, got {scaling['factor']}")
