"""Megatron-core on a CPU: the one place that makes its CUDA names mean the CPU.

Megatron-core 0.16 to 0.19 writes `device="cuda"`, `torch.cuda.current_device()`,
`torch.cuda.synchronize()` and compares `tensor.type()` with `"torch.cuda.FloatTensor"` in an
ordinary training step. Nothing of that needs a GPU: the collectives run on gloo. So, where
there is no CUDA, `use_cpu` answers those names; where there is CUDA, nothing calls it.

Call it before the first import of `megatron` in the process.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_is_installed = False


class _CudaMeansCpu(TorchFunctionMode):
    """Sends tensors asked for on CUDA to the CPU and gives `Tensor.type()` its CUDA name."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs:
            if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.")
        return result


class _NoStream:
    """A CUDA stream's face with nothing behind it: on a CPU work is done when the call returns."""

    def wait_stream(self, *_: Any) -> None:
        """Nothing to wait for."""

    wait_event = synchronize = wait_stream


def use_cpu() -> None:
    """Make Megatron-core's CUDA names mean the CPU, for the rest of this process.

    Raises:
        RuntimeError: if CUDA is available; then the real names must stay.
    """
    global _is_installed
    if torch.cuda.is_available():
        raise RuntimeError("use_cpu: CUDA is available here; its names must keep their meaning")
    if _is_installed:
        return
    names: dict[str, Any] = {
        "current_device": lambda: _CPU,
        "set_device": lambda device: None,
        "synchronize": lambda *device: None,
        "empty_cache": lambda: None,
        "current_stream": lambda *device: _NoStream(),
        "Stream": lambda *args, **kwargs: _NoStream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "get_rng_state": lambda *device: torch.get_rng_state(),
        "manual_seed": lambda seed: None,
    }
    for name, stand_in in names.items():
        setattr(torch.cuda, name, stand_in)
    _CudaMeansCpu().__enter__()
    from megatron.core.tensor_parallel import random as megatron_random

    # Both reach into CUDA's generator objects. lclm draws nothing at random inside a layer, so the
    # state kept around a recomputed layer is the CPU generator's, and that is kept already.
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda *args, **kwargs: None
    _is_installed = True
