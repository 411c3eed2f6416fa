"""Random command lines and damaged inputs: an exit status, one line, nothing lost or half written.

A failure names its number; `run_one(number, ...)` makes the same command line again.
"""

import contextlib
import gzip
import hashlib
import importlib.util
import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lclm.data.indexed import IndexedWriter
from lclm.hf import convert
from tests.checkpoint.samples import save_hf, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
ODD = ["", ".", "nosuch", "no/such", "\u00e9 \u4e2d", "a\nb", "-1", "0", "x" * 300, "nan", "1e3"]
NUMBERS = ["0", "1", "3", "17", "64", "-1", "1.5", "x", "", "nan"]
TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world <|eot_id|>"}]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tokenizer_files):
    """Files of every kind that a tool reads, whole and in the wrong places."""
    root = tmp_path_factory.mktemp("inputs")
    rows = [{"text": f"hello world {n}\n" * (n % 5), "id": n} for n in range(40)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "a.jsonl").write_text(lines)
    (root / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (root / "bad.jsonl").write_text(lines + '{"text": 3}\nnonsense\n')
    (root / "talks.jsonl").write_text((json.dumps({"messages": TALK}) + "\n") * 9)
    pq.write_table(pa.table({"text": [row["text"] for row in rows]}), root / "c.parquet")
    (root / "folder").mkdir()
    (root / "folder" / "README.md").write_text("# read me\n")
    (root / "folder" / "f.py").write_text("def f(x):\n    return x\n")
    (root / "folder" / "raw.bin").write_bytes(bytes(range(256)))
    (root / "folder" / "part.json").write_text(lines)
    for kind, file in tokenizer_files.items():
        shutil.copytree(file.parent, root / f"tokenizer_{kind}")
    for name, values in (("p", ()), ("q", (0.0, 1.0))):
        with IndexedWriter(str(root / name), 300, values) as writer:
            for length in (5, 1, 0, 60, 9):
                weights = np.ones(length, np.uint8) if values else None
                writer.add_document(np.arange(length), weights)
    save_hf(root / "hf")
    write_tokenizer(root / "hf")
    convert.convert_from_hf(root / "hf", root / "checkpoint", report=lambda line: None)
    shutil.copy(ROOT / "examples/configs/prolong_tiny.toml", root / "run.toml")
    (root / "lengths.csv").write_text("length,count\n1000,5\n300,70\n")
    return root


class Choices:
    """Words of one command line, from a seed."""

    def __init__(self, number: int, inputs: Path, folder: Path) -> None:
        self.random = random.Random(number)
        self.inputs = sorted(
            path for path in inputs.rglob("*") if path.is_file() or path.parent == inputs
        )
        self.root, self.folder = inputs, folder
        self.read: list[str] = []

    def one_of(self, *values: object) -> str:
        """One of the values as a word; now and then one of no kind."""
        return str(self.random.choice(ODD if self.random.random() < 0.1 else values))

    def path(self, *names: str) -> str:
        """An input of the names; now and then another, or a damaged copy."""
        chance = self.random.random()
        if chance < 0.6:
            path = str(self.root / self.random.choice(names))
        else:
            path = self.damaged(names) if chance < 0.75 else self.one_of(*self.inputs)
        self.read.append(path)
        return path

    def damaged(self, names: tuple[str, ...]) -> str:
        """A copy in which one file is cut short, or has bytes changed, put in or taken out."""
        name = self.random.choice(names)
        copies = self.folder / "damaged"
        copies.mkdir(exist_ok=True)
        source = self.root / name
        if source.is_dir():
            shutil.copytree(source, copies / name, dirs_exist_ok=True)
        for file in self.root.glob(f"{name}.*"):  # of a prefix
            shutil.copy(file, copies)
        if source.is_file():
            shutil.copy(source, copies)
        files = [path for path in copies.rglob("*") if path.is_file()]
        victim = self.random.choice(sorted(files))
        data = bytearray(victim.read_bytes())
        place = self.random.randrange(len(data) + 1)
        match self.random.randrange(4):
            case 0:
                del data[place:]
            case 1:
                data[place : place + 1] = bytes([self.random.randrange(256)])
            case 2:
                data[place:place] = self.random.randbytes(3)
            case 3:
                del data[place : place + 7]
        victim.write_bytes(data)
        return str(copies / name)

    def output(self) -> str:
        """A place for output; now and then what is read, its folder, or a place in it."""
        if self.random.random() < 0.15 and self.read:
            path = Path(self.random.choice(self.read))
            return str(self.random.choice([path, path.parent / path.stem, path.parent, path / "x"]))
        return self.one_of("out", "out/x", "out/deep/x", "out/", "./out")

    def options(self, **makers: object) -> list[str]:
        """Options with their values, each there or not; a list of makers gives several values."""
        words: list[str] = []
        for name, maker in makers.items():
            is_needed = name.endswith("_")
            if self.random.random() > (0.97 if is_needed else 0.2):
                continue
            words.append("--" + name.strip("_").replace("_", "-"))
            many = isinstance(maker, Several) and self.random.random() < 0.25
            if maker is not None:
                words += [maker() for _ in range(2 if many else 1)]
        return words


class Several:
    """A maker of an option that takes one or more values."""

    def __init__(self, maker) -> None:
        self.maker = maker

    def __call__(self) -> str:
        return self.maker()


TEXTS = ("a.jsonl", "b.jsonl.gz", "bad.jsonl", "c.parquet", "folder", "talks.jsonl")
TOKENIZERS = ("tokenizer_hf", "tokenizer_tiktoken", "tokenizer_sentencepiece")


def preprocess_data(c: Choices) -> list[str]:
    chat = c.options(
        chat_=None, chat_template_=lambda: c.one_of("llama3", "chatml", "tokenizer"),
        prompt_weight=lambda: c.one_of(0.5, 2), end_token=lambda: c.one_of("</s>"),
    )  # fmt: skip
    return [
        *c.options(
            input_=Several(lambda: c.path(*TEXTS)), tokenizer_=lambda: c.path(*TOKENIZERS),
            output_prefix_=c.output, append_eod=None, prepend_bos=None,
            eod_token=lambda: c.one_of("<|end_of_text|>", "</s>", "<s>"),
            json_keys=Several(lambda: c.one_of("text", "id", "messages", "a/b")),
            min_tokens=lambda: c.one_of(*NUMBERS), max_tokens=lambda: c.one_of(*NUMBERS),
            shard=lambda: c.one_of("1/1", "1/2", "2/2", "3/2", "0/0"),
            tokenizer_library=lambda: c.one_of("auto", "standard"),
            group_by=lambda: c.one_of("file", "repo"), on_error=lambda: c.one_of("stop", "skip"),
            domain=lambda: c.one_of("d"),
        ),
        "--workers", c.one_of(1, 1, 1, 0, -1),
        *(chat if c.random.random() < 0.3 else []),
    ]  # fmt: skip


def merge_data(c: Choices) -> list[str]:
    prefix = Several(lambda: c.path("p", "q"))
    return c.options(input_=prefix, output_prefix_=c.output, domain=lambda: c.one_of("d"))


def retokenize(c: Choices) -> list[str]:
    tokenizer = lambda: c.path(*TOKENIZERS)  # noqa: E731
    return c.options(input_=lambda: c.path("p", "q"), tokenizer_=tokenizer, to_tokenizer=tokenizer,
                     output_prefix_=c.output, append_eod=None, prepend_bos=None,
                     eod_token=lambda: c.one_of("</s>"), domain=lambda: c.one_of("d"))  # fmt: skip


def inspect_data(c: Choices) -> list[str]:
    number = lambda: c.one_of(*NUMBERS)  # noqa: E731
    return [c.path("p", "q"), *c.options(
        verify=None, seq_length=number, row=number, seed=number,
        packing=lambda: c.one_of("exact", "concat", "best-fit"),
        tokenizer=lambda: c.path(*TOKENIZERS))]  # fmt: skip


def train_tokenizer(c: Choices) -> list[str]:
    return c.options(input_=Several(lambda: c.path(*TEXTS)), output_=c.output,
                     vocab_size_=lambda: c.one_of(270, 280, *NUMBERS),
                     json_keys=Several(lambda: c.one_of("text", "id")),
                     group_by=lambda: c.one_of("file", "repo"))  # fmt: skip


def plan_context(c: Choices) -> list[str]:
    return c.options(histogram_=lambda: c.path("lengths.csv"), config=lambda: c.path("run.toml"),
                     row_length=lambda: c.one_of(1024, 2048, *NUMBERS),
                     longest=lambda: c.one_of(500, *NUMBERS), cp=lambda: c.one_of("2", "1,2", "x"),
                     chunk=lambda: c.one_of(128, *NUMBERS), rows_=lambda: c.one_of(2, 0, -1),
                     seed=lambda: c.one_of(*NUMBERS), rates=lambda: c.path("run.toml"),
                     link=lambda: c.one_of("nvlink", "infiniband"))  # fmt: skip


def convert_to_hf(c: Choices) -> list[str]:
    return c.options(checkpoint_=lambda: c.path("checkpoint", "checkpoint/step_00000000"),
                     output_=c.output, overwrite=None, dtype=lambda: c.one_of("keep", "bf16"),
                     tokenizer=lambda: c.path("hf", *TOKENIZERS),
                     max_shard_size=lambda: c.one_of("1GB", "10KB", *NUMBERS))  # fmt: skip


def convert_from_hf(c: Choices) -> list[str]:
    return c.options(hf_model_=lambda: c.path("hf"), output_=c.output, overwrite=None)


TOOLS = (preprocess_data, merge_data, retokenize, inspect_data, train_tokenizer, plan_context,
         convert_to_hf, convert_from_hf)  # fmt: skip


def hash_files(*folders: Path) -> dict[str, str]:
    """SHA-256 of every file below."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def load_tool(name: str):
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(tool, words: list[str]) -> tuple[int, str]:
    """Exit status and stderr of a tool that runs in this process."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = tool.main(words)
        except SystemExit as leaving:  # argparse
            status = leaving.code
    return status, said.getvalue()


def start(name: str, words: list[str]) -> tuple[int, str]:
    """The same as a process of its own."""
    command = [sys.executable, ROOT / "tools" / f"{name}.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stderr


def run_one(number: int, inputs: Path, folder: Path, run) -> str:
    """One command line in a fresh folder; the tool's name."""
    folder.mkdir()
    os.chdir(folder)
    choices = Choices(number, inputs, folder)
    make = choices.random.choice(TOOLS)
    words = make(choices)
    before = hash_files(inputs, folder)
    what = f"number {number}: {make.__name__} {words}"
    try:
        status, said = run(make.__name__, words)
    except Exception as error:
        raise AssertionError(f"{what}: {error!r}") from error
    what = f"{what}: exit status {status}: {said[-2000:]}"
    after = hash_files(inputs, folder)
    assert status in (0, 1, 2) and "Traceback" not in said, what
    assert {path: after.get(path) for path in before} == before, f"an input changed; {what}"
    new = sorted(after.keys() - before.keys())
    assert status == 0 or not new, f"left {new}; {what}"
    assert not [path for path in new if ".tmp" in path or ".unfinished" in path], what
    assert status == 0 or "error: " in said, what
    return make.__name__


def run_many(numbers: range, inputs: Path, tmp_path: Path, monkeypatch, run) -> None:
    monkeypatch.chdir(tmp_path)
    succeeded = set()
    for number in numbers:
        folder = tmp_path / str(number)
        succeeded.add(run_one(number, inputs, folder, run))
        os.chdir(tmp_path)
        shutil.rmtree(folder)
    assert succeeded == {make.__name__ for make in TOOLS}


@pytest.mark.parametrize(
    "count", [300, pytest.param(10_000, marks=[pytest.mark.long, pytest.mark.timeout(3000)])]
)
def test_command_lines_in_this_process(inputs, tmp_path, monkeypatch, count):
    tools = {make.__name__: load_tool(make.__name__) for make in TOOLS}
    run_many(
        range(count), inputs, tmp_path, monkeypatch, lambda name, words: call(tools[name], words)
    )


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_command_lines_as_processes(inputs, tmp_path, monkeypatch):
    run_many(range(20_000, 20_050), inputs, tmp_path, monkeypatch, start)
