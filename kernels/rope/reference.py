"""Rotary position embedding by its formula (Su et al., arXiv 2104.09864, section 3.4.2).

Letters: T tokens, N heads, H head size. Plain torch, differentiable, any floating dtype.
"""

import torch

__all__ = ["rotate_reference"]


def rotate_reference(x_TNH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + H/2) of every head by the angles of the table.

    Args:
        x_TNH: [T, N, H].
        cos, sin: [T, H/2].

    Returns:
        [T, N, H] in x's dtype, computed in the wider of x's and the table's dtype.
    """
    first, second = x_TNH.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, H/2]
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(rotated, dim=-1).to(x_TNH.dtype)
