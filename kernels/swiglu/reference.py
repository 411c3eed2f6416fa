"""SwiGLU forward and backward by formula (Shazeer, arXiv 2002.05202, section 2).

Letters: F feed-forward size. The input holds gate and up side by side: [..., 2F]. fp32 inside,
fp64 for fp64 inputs.
"""

import torch

from ..tensors import widen


def swiglu_fwd_reference(x: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, [..., F] in x's dtype, rounded once."""
    gate, up = x.chunk(2, dim=-1)
    return (torch.nn.functional.silu(widen(gate)) * widen(up)).to(x.dtype)


def swiglu_bwd_reference(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return dx [..., 2F] in x's dtype from dy [..., F] and the forward's input."""
    gate, up = (widen(half) for half in x.chunk(2, dim=-1))
    wide_dy = widen(dy)
    dx = torch.empty(x.shape, dtype=gate.dtype, device=x.device)
    dgate, dup = dx.chunk(2, dim=-1)
    torch.ops.aten.silu_backward.grad_input(wide_dy * up, gate, grad_input=dgate)
    torch.mul(wide_dy, torch.nn.functional.silu(gate), out=dup)
    return dx.to(x.dtype)
