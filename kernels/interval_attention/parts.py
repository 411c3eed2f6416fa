"""Walk the parts of a plan with a dense attention operator.

Letters: T query tokens, S key tokens, N query heads, K kv heads, H head size; P tiles of a part,
R rows and C keys of a tile. `cpu_impl` brings the operator, this module the views
of the part's tensors, the online softmax over parts and the sums of the gradients.
"""

from typing import Protocol

import torch

from .plan import IntervalPlan, Part


class DenseAttention(Protocol):
    """A dense attention operator on P tiles at once; bias is None or 0 / -inf [P, 1, R, C]."""

    def fwd(
        self,
        q: torch.Tensor,  # [P, N, R, H]
        k: torch.Tensor,  # [P, K, C, H]
        v: torch.Tensor,  # [P, K, C, H]
        bias: torch.Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (out [P, N, R, H], lse [P, N, R]); every row sees a key."""

    def bwd(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        bias: torch.Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (dq [P, N, R, H], dk, dv [P, K, C, H]) for the global out and lse."""


def _tiles(x: torch.Tensor, start: int, length: int, part: Part, step: int) -> torch.Tensor:
    """View of x [tokens, heads, H] as [P, heads, length, H]."""
    token, head, last = x.stride()
    return x.as_strided(
        (part.num_tiles, x.shape[1], length, x.shape[2]),
        (step * token, head, token, last),
        x.storage_offset() + start * token,
    )


def _row_tiles(x_TNH: torch.Tensor, part: Part) -> torch.Tensor:
    return _tiles(x_TNH, part.row_start, part.num_rows, part, part.row_step)


def _key_tiles(x_SKH: torch.Tensor, part: Part) -> torch.Tensor:
    return _tiles(x_SKH, part.key_start, part.num_keys, part, part.key_step)


def _lse_tiles(lse_NT: torch.Tensor, part: Part) -> torch.Tensor:
    """View of lse [N, T] as [P, N, R]."""
    head, token = lse_NT.stride()
    return lse_NT.as_strided(
        (part.num_tiles, lse_NT.shape[0], part.num_rows),
        (part.row_step * token, head, token),
        lse_NT.storage_offset() + part.row_start * token,
    )


def parts_fwd(
    operator: DenseAttention,
    q_TNH: torch.Tensor,
    k_SKH: torch.Tensor,
    v_SKH: torch.Tensor,
    plan: IntervalPlan,
    scale: float,
    out_TNH: torch.Tensor,
    lse_NT: torch.Tensor,
    is_fresh: bool,
) -> None:
    """Merge the attention over these keys into (out, lse), in place.

    Args:
        q_TNH, k_SKH, v_SKH: in the dtype the operator shall see; H contiguous.
        out_TNH, lse_NT: the accumulators, fp32 (or fp64).
        is_fresh: out and lse are zeros and -inf, so a row's first part is written, not merged.
    """
    for index, part in enumerate(plan.parts):
        bias = plan.bias(index, q_TNH.device, q_TNH.dtype)
        part_out, part_lse = operator.fwd(
            _row_tiles(q_TNH, part),
            _key_tiles(k_SKH, part),
            _key_tiles(v_SKH, part),
            bias,
            part.is_causal,
            scale,
        )
        out, lse = _row_tiles(out_TNH, part), _lse_tiles(lse_NT, part)
        if is_fresh and part.is_first:
            out.copy_(part_out)
            lse.copy_(part_lse)
            continue
        # share = exp(part_lse) / (exp(part_lse) + exp(lse)); 1 where lse is -inf
        share = torch.sigmoid(part_lse - lse)
        out.lerp_(part_out.to(out.dtype), share[..., None])
        lse.copy_(torch.logaddexp(lse, part_lse))


def parts_bwd(
    operator: DenseAttention,
    dout_TNH: torch.Tensor,
    q_TNH: torch.Tensor,
    k_SKH: torch.Tensor,
    v_SKH: torch.Tensor,
    out_TNH: torch.Tensor,
    lse_NT: torch.Tensor,
    plan: IntervalPlan,
    scale: float,
    dq_TNH: torch.Tensor,
    dk_SKH: torch.Tensor,
    dv_SKH: torch.Tensor,
) -> None:
    """Add the gradients of these keys' part of the row to dq, dk, dv, in place.

    Args:
        dout_TNH, q_TNH, k_SKH, v_SKH, out_TNH: in the dtype the operator shall see; H contiguous.
        out_TNH, lse_NT: of the whole row, not of these keys alone.
        dq_TNH, dk_SKH, dv_SKH: the accumulators, fp32 (or fp64).
    """
    for index, part in enumerate(plan.parts):
        dq, dk, dv = operator.bwd(
            _row_tiles(dout_TNH, part),
            _row_tiles(q_TNH, part),
            _key_tiles(k_SKH, part),
            _key_tiles(v_SKH, part),
            _row_tiles(out_TNH, part),
            _lse_tiles(lse_NT, part),
            plan.bias(index, q_TNH.device, q_TNH.dtype),
            part.is_causal,
            scale,
        )
        _row_tiles(dq_TNH, part).add_(dq)
        _key_tiles(dk_SKH, part).add_(dk)
        _key_tiles(dv_SKH, part).add_(dv)
