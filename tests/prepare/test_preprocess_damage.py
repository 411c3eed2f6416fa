"""Bad inputs of tools/preprocess_data.py, and runs killed at any time."""

import gzip
import importlib.util
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lclm.data.indexed import IndexedReader

ROOT = Path(__file__).resolve().parents[2]
GOOD = b'{"text": "hello world"}\n'
LINES = GOOD * 40


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def zst(data):
    import zstandard

    return zstandard.ZstdCompressor().compress(data)


def parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "whole"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["hello"] * 99}), path)
    return path.read_bytes()


DAMAGE = {
    "invalid UTF-8": ("a.jsonl", GOOD + b'{"text": "\xff"}\n', "line 2: is not UTF-8 (byte 10)"),
    "surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: has half a surrogate pair"),
    "zero byte": ("a.jsonl", b'{"text": "a\0b"}\n', "line 1: is not JSON"),
    "zeros": ("a.jsonl", GOOD + b"\0" * 5000, "line 2: is not JSON"),
    "array": ("a.json", b'[{"text": "a"},\n{"text": "b"}]', "one JSON array must become one obj"),
    "array in a line": ("a.json", b'[{"text": "a"}]', "is a JSON list, not an object"),
    "repeated key": ("a.jsonl", b'{"text": "a", "text": "b"}\n', "has the key 'text' twice"),
    "missing key": ("a.jsonl", GOOD + b'{"t": "a"}\n', "line 2: has no key 'text' (its keys: t)"),
    "cut line": ("a.jsonl", GOOD + GOOD[:-4], "line 2: is not JSON"),
    "two objects": ("a.jsonl", GOOD[:-1] + GOOD, "line 1: is not JSON"),
    "no text": ("a.jsonl", b'{"text": ""}\n' * 3, "gives no tokens (3 empty documents"),
    "cut gz": ("a.jsonl.gz", gzip.compress(LINES)[:-9], "cannot be decompressed"),
    "no gz": ("a.jsonl.gz", LINES, "cannot be decompressed"),
    "cut zst": ("a.jsonl.zst", lambda _: zst(LINES)[:-9], "cannot be decompressed"),
    "cut parquet": ("a.parquet", lambda path: parquet(path)[:-9], "cannot be read as Parquet"),
    "no parquet": ("a.parquet", LINES, "cannot be read as Parquet"),
    "text file": ("a.txt", b"latin \xe9", "a.txt: is not UTF-8"),
}


@pytest.mark.parametrize(("name", "content", "message"), DAMAGE.values(), ids=list(DAMAGE))
def test_bad_input_ends_with_2_and_keeps_the_old_files(
    tmp_path, tokenizer_files, capsys, name, content, message
):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).write_bytes(content(tmp_path) if callable(content) else content)
    old = {f"x{ending}": ending.encode() for ending in (".bin", ".idx", ".json")}
    (tmp_path / "out").mkdir()
    for file, text in old.items():
        (tmp_path / "out" / file).write_bytes(text)
    status = load_tool("preprocess_data").main(
        ["--input", str(folder / name), "--output-prefix", str(tmp_path / "out" / "x"),
         "--tokenizer", str(tokenizer_files["hf"]), "--workers", "1"]
    )  # fmt: skip
    assert status == 2 and message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == old


def test_odd_input_that_is_right(tmp_path, tokenizer_files):
    """A zero byte by its escape, empty texts, blank lines, no last newline, a byte order mark."""
    lines = ['\ufeff{"text": "a\\u0000b"}', "", '{"text": ""}', "\t ", '{"text": "", "n": [1]}']
    (tmp_path / "a.jsonl").write_text("\r\n".join([*lines, '{"text": "end"}']))
    status = load_tool("preprocess_data").main(
        ["--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "x"),
         "--tokenizer", str(tokenizer_files["hf"]), "--append-eod", "--workers", "1"]
    )  # fmt: skip
    reader = IndexedReader(tmp_path / "x")
    assert status == 0 and len(reader) == 2 and reader.metadata["empty_documents"] == 2
    assert reader.lengths.tolist() == [4, 4]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda prefix: cut(prefix, ".bin", -2), "the file is cut short or belongs to another"),
        (lambda prefix: cut(prefix, ".idx", -8), "the file is cut short or damaged"),
        (lambda prefix: put(prefix, ".idx", 9, b"\2"), "index version 2, only version 1"),
        (lambda prefix: put(prefix, ".idx", 0, b"X"), "an index starts with"),
        (lambda prefix: put(prefix, ".bin", 0, b"\xff\xff"), "is 65535, the vocabulary has 300"),
    ],
)
def test_damaged_token_files_are_refused(tmp_path, tokenizer_files, capsys, damage, message):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    prefix = str(tmp_path / "x")
    common = ["--tokenizer", str(tokenizer_files["hf"]), "--output-prefix", prefix]
    tool = load_tool("preprocess_data")
    assert tool.main(["--input", str(tmp_path / "a.jsonl"), *common, "--workers", "1"]) == 0
    damage(prefix)
    assert load_tool("inspect_data").main([prefix, "--verify"]) == 2
    assert message in capsys.readouterr().err


def cut(prefix, ending, count):
    path = Path(prefix + ending)
    path.write_bytes(path.read_bytes()[:count])


def put(prefix, ending, at, content):
    with open(prefix + ending, "r+b") as file:
        file.seek(at)
        file.write(content)


# The tool with small units, noting each of which takes some time.
TOOL = """
import sys, time
sys.path.insert(0, "tools")
import preprocess_data
from lclm.prepare import encoder, resume
original = resume.Unfinished.save
def slow(self):
    time.sleep(float(sys.argv[1]))
    original(self)
resume.Unfinished.save = slow
encoder.encode_sources.__defaults__ = ("", None, 2000)
sys.exit(preprocess_data.main(sys.argv[2:]))
"""


def write_texts(path, count):
    rng = random.Random(0)
    words = ["hello", "world", "cat", "hill", "\n", "42", "caf\u00e9"]
    texts = [" ".join(rng.choices(words, k=rng.randrange(60))) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def command(tmp_path, tokenizer, name, workers, seconds):
    return [sys.executable, "-c", TOOL, str(seconds), "--input", str(tmp_path / "a.jsonl"),
            "--tokenizer", str(tokenizer), "--append-eod", "--workers", str(workers),
            "--output-prefix", str(tmp_path / name / "x")]  # fmt: skip


def units_done(folder):
    """How far a run has come; -1: there is none under way."""
    try:
        return json.loads((folder / "x.unfinished" / "state.json").read_text())["units"]
    except FileNotFoundError:
        return -1


def wait_for_the_end_of_group(number):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.killpg(number, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("processes are left")


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_kills_at_random_times_change_no_byte(tmp_path, tokenizer_files, workers):
    write_texts(tmp_path / "a.jsonl", 600)
    subprocess.run(command(tmp_path, tokenizer_files["hf"], "whole", 1, 0), cwd=ROOT, check=True)
    expected = contents(tmp_path / "whole")
    rng = random.Random(workers)
    killed_at = []
    for _ in range(5):
        process = subprocess.Popen(
            command(tmp_path, tokenizer_files["hf"], "killed", workers, 0.02),
            cwd=ROOT,
            start_new_session=True,
        )
        first = units_done(tmp_path / "killed")
        # when work goes on depends on the machine: from then on the time is random
        while process.poll() is None and units_done(tmp_path / "killed") <= first:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.15))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed_at.append(units_done(tmp_path / "killed"))
    assert len(set(killed_at)) > 2, killed_at
    last = command(tmp_path, tokenizer_files["hf"], "killed", 3 - workers, 0)
    subprocess.run(last, cwd=ROOT, check=True)
    assert contents(tmp_path / "killed") == expected


@pytest.mark.slow
def test_an_interrupt_ends_all_processes_and_loses_nothing(tmp_path, tokenizer_files):
    write_texts(tmp_path / "a.jsonl", 600)
    process = subprocess.Popen(
        command(tmp_path, tokenizer_files["hf"], "out", 2, 0.05),
        cwd=ROOT,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    while units_done(tmp_path / "out") < 2:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=100) != 0
    wait_for_the_end_of_group(process.pid)
    assert units_done(tmp_path / "out") >= 2
    for name in ("out", "whole"):
        run = command(tmp_path, tokenizer_files["hf"], name, 1, 0)
        subprocess.run(run, cwd=ROOT, check=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_full_disk_under_two_workers_keeps_the_old_files(tmp_path, tokenizer_files):
    write_texts(tmp_path / "a.jsonl", 3)
    run = command(tmp_path, tokenizer_files["hf"], "out", 2, 0)
    subprocess.run(run, cwd=ROOT, check=True)
    before = contents(tmp_path / "out")
    write_texts(tmp_path / "a.jsonl", 900)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    done = subprocess.run(
        run, cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=limit
    )
    assert done.returncode == 1 and "nothing was written" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert contents(tmp_path / "out") == before
