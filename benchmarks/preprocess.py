"""How fast text becomes token files, beside the raw tokenizer and beside Megatron-LM's own tool.

    python benchmarks/preprocess.py speed --tokenizer llama3/tokenizer.model --input some.jsonl
    python benchmarks/preprocess.py megatron --megatron Megatron-LM/ (and the same)
    python benchmarks/preprocess.py memory --gigabytes 10 --folder /scratch (and the same)

Times are processor seconds of all processes of the tool, so that other work on the machine does not
count; what the tool costs before its first text (start) is measured on a few lines and given apart.
Texts are under "text". Results are appended to benchmarks/results/data.jsonl.
"""

import argparse
import filecmp
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from timing import record, run_measured

from lclm.data.indexed import dtype_for_vocab
from lclm.data.tokenizer import load_tokenizer
from lclm.prepare.gigatoken import choose_library, load_gigatoken, make_plain_json
from lclm.prepare.readers import BLOCK_BYTES

TOOL = Path(__file__).resolve().parents[1] / "tools" / "preprocess_data.py"
COPY_BYTES = 1 << 24


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


def bench_speed(arguments: argparse.Namespace) -> None:
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
    record("preprocess", rows)


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
    record("preprocess against Megatron-LM", rows)


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
    record("preprocess memory", [row | {"tokens": tokens}])


def main() -> int:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(required=True)
    speed, megatron, memory = map(kinds.add_parser, ("speed", "megatron", "memory"))
    for kind in (speed, megatron, memory):
        kind.add_argument("--tokenizer", required=True, type=Path)
        kind.add_argument("--input", required=True, type=Path, help="JSON lines")
        kind.add_argument("--folder", help="for work (default: the system's)")
    speed.add_argument("--repeats", type=int, default=3)
    speed.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    speed.set_defaults(run=bench_speed)
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
