"""The ways in which one test body runs.

`reference` (and an operator's other PyTorch implementations) always; `triton` compiled where there
is a GPU, and in Triton's interpreter on the CPU in a process of its own, which
`test_interpreter.py` starts with TRITON_INTERPRET=1 on everything marked `triton`.
"""

import pytest
import torch

from lclm_kernels.backend import IS_INTERPRETED

_TRITON_MARKS = [pytest.mark.triton] if IS_INTERPRETED else [pytest.mark.triton, pytest.mark.gpu]
TRITON = pytest.param("triton", marks=_TRITON_MARKS)


def each_implementation(*names):
    """Parametrize `implementation` over the names; "triton" gets its marks."""
    values = [TRITON if name == "triton" else name for name in names]
    return pytest.mark.parametrize("implementation", values)


def device_of(implementation: str) -> torch.device:
    """Where the tensors of a test of this implementation lie."""
    runs_on_gpu = implementation == "triton" and not IS_INTERPRETED
    return torch.device("cuda" if runs_on_gpu else "cpu")
