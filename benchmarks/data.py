"""How fast data is prepared, planned and read, each figure beside its floor.

    python benchmarks/data.py preprocess --tokenizer llama3/tokenizer.model --input some.jsonl
    python benchmarks/data.py plan --documents 1e6 1e7 1e8
    python benchmarks/data.py loader

Times of `preprocess` are processor seconds of all processes, so that other work on the machine does
not count; figures are per core. Results are appended to benchmarks/results/data.jsonl.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lclm.data.encode import EncodeOptions, encode_sources
from lclm.data.fast import Encoder, choose_library
from lclm.data.indexed import IndexedReader, adopt_tokens
from lclm.data.loader import StageRows
from lclm.data.mixture import MixtureEntry
from lclm.data.readers import find_sources
from lclm.data.tokenizer import load_tokenizer
from lclm_kernels.native import pack_best_fit, pack_concat, seeded_order

RESULTS = Path(__file__).resolve().parent / "results" / "data.jsonl"
ROW_LENGTH = 65536
COPIES = 6  # of the input: the difference to one copy is what input costs without the start


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


def record(kind: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows and append them with the machine's description."""
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }
    with open(RESULTS, "a", encoding="utf-8") as file:
        for row in rows:
            shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
            print("  ".join(f"{name}={value}" for name, value in shown.items()))
            file.write(json.dumps({"benchmark": kind, **row, "machine": machine}) + "\n")


def bench_preprocess(arguments: argparse.Namespace) -> None:
    """The whole tool's work against the raw tokenizer on texts in memory (the floor)."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    tokenizer = load_tokenizer(arguments.tokenizer)
    sources = find_sources([arguments.input])
    lines = arguments.input.read_bytes().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    num_bytes = sum(len(text.encode()) for text in texts)
    plain_json = choose_library(tokenizer, "auto", texts[:8])
    fast = Encoder(tokenizer, plain_json)
    slow = Encoder(tokenizer, None)
    sample = texts[: max(1, len(texts) // 40)]
    if any(not np.array_equal(a, b) for a, b in zip(fast.encode(sample), slow.encode(sample))):
        sys.exit("benchmarks/data.py: the libraries give different ids; nothing is measured")

    def passes(encoder: Encoder, some: list[str], count: int) -> dict[str, float]:
        times = []
        for _ in range(count):
            start = time.process_time()
            num_tokens = sum(len(ids) for ids in encoder.encode(some))
            times.append(time.process_time() - start)
        size = sum(len(text.encode()) for text in some)
        return {"first": size / times[0] / 1e6, "last": size / times[-1] / 1e6, "n": num_tokens}

    raw = passes(fast, texts, 3)
    ordinary = passes(slow, sample, 1)

    def tool(copies: int, workers: int) -> dict[str, float]:
        def work() -> dict[str, float]:
            with tempfile.TemporaryDirectory() as folder:
                options = EncodeOptions(append_eod=True, num_workers=workers)
                encode_sources(list(sources) * copies, tokenizer, f"{folder}/x", options)
            return {}

        return measure(work)

    rows = [
        {"what": "raw tokenizer, first pass", "mb_per_core_second": raw["first"]},
        {"what": "raw tokenizer, warm (floor)", "mb_per_core_second": raw["last"]},
        {"what": "standard library alone", "mb_per_core_second": ordinary["last"]},
    ]
    for workers in (1, 2):
        once, more = tool(1, workers), tool(COPIES, workers)
        seconds = more["cpu_seconds"] - once["cpu_seconds"]
        speed = (COPIES - 1) * num_bytes / seconds / 1e6
        rows.append(
            {
                "what": f"preprocess_data, --workers {workers}: read, parse, encode, write, join",
                "mb_per_core_second": speed,
                "of_warm_raw": speed / raw["last"],
                "times_standard_library": speed / ordinary["last"],
                "tokens_per_core_second": (COPIES - 1) * raw["n"] / seconds,
                "start_cpu_seconds": once["cpu_seconds"] - num_bytes / speed / 1e6,
                "peak_gb": more["peak_gb"],
            }
        )
    record("preprocess", rows)


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
            entry = MixtureEntry(prefix, packing, 0, 1.0)
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
    preprocess = kinds.add_parser("preprocess")
    preprocess.add_argument("--tokenizer", required=True)
    preprocess.add_argument("--input", type=Path, required=True, help="JSON lines with 'text'")
    preprocess.set_defaults(run=bench_preprocess)
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
