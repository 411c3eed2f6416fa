"""Forward Triton kernel of interval attention (FlashAttention-2, arXiv 2307.08691, algorithm 1).

Letters: T query tokens, S key tokens, N query heads, K kv heads, G = N / K, H head size; BLOCK_T
query rows, BLOCK_S key rows and BLOCK_H (H rounded up to a power of two) columns of a tile.

What is common to the attention kernels, forward and backward:
- A tile (see `tiles.py`) is a block of rows and the range [begin, end) it needs of the other side,
  of which [full_begin, full_end) needs no mask. Steps with a mask come first, in one loop for both
  ends; they are the only ones where a row may have seen nothing yet.
- One program per item, in the order in which the hardware starts them: kv head by kv head, so
  that its keys stay in L2, longest tile first, so that what starts last is short; the G query heads
  of a tile are neighbours. Resident programs that loop over every n-th item, a list of their own
  or items from a counter give the same order and balance, but (sm_90a, H = 128) dq takes 58
  registers more and the dk and dv kernel spills 40 to 64 bytes.
- Each result is made by one program in a fixed order: the same inputs give the same bits.
- A source (q, k, v, dout) is a TMA descriptor of [heads, rows, H], or a pointer with 64-bit
  offsets. Rows and columns beyond its shape are read as 0.
- Scores are in units of log2: scale_log2 = scale * log2(e) is folded into exp2. It is not negative.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
TILE_WORDS = tl.constexpr(5)  # of a row of the tile table: tile, begin, full_begin, full_end, end
UNSPECIALISED = ["num_queries", "num_keys", "num_tiles", "num_kv_heads", "num_groups"]


@triton.jit
def load_block(
    source, i_head, i_row,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, USE_TMA: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):  # fmt: skip
    """Rows [i_row, i_row + BLOCK) of one head, [BLOCK, BLOCK_H]; CHECK_ROWS: some may not exist.

    source: (TMA descriptor or pointer, stride of rows, stride of heads, number of rows).
    """
    tensor, stride_row, stride_head, num_rows = source
    if USE_TMA:
        b_rows = tensor.load([i_head, i_row, 0]).reshape(BLOCK, BLOCK_H)
    else:
        o_row = tl.arange(0, BLOCK)
        o_h = tl.arange(0, BLOCK_H)
        start = tensor + tl.cast(i_head, tl.int64) * stride_head
        start += tl.cast(i_row, tl.int64) * stride_row
        pointers = start + o_row.to(tl.int64)[:, None] * stride_row + o_h[None, :]
        if CHECK_ROWS and HEAD_DIM < BLOCK_H:
            m_exists = (i_row + o_row < num_rows)[:, None] & (o_h < HEAD_DIM)[None, :]
            b_rows = tl.load(pointers, mask=m_exists, other=0.0)
        elif CHECK_ROWS:
            b_rows = tl.load(pointers, mask=(i_row + o_row < num_rows)[:, None], other=0.0)
        elif HEAD_DIM < BLOCK_H:
            b_rows = tl.load(pointers, mask=(o_h < HEAD_DIM)[None, :], other=0.0)
        else:
            b_rows = tl.load(pointers)
    return b_rows


@triton.jit
def block_pointers(
    start_ptr, i_head, i_row, stride_row, stride_head, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Pointers to rows of one head of an fp32 accumulator or the output, [BLOCK, BLOCK_H]."""
    o_row = tl.cast(i_row, tl.int64) + tl.arange(0, BLOCK)
    start = start_ptr + tl.cast(i_head, tl.int64) * stride_head
    return start + o_row[:, None] * stride_row + tl.arange(0, BLOCK_H)[None, :]


@triton.jit
def read_tile(tiles_ptr, i_tile):
    """(tile, begin, full_begin, full_end, end) of one row of a tile table."""
    row_ptr = tiles_ptr + i_tile * TILE_WORDS
    return (
        tl.load(row_ptr),
        tl.load(row_ptr + 1),
        tl.load(row_ptr + 2),
        tl.load(row_ptr + 3),
        tl.load(row_ptr + 4),
    )


@triton.jit
def query_program(num_tiles, num_groups):
    """(kv head, query head, place in the tile table) of a program that has a tile of queries."""
    num_per_head = num_tiles * num_groups
    i_item = tl.program_id(0)
    i_k = i_item // num_per_head
    i_rest = i_item % num_per_head
    return i_k, i_k * num_groups + i_rest % num_groups, i_rest // num_groups


@triton.jit
def load_bounds(lo_ptr, hi_ptr, o_row, num_rows):
    """The range of the other side that each row sees; empty for rows that do not exist."""
    m_row = o_row < num_rows
    b_lo = tl.load(lo_ptr + o_row, mask=m_row, other=0)
    b_hi = tl.load(hi_ptr + o_row, mask=m_row, other=0)
    return b_lo, b_hi


@triton.jit
def seen_mask(i_start, b_lo, b_hi, BLOCK: tl.constexpr):
    """Which of the other side's [i_start, i_start + BLOCK) each row sees, [rows, BLOCK]."""
    o_other = i_start + tl.arange(0, BLOCK)[None, :]
    return (o_other >= b_lo[:, None]) & (o_other < b_hi[:, None])


@triton.jit
def masked_start(i_step, begin, full_begin, full_end, BLOCK: tl.constexpr):
    """First row of the i-th masked step: before the full range, then behind it."""
    num_before = (full_begin - begin) // BLOCK
    if i_step < num_before:
        start = begin + i_step * BLOCK
    else:
        start = full_end + (i_step - num_before) * BLOCK
    return start


@triton.jit
def num_masked_steps(begin, full_begin, full_end, end, BLOCK: tl.constexpr):
    return (full_begin - begin) // BLOCK + tl.cdiv(end - full_end, BLOCK)


@triton.jit
def _fwd_step(
    b_acc, b_max, b_sum, b_q, b_lo, b_hi, k, v, i_k, i_key,
    scale_log2,
    BLOCK_S: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the keys [i_key, i_key + BLOCK_S)."""
    b_k = load_block(k, i_k, i_key, BLOCK_S, HEAD_DIM, BLOCK_H, USE_TMA, MASKED)
    b_score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_T, BLOCK_S]
    if MASKED:
        m_seen = seen_mask(i_key, b_lo, b_hi, BLOCK_S)
        b_score = tl.where(m_seen, b_score * scale_log2, float("-inf"))
        b_max_new = tl.maximum(b_max, tl.max(b_score, 1))
        # A row that has seen nothing yet: exp2(-inf - -inf) would be NaN, exp2(-inf - 0) is 0.
        b_base = tl.where(b_max_new == float("-inf"), 0.0, b_max_new)
        b_share = tl.exp2(b_score - b_base[:, None])
        b_kept = tl.exp2(b_max - b_base)
    else:
        b_max_new = tl.maximum(b_max, tl.max(b_score, 1) * scale_log2)
        b_share = tl.exp2(b_score * scale_log2 - b_max_new[:, None])
        b_kept = tl.exp2(b_max - b_max_new)
    b_sum = b_sum * b_kept + tl.sum(b_share, 1)
    b_acc = b_acc * b_kept[:, None]
    b_v = load_block(v, i_k, i_key, BLOCK_S, HEAD_DIM, BLOCK_H, USE_TMA, MASKED)
    b_acc = tl.dot(b_share.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    return b_acc, b_max_new, b_sum


@triton.jit(do_not_specialize=UNSPECIALISED)
def attention_fwd_kernel(
    q, k, v, out_ptr, lse_ptr, lo_ptr, hi_ptr, tiles_ptr,
    q_stride_t, q_stride_n, k_stride_s, k_stride_k, v_stride_s, v_stride_k, out_stride_t,
    out_stride_n, lse_stride_n, lse_stride_t,
    num_queries, num_keys, num_tiles, num_kv_heads, num_groups, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_CARRY: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [T, N, H] and lse [N, T] from q [T, N, H], k and v [S, K, H].

    HAS_CARRY: out (fp32) and lse hold the attention over other keys, which these join.
    """
    i_k, i_n, i_place = query_program(num_tiles, num_groups)
    k, v = (k, k_stride_s, k_stride_k, num_keys), (v, v_stride_s, v_stride_k, num_keys)
    i_tile, begin, full_begin, full_end, end = read_tile(tiles_ptr, i_place)
    i_row = i_tile * BLOCK_T
    b_lo, b_hi = load_bounds(lo_ptr, hi_ptr, i_row + tl.arange(0, BLOCK_T), num_queries)
    b_max = tl.full([BLOCK_T], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_T], tl.float32)
    b_acc = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    q = (q, q_stride_t, q_stride_n, num_queries)
    b_q = load_block(q, i_n, i_row, BLOCK_T, HEAD_DIM, BLOCK_H, USE_TMA, True)
    for i_step in range(num_masked_steps(begin, full_begin, full_end, end, BLOCK_S)):
        i_key = masked_start(i_step, begin, full_begin, full_end, BLOCK_S)
        b_acc, b_max, b_sum = _fwd_step(
            b_acc, b_max, b_sum, b_q, b_lo, b_hi, k, v, i_k, i_key, scale_log2,
            BLOCK_S, HEAD_DIM, BLOCK_H, USE_TMA, PRECISION, True,
        )  # fmt: skip
    for i_key in range(full_begin, full_end, BLOCK_S):
        b_acc, b_max, b_sum = _fwd_step(
            b_acc, b_max, b_sum, b_q, b_lo, b_hi, k, v, i_k, i_key, scale_log2,
            BLOCK_S, HEAD_DIM, BLOCK_H, USE_TMA, PRECISION, False,
        )  # fmt: skip
    # What only the end needs is made from a second read of the tile's number, which the compiler
    # cannot merge with the first: through the loops it would cost up to 40 registers.
    i_row = tl.load(tiles_ptr + i_place * TILE_WORDS, volatile=True) * BLOCK_T
    o_row = i_row + tl.arange(0, BLOCK_T)
    m_row = o_row < num_queries
    m_out = m_row[:, None] & (tl.arange(0, BLOCK_H) < HEAD_DIM)[None, :]
    p_out = block_pointers(out_ptr, i_n, i_row, out_stride_t, out_stride_n, BLOCK_T, BLOCK_H)
    p_lse = lse_ptr + tl.cast(i_n, tl.int64) * lse_stride_n + o_row.to(tl.int64) * lse_stride_t
    # A row that has seen nothing: out 0 / 1, lse -inf + 0.
    b_total = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_lse = b_max + tl.log2(b_total)
    if HAS_CARRY:  # joins here, not at the start: the accumulators of the loops stay in registers
        m_row = m_row & (b_sum != 0.0)  # a row that has seen nothing keeps its bits
        m_out = m_out & (b_sum != 0.0)[:, None]
        b_old_lse = tl.load(p_lse, mask=m_row, other=0.0) * LOG2_E
        b_top = tl.maximum(b_lse, b_old_lse)
        b_old = tl.exp2(b_old_lse - b_top)
        b_new = tl.exp2(b_lse - b_top)
        b_both = b_old + b_new
        b_lse = b_top + tl.log2(b_both)
        b_out = b_acc * (b_new / (b_total * b_both))[:, None]
        b_out += tl.load(p_out, mask=m_out, other=0.0) * (b_old / b_both)[:, None]
    else:
        b_out = b_acc / b_total[:, None]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_out)
    tl.store(p_lse, b_lse * LN_2, mask=m_row)
