"""SwiGLU forward and backward by formula (Shazeer, arXiv 2002.05202, section 2).

Letters: F feed-forward size. The input holds gate and up side by side: [..., 2F]. fp32 inside,
fp64 for fp64 inputs.
"""

import torch

__all__ = ["swiglu_bwd_reference", "swiglu_fwd_reference"]


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def swiglu_fwd_reference(x: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, [..., F] in x's dtype, rounded once."""
    gate, up = x.chunk(2, dim=-1)
    return (torch.nn.functional.silu(_wide(gate)) * _wide(up)).to(x.dtype)


def swiglu_bwd_reference(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return dx [..., 2F] in x's dtype from dy [..., F] and the forward's input."""
    gate, up = (_wide(half) for half in x.chunk(2, dim=-1))
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    wide_dy = _wide(dy)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dgate, dup = dx.chunk(2, dim=-1)
    # silu'(g) = sigmoid(g) + silu(g) * (1 - sigmoid(g))
    dgate.copy_(wide_dy * up * (sigmoid + silu * (1.0 - sigmoid)))
    dup.copy_(wide_dy * silu)
    return dx
