"""SwiGLU with its own backward. Letters: F feed-forward size."""

import torch
from torch.autograd.function import once_differentiable

from ..backend import AUTO, TRITON_OR_REFERENCE, choose
from ..tensors import with_contiguous_rows
from .reference import swiglu_bwd_reference, swiglu_fwd_reference


def _rows(x: torch.Tensor) -> torch.Tensor:
    """As [R, last size] with the last dim contiguous; a copy only where strides ask for it."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty((0, x.shape[-1]))
    return with_contiguous_rows(rows)


class _SwiGLUFunction(torch.autograd.Function):
    """Saves only its input; the backward recomputes the activation."""

    @staticmethod
    def forward(ctx, x, chosen):
        ctx.save_for_backward(x)
        ctx.chosen = chosen
        if chosen == "reference":
            return swiglu_fwd_reference(x)
        from .triton_impl import swiglu_fwd_triton

        return swiglu_fwd_triton(_rows(x)).view(*x.shape[:-1], x.shape[-1] // 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        if ctx.chosen == "reference":
            return swiglu_bwd_reference(dy, x), None
        from .triton_impl import swiglu_bwd_triton

        return swiglu_bwd_triton(_rows(dy), _rows(x)).view(x.shape), None


def swiglu(x: torch.Tensor, implementation: str = AUTO) -> torch.Tensor:
    """Return silu(x[..., :F]) * x[..., F:].

    Args:
        x: [..., 2F], gate then up, any floating dtype, any strides.
        implementation: "auto", "triton" or "reference".

    Returns:
        [..., F] in x's dtype.

    Raises:
        ValueError: the last size of x is odd, or the requested implementation cannot take x.
    """
    if x.dim() < 1 or x.shape[-1] % 2:
        raise ValueError(f"swiglu: x must be [..., 2F] (gate, then up), got {list(x.shape)}")
    chosen = choose("swiglu", implementation, x.device, x.dtype, TRITON_OR_REFERENCE)
    return _SwiGLUFunction.apply(x, chosen)
