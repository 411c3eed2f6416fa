"""RMSNorm forward and backward by formula (Zhang and Sennrich, arXiv 1910.07467, eq. 4).

Letters: D model size; R rows (all leading dims flattened). fp32 inside, fp64 for fp64 inputs.
"""

import torch

from ..tensors import widen


def rms_norm_fwd_reference(
    x_RD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (y [R, D] in x's dtype, reciprocal rms [R, 1] in fp32 or fp64).

    The normalised value is rounded to x's dtype before it meets the weight, as Hugging Face's
    Llama does; with a weight in x's dtype the result is bit-identical to it.
    """
    wide = widen(x_RD)
    rrms = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (weight_D * (wide * rrms).to(x_RD.dtype)).to(x_RD.dtype), rrms


def rms_norm_bwd_reference(
    dy_RD: torch.Tensor, x_RD: torch.Tensor, weight_D: torch.Tensor, rrms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (dx [R, D] in x's dtype, dweight [D] in the weight's dtype, summed in fp32)."""
    normed = widen(x_RD) * rrms
    dy = widen(dy_RD)
    dweight = (dy * normed).sum(dim=0)
    dnormed = dy * widen(weight_D)
    dx = rrms * (dnormed - normed * (dnormed * normed).mean(dim=-1, keepdim=True))
    return dx.to(x_RD.dtype), dweight.to(weight_D.dtype)
