"""What an implementation of interval attention is called with, once `ops.py` has checked it.

Letters: T query tokens, S key tokens, N query heads, K kv heads, H head size. q, k and v are of one
dtype and of any strides, N is a multiple of K. "Wide" is fp32, for fp64 inputs fp64.
"""

from typing import NamedTuple

import torch

from .plan import IntervalPlan


class ForwardCall(NamedTuple):
    """Merge the attention over these keys into (out, lse), in place."""

    q_TNH: torch.Tensor
    k_SKH: torch.Tensor
    v_SKH: torch.Tensor
    plan: IntervalPlan
    scale: float
    out_TNH: torch.Tensor  # wide; for Triton in q's dtype if is_fresh
    lse_NT: torch.Tensor  # wide, natural log
    is_fresh: bool  # out and lse are zeros and -inf; for Triton unwritten


class BackwardCall(NamedTuple):
    """Add the gradients of these keys' part of the row to dq, dk and dv, in place."""

    dout_TNH: torch.Tensor  # of the whole row, like out and lse; q's dtype or wide
    q_TNH: torch.Tensor
    k_SKH: torch.Tensor
    v_SKH: torch.Tensor
    out_TNH: torch.Tensor  # q's dtype or wide
    lse_NT: torch.Tensor  # wide
    delta_NT: torch.Tensor  # wide, sum over H of dout * out
    plan: IntervalPlan
    scale: float
    dq_TNH: torch.Tensor  # wide, like dk and dv
    dk_SKH: torch.Tensor
    dv_SKH: torch.Tensor
