"""RMSNorm with its own backward. Letters: D model size."""

import torch

from .reference import rms_norm_bwd_reference, rms_norm_fwd_reference

__all__ = ["rms_norm"]


class _RMSNormFunction(torch.autograd.Function):
    """Saves the input and one fp32 number per row."""

    @staticmethod
    def forward(ctx, x, weight_D, eps):
        rows = x.reshape(-1, x.shape[-1])
        y, rrms = rms_norm_fwd_reference(rows, weight_D, eps)
        ctx.save_for_backward(rows, weight_D, rrms)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        rows, weight_D, rrms = ctx.saved_tensors
        dx, dweight = rms_norm_bwd_reference(dy.reshape(rows.shape), rows, weight_D, rrms)
        return dx.view(dy.shape), dweight, None


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Divide each row by its root mean square and scale it by the weight.

    Args:
        x: [..., D], any floating dtype, any strides.
        weight_D: [D].
        eps: added to the mean square, > 0.

    Returns:
        [..., D] in x's dtype.

    Raises:
        ValueError: weight is not [D], or eps is not positive.
    """
    if x.dim() < 1 or weight_D.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: weight must be [D] with D the last size of x {list(x.shape)}, "
            f"got {list(weight_D.shape)}"
        )
    if not eps > 0.0:
        raise ValueError(f"rms_norm: eps must be positive, got {eps}; Llama uses 1e-5")
    return _RMSNormFunction.apply(x, weight_D, eps)
