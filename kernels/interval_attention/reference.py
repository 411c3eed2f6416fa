"""Dense interval attention by formula: the truth other implementations are tested against.

Letters: T query tokens, S key tokens, N query heads, K kv heads, G = N / K, H head size.
Needs T x S memory per head. fp32 inside, fp64 for fp64 inputs.
"""

import torch

from .call import BackwardCall, ForwardCall
from .plan import IntervalPlan


def _visible_TS(plan: IntervalPlan, device: torch.device) -> torch.Tensor:
    keys = torch.arange(plan.num_keys, device=device)
    lo, hi = plan.lo.to(device), plan.hi.to(device)
    return (keys >= lo[:, None]) & (keys < hi[:, None])


def _heads_first(x: torch.Tensor, num_groups: int, dtype: torch.dtype) -> torch.Tensor:
    """[tokens, heads, H] -> [heads * num_groups, tokens, H]: each kv head once per query head."""
    return x.to(dtype).transpose(0, 1).repeat_interleave(num_groups, dim=0)


def reference_fwd(call: ForwardCall) -> None:
    """See `ForwardCall`; all of it goes through one merge, fresh or not."""
    q_TNH, k_SKH, v_SKH, plan, scale, out_TNH, lse_NT, _ = call
    dtype = lse_NT.dtype
    num_groups = q_TNH.shape[1] // k_SKH.shape[1]
    k, v = (_heads_first(x, num_groups, dtype) for x in (k_SKH, v_SKH))
    scores = scale * (_heads_first(q_TNH, 1, dtype) @ k.transpose(1, 2))
    scores = scores.masked_fill(~_visible_TS(plan, q_TNH.device), float("-inf"))
    new_lse = torch.logaddexp(lse_NT, scores.logsumexp(dim=-1))
    is_seen = (plan.hi > plan.lo).to(q_TNH.device)  # [T]
    # A row that sees nothing has lse -inf on both sides: exp(-inf - -inf) is NaN, its share is 0.
    shares = torch.where(is_seen[:, None], (scores - new_lse[..., None]).exp(), 0.0)
    kept = torch.where(is_seen, (lse_NT - new_lse).exp(), 1.0)
    out_TNH.mul_(kept.t()[..., None]).add_((shares @ v).transpose(0, 1))
    lse_NT.copy_(new_lse)


def reference_bwd(call: BackwardCall) -> None:
    """See `BackwardCall`; FlashAttention-2 (arXiv 2307.08691), algorithm 2."""
    dtype = call.lse_NT.dtype
    num_groups = call.q_TNH.shape[1] // call.k_SKH.shape[1]
    q, dout = (_heads_first(x, 1, dtype) for x in (call.q_TNH, call.dout_TNH))
    k, v = (_heads_first(x, num_groups, dtype) for x in (call.k_SKH, call.v_SKH))
    scores = call.scale * (q @ k.transpose(1, 2))
    shares = (scores - call.lse_NT[..., None]).exp()
    shares = torch.where(_visible_TS(call.plan, q.device), shares, 0.0)
    dscores = call.scale * shares * (dout @ v.transpose(1, 2) - call.delta_NT[..., None])
    call.dq_TNH.add_((dscores @ k).transpose(0, 1))
    dk, dv = dscores.transpose(1, 2) @ q, shares.transpose(1, 2) @ dout
    for total, dense in ((call.dk_SKH, dk), (call.dv_SKH, dv)):
        grouped = dense.unflatten(0, (-1, num_groups)).sum(dim=1)  # [K, S, H]
        total.add_(grouped.transpose(0, 1))
