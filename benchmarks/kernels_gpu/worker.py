"""One operator's contests, in a process of its own: `python -m kernels_gpu.worker`.

The request, on standard input, is a JSON object: op, size and device (see `shapes.list_specs`),
`excluded` {peer: reason}, `skipped` [numbers of problems], `deadline` (of time.time). Answers are
JSON objects, one per line, on what was standard output; what peers print goes to standard error.

    {"event": "machine", ...}                                 first
    {"event": "trying", "problem": 3, "peer": "Liger"}        before anything of a peer runs
    {"event": "result", "problem": 3, ...}                    a finished contest
    {"event": "lost", "reason": "..."}                        the GPU is gone; the process ends
    {"event": "done", "left_out": [4, 5]}                     last; problems there was no time for
"""

import importlib.metadata
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from . import problems
from .attention_peers import ATTENTION_PEERS
from .attention_problem import attention_problem
from .ceilings import measure_ceilings
from .contest import (
    AbsentError,
    DeviceLostError,
    Measure,
    Outcome,
    Peer,
    Problem,
    Run,
    cpu_measure,
    cuda_measure,
    describe,
    hold_contest,
)
from .loss_peers import LOSS_PEERS
from .row_peers import ADAMW_PEERS, RMS_NORM_PEERS, ROPE_PEERS, SWIGLU_PEERS
from .shapes import Spec, list_specs

__all__ = ["main", "run_operator"]

FLUSH_BYTES = 1 << 32  # many times any L2 cache; about a millisecond in which the host gets ready
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "nvidia-cudnn-frontend",
    "liger-kernel",
    "quack-kernels",
    "nvidia-cutlass-dsl",
    "cut-cross-entropy",
    "apex",
    "transformer-engine",
)

Make = Callable[[Spec, torch.device, torch.dtype], Problem]
Emit = Callable[..., None]
OPERATORS: dict[str, tuple[Make, tuple[Peer, ...]]] = {
    "interval_attention": (attention_problem, ATTENTION_PEERS),
    "linear_cross_entropy": (problems.loss_problem, LOSS_PEERS),
    "rms_norm": (problems.rms_norm_problem, RMS_NORM_PEERS),
    "swiglu": (problems.swiglu_problem, SWIGLU_PEERS),
    "rope": (problems.rope_problem, ROPE_PEERS),
    "adamw": (problems.adamw_problem, ADAMW_PEERS),
}


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers, of those that are installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name of the GPU, and versions."""
    if device.type != "cuda":
        return {"gpu": f"none ({platform.machine()})", "versions": installed_versions()}
    properties = torch.cuda.get_device_properties(device)
    versions = {
        **installed_versions(),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
    }
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "versions": versions,
    }


def _refuse(reason: str) -> Callable[[Any], Run]:
    def make(_: Any) -> Run:
        raise AbsentError(reason)

    return make


def choose_peers(op: str, excluded: dict[str, str]) -> list[Peer]:
    """The operator's contestants; excluded ones only say why."""
    return [
        replace(peer, make=_refuse(excluded[peer.name])) if peer.name in excluded else peer
        for peer in OPERATORS[op][1]
    ]


def run_operator(request: dict[str, Any], emit: Emit) -> None:
    """Hold the contests that the request asks for; see the top of this file."""
    device = torch.device(request["device"])
    is_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if is_gpu else torch.float32  # Triton's interpreter has no right bf16
    measure: Measure = cuda_measure(device, FLUSH_BYTES) if is_gpu else cpu_measure
    ceilings = measure_ceilings(device, dtype, measure, request["size"] == "tiny")
    emit(event="machine", ceilings=ceilings, dtype=str(dtype), **describe_device(device))
    left_out = []
    for number, spec in enumerate(list_specs(request["op"], request["size"])):
        if number in request["skipped"]:
            continue
        if time.time() > request["deadline"]:
            left_out.append(number)
            continue
        torch.manual_seed(0)
        emit(event="trying", problem=number, peer="")
        problem = OPERATORS[request["op"]][0](spec, device, dtype)
        outcome = hold_contest(
            problem,
            choose_peers(request["op"], request["excluded"]),
            measure,
            lambda name, n=number: emit(event="trying", problem=n, peer=name),
        )
        emit(event="result", problem=number, **describe_outcome(problem, outcome))
        del problem
    emit(event="done", left_out=left_out)


def describe_outcome(problem: Problem, outcome: Outcome) -> dict[str, Any]:
    """A contest as JSON types."""
    return {
        "note": problem.note,
        "work": {phase: [work.amount, work.unit] for phase, work in problem.work.items()},
        "times_ms": outcome.times_ms,
        "absent": outcome.absent,
        "errors": outcome.errors,
    }


def main() -> int:
    """Serve one request."""
    request = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        run_operator(request, emit)
    except Exception as error:
        traceback.print_exc()
        lost = error if isinstance(error, DeviceLostError) else describe(error)
        emit(event="lost", reason=str(lost))
        sys.stderr.flush()
        os._exit(1)  # tidying up would ask the GPU, which may be lost, and hang
    return 0


if __name__ == "__main__":
    sys.exit(main())
