"""Time every operator: on an NVIDIA GPU beside its peers, without one on the CPU beside PyTorch.

    python benchmarks/kernels.py [--quick] [--op NAME ...]

On a GPU (`kernels_gpu/`): Llama-3-8B and 70B shapes in bf16, rows of 8K to 128K tokens, forward and
backward apart, medians of interleaved runs, as shares of what this GPU reaches in the same run in a
large matrix product and a large copy. Every peer that is installed runs beside ours; one that is
missing, fails or gives wrong numbers is named with the reason. About seven minutes on an H200,
with --quick about two and a half. A line per problem goes to results/kernels_gpu.jsonl as soon as
it is done.

On a CPU (`kernels_cpu.py`): one thread, fp32, CPU seconds. About five minutes; one JSON object goes
to results/kernels_cpu.jsonl.

Every operator is first checked against its formula. Exit code 1 if one of ours is wrong, which then
is not timed.
"""

import argparse
import shlex
import signal
import sys
from pathlib import Path

import torch
from kernels_cpu import run as run_on_cpu
from kernels_gpu.run import run as run_on_gpu
from kernels_gpu.shapes import OPS

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    """Parse the arguments and run where there is a GPU, else on the CPU."""
    parser = argparse.ArgumentParser(description="Time the operators, on a GPU if there is one.")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rows")
    parser.add_argument(
        "--op", nargs="+", metavar="NAME", choices=OPS, default=OPS, help=f"of {', '.join(OPS)}"
    )
    arguments = parser.parse_args()
    command = shlex.join(["python", *sys.argv])
    if torch.cuda.is_available():
        # Told to stop, it ends its worker processes on the way out.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        size = "quick" if arguments.quick else "full"
        results = RESULTS / "kernels_gpu.jsonl"
        return run_on_gpu(arguments.op, size, "cuda", results, command)
    return run_on_cpu(arguments.op, arguments.quick, RESULTS / "kernels_cpu.jsonl", command)


if __name__ == "__main__":
    sys.exit(main())
