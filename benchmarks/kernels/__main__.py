"""Time every operator of `lclm_kernels` beside its peers, on an NVIDIA GPU or on a CPU.

    python -m benchmarks.kernels [--cpu] [--quick] [--dry-run] [--op NAME ...] [--peer NAME ...]

On a GPU: Llama-3-8B and 70B shapes in bf16, rows of 8K to 128K tokens. With --cpu: small shapes in
fp32, one thread, processor time. For every operator and peer a process of its own times ours,
PyTorch's own and the peer in turns, forward and backward apart: medians of the rounds, and of the
quotients to ours in the same round; rates as shares of what the device reaches in that process in a
large matrix product and a large copy.

Every result is first compared with the formula in fp32. Who is missing, fails, hangs, ends its
process or gives wrong numbers is named with the reason. On a GPU no process runs later than seven
minutes from the start; what was not measured then is named too. A line per operator, shape and peer
goes to benchmarks/results/kernels_gpu.jsonl or kernels_cpu.jsonl as soon as it is there.

Exit code 1 if a result of ours is wrong or could not be had, 2 if the command cannot be run.
"""

import argparse
import signal
import sys

import torch

from benchmarks.timing import RESULTS

from .operators import OPERATORS
from .peers import PEERS
from .supervisor import Run, run_all

# Seconds for the whole run and for each process: on a GPU seven minutes with what lies around.
LIMITS = {"cuda": (410.0, 90.0), "cpu": (3600.0, 600.0)}


def main() -> int:
    """Parse the arguments and run."""
    names = sorted({peer.name for peers in PEERS.values() for peer in peers[1:]})
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="on the CPU")
    parser.add_argument("--quick", action="store_true", help="on a GPU fewer and shorter rows")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes, to try the program; records nothing"
    )
    choose = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--op", **choose, choices=OPERATORS, default=[*OPERATORS], help="these")
    parser.add_argument("--peer", **choose, choices=names, help=f"of {', '.join(names)}")
    arguments = parser.parse_args()
    if not arguments.cpu and not torch.cuda.is_available():
        print("error: PyTorch sees no NVIDIA GPU; --cpu times on the CPU", file=sys.stderr)
        return 2
    # Told to stop, it ends its workers on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    device, size = ("cpu", "cpu") if arguments.cpu else ("cuda", "full")
    results = RESULTS / ("kernels_cpu.jsonl" if arguments.cpu else "kernels_gpu.jsonl")
    if arguments.quick and not arguments.cpu:
        size = "quick"
    if arguments.dry_run:
        size, results = "tiny", None
    code = run_all(Run(size, device, results, *LIMITS[device]), arguments.op, arguments.peer)
    print("" if results is None else f"\nappended to {results}")
    return code


if __name__ == "__main__":
    sys.exit(main())
