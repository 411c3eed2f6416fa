"""Loss and gradient of one chunk of logits in Triton, the gradient in the logits' place.

Letters: C tokens of the chunk, V_local rows of this process's vocabulary shard. With the whole
vocabulary here, one launch reads each row twice and writes it once. With the vocabulary cut over
processes the same kernel runs twice, first for the shard's statistics, then, after one maximum and
a few sums per token were exchanged, for the gradient.
"""

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from ..backend import on_device
from .reference import IGNORED_LABEL

BLOCK_V = 4096  # 16 bf16 per thread: two 16-byte loads
NUM_WARPS = 8


@triton.jit
def cross_entropy_kernel(
    logits_ptr, labels_ptr, weights_ptr, stats_ptr,
    num_tokens, vocab_size, vocab_start,
    IGNORED: tl.constexpr, READS_STATS: tl.constexpr, WRITES_GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row of logits [C, V_local].

    stats fp32 [4, C]: maximum, sum of exponentials relative to it, logit of the label relative to
    it (0 where the label is not here), 1 where the label is here. Computed and written, or read
    where they are those of the whole vocabulary. The gradient, weight * (softmax - one-hot),
    overwrites the logits.
    """
    i_t = tl.program_id(0)
    i_row = i_t.to(tl.int64)
    label = tl.load(labels_ptr + i_t)
    row = label - vocab_start
    is_here = (label != IGNORED) & (row >= 0) & (row < vocab_size)
    row = tl.where(is_here, row, 0)
    p_logits = logits_ptr + i_row * vocab_size
    p_stats = stats_ptr + i_t
    if READS_STATS:
        maximum = tl.load(p_stats)
        total = tl.load(p_stats + num_tokens)
    else:
        b_max = tl.full([BLOCK_V], float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_V], tl.float32)
        for i_v in range(0, vocab_size, BLOCK_V):
            o_v = i_v + tl.arange(0, BLOCK_V)
            b_logits = tl.load(p_logits + o_v, mask=o_v < vocab_size, other=float("-inf"))
            b_logits = b_logits.to(tl.float32)
            b_new = tl.maximum(b_max, b_logits)
            b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)  # lanes that saw nothing yet
            b_sum = b_sum * tl.exp(b_max - b_shift) + tl.exp(b_logits - b_shift)
            b_max = b_new
        maximum = tl.max(b_max, axis=0)
        total = tl.sum(b_sum * tl.exp(b_max - maximum), axis=0)
        target = tl.load(p_logits + row, mask=is_here, other=0.0).to(tl.float32)
        tl.store(p_stats, maximum)
        tl.store(p_stats + num_tokens, total)
        tl.store(p_stats + 2 * num_tokens, tl.where(is_here, target - maximum, 0.0))
        tl.store(p_stats + 3 * num_tokens, is_here.to(tl.float32))
    if WRITES_GRADIENT:
        weight = tl.load(weights_ptr + i_t)
        scale = weight / total
        tl.debug_barrier()  # the label's logit is read before another thread overwrites it
        for i_v in range(0, vocab_size, BLOCK_V):
            o_v = i_v + tl.arange(0, BLOCK_V)
            m_v = o_v < vocab_size
            b_logits = tl.load(p_logits + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
            b_gradient = tl.exp(b_logits - maximum) * scale
            b_gradient -= tl.where((o_v == row) & is_here, weight, 0.0)
            tl.store(p_logits + o_v, b_gradient.to(logits_ptr.dtype.element_ty), mask=m_v)


def chunk_loss_triton(
    logits: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor | None,
    vocab_start: int,
    group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (loss of each token fp32 [C], shards that hold its label [C]).

    Args:
        logits: contiguous [C, V_local]; overwritten with the gradient of the weighted loss sum.
        labels: int64 [C], in the whole vocabulary, or IGNORED_LABEL.
        token_weights: fp32 [C], 0 where ignored; None: no gradient, logits stay.
        vocab_start: first vocabulary entry of this shard.
        group: processes that hold the other shards; None if there are none.
    """
    num_tokens = logits.shape[0]
    stats = torch.empty((4, num_tokens), dtype=torch.float32, device=logits.device)
    if num_tokens == 0:
        return stats[0], stats[3]

    def launch(reads_stats: bool, writes_gradient: bool) -> None:
        with on_device(logits.device):
            cross_entropy_kernel[(num_tokens,)](
                *(logits, labels, token_weights, stats),
                *(num_tokens, logits.shape[1], vocab_start),
                IGNORED=IGNORED_LABEL,
                READS_STATS=reads_stats,
                WRITES_GRADIENT=writes_gradient,
                BLOCK_V=BLOCK_V,
                num_warps=NUM_WARPS,
            )

    writes_gradient = token_weights is not None
    launch(reads_stats=False, writes_gradient=writes_gradient and group is None)
    if group is not None:
        _exchange(stats, group)
        if writes_gradient:
            launch(reads_stats=True, writes_gradient=True)
    _, total, target, num_owners = stats
    losses = (total.log() - target).masked_fill(labels == IGNORED_LABEL, 0.0)
    return losses, num_owners


def _exchange(stats: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Make the statistics of a shard those of the whole vocabulary, in place."""
    local, sums = stats[0].clone(), stats[1:]
    dist.all_reduce(stats[0], op=dist.ReduceOp.MAX, group=group)
    below = local - stats[0]  # at most 0
    sums[0] *= below.exp()
    sums[1] += below * sums[2]  # only where the label is
    dist.all_reduce(sums, group=group)
