"""Rotary position embedding by its formula (Su et al., arXiv 2104.09864, section 3.4.2).

Letters: T tokens, H head size. Any floating dtype.
"""

import torch


def rotate_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + H/2) of every head by the angles of the table.

    Args:
        x: [T, ..., H], heads in any number of dims.
        cos, sin: [T, H/2].

    Returns:
        [T, ..., H] in x's dtype, computed in the wider of x's and the table's dtype.
    """
    dtype = torch.promote_types(x.dtype, cos.dtype)
    first, second = x.to(dtype).chunk(2, dim=-1)
    one_per_token = (slice(None), *[None] * (x.dim() - 2))
    cos, sin = cos[one_per_token], sin[one_per_token]  # [T, 1, ..., H/2]
    rotated = torch.empty(x.shape, dtype=dtype, device=x.device)
    rotated_first, rotated_second = rotated.chunk(2, dim=-1)
    torch.mul(first, cos, out=rotated_first).addcmul_(second, sin, value=-1.0)
    torch.mul(second, cos, out=rotated_second).addcmul_(first, sin)
    return rotated.to(x.dtype)
