"""Rotary position embedding (RoPE)."""

from .ops import apply_rope, build_rope_table

__all__ = ["apply_rope", "build_rope_table"]
