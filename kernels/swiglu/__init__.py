"""Gated activation of the feed-forward block."""

from .ops import swiglu

__all__ = ["swiglu"]
