"""Cross entropy of one chunk of tokens, over a vocabulary that may be cut over processes.

Letters: C tokens of the chunk, V_local rows of this process's vocabulary shard. Softmax in fp32
(fp64 for fp64 logits). The vocabulary-parallel form is Megatron-LM's (arXiv 1909.08053,
section 3): the processes exchange one maximum and a few sums per token, never logits.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist

IGNORED_LABEL = -100  # torch.nn.functional.cross_entropy's default ignore_index


class ChunkLoss(NamedTuple):
    """What the forward of a chunk leaves behind for its backward."""

    losses: torch.Tensor  # [C], fp32 or fp64; 0 where the label is ignored
    shares: torch.Tensor  # [C, V_local], softmax over the whole vocabulary
    rows: torch.Tensor  # int64 [C], row of the label in this shard, 0 where it is not here
    is_here: torch.Tensor  # bool [C], the label is in this shard
    num_owners: torch.Tensor  # [C], shards that hold the label: 1, or the label is out of range


def chunk_loss_reference(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_start: int,
    group: dist.ProcessGroup | None,
) -> ChunkLoss:
    """Compute the loss of each token.

    Args:
        logits: [C, V_local], fp32 or fp64; overwritten.
        labels: int64 [C], in the whole vocabulary, or IGNORED_LABEL.
        vocab_start: first vocabulary entry of this shard.
        group: processes that hold the other shards; None if there are none.
    """
    maximum = logits.amax(dim=-1)
    if group is not None:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    logits.sub_(maximum[:, None])
    rows = labels - vocab_start
    is_here = (labels != IGNORED_LABEL) & (rows >= 0) & (rows < logits.shape[1])
    rows = rows.masked_fill(~is_here, 0)
    target = logits.gather(1, rows[:, None])[:, 0].masked_fill(~is_here, 0.0)
    shares = logits.exp_()
    sums = torch.stack([shares.sum(dim=-1), target, is_here.to(shares.dtype)])
    if group is not None:
        dist.all_reduce(sums, group=group)
    total, target, num_owners = sums
    shares.div_(total[:, None])
    losses = (total.log() - target).masked_fill(labels == IGNORED_LABEL, 0.0)
    return ChunkLoss(losses, shares, rows, is_here, num_owners)


def chunk_dlogits_reference(chunk: ChunkLoss, token_weights: torch.Tensor) -> torch.Tensor:
    """Return d(sum of token_weights * losses)/d(logits), [C, V_local]; overwrites chunk.shares."""
    dlogits = chunk.shares
    dlogits.scatter_add_(1, chunk.rows[:, None], -chunk.is_here.to(dlogits.dtype)[:, None])
    return dlogits.mul_(token_weights[:, None])
