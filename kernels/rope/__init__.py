"""Rotary position embedding (RoPE)."""

from .ops import apply_rope, apply_rope_to_qkv
from .tables import SCALING_KEYS, build_rope_table, scale_base_ntk

__all__ = ["SCALING_KEYS", "apply_rope", "apply_rope_to_qkv", "build_rope_table", "scale_base_ntk"]
