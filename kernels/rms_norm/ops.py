"""RMSNorm with its own backward. Letters: D model size."""

import torch

from .reference import rms_norm_bwd_reference, rms_norm_fwd_reference

__all__ = ["rms_norm"]


class _RMSNormFunction(torch.autograd.Function):
    """Saves the input and one fp32 number per row."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        rows = x.reshape(-1, x.shape[-1])
        y, rrms = rms_norm_fwd_reference(rows, weight, eps)
        ctx.save_for_backward(rows, weight, rrms)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        rows, weight, rrms = ctx.saved_tensors
        dx, dweight = rms_norm_bwd_reference(dy.reshape(rows.shape), rows, weight, rrms)
        return dx.view(dy.shape), dweight, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Divide each row by its root mean square and scale it by the weight.

    Args:
        x: [..., D], any floating dtype, any strides.
        weight: [D].
        eps: added to the mean square, > 0.

    Returns:
        [..., D] in x's dtype.

    Raises:
        ValueError: weight is not [D], or eps is not positive.
    """
    if x.dim() < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: weight must be [D] with D the last size of x {list(x.shape)}, "
            f"got {list(weight.shape)}"
        )
    if not eps > 0.0:
        raise ValueError(f"rms_norm: eps must be positive, got {eps}; Llama uses 1e-5")
    return _RMSNormFunction.apply(x, weight, eps)
