"""tools/train_tokenizer.py: size as asked for, the same file each time, loaded by others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lclm.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "lclm" / "data" / "stage_rows.py").read_text()


def run_tool(*arguments, **environment):
    command = [sys.executable, str(ROOT / "tools" / "train_tokenizer.py"), *map(str, arguments)]
    env = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)


@pytest.fixture
def inputs(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "b.py").write_text(TEXT[::2] + "<|end_of_text|>" * 50)
    return [tmp_path / "a.jsonl", tmp_path / "code"]


def test_size_and_loading(tmp_path, inputs):
    done = run_tool("--input", *inputs, "--vocab-size", 500, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    ours = load_tokenizer(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert ours.vocab_size == len(theirs) == 500
    assert (ours.bos_id, ours.eod_id) == (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)
    assert ours.encode(TEXT) == theirs.encode(TEXT)
    assert len(ours.encode(TEXT)) < len(TEXT) / 2
    spelled = "a<|end_of_text|>\u65e5\u672c \U0001f600\n"
    assert 1 not in ours.encode(spelled) and ours.decode(ours.encode(spelled)) == spelled


def test_training_is_deterministic(tmp_path, inputs):
    written = []
    for number, threads in enumerate(("1", "4")):
        folder = tmp_path / f"out{number}"
        done = run_tool(
            "--input", *inputs, "--vocab-size", 600, "--output", folder,
            RAYON_NUM_THREADS=threads, PYTHONHASHSEED=threads,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1]
    assert sorted(written[0]) == ["tokenizer.json", "tokenizer_config.json"]


def test_too_little_text_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("hello hello")
    done = run_tool("--input", tmp_path / "a.txt", "--vocab-size", 5000, "--output", tmp_path / "o")
    assert done.returncode == 0
    size = load_tokenizer(tmp_path / "o").vocab_size
    assert size < 5000
    assert f"{size} tokens, not the 5000 asked for" in done.stderr


@pytest.mark.parametrize(
    ("content", "vocab_size", "message"),
    [
        ('{"text": "hello"}\n', 257, "must be at least 258"),
        ("", 300, "is empty or holds no file"),
        ('{"text": "hello"}\n{"text": 4}\n', 300, "a.jsonl, line 2: has int"),
        ('{"text": ""}\n', 300, "has no text to merge"),
    ],
)
def test_bad_input_ends_with_2_and_leaves_nothing(tmp_path, content, vocab_size, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    done = run_tool("--input", path, "--vocab-size", vocab_size, "--output", tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [path]


def test_help_teaches():
    done = run_tool("--help")
    assert done.returncode == 0 and "--vocab-size" in done.stdout and "example" in done.stdout
