"""Small rules about tensors that several operators share."""

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what Triton kernels compute in fp32


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of the inside of an operator: fp32, for fp64 inputs fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(x: torch.Tensor) -> torch.Tensor:
    """x in its `wide_dtype`."""
    return x.to(wide_dtype(x.dtype))


def with_contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    """x, copied only if the elements of its last dim do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()
