"""Which implementation of an operator runs, and why.

An operator lists its implementations best first, as `Candidate`s. `choose` returns the name of the
first one that can serve the request, or of the one asked for. A wish that cannot be met is an
error and never another implementation. Every distinct choice is logged once with its reason.

Triton kernels run on CUDA devices. Under `TRITON_INTERPRET=1`, which must be set before the process
starts, they also run on CPU tensors, in Triton's interpreter: slow, for tests.
"""

import contextlib
import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .tensors import FLOATS

AUTO = "auto"
logger = logging.getLogger(__name__)
_logged: set[tuple[str, str, str, str, str]] = set()

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Candidate:
    """One implementation of an operator and what it accepts."""

    name: str
    device_types: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    is_automatic: bool = True  # False: runs only when asked for by name
    missing: str = ""  # what this installation lacks to run it

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str:
        """Say why this implementation cannot serve device and dtype; empty if it can."""
        if self.missing:
            return f"needs {self.missing}"
        if device.type not in self.device_types:
            return f"runs on {'/'.join(self.device_types)}, the tensors are on {device.type}"
        if dtype not in self.dtypes:
            names = ", ".join(str(item).removeprefix("torch.") for item in self.dtypes)
            return f"takes {names}, the tensors are {str(dtype).removeprefix('torch.')}"
        return ""


def triton_candidate(*dtypes: torch.dtype) -> Candidate:
    """The candidate "triton" of an operator whose kernels take these dtypes."""
    return Candidate(
        "triton",
        ("cuda", "cpu") if IS_INTERPRETED else ("cuda",),
        dtypes,
        missing="" if _HAS_TRITON else "the package triton, which is not installed",
    )


TRITON_OR_REFERENCE = (
    triton_candidate(*FLOATS),
    Candidate("reference", ("cpu", "cuda"), (*FLOATS, torch.float64)),
)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Where a launch of a Triton kernel on tensors of `device` belongs.

    Triton launches on the current device, wherever the tensors are.
    """
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def choose(
    op: str,
    wish: str,
    device: torch.device,
    dtype: torch.dtype,
    candidates: Sequence[Candidate],
    refused: Mapping[str, str] | None = None,
) -> str:
    """Return the name of the implementation that serves this call.

    Args:
        op: operator name, for messages.
        wish: "auto", or the name of one implementation.
        device, dtype: of the operator's inputs.
        candidates: what there is, best first.
        refused: why an implementation cannot serve the shapes or strides at hand, by name, as a
            clause whose subject is the implementation; absent or empty: it can.

    Raises:
        ValueError: the wish names no implementation, or one that cannot serve this call, or no
            implementation can.
    """
    of_shape = refused or {}
    refusals = {
        item.name: item.refusal(device, dtype) or of_shape.get(item.name, "") for item in candidates
    }
    if wish != AUTO:
        if wish not in refusals:
            raise ValueError(
                f"{op}: implementation={wish!r} does not exist; "
                f"use one of {', '.join([AUTO, *refusals])}"
            )
        if refusals[wish]:
            raise ValueError(
                f"{op}: implementation={wish!r} cannot run: it {refusals[wish]}; "
                f"use implementation={AUTO!r} or convert the tensors"
            )
        _log_once(op, wish, "asked for by name", device, dtype)
        return wish
    automatic = [item.name for item in candidates if item.is_automatic]
    for name in automatic:
        if not refusals[name]:
            passed_over = [f"{n} {refusals[n]}" for n in automatic[: automatic.index(name)]]
            _log_once(op, name, "; ".join(passed_over) or "best first", device, dtype)
            return name
    reasons = "; ".join(f"{name} {refusals[name]}" for name in automatic)
    raise ValueError(f"{op}: no implementation serves these tensors: {reasons}; convert them")


def _log_once(op: str, name: str, reason: str, device: torch.device, dtype: torch.dtype) -> None:
    key = (op, name, reason, device.type, str(dtype))
    if key not in _logged:
        _logged.add(key)
        logger.info("%s: %s implementation on %s %s (%s)", op, name, device.type, dtype, reason)
