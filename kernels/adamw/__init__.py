"""AdamW whose step counter lives in the parameter group."""

from .ops import AdamW

__all__ = ["AdamW"]
