"""RMSNorm with its own backward. Letters: D model size."""

import torch
from torch.autograd.function import once_differentiable

from ..backend import AUTO, TRITON_OR_REFERENCE, choose
from ..tensors import FLOATS, with_contiguous_rows
from .reference import rms_norm_bwd_reference, rms_norm_fwd_reference

_MAX_SIZE = 32768  # a Triton program holds whole rows in registers


class _RMSNormFunction(torch.autograd.Function):
    """Saves the input and one fp32 number per row."""

    @staticmethod
    def forward(ctx, x, weight, eps, chosen):
        rows = x.reshape(-1, x.shape[-1])
        if chosen == "triton":
            from .triton_impl import rms_norm_fwd_triton

            rows = with_contiguous_rows(rows)
            y, rrms = rms_norm_fwd_triton(rows, weight.contiguous(), eps)
        else:
            y, rrms = rms_norm_fwd_reference(rows, weight, eps)
        ctx.save_for_backward(rows, weight, rrms)
        ctx.chosen = chosen
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        rows, weight, rrms = ctx.saved_tensors
        dy_rows = dy.reshape(rows.shape)
        if ctx.chosen == "triton":
            from .triton_impl import rms_norm_bwd_triton

            dy_rows = with_contiguous_rows(dy_rows)
            dx, dweight = rms_norm_bwd_triton(dy_rows, rows, weight.contiguous(), rrms)
        else:
            dx, dweight = rms_norm_bwd_reference(dy_rows, rows, weight, rrms)
        return dx.view(dy.shape), dweight, None, None


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, implementation: str = AUTO
) -> torch.Tensor:
    """Divide each row by its root mean square and scale it by the weight.

    Args:
        x: [..., D], any floating dtype, any strides.
        weight: [D], any floating dtype.
        eps: added to the mean square, > 0.
        implementation: "auto", "triton" or "reference".

    Returns:
        [..., D] in x's dtype.

    Raises:
        ValueError: weight is not [D] or on another device, eps is not positive, or the
            requested implementation cannot take x and weight.
    """
    if x.dim() < 1 or weight.shape != x.shape[-1:] or not weight.numel():
        raise ValueError(
            f"rms_norm: weight must be [D] with D > 0 the last size of x {list(x.shape)}, "
            f"got {list(weight.shape)}"
        )
    if not eps > 0.0:
        raise ValueError(f"rms_norm: eps must be positive, got {eps}; Llama uses 1e-5")
    if x.device != weight.device:
        raise ValueError(f"rms_norm: x is on {x.device}, weight on {weight.device}; move one")
    refusal = ""
    if x.shape[-1] > _MAX_SIZE:
        refusal = f"takes rows of up to {_MAX_SIZE}, these have {x.shape[-1]}"
    elif weight.dtype not in FLOATS:
        refusal = f"does not take a weight of {weight.dtype}"
    chosen = choose(
        "rms_norm", implementation, x.device, x.dtype, TRITON_OR_REFERENCE, {"triton": refusal}
    )
    return _RMSNormFunction.apply(x, weight, eps, chosen)
