"""What holds for every test: fixed seeds, GPU tests only with a GPU, unwritten memory is NaN."""

import random
import sys

import numpy as np
import pytest
import torch

_ALLOCATORS = ("empty", "empty_like", "empty_strided")


def pytest_collection_modifyitems(items):
    """Leave out the tests marked gpu on machines without CUDA."""
    if torch.cuda.is_available():
        return
    marks = pytest.mark
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(marks.skip(reason="needs an NVIDIA GPU; torch sees none"))


@pytest.fixture(autouse=True)
def _fixed_seeds():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (for code under test that uses the global generator)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan(monkeypatch):
    """Fill what lclm_kernels allocates without writing it with NaN."""

    def filling(allocate):
        def allocate_nan(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("lclm_kernels") and tensor.is_floating_point():
                tensor.fill_(float("nan"))
            return tensor

        return allocate_nan

    for name in _ALLOCATORS:
        monkeypatch.setattr(torch, name, filling(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", filling(torch.Tensor.new_empty))
