"""SwiGLU with its own backward. Letters: F feed-forward size."""

import torch

from .reference import swiglu_bwd_reference, swiglu_fwd_reference

__all__ = ["swiglu"]


class _SwiGLUFunction(torch.autograd.Function):
    """Saves only its input; the backward recomputes the activation."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return swiglu_fwd_reference(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return swiglu_bwd_reference(dy, x)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """Return silu(x[..., :F]) * x[..., F:].

    Args:
        x: [..., 2F], gate then up, any floating dtype, any strides.

    Returns:
        [..., F] in x's dtype.

    Raises:
        ValueError: the last size of x is odd.
    """
    if x.dim() < 1 or x.shape[-1] % 2:
        raise ValueError(f"swiglu: x must be [..., 2F] (gate, then up), got {list(x.shape)}")
    return _SwiGLUFunction.apply(x)
