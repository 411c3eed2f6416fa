"""One operator's contests with one peer, in a process of its own.

    python -m benchmarks.kernels.worker OP PEER SIZE DEVICE

It imports PyTorch, waits for a line on standard input, so that it can be started ahead of its time,
and answers with JSON objects, one per line; what peers print goes to standard error.

    {"machine": {...}}                  first
    {"running": "Liger"}                before anything of a contestant runs; "" for the inputs
    {"case": {...}, "times_ms": {...}, "failed": {...}, "work": {...}, "note": "..."}
"""

import importlib.metadata
import json
import os
import platform
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.timing import cpu_name

from .contest import Measure, Tensors, cpu_measure, cuda_measure, hold_contest
from .operators import OPERATORS, list_cases
from .peers import contestants

FLUSH_BYTES = 1 << 32  # many times any L2 cache; about a millisecond in which the host gets ready
BEST_OF = 20  # runs that decide what the device reaches
PACKAGES = """torch triton numpy flash-attn flash-attn-3 flash-attn-4 nvidia-cudnn-frontend
    liger-kernel quack-kernels nvidia-cutlass-dsl cut-cross-entropy apex transformer-engine"""


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers, of those that are installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES.split():
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name of the GPU, and versions."""
    versions = installed_versions()
    if device.type != "cuda":
        capability = torch.backends.cpu.get_cpu_capability()
        return {"device": cpu_name(), "capability": capability, "versions": versions}
    versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "versions": versions,
    }


def measure_ceilings(
    device: torch.device, dtype: torch.dtype, measure: Measure
) -> dict[str, float]:
    """Most operations and bytes per second seen here and now, by unit of `Work`.

    A square product of random matrices (8192) and a copy of 1 Gi numbers; the best of several runs.
    """
    size, copied = (8192, 1 << 30) if device.type == "cuda" else (256, 1 << 18)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.randn(copied, device=device, dtype=dtype)
    target = torch.empty_like(source)

    def least_seconds(call: Callable[[], Tensors]) -> float:
        measure(call)
        return 1e-3 * max(min(measure(call)[0] for _ in range(BEST_OF)), 1e-6)

    return {
        "flop": 2.0 * size**3 / least_seconds(lambda: [torch.mm(left, right, out=product)]),
        "byte": 2.0 * source.nbytes / least_seconds(lambda: [target.copy_(source)]),
    }


def hold_contests(op: str, peer: str, size: str, device_name: str, emit: Callable) -> None:
    """Answer by `emit` as said at the top of this file."""
    device = torch.device(device_name)
    is_gpu = device.type == "cuda"
    if not is_gpu:
        torch.set_num_threads(1)  # what is timed is one processor
    dtype = torch.bfloat16 if is_gpu else torch.float32  # Triton's interpreter has no right bf16
    measure: Measure = cuda_measure(device, FLUSH_BYTES) if is_gpu else cpu_measure
    ceilings = measure_ceilings(device, dtype, measure)
    emit(machine={**describe_device(device), "dtype": str(dtype), "ceilings": ceilings})
    for case in list_cases(op, size):
        torch.manual_seed(0)
        emit(running="")
        with torch.device(device):
            problem = OPERATORS[op](case, dtype)
        outcome = hold_contest(
            problem, contestants(op, peer), measure, lambda name: emit(running=name)
        )
        work = {phase: [work.amount, work.unit] for phase, work in problem.work.items()}
        emit(case=asdict(case), note=problem.note, work=work, **asdict(outcome))
        del problem


def main() -> None:
    """Serve the command line; ends the process at once, as tidying up may hang on a lost GPU."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    code = 0
    sys.stdin.readline()
    try:
        hold_contests(*sys.argv[1:], emit)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
