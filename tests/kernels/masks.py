"""Interval masks for the attention tests, and attention in fp64 by its definition."""

import numpy as np
import torch

from lclm_kernels.interval_attention import IntervalPlan, make_plan


def document_intervals(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Causal intervals within packed documents, int32 [sum of lengths]."""
    ends = np.cumsum([0, *lengths])
    lo = np.repeat(ends[:-1], lengths).astype(np.int32)
    return lo, np.arange(1, len(lo) + 1, dtype=np.int32)


def _plan(lo, hi, num_keys: int) -> IntervalPlan:
    return make_plan(np.asarray(lo, dtype=np.int32), np.asarray(hi, dtype=np.int32), num_keys)


def _rows_of(lengths: list[int], *chunks: tuple[int, int]):
    """The intervals of a context-parallel rank that holds the chunks, keys in global order."""
    rows = np.concatenate([np.arange(*chunk) for chunk in chunks])
    lo, hi = document_intervals(lengths)
    return lo[rows], hi[rows]


def _random_mask(seed: int, num_queries: int, num_keys: int) -> IntervalPlan:
    rng = np.random.default_rng(seed)
    lo = np.sort(rng.integers(0, num_keys + 1, num_queries))
    hi = np.maximum(lo, np.sort(rng.integers(0, num_keys + 1, num_queries)))
    is_empty = rng.random(num_queries) < 0.1
    lo[is_empty] = rng.integers(0, num_keys + 1, is_empty.sum())  # anywhere: order is free there
    hi[is_empty] = lo[is_empty]
    return _plan(lo, hi, num_keys)


def build_masks() -> dict[str, IntervalPlan]:
    """Every kind of mask the trainer makes, and legal masks that nobody should make."""
    ragged = [5, 1, 130, 250, 3, 3, 64]
    total = sum(ragged)
    masks = {
        "one token": _plan([0], [1], 1),
        "one giant document": _plan(*document_intervals([700]), 700),
        "two giant documents": _plan(*document_intervals([1, 1699]), 1700),  # coarse rectangles
        "ragged documents": _plan(*document_intervals(ragged), total),
        "one-token documents": _plan(*document_intervals([1] * 300), 300),
        "tiny documents": _plan(*document_intervals([4] * 70), 280),
        "63 tokens": _plan(*document_intervals([63]), 63),
        "rectangle": _plan([3] * 200, [77] * 200, 80),
        "cross attention blocks": _plan(np.arange(200) // 7 * 7, np.arange(200) // 7 * 7 + 7, 207),
        "sliding window": _plan(np.maximum(np.arange(500) - 200, 0), np.arange(500) + 1, 500),
        "narrow window": _plan(np.maximum(np.arange(300) - 3, 0), np.arange(300) + 1, 300),
        "prefix": _plan([0] * 300, np.maximum(np.arange(300) + 1, 150), 300),
        "middle of a document": _plan([0] * 260, np.arange(300, 560), 600),
        # tiles of 65 keys, 64 apart: they must not be batched
        "two queries per key": _plan([0] * 400, (np.arange(400) + 1) // 2 + 1, 300),
        "zigzag shard": _plan(*_rows_of(ragged, (100, 200), (300, 400)), total),
        "keys nobody sees": _plan([50] * 100, np.arange(51, 151), 400),
        "some rows empty": _plan([0, 9, 0, 2, 7, 2, 5], [0, 9, 4, 5, 7, 5, 5], 9),
        "all rows empty": _plan([4] * 70, [4] * 70, 9),
        "no queries": _plan([], [], 5),
        "no keys": _plan([0] * 5, [0] * 5, 0),
        "neither": _plan([], [], 0),
    }
    lo, hi = _rows_of(ragged, (100, 200), (300, 400))
    masks["ring step"] = _plan(np.clip(lo, 150, 320) - 150, np.clip(hi, 150, 320) - 150, 170)
    for seed, size in enumerate([(300, 170), (90, 500), (257, 256)]):
        masks[f"random {size}"] = _random_mask(seed, *size)
    return masks


MASKS = build_masks()


def visible_TS(plan: IntervalPlan) -> torch.Tensor:
    """The mask of a plan from lo and hi alone, bool [T, S]."""
    keys = torch.arange(plan.num_keys)
    return (keys >= plan.lo[:, None]) & (keys < plan.hi[:, None])


def random_inputs(plan: IntervalPlan, num_heads=4, num_kv_heads=2, head_dim=16):
    """q, k, v, dout, standard normal fp64."""
    shapes = [
        (plan.num_queries, num_heads, head_dim),
        (plan.num_keys, num_kv_heads, head_dim),
        (plan.num_keys, num_kv_heads, head_dim),
        (plan.num_queries, num_heads, head_dim),
    ]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def dense_attention(q, k, v, dout, plan: IntervalPlan, scale: float):
    """Return (out, lse, dq, dk, dv) by definition, in the inputs' dtype, with autograd's gradients.

    Only rows that see something enter, so no 0 / 0 appears; the others have out 0, lse -inf.
    """
    rows = torch.nonzero(plan.hi > plan.lo)[:, 0]
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    num_groups = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.repeat_interleave(num_groups, dim=1) for x in (k, v))
    scores = scale * torch.einsum("tnh,snh->nts", q[rows], wide_k)
    scores = scores.masked_fill(~visible_TS(plan)[rows], float("-inf"))
    out = torch.zeros_like(q).index_add(
        0, rows, torch.einsum("nts,snh->tnh", scores.softmax(dim=-1), wide_v)
    )
    lse = torch.full(q.shape[1::-1], float("-inf"), dtype=q.dtype)
    lse = lse.index_copy(1, rows, scores.logsumexp(dim=-1)).detach()
    out.backward(dout)
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in (q, k, v)]
    return out.detach(), lse, *grads


def torch_attention(q, k, v, dout, plan: IntervalPlan, scale: float):
    """(out, dq, dk, dv) of torch's scaled_dot_product_attention in the inputs' dtype."""
    rows = torch.nonzero(plan.hi > plan.lo)[:, 0]
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    seen = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q[rows], k, v)),
        attn_mask=visible_TS(plan)[rows][None, None].to(q.device),
        scale=scale,
        enable_gqa=True,
    )[0].transpose(0, 1)
    out = torch.zeros_like(q).index_add(0, rows, seen)
    out.backward(dout)
    return out.detach(), q.grad, k.grad, v.grad
