"""Backward Triton kernels of interval attention (FlashAttention-2, arXiv 2307.08691, algorithm 2).

Letters and rules as in `triton_fwd.py`. dq is made by tiles of queries, dk and dv by tiles of keys:
seven matrix products instead of five, for results that need no atomic sum across programs.
"""

import triton
import triton.language as tl

from .triton_fwd import (
    LOG2_E,
    TILE_WORDS,
    UNSPECIALISED,
    block_pointers,
    load_block,
    load_bounds,
    masked_start,
    num_masked_steps,
    query_program,
    read_tile,
    seen_mask,
)


@triton.jit(do_not_specialize=["num_queries"])
def attention_delta_kernel(
    dout_ptr, out_ptr, delta_ptr,
    dout_stride_t, dout_stride_n, out_stride_t, out_stride_n, delta_stride_n, delta_stride_t,
    num_queries,
    HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """delta [N, T] = sum over H of dout * out, both [T, N, H]. Grid: (tiles of T, N)."""
    i_row = tl.program_id(0) * BLOCK_T
    i_n = tl.program_id(1)
    o_row = i_row + tl.arange(0, BLOCK_T)
    m_row = o_row < num_queries
    m_block = m_row[:, None] & (tl.arange(0, BLOCK_H) < HEAD_DIM)[None, :]
    p_dout = block_pointers(dout_ptr, i_n, i_row, dout_stride_t, dout_stride_n, BLOCK_T, BLOCK_H)
    p_out = block_pointers(out_ptr, i_n, i_row, out_stride_t, out_stride_n, BLOCK_T, BLOCK_H)
    b_dout = tl.load(p_dout, mask=m_block, other=0.0).to(tl.float32)
    b_out = tl.load(p_out, mask=m_block, other=0.0).to(tl.float32)
    p_delta = delta_ptr + tl.cast(i_n, tl.int64) * delta_stride_n
    p_delta += o_row.to(tl.int64) * delta_stride_t
    tl.store(p_delta, tl.sum(b_dout * b_out, 1), mask=m_row)


@triton.jit(do_not_specialize=["num_queries", "num_heads"])
def attention_stats_kernel(
    lse_ptr, delta_ptr, lo_ptr, hi_ptr, stats_ptr,
    lse_stride_n, lse_stride_t, delta_stride_n, delta_stride_t, stats_stride,
    num_queries, num_heads,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """stats fp32 [2N, padded T]: lse in log2 units, then delta. Grid: (tiles of padded T, N).

    Rows that see nothing here and rows that do not exist get lse inf, which makes their share of
    any key exp2(-inf) = 0, and delta 0.
    """
    o_row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    i_n = tl.program_id(1)
    i_head = tl.cast(i_n, tl.int64)
    o_wide = o_row.to(tl.int64)
    b_lo, b_hi = load_bounds(lo_ptr, hi_ptr, o_row, num_queries)
    m_row = b_lo < b_hi
    p_lse = lse_ptr + i_head * lse_stride_n + o_wide * lse_stride_t
    p_delta = delta_ptr + i_head * delta_stride_n + o_wide * delta_stride_t
    b_lse = tl.load(p_lse, mask=m_row, other=float("inf"))
    b_delta = tl.load(p_delta, mask=m_row, other=0.0)
    tl.store(stats_ptr + i_head * stats_stride + o_row, b_lse * LOG2_E)
    tl.store(stats_ptr + (num_heads + i_head) * stats_stride + o_row, b_delta)


@triton.jit
def _load_stats(stats, i_stat, i_row, stride, BLOCK: tl.constexpr, USE_TMA: tl.constexpr):
    """Numbers of the rows [i_row, i_row + BLOCK) from what attention_stats_kernel wrote."""
    if USE_TMA:
        b_stats = stats.load([i_stat, i_row]).reshape(BLOCK)
    else:
        b_stats = tl.load(stats + tl.cast(i_stat, tl.int64) * stride + i_row + tl.arange(0, BLOCK))
    return b_stats


@triton.jit
def _dq_step(
    b_dq, b_q, b_dout, b_lse, b_delta, b_lo, b_hi, k, v, i_k, i_key,
    scale_log2,
    BLOCK_S: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add to dq (without the factor scale) what flows through the keys from i_key on."""
    b_k = load_block(k, i_k, i_key, BLOCK_S, HEAD_DIM, BLOCK_H, USE_TMA, MASKED)
    b_v = load_block(v, i_k, i_key, BLOCK_S, HEAD_DIM, BLOCK_H, USE_TMA, MASKED)
    b_score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_T, BLOCK_S]
    b_share = tl.exp2(b_score * scale_log2 - b_lse[:, None])
    if MASKED:
        b_share = tl.where(seen_mask(i_key, b_lo, b_hi, BLOCK_S), b_share, 0.0)
    b_dshare = tl.dot(b_dout, tl.trans(b_v), input_precision=PRECISION)
    b_dscore = b_share * (b_dshare - b_delta[:, None])
    return tl.dot(b_dscore.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=UNSPECIALISED)
def attention_dq_kernel(
    q, k, v, dout, stats, dq_ptr, lo_ptr, hi_ptr, tiles_ptr,
    q_stride_t, q_stride_n, k_stride_s, k_stride_k, v_stride_s, v_stride_k, dout_stride_t,
    dout_stride_n, stats_stride, dq_stride_t, dq_stride_n,
    num_queries, num_keys, num_tiles, num_kv_heads, num_groups, scale,
    HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dq fp32 [T, N, H]; stats as attention_stats_kernel wrote them."""
    scale_log2 = scale * LOG2_E
    i_k, i_n, i_place = query_program(num_tiles, num_groups)
    q = (q, q_stride_t, q_stride_n, num_queries)
    dout = (dout, dout_stride_t, dout_stride_n, num_queries)
    k, v = (k, k_stride_s, k_stride_k, num_keys), (v, v_stride_s, v_stride_k, num_keys)
    i_tile, begin, full_begin, full_end, end = read_tile(tiles_ptr, i_place)
    i_row = i_tile * BLOCK_T
    o_row = i_row + tl.arange(0, BLOCK_T)
    b_lo, b_hi = load_bounds(lo_ptr, hi_ptr, o_row, num_queries)
    num_heads = num_kv_heads * num_groups
    b_lse = _load_stats(stats, i_n, i_row, stats_stride, BLOCK_T, USE_TMA)
    b_delta = _load_stats(stats, num_heads + i_n, i_row, stats_stride, BLOCK_T, USE_TMA)
    b_q = load_block(q, i_n, i_row, BLOCK_T, HEAD_DIM, BLOCK_H, USE_TMA, True)
    b_dout = load_block(dout, i_n, i_row, BLOCK_T, HEAD_DIM, BLOCK_H, USE_TMA, True)
    b_dq = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for i_step in range(num_masked_steps(begin, full_begin, full_end, end, BLOCK_S)):
        i_key = masked_start(i_step, begin, full_begin, full_end, BLOCK_S)
        b_dq = _dq_step(
            b_dq, b_q, b_dout, b_lse, b_delta, b_lo, b_hi, k, v, i_k, i_key, scale_log2,
            BLOCK_S, HEAD_DIM, BLOCK_H, USE_TMA, PRECISION, True,
        )  # fmt: skip
    for i_key in range(full_begin, full_end, BLOCK_S):
        b_dq = _dq_step(
            b_dq, b_q, b_dout, b_lse, b_delta, b_lo, b_hi, k, v, i_k, i_key, scale_log2,
            BLOCK_S, HEAD_DIM, BLOCK_H, USE_TMA, PRECISION, False,
        )  # fmt: skip
    p_dq = block_pointers(dq_ptr, i_n, i_row, dq_stride_t, dq_stride_n, BLOCK_T, BLOCK_H)
    m_dq = (o_row < num_queries)[:, None] & (tl.arange(0, BLOCK_H) < HEAD_DIM)[None, :]
    tl.store(p_dq, tl.load(p_dq, mask=m_dq, other=0.0) + b_dq * scale, mask=m_dq)


@triton.jit
def _dkdv_step(
    b_dk, b_dv, b_k, b_v, b_from, b_until, q, dout, stats, i_n, i_row,
    num_heads, stats_stride, scale_log2,
    BLOCK_T: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add to dk (without the factor scale) and dv what flows from the rows from i_row on.

    lse and delta are read where they are needed: a thread holds 16 numbers of each.
    """
    b_q = load_block(q, i_n, i_row, BLOCK_T, HEAD_DIM, BLOCK_H, USE_TMA, MASKED)
    b_dout = load_block(dout, i_n, i_row, BLOCK_T, HEAD_DIM, BLOCK_H, USE_TMA, MASKED)
    b_score = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BLOCK_S, BLOCK_T]
    b_lse = _load_stats(stats, i_n, i_row, stats_stride, BLOCK_T, USE_TMA)
    b_share = tl.exp2(b_score * scale_log2 - b_lse[None, :])
    if MASKED:
        b_share = tl.where(seen_mask(i_row, b_from, b_until, BLOCK_T), b_share, 0.0)
    b_dv = tl.dot(b_share.to(b_dout.dtype), b_dout, b_dv, input_precision=PRECISION)
    b_dshare = tl.dot(b_v, tl.trans(b_dout), input_precision=PRECISION)
    b_delta = _load_stats(stats, num_heads + i_n, i_row, stats_stride, BLOCK_T, USE_TMA)
    b_dscore = b_share * (b_dshare - b_delta[None, :])
    b_dk = tl.dot(b_dscore.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=UNSPECIALISED)
def attention_dkdv_kernel(
    q, k, v, dout, stats, dk_ptr, dv_ptr, from_ptr, until_ptr, tiles_ptr,
    q_stride_t, q_stride_n, k_stride_s, k_stride_k, v_stride_s, v_stride_k, dout_stride_t,
    dout_stride_n, stats_stride, dk_stride_s, dk_stride_k, dv_stride_s, dv_stride_k,
    num_queries, num_keys, num_tiles, num_kv_heads, num_groups, scale,
    HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv fp32 [S, K, H], summed over the query heads of the kv head.

    The tile table is that of the keys: a tile of BLOCK_S keys and the rows that see some of them.
    """
    scale_log2 = scale * LOG2_E
    num_heads = num_kv_heads * num_groups
    i_k = tl.program_id(0) // num_tiles
    i_place = tl.program_id(0) % num_tiles
    i_tile, begin, full_begin, full_end, end = read_tile(tiles_ptr, i_place)
    i_key = i_tile * BLOCK_S
    o_key = i_key + tl.arange(0, BLOCK_S)
    b_from, b_until = load_bounds(from_ptr, until_ptr, o_key, num_keys)
    q = (q, q_stride_t, q_stride_n, num_queries)
    dout = (dout, dout_stride_t, dout_stride_n, num_queries)
    k, v = (k, k_stride_s, k_stride_k, num_keys), (v, v_stride_s, v_stride_k, num_keys)
    b_k = load_block(k, i_k, i_key, BLOCK_S, HEAD_DIM, BLOCK_H, USE_TMA, True)
    b_v = load_block(v, i_k, i_key, BLOCK_S, HEAD_DIM, BLOCK_H, USE_TMA, True)
    b_dk = tl.zeros([BLOCK_S, BLOCK_H], tl.float32)
    b_dv = tl.zeros([BLOCK_S, BLOCK_H], tl.float32)
    # One loop over heads and steps, so that loads run ahead from one head to the next.
    num_masked = num_masked_steps(begin, full_begin, full_end, end, BLOCK_T)
    i_n = i_k * num_groups
    i_step = 0
    for _ in range(num_groups * num_masked):
        i_row = masked_start(i_step, begin, full_begin, full_end, BLOCK_T)
        b_dk, b_dv = _dkdv_step(
            b_dk, b_dv, b_k, b_v, b_from, b_until, q, dout, stats, i_n, i_row,
            num_heads, stats_stride, scale_log2,
            BLOCK_T, HEAD_DIM, BLOCK_H, USE_TMA, PRECISION, True,
        )  # fmt: skip
        is_last = i_step == num_masked - 1
        i_n = tl.where(is_last, i_n + 1, i_n)
        i_step = tl.where(is_last, 0, i_step + 1)
    i_n = i_k * num_groups
    i_row = full_begin
    for _ in range(num_groups * ((full_end - full_begin) // BLOCK_T)):
        b_dk, b_dv = _dkdv_step(
            b_dk, b_dv, b_k, b_v, b_from, b_until, q, dout, stats, i_n, i_row,
            num_heads, stats_stride, scale_log2,
            BLOCK_T, HEAD_DIM, BLOCK_H, USE_TMA, PRECISION, False,
        )  # fmt: skip
        is_last = i_row == full_end - BLOCK_T
        i_n = tl.where(is_last, i_n + 1, i_n)
        i_row = tl.where(is_last, full_begin, i_row + BLOCK_T)
    # What only the end needs is made from a second read of the tile's number, see triton_fwd.py. A
    # reduction without a result needs no registers for what was there; nobody else adds to these
    # addresses, so the order is fixed.
    i_key = tl.load(tiles_ptr + i_place * TILE_WORDS, volatile=True) * BLOCK_S
    o_key = i_key + tl.arange(0, BLOCK_S)
    m_key = (o_key < num_keys)[:, None] & (tl.arange(0, BLOCK_H) < HEAD_DIM)[None, :]
    p_dk = block_pointers(dk_ptr, i_k, i_key, dk_stride_s, dk_stride_k, BLOCK_S, BLOCK_H)
    p_dv = block_pointers(dv_ptr, i_k, i_key, dv_stride_s, dv_stride_k, BLOCK_S, BLOCK_H)
    tl.atomic_add(p_dk, b_dk * scale, mask=m_key, sem="relaxed")
    tl.atomic_add(p_dv, b_dv, mask=m_key, sem="relaxed")
