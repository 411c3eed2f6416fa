"""Rotary position embedding: the rotation, of one tensor or in place on packed qkv.

Letters: T tokens, N query heads, K kv heads, G = N / K, H head size. The pairing is "rotate half":
element i turns with element i + H/2, as in Hugging Face's Llama, so its weights need no
permutation.
"""

import torch
from torch.autograd.function import once_differentiable

from ..backend import AUTO, TRITON_OR_REFERENCE, choose
from ..tensors import with_contiguous_rows
from .reference import rotate_reference

_MAX_HEAD_DIM = 512  # a Triton tile holds whole heads


def _rotate(
    chosen: str,
    x_TKPH: torch.Tensor,
    out_TKPH: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_rotated: int,
    is_inverse: bool = False,
) -> None:
    """Write x into out (which may be x), the first `num_rotated` heads of each group turned."""
    if chosen == "triton":
        from .triton_impl import rotate_triton

        rotate_triton(x_TKPH, out_TKPH, cos, sin, num_rotated, is_inverse)
        return
    turned = rotate_reference(x_TKPH[:, :, :num_rotated], cos, -sin if is_inverse else sin)
    out_TKPH[:, :, :num_rotated] = turned
    if out_TKPH.data_ptr() != x_TKPH.data_ptr():
        out_TKPH[:, :, num_rotated:] = x_TKPH[:, :, num_rotated:]


class _RopeFunction(torch.autograd.Function):
    """The rotation; its gradient is the inverse rotation, so only the table is saved."""

    @staticmethod
    def forward(ctx, x_TNH, cos, sin, chosen):
        ctx.save_for_backward(cos, sin)
        ctx.chosen = chosen
        return _RopeFunction._turn(chosen, x_TNH, cos, sin, is_inverse=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_TNH):
        cos, sin = ctx.saved_tensors
        dx_TNH = _RopeFunction._turn(ctx.chosen, dout_TNH, cos, sin, is_inverse=True)
        return dx_TNH, None, None, None

    @staticmethod
    def _turn(chosen, x_TNH, cos, sin, is_inverse):
        if chosen == "reference":
            return rotate_reference(x_TNH, cos, -sin if is_inverse else sin)
        x_TNH = with_contiguous_rows(x_TNH)
        out_TNH = torch.empty(x_TNH.shape, dtype=x_TNH.dtype, device=x_TNH.device)
        groups = (x_TNH.unsqueeze(1), out_TNH.unsqueeze(1))
        _rotate(chosen, *groups, cos, sin, x_TNH.shape[1], is_inverse)
        return out_TNH


class _PackedRopeFunction(torch.autograd.Function):
    """The rotation of q and k in place on packed qkv; the gradient goes to a tensor of its own.

    Autograd may hand one gradient tensor to several functions, so it is never written to.
    """

    @staticmethod
    def forward(ctx, qkv, cos, sin, heads_shape, chosen):
        ctx.save_for_backward(cos, sin)
        ctx.heads_shape, ctx.chosen = heads_shape, chosen
        heads = qkv.view(cos.shape[0], *heads_shape)
        _rotate(chosen, heads, heads, cos, sin, heads_shape[1] - 1)
        ctx.mark_dirty(qkv)
        return qkv

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        cos, sin = ctx.saved_tensors
        dout = dout.contiguous()
        dqkv = torch.empty_like(dout)
        shape = (cos.shape[0], *ctx.heads_shape)
        num_rotated = ctx.heads_shape[1] - 1
        _rotate(ctx.chosen, dout.view(shape), dqkv.view(shape), cos, sin, num_rotated, True)
        return dqkv, None, None, None, None


def apply_rope(
    x_TNH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, implementation: str = AUTO
) -> torch.Tensor:
    """Rotate queries or keys.

    Args:
        x_TNH: [T, N, H], any floating dtype, any strides.
        cos, sin: [T, H/2] from `build_rope_table`.
        implementation: "auto", "triton" or "reference".

    Returns:
        [T, N, H] in x's dtype; the arithmetic is in fp32 or wider.

    Raises:
        ValueError: the shapes or devices do not match, the table requires a gradient, or
            the requested implementation cannot take them.
    """
    if x_TNH.dim() != 3 or x_TNH.shape[-1] % 2:
        raise ValueError(f"rope: x must be [T, N, H] with even H, got {list(x_TNH.shape)}")
    _check_table(x_TNH, x_TNH.shape[-1], cos, sin)
    chosen = _choose(implementation, x_TNH, cos, sin)
    return _RopeFunction.apply(x_TNH, cos, sin, chosen)


def apply_rope_to_qkv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads_shape: tuple[int, int, int] | None = None,
    implementation: str = AUTO,
) -> torch.Tensor:
    """Rotate the query and key heads of a packed projection in place, in one launch.

    Per kv head the projection holds G query heads, a key head and a value head, which stays. Do it
    before the heads are split: autograd refuses to modify one of several views in place.

    Args:
        qkv: [T, K, G + 2, H], contiguous; overwritten. With `heads_shape`: any contiguous tensor of
            those elements in that order, such as the projection's own output [T, 1, K (G + 2) H].
            Prefer that: for a view that is modified in place autograd copies the gradient twice.
        cos, sin: [T, H/2] from `build_rope_table`.
        heads_shape: (K, G + 2, H); None: the shape of qkv says it.
        implementation: "auto", "triton" or "reference".

    Returns:
        qkv itself.

    Raises:
        ValueError: as `apply_rope`, and if qkv is not contiguous.
    """
    shape = tuple(qkv.shape[1:]) if heads_shape is None else tuple(heads_shape)
    num_tokens = qkv.shape[0] if qkv.dim() else 0
    if len(shape) != 3 or shape[1] < 3 or shape[2] % 2 or not qkv.is_contiguous():
        raise ValueError(
            f"rope: qkv must be contiguous [T, K, G + 2, H] with even H, got {list(qkv.shape)} of "
            f"strides {list(qkv.stride())}, heads {list(shape)}; rotate before splitting the heads"
        )
    if qkv.numel() != num_tokens * shape[0] * shape[1] * shape[2]:
        raise ValueError(
            f"rope: qkv {list(qkv.shape)} does not hold [{num_tokens}, *{list(shape)}]; "
            "heads_shape is (K, G + 2, H)"
        )
    if qkv.requires_grad and qkv.is_leaf and torch.is_grad_enabled():
        raise ValueError(
            f"rope: qkv {list(qkv.shape)} is a leaf that requires grad, which autograd "
            "does not let anyone overwrite; rotate a projection's output, or a clone"
        )
    _check_table(qkv, shape[2], cos, sin)
    chosen = _choose(implementation, qkv, cos, sin, shape[2])
    return _PackedRopeFunction.apply(qkv, cos, sin, shape, chosen)


def _choose(
    wish: str, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_dim: int | None = None
) -> str:
    head_dim = head_dim or x.shape[-1]
    refusal = ""
    if cos.dtype != torch.float32 or not (cos.is_contiguous() and sin.is_contiguous()):
        refusal = f"needs a contiguous float32 table, this one is {cos.dtype}"
    elif head_dim > _MAX_HEAD_DIM:
        refusal = f"takes heads of up to {_MAX_HEAD_DIM}, these have {head_dim}"
    return choose("rope", wish, x.device, x.dtype, TRITON_OR_REFERENCE, {"triton": refusal})


def _check_table(x: torch.Tensor, head_dim: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
    table_shape = (x.shape[0], head_dim // 2)
    if cos.shape != table_shape or sin.shape != table_shape or cos.dtype != sin.dtype:
        raise ValueError(
            f"rope: cos and sin must be {list(table_shape)} for x {list(x.shape)}, got "
            f"{list(cos.shape)} and {list(sin.shape)}; build the table from this shard's positions"
        )
    if not x.device == cos.device == sin.device:
        raise ValueError(
            f"rope: x is on {x.device}, the table on {cos.device} and {sin.device}; "
            "move the table once per micro-batch"
        )
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("rope: the table has no gradient here; detach cos and sin")
