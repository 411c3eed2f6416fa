"""Output projection and cross entropy without the logits of the whole batch.

Letters: T tokens, D model size, V_local rows of this process's vocabulary shard. The gradients
are made in the forward, chunk by chunk (Liger-Kernel, arXiv 2410.10989, section 3.2), so logits
exist for one chunk at a time.
"""

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from ..backend import AUTO, TRITON_OR_REFERENCE, choose
from ..tensors import wide_dtype, widen
from .reference import IGNORED_LABEL, chunk_dlogits_reference, chunk_loss_reference


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int = 2048,
    label_weights: torch.Tensor | None = None,
    implementation: str = AUTO,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the cross entropy of hidden @ weight.T over the labelled tokens.

    Differentiable in hidden and weight. With a group, the gradient of hidden is this process's
    PARTIAL sum over its vocabulary shard; the caller adds them up over the group.

    Args:
        hidden: [T, D]; with a group, the same on each process.
        weight: [V_local, D], hidden's dtype; its gradient is summed over chunks in fp32.
        labels: int64 [T] in the whole vocabulary; IGNORED_LABEL (-100) tokens do not count.
        vocab_start: vocabulary entry of weight's first row.
        group: the tensor-parallel group that holds the other shards.
        chunk_tokens: tokens whose logits exist at the same time.
        label_weights: fp32 [T], factor of each token's loss; None: 1. No gradient goes to it.
        implementation: "auto", "triton" or "reference", of what happens between the matrix
            products; the same on each process of the group.

    Returns:
        (loss_sum fp32 scalar in nats (fp64 for fp64 inputs), num_labels int64 scalar: labels not
        ignored, and of weight > 0 if there are weights).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, the requested implementation cannot
            take them, or a label is in no shard. The latter is found on CPU tensors
            only; on a GPU it makes the loss NaN instead of waiting for the device.
    """
    _check_inputs(hidden, weight, labels, vocab_start, chunk_tokens, label_weights)
    chosen = _choose(implementation, hidden)
    if not torch.is_grad_enabled():  # forward of a Function cannot tell
        hidden, weight = hidden.detach(), weight.detach()
    is_counted = labels != IGNORED_LABEL
    token_weights = is_counted.to(wide_dtype(hidden.dtype))
    if label_weights is not None:
        is_counted = is_counted & (label_weights > 0)
        token_weights = token_weights * label_weights
    loss_sum = _LinearCrossEntropyFunction.apply(
        hidden, weight, labels, token_weights, vocab_start, group, chunk_tokens, chosen
    )
    return loss_sum, is_counted.sum()


@torch.no_grad()
def per_token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int = 2048,
    implementation: str = AUTO,
) -> torch.Tensor:
    """Return each token's cross entropy, fp32 [T] (fp64 for fp64), 0 where ignored; no gradient.

    Arguments and errors as in `linear_cross_entropy`.
    """
    _check_inputs(hidden, weight, labels, vocab_start, chunk_tokens, None)
    chosen = _choose(implementation, hidden)
    losses = torch.zeros(hidden.shape[0], dtype=wide_dtype(hidden.dtype), device=hidden.device)
    for start in range(0, hidden.shape[0], chunk_tokens):
        part = slice(start, start + chunk_tokens)
        losses[part], _ = _chunk_loss(
            chosen, hidden[part], weight, labels[part], None, vocab_start, group
        )
    return losses


class _LinearCrossEntropyFunction(torch.autograd.Function):
    """Makes the gradients in the forward; the backward scales them by the incoming scalar."""

    @staticmethod
    def forward(
        ctx, hidden, weight, labels, token_weights, vocab_start, group, chunk_tokens, chosen
    ):
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        loss_sum = torch.zeros((), dtype=token_weights.dtype, device=hidden.device)
        dhidden = None
        if needs_hidden:
            dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        dweight = None
        if needs_weight:
            dweight = torch.zeros_like(weight, dtype=token_weights.dtype)
        for start in range(0, hidden.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            weights = token_weights[part] if needs_hidden or needs_weight else None
            losses, dlogits = _chunk_loss(
                chosen, hidden[part], weight, labels[part], weights, vocab_start, group
            )
            loss_sum += torch.dot(losses, token_weights[part])
            if dlogits is None:
                continue
            if dhidden is not None:
                torch.mm(dlogits, weight, out=dhidden[part])
            if dweight is not None:
                _add_matmul(dweight, dlogits.t(), hidden[part])
        if dweight is not None:
            dweight = dweight.to(weight.dtype)
        ctx.save_for_backward(dhidden, dweight)
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dhidden, dweight = (
            None if grad is None else grad * dloss.to(grad.dtype) for grad in ctx.saved_tensors
        )
        return dhidden, dweight, *[None] * 6


def _add_matmul(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left @ right to total, which may be wider than both."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.device.type == "cuda":  # added within the product, in fp32; torch has it there only
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(left @ right)  # each product is rounded once, their sum is not


def _chunk_loss(
    chosen: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor | None,
    vocab_start: int,
    group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (losses [C], gradient of their weighted sum [C, V_local], or None without weights)."""
    logits = hidden @ weight.t()
    dlogits = None
    if chosen == "triton":
        from .triton_impl import chunk_loss_triton

        losses, num_owners = chunk_loss_triton(
            logits, labels.contiguous(), token_weights, vocab_start, group
        )
        dlogits = None if token_weights is None else logits
    else:
        wide = widen(logits)
        chunk = chunk_loss_reference(wide, labels, vocab_start, group)
        losses, num_owners = chunk.losses, chunk.num_owners
        if token_weights is not None:
            dlogits = chunk_dlogits_reference(chunk, token_weights).to(hidden.dtype)
    return _mark_lost(losses, labels, num_owners, vocab_start, weight.shape[0]), dlogits


def _mark_lost(
    losses: torch.Tensor,
    labels: torch.Tensor,
    num_owners: torch.Tensor,
    vocab_start: int,
    num_rows: int,
) -> torch.Tensor:
    """Refuse labels that are not in exactly one shard; on a GPU make their losses NaN."""
    is_lost = (labels != IGNORED_LABEL) & (num_owners != 1)
    if labels.device.type != "cpu":
        return losses.masked_fill(is_lost, float("nan"))
    if is_lost.any():
        label = int(labels[is_lost][0])
        held = f"entries {vocab_start} to {vocab_start + num_rows - 1}"
        raise ValueError(
            f"linear_cross_entropy: label {label} is in no vocabulary shard (or in several); this "
            f"process holds {held}; use {IGNORED_LABEL} for tokens without a label, and check the "
            "tokenizer against vocab_size"
        )
    return losses


def _choose(wish: str, hidden: torch.Tensor) -> str:
    return choose("linear_cross_entropy", wish, hidden.device, hidden.dtype, TRITON_OR_REFERENCE)


def _check_inputs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    vocab_start: int,
    chunk_tokens: int,
    label_weights: torch.Tensor | None,
) -> None:
    where = "linear_cross_entropy: "
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{where}hidden must be [T, D] and weight [V_local, D], got {list(hidden.shape)} and "
            f"{list(weight.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"{where}hidden is {hidden.dtype}, weight is {weight.dtype}; cast one to the other"
        )
    if not hidden.device == weight.device == labels.device:
        raise ValueError(
            f"{where}hidden is on {hidden.device}, weight on {weight.device}, labels on "
            f"{labels.device}; move them to one device"
        )
    if labels.dtype != torch.int64 or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"{where}labels must be int64 [{hidden.shape[0]}], got {labels.dtype} "
            f"{list(labels.shape)}; one label per row of hidden"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"{where}weight has no rows; give every process a part of the vocabulary")
    if vocab_start < 0:
        raise ValueError(f"{where}vocab_start must be at least 0, got {vocab_start}")
    if chunk_tokens < 1:
        raise ValueError(f"{where}chunk_tokens must be at least 1, got {chunk_tokens}")
    if label_weights is not None and (
        label_weights.dtype != torch.float32
        or label_weights.shape != labels.shape
        or label_weights.device != labels.device
        or label_weights.requires_grad
    ):
        raise ValueError(
            f"{where}label_weights must be float32 [{labels.shape[0]}] on {labels.device} without "
            f"a gradient, got {label_weights.dtype} {list(label_weights.shape)} on "
            f"{label_weights.device}, requires_grad={label_weights.requires_grad}"
        )
