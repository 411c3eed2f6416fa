"""How fast data is prepared, planned and read, each figure beside its floor or Megatron-LM's tool.

    python -m benchmarks.data plan --documents 1e6 1e7 1e8
    python -m benchmarks.data loader
    python -m benchmarks.data preprocess --tokenizer llama3/tokenizer.model --input some.jsonl
    python -m benchmarks.data megatron --megatron Megatron-LM/ (and the same)
    python -m benchmarks.data memory --gigabytes 10 --folder /scratch (and the same)

Times are processor seconds of all processes, so that other work on the machine does not count; what
preprocessing costs before its first text (start) is measured on a few lines and given apart. Texts
are under "text". Results are appended to benchmarks/results/data.jsonl.
"""

import argparse
import filecmp
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import ROOT, record_rows, run_measured
from lclm.config import MixtureEntry
from lclm.data.indexed import IndexedReader, adopt_tokens, dtype_for_vocab
from lclm.data.stage_rows import StageRows
from lclm.data.tokenizer import load_tokenizer
from lclm.prepare.gigatoken import choose_library, load_gigatoken, make_plain_json
from lclm.prepare.readers import BLOCK_BYTES
from lclm_kernels.native import pack_best_fit, pack_concat, seeded_order

ROW_LENGTH = 65536
TOOL = ROOT / "tools" / "preprocess_data.py"
COPY_BYTES = 1 << 24


def draw_lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    """Lengths of documents, int32, about 1,270 tokens in the mean."""
    return rng.lognormal(6.3, 1.3, count).astype(np.int32) + 1


def plan_epoch(count: int, packing: str) -> dict[str, float]:
    """Order and pack an epoch of documents; seconds, memory and padding of this process."""
    begun = time.process_time(), time.perf_counter()
    lengths = draw_lengths(np.random.default_rng(0), count)
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
    assert len(docs) == len(packed.place)
    return {
        "cpu_seconds": time.process_time() - begun[0],
        "wall_seconds": time.perf_counter() - begun[1],
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "plan_seconds": seconds,
        "order_seconds": gathered,
        "padding": 1 - packed.length.sum(dtype=np.int64) / (num_rows * ROW_LENGTH),
    }


def bench_plan(arguments: argparse.Namespace) -> None:
    """Order and packing of one epoch; the floor is the order's gather of lengths alone."""
    rows = []
    for count in (int(float(text)) for text in arguments.documents):
        for packing in ("concat", "best-fit"):
            # a process for each, so that its memory is its own
            with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
                done = pool.submit(plan_epoch, count, packing).result()
            rows.append({"what": packing, "documents": count, **done})
    record_rows("plan", rows)


def bench_loader(arguments: argparse.Namespace) -> None:
    """Rows per second from files in the page cache against one read of the same bytes."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        lengths = draw_lengths(rng, arguments.documents_on_disk)
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
    record_rows("loader", rows)


def run_tool(
    tokenizer: Path, inputs: list[Path], prefix: str, workers: int, **options: Any
) -> dict[str, float]:
    """Preprocess inputs by our tool; see `run_measured`."""
    for old in Path(prefix).parent.glob(f"{Path(prefix).name}.*"):
        old.unlink()  # to free a large file costs time too
    command = [sys.executable, str(TOOL), "--input", *map(str, inputs), "--output-prefix", prefix]
    command += ["--tokenizer", str(tokenizer), "--append-eod", "--workers", str(workers)]
    return run_measured(command, **options)


def read_and_write(source: Path, target: Path, num_bytes: int) -> float:
    """Processor seconds to read a file and to write a new one, in blocks as the tool does."""
    start = time.process_time()
    block = bytearray(BLOCK_BYTES)
    with open(source, "rb", 0) as reader, open(target, "wb", 0) as writer:
        while reader.readinto(block):
            pass
        for at in range(0, num_bytes, BLOCK_BYTES):
            writer.write(memoryview(block)[: num_bytes - at])
    seconds = time.process_time() - start
    target.unlink()
    return seconds


def bench_preprocess(arguments: argparse.Namespace) -> None:
    """The tool against the raw tokenizer on the same texts in memory, in two states.

    fresh: every text is new to the tokenizer, whose memory of words grows; the usual case.
    warm: the same texts once more, so that every word is known.
    """
    os.environ["RAYON_NUM_THREADS"] = "1"
    tokenizer = load_tokenizer(arguments.tokenizer)
    with open(arguments.input, encoding="utf-8") as file:
        texts = [json.loads(line)["text"].encode() for line in file]
    num_bytes = sum(map(len, texts))
    plain_json = choose_library(tokenizer, "gigatoken", [text.decode() for text in texts[:8]])
    assert plain_json is not None, "gigatoken was asked for by name"
    cpu: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        # a unit of input for every worker, so that all start, and next to no text
        line = json.dumps({"text": "a line", "padding": "x" * BLOCK_BYTES}) + "\n"
        nothing = Path(folder) / "nothing.jsonl"
        nothing.write_text(line * max(arguments.workers), encoding="utf-8")
        for _ in range(arguments.repeats):  # interleaved, so that all see the same load
            raw = load_gigatoken(plain_json)
            for state in ("fresh", "warm"):
                start = time.process_time()
                num_tokens = sum(len(raw.encode(text)) for text in texts)
                cpu.setdefault(f"raw {state}", []).append(time.process_time() - start)
            num_token_bytes = num_tokens * dtype_for_vocab(tokenizer.vocab_size).itemsize
            files = read_and_write(arguments.input, Path(folder) / "written", num_token_bytes)
            cpu.setdefault("files", []).append(files)
            for workers in arguments.workers:
                start, once, twice = (
                    run_tool(arguments.tokenizer, inputs, f"{folder}/x", workers)["cpu_seconds"]
                    for inputs in ([nothing], [arguments.input], [arguments.input] * 2)
                )
                cpu.setdefault(f"tool {workers} fresh", []).append(once - start)
                cpu.setdefault(f"tool {workers} warm", []).append(twice - once)
                cpu.setdefault(f"tool {workers} start", []).append(start)
    rows = []
    for state in ("fresh", "warm"):
        floors = cpu[f"raw {state}"]
        about = {"state": state, "input_bytes": num_bytes, "tokens": num_tokens}
        speed = num_bytes / statistics.median(floors) / 1e6
        rows.append({"what": "raw tokenizer", **about, "mb_per_core_second": speed})
        for workers in arguments.workers:
            tool, start = cpu[f"tool {workers} {state}"], cpu[f"tool {workers} start"]
            ratios = [floor / seconds for floor, seconds in zip(floors, tool)]
            # of the raw tokenizer and the bare reading and writing of the same bytes
            with_files = [
                (floor + files) / seconds
                for floor, files, seconds in zip(floors, cpu["files"], tool)
            ]
            rows.append(
                {
                    "what": f"preprocess_data --workers {workers}",
                    **about,
                    "mb_per_core_second": num_bytes / statistics.median(tool) / 1e6,
                    "of_raw": statistics.median(ratios),
                    "of_raw_and_files": statistics.median(with_files),
                    "files_cpu_seconds": statistics.median(cpu["files"]),
                    "start_cpu_seconds": statistics.median(start),
                }
            )
    record_rows("preprocess", rows)


def bench_megatron(arguments: argparse.Namespace) -> None:
    """Our tool and Megatron-LM's on the same lines, one after the other; their bytes are equal."""
    tokenizer = load_tokenizer(arguments.tokenizer)
    script = arguments.megatron / "tools" / "preprocess_data.py"
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        special = [
            {"id": token, "content": name, "special": True, "single_word": False, "lstrip": False}
            | {"rstrip": False, "normalized": False}
            for name, token in tokenizer.special_names.items()
        ]
        tree = json.loads(make_plain_json(tokenizer)) | {"added_tokens": special}
        (Path(folder) / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end_of_text|>"}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        line, lines, more = (Path(folder) / f"{name}.jsonl" for name in ("line", "lines", "more"))
        line.write_text(json.dumps({"text": "a line"}) + "\n", encoding="utf-8")
        for target, megabytes in ((lines, arguments.megabytes), (more, arguments.our_megabytes)):
            with open(arguments.input, "rb") as file:
                texts = file.readlines(int(megabytes * 1e6))
            # their tool makes special tokens of text that spells one; ours leaves it text
            target.write_bytes(b"".join(text for text in texts if b"<|" not in text))
        path = os.pathsep.join([str(arguments.megatron), os.environ.get("PYTHONPATH", "")])

        def theirs(source: Path) -> dict[str, float]:
            command = [sys.executable, str(script), "--input", str(source), "--append-eod"]
            command += ["--output-prefix", f"{folder}/theirs", "--workers", str(arguments.workers)]
            command += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder]
            return run_measured(command, env=os.environ | {"PYTHONPATH": path})

        def ours(source: Path) -> dict[str, float]:
            return run_tool(arguments.tokenizer, [source], f"{folder}/ours", arguments.workers)

        their_start, our_start = theirs(line), ours(line)
        their_lines, our_lines = theirs(lines), ours(lines)
        for ending in (".bin", ".idx"):
            names = f"{folder}/ours{ending}", f"{folder}/theirs_text_document{ending}"
            if not filecmp.cmp(*names, shallow=False):
                sys.exit(f"the two tools wrote different {ending} files; nothing is recorded")
        # ours is done with so little before its time differs from its start by much
        our_more = ours(more)
        sizes = lines.stat().st_size, more.stat().st_size
    rows = []
    for what, start, end, size in (
        ("Megatron-LM's tool", their_start, their_lines, sizes[0]),
        ("preprocess_data", our_start, our_more, sizes[1]),
    ):
        speed = size / (end["cpu_seconds"] - start["cpu_seconds"]) / 1e6
        row = {"what": what, "workers": arguments.workers, "input_bytes": size}
        row |= {"mb_per_core_second": speed, "start_cpu_seconds": start["cpu_seconds"]}
        rows.append(row)
    rows[1]["times_megatron"] = rows[1]["mb_per_core_second"] / rows[0]["mb_per_core_second"]
    # start included, on the same lines
    rows[1]["times_megatron_whole"] = their_lines["cpu_seconds"] / our_lines["cpu_seconds"]
    rows[1]["is_byte_identical"] = True
    record_rows("preprocess against Megatron-LM", rows)


def bench_memory(arguments: argparse.Namespace) -> None:
    """Memory of all processes on many gigabytes: the texts again and again, numbered."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        big = Path(folder) / "big.jsonl"
        wanted, copy = int(arguments.gigabytes * 1e9), 0
        with open(big, "wb") as target:
            while target.tell() < wanted:
                with open(arguments.input, "rb") as source:
                    while target.tell() < wanted and (lines := source.readlines(COPY_BYTES)):
                        numbered = b'{"text": "copy %d ' % copy
                        target.write(b"".join(lines).replace(b'{"text": "', numbered))
                copy += 1
        size = big.stat().st_size
        done = run_tool(
            arguments.tokenizer, [big], f"{folder}/x", arguments.workers, watch_memory=True
        )
        tokens = json.loads(Path(f"{folder}/x.json").read_text(encoding="utf-8"))["tokens"]
    row = {"what": f"preprocess_data --workers {arguments.workers}", "input_bytes": size, **done}
    record_rows("preprocess memory", [row | {"tokens": tokens}])


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
    tool, megatron, memory = map(kinds.add_parser, ("preprocess", "megatron", "memory"))
    for kind in (tool, megatron, memory):
        kind.add_argument("--tokenizer", required=True, type=Path)
        kind.add_argument("--input", required=True, type=Path, help="JSON lines")
        kind.add_argument("--folder", help="for work (default: the system's)")
    tool.add_argument("--repeats", type=int, default=3)
    tool.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    tool.set_defaults(run=bench_preprocess)
    megatron.add_argument("--megatron", required=True, type=Path, help="checkout of Megatron-LM")
    megatron.add_argument("--megabytes", type=float, default=30.0, help="that both encode")
    megatron.add_argument("--our-megabytes", type=float, default=500.0, help="for our speed")
    megatron.add_argument("--workers", type=int, default=1)
    megatron.set_defaults(run=bench_megatron)
    memory.add_argument("--gigabytes", type=float, default=10.0)
    memory.add_argument("--workers", type=int, default=2)
    memory.set_defaults(run=bench_memory)
    arguments = parser.parse_args()
    arguments.run(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
