"""How fast data is planned and read, each figure beside its floor; see also preprocess.py.

    python benchmarks/data.py plan --documents 1e6 1e7 1e8
    python benchmarks/data.py loader

Times are processor seconds, so that other work on the machine does not count. Results are appended
to benchmarks/results/data.jsonl.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from timing import record

from lclm.config import MixtureEntry
from lclm.data.indexed import IndexedReader, adopt_tokens
from lclm.data.stage_rows import StageRows
from lclm_kernels.native import pack_best_fit, pack_concat, seeded_order

ROW_LENGTH = 65536


def measure(work: Callable[[], Any]) -> dict[str, float]:
    """Processor seconds of `work` in a process of its own with its children, and its memory."""
    pipe, end = multiprocessing.get_context("fork").Pipe(duplex=False)

    def run() -> None:
        before = time.process_time()
        start = time.perf_counter()
        value = work()
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        own = time.process_time() - before
        result = {
            "cpu_seconds": own + children.ru_utime + children.ru_stime,
            "wall_seconds": time.perf_counter() - start,
            "peak_gb": max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, children.ru_maxrss)
            / 1e6,
        }
        end.send(result | (value or {}))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    result = pipe.recv()
    process.join()
    return result


def bench_plan(arguments: argparse.Namespace) -> None:
    """Order and packing of one epoch; the floor is the order's gather of lengths alone."""
    rows = []
    for count in (int(float(text)) for text in arguments.documents):
        for packing in ("concat", "best-fit"):

            def work(count: int = count, packing: str = packing) -> dict[str, float]:
                lengths = np.random.default_rng(0).lognormal(6.3, 1.3, count).astype(np.int32) + 1
                start = time.process_time()
                order = seeded_order(7, count)
                stream = lengths[order]
                gathered = time.process_time() - start
                num_rows = int(stream.sum(dtype=np.int64) * 0.97 / ROW_LENGTH)
                if packing == "concat":
                    packed: Any = pack_concat(stream, 0, ROW_LENGTH, num_rows)
                else:
                    packed = pack_best_fit(stream, ROW_LENGTH, num_rows)
                docs = order[packed.place]
                seconds = time.process_time() - start
                padding = 1 - packed.length.sum(dtype=np.int64) / (num_rows * ROW_LENGTH)
                assert len(docs) == len(packed.place)
                return {"plan_seconds": seconds, "order_seconds": gathered, "padding": padding}

            done = measure(work)
            rows.append({"what": packing, "documents": count, **done})
    record("plan", rows)


def bench_loader(arguments: argparse.Namespace) -> None:
    """Rows per second from files in the page cache against one read of the same bytes."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        lengths = rng.lognormal(6.3, 1.3, arguments.documents_on_disk).astype(np.int32) + 1
        num_tokens = int(lengths.sum(dtype=np.int64))
        tokens = Path(folder) / "tokens"
        rng.integers(0, 128_000, num_tokens, dtype=np.int32).tofile(tokens)
        prefix = f"{folder}/x"
        adopt_tokens(prefix, tokens, lengths, 128_256, {})
        start = time.process_time()
        data = Path(f"{prefix}.bin").read_bytes()
        floor = len(data) / (time.process_time() - start) / 1e6
        num_rows = num_tokens * 9 // 10 // ROW_LENGTH
        for packing in ("concat", "best-fit"):
            entry = MixtureEntry(prefix=prefix, packing=packing, share=1.0)
            for state in ("cold plan", "kept plan"):
                wall = time.perf_counter()
                planned = StageRows(
                    [entry], ROW_LENGTH, num_rows, 1, cache_dir=Path(folder) / "plans"
                )
                planned.row(0)
                first = time.perf_counter() - wall
                start = time.process_time()
                for number in range(num_rows):
                    planned.row(number)
                seconds = time.process_time() - start
                rows.append(
                    {
                        "what": f"{packing}, {state}",
                        "documents": len(IndexedReader(prefix)),
                        "first_row_wall_seconds": first,
                        "rows_per_core_second": num_rows / seconds,
                        "mb_per_core_second": num_rows * ROW_LENGTH * 4 / seconds / 1e6,
                        "floor_mb_per_core_second": floor,
                    }
                )
    record("loader", rows)


def main() -> int:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(required=True)
    plan = kinds.add_parser("plan")
    plan.add_argument("--documents", nargs="+", default=["1e6", "1e7"])
    plan.set_defaults(run=bench_plan)
    loader = kinds.add_parser("loader")
    loader.add_argument("--documents-on-disk", type=int, default=100_000)
    loader.set_defaults(run=bench_loader)
    arguments = parser.parse_args()
    arguments.run(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
