"""The error bound every kernel is held to."""

import torch

from tests.tolerances import (
    FLOOR_BF16,
    FLOOR_FP16,
    FLOOR_FP32,
    FLOOR_FP64,
    TORCH_ERROR_FACTOR,
)

_FLOORS = {
    torch.float64: FLOOR_FP64,
    torch.float32: FLOOR_FP32,
    torch.float16: FLOOR_FP16,
    torch.bfloat16: FLOOR_BF16,
}


def max_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest absolute difference; NaN counts as infinite, equal infinities as none."""
    assert actual.shape == truth.shape
    if actual.numel() == 0:
        return 0.0
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    difference = torch.where(actual == truth, 0.0, (actual - truth).abs())
    return difference.nan_to_num(nan=float("inf")).max().item()


def assert_within_torch_error(
    name: str, actual: torch.Tensor, same_dtype_torch: torch.Tensor, truth: torch.Tensor
) -> None:
    """Error against fp64 at most twice PyTorch's in the same dtype, plus the dtype's floor."""
    assert actual.dtype == same_dtype_torch.dtype
    # the floor is a rounding of a value of size 1; larger results round at their own size
    size = max(1.0, truth.detach().abs().max().item()) if truth.numel() else 1.0
    bound = TORCH_ERROR_FACTOR * max_error(same_dtype_torch, truth) + _FLOORS[actual.dtype] * size
    error = max_error(actual, truth)
    assert error <= bound, f"{name}: error {error:.2e}, allowed {bound:.2e}"
