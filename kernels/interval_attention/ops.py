"""Interval attention: validation, dispatch and autograd.

Letters: T query tokens, S key tokens, N query heads, K kv heads, H head size. Accumulators are
fp32, for fp64 inputs fp64. `triton_impl` is imported where it is called: Triton may be absent.
"""

import math

import torch
from torch.autograd.function import once_differentiable

from ..backend import AUTO, Candidate, choose, triton_candidate
from ..tensors import FLOATS, wide_dtype
from .call import BackwardCall, ForwardCall
from .cpu_impl import cpu_bwd, cpu_fwd
from .plan import IntervalPlan
from .reference import reference_bwd, reference_fwd
from .tilings import MAX_HEAD_DIM, refuse_triton

_CANDIDATES = (
    Candidate("cpu", ("cpu",), (*FLOATS, torch.float64)),
    triton_candidate(*FLOATS),
    Candidate("reference", ("cpu", "cuda"), (*FLOATS, torch.float64), is_automatic=False),
)
_WHERE = "interval_attention: "


def forward(
    q_TNH: torch.Tensor,
    k_SKH: torch.Tensor,
    v_SKH: torch.Tensor,
    plan: IntervalPlan,
    scale: float,
    carry: tuple[torch.Tensor, torch.Tensor] | None = None,
    implementation: str = AUTO,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from each query to its interval of the keys. No autograd.

    Args:
        q_TNH: [T, N, H]; k_SKH, v_SKH: [S, K, H] with N % K == 0, all of one dtype (fp32, bf16,
            fp16, fp64), any strides.
        plan: of T rows and S keys.
        scale: factor of the scores, usually H ** -0.5.
        carry: (out fp32 [T, N, H], lse fp32 [N, T]) of the keys seen so far (start: zeros, -inf),
            updated in place and returned.
        implementation: "auto", "reference" (dense), "cpu" or "triton" (CUDA, head sizes up to 256).

    Returns:
        (out [T, N, H] in q's dtype, or the carry's; lse [N, T], natural log). A row that sees
        nothing has out 0 and lse -inf.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together or the implementation, an input
            requires grad, or elements of the carry share memory.
    """
    _check_qkv(q_TNH, k_SKH, v_SKH, plan, scale)
    chosen = _choose(q_TNH, scale, implementation)
    num_queries, num_heads, _ = q_TNH.shape
    wide = wide_dtype(q_TNH.dtype)
    if carry is not None:
        out, lse = carry
        _check_accumulator("carry out", out, q_TNH.shape, wide, q_TNH.device)
        _check_accumulator("carry lse", lse, (num_heads, num_queries), wide, q_TNH.device)
    elif chosen == "triton":
        out = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
        lse = torch.empty(num_heads, num_queries, dtype=wide, device=q_TNH.device)
    else:
        out = torch.zeros(q_TNH.shape, dtype=wide, device=q_TNH.device)
        lse = torch.full((num_heads, num_queries), float("-inf"), dtype=wide, device=q_TNH.device)
    call = ForwardCall(q_TNH, k_SKH, v_SKH, plan, scale, out, lse, carry is None)
    if chosen == "reference":
        reference_fwd(call)
    elif chosen == "triton":
        from .triton_impl import triton_fwd

        triton_fwd(call)
    else:
        cpu_fwd(call)
    return (out.to(q_TNH.dtype) if carry is None else out), lse


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    plan: IntervalPlan,
    scale: float,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    implementation: str = AUTO,
) -> None:
    """Add the gradients that flow through these keys to dq, dk, dv. No autograd.

    With out, lse and delta of the whole row, the calls over the shards of the keys add up to the
    gradients of the whole row exactly. The same inputs give the same bits.

    Args:
        dout: gradient of the whole row's out, [T, N, H].
        q, k, v, plan, scale, implementation: as in `forward`.
        out: the whole row's out, fp32 or q's dtype; lse: the whole row's, [N, T].
        delta: fp32 [N, T], sum over H of dout * out. An implementation may compute it again
            from dout and out, so nothing else can be folded into it.
        dq, dk, dv: fp32 (fp64) accumulators in the shapes of q, k, v.

    Raises:
        ValueError: as in `forward`, of the accumulators what it says of the carry.
    """
    _check_qkv(q, k, v, plan, scale)
    chosen = _choose(q, scale, implementation)
    wide = wide_dtype(q.dtype)
    device = q.device
    num_queries, num_heads, _ = q.shape
    for name, x, like in (("dq", dq, q), ("dk", dk, k), ("dv", dv, v)):
        _check_accumulator(name, x, like.shape, wide, device)
    for name, x in (("lse", lse), ("delta", delta)):
        _check(name, x, (num_heads, num_queries), wide, device)
    for name, x in (("dout", dout), ("out", out)):
        _check(name, x, q.shape, wide if x.dtype == wide else q.dtype, device)
    call = BackwardCall(dout, q, k, v, out, lse, delta, plan, scale, dq, dk, dv)
    if chosen == "reference":
        reference_bwd(call)
    elif chosen == "triton":
        from .triton_impl import triton_bwd

        triton_bwd(call)
    else:
        cpu_bwd(call)


class _IntervalAttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, scale, implementation):
        out, lse = forward(q, k, v, plan, scale, None, implementation)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.arguments = (plan, scale, implementation)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        plan, scale, implementation = ctx.arguments
        if _choose(q, scale, implementation) == "triton":
            from .triton_impl import triton_delta

            delta = triton_delta(dout, out)
        else:
            delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(dim=-1).t()
        dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v))
        state = (out, lse, delta, plan, scale, dq, dk, dv)
        backward(dout, q, k, v, *state, implementation=implementation)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), None, None, None


def interval_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: IntervalPlan,
    scale: float,
    implementation: str = AUTO,
) -> torch.Tensor:
    """Attend from each query to its interval of the keys, with autograd, keys on one shard.

    Arguments and errors as in `forward`. Returns out [T, N, H] in q's dtype. Its gradient cannot be
    differentiated again; torch says so.
    """
    return _IntervalAttentionFunction.apply(q, k, v, plan, scale, implementation)


def check_head_size(head_size: int, device: torch.device) -> None:
    """Refuse at the start of a run what no layer could compute on this kind of device.

    Raises:
        ValueError: a head size above 256 on CUDA.
    """
    if device.type == "cuda" and head_size > MAX_HEAD_DIM:
        raise ValueError(
            f"{_WHERE}head size {head_size} on {device}; the CUDA kernels take head sizes up to "
            f"{MAX_HEAD_DIM}: use a model with smaller heads, or the CPU"
        )


def _choose(q_TNH: torch.Tensor, scale: float, wish: str) -> str:
    device, head_dim = q_TNH.device, q_TNH.shape[2]
    refused = {"triton": refuse_triton(head_dim, scale, device)}
    return choose("interval_attention", wish, device, q_TNH.dtype, _CANDIDATES, refused)


def _check(
    name: str, x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if x.shape != torch.Size(shape) or x.dtype != dtype or x.device != device:
        raise ValueError(
            f"{_WHERE}{name} must be {dtype} {list(shape)} on {device}, got {x.dtype} "
            f"{list(x.shape)} on {x.device}"
        )


def _check_accumulator(
    name: str, x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    _check(name, x, shape, dtype, device)
    _check_no_grad(name, x)
    if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride())):
        raise ValueError(
            f"{_WHERE}{name} {list(shape)} of strides {list(x.stride())} is expanded: several of "
            "its elements share memory and cannot be added to separately; clone it"
        )


def _check_no_grad(name: str, x: torch.Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{_WHERE}{name} {list(x.shape)} requires grad, and autograd does not track what "
            "is done to it here; call under torch.no_grad() or use interval_attention()"
        )


def _check_qkv(
    q_TNH: torch.Tensor,
    k_SKH: torch.Tensor,
    v_SKH: torch.Tensor,
    plan: IntervalPlan,
    scale: float,
) -> None:
    if q_TNH.dim() != 3 or k_SKH.dim() != 3:
        raise ValueError(
            f"{_WHERE}q must be [T, N, H] and k [S, K, H], got {list(q_TNH.shape)} and "
            f"{list(k_SKH.shape)}"
        )
    num_queries, num_heads, head_dim = q_TNH.shape
    num_keys, num_kv_heads, _ = k_SKH.shape
    _check("k", k_SKH, (num_keys, num_kv_heads, head_dim), q_TNH.dtype, q_TNH.device)
    _check("v", v_SKH, k_SKH.shape, q_TNH.dtype, q_TNH.device)
    if head_dim < 1 or num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"{_WHERE}{num_heads} query heads cannot share {num_kv_heads} kv heads of size "
            f"{head_dim}; the number of query heads must be a multiple of that of kv heads"
        )
    if (plan.num_queries, plan.num_keys) != (num_queries, num_keys):
        raise ValueError(
            f"{_WHERE}the plan is for {plan.num_queries} queries and {plan.num_keys} keys, got "
            f"{num_queries} and {num_keys}; build it from this shard's intervals"
        )
    for name, x in (("q", q_TNH), ("k", k_SKH), ("v", v_SKH)):
        _check_no_grad(name, x)
    if not math.isfinite(scale):
        raise ValueError(f"{_WHERE}scale must be finite, got {scale}; H ** -0.5 is usual")
