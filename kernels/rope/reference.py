"""Rotary position embedding by its formula (Su et al., arXiv 2104.09864, section 3.4.2).

Letters: T tokens, N heads, H head size. Any floating dtype.
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
    dtype = torch.promote_types(x_TNH.dtype, cos.dtype)
    first, second = x_TNH.to(dtype).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, H/2]
    rotated = torch.empty(x_TNH.shape, dtype=dtype, device=x_TNH.device)
    rotated_first, rotated_second = rotated.chunk(2, dim=-1)
    torch.mul(first, cos, out=rotated_first).addcmul_(second, sin, value=-1.0)
    torch.mul(second, cos, out=rotated_second).addcmul_(first, sin)
    return rotated.to(x_TNH.dtype)
