"""Attention in which every query sees one contiguous interval of the keys."""

from .ops import backward, check_head_size, forward, interval_attention
from .plan import IntervalPlan, make_plan

__all__ = [
    "IntervalPlan",
    "backward",
    "check_head_size",
    "forward",
    "interval_attention",
    "make_plan",
]
