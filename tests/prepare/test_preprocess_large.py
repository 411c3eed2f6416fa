"""Preprocessing that is killed, sharded, sped up or runs out of disk: the same bytes at last."""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lclm.data.indexed import IndexedReader
from lclm.data.tokenizer import load_tokenizer
from lclm.prepare import gigatoken
from lclm.prepare.encoder import encode_sources
from lclm.prepare.gigatoken import Encoder, choose_library, make_plain_json
from lclm.prepare.merge import merge_prefixes
from lclm.prepare.readers import find_sources
from lclm.prepare.worker import EncodeOptions

ROOT = Path(__file__).resolve().parents[2]
ENDINGS = (".bin", ".idx", ".json")
WORDS = np.array(["hello", "world", "cat", "hill", "\n", "42", "", "road", "caf\u00e9"])


def write_lines(path, count, seed=0):
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, rng.integers(0, 50))) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def contents(prefix):
    return [Path(f"{prefix}{ending}").read_bytes() for ending in ENDINGS]


def encode(inputs, tokenizer, prefix, block_bytes=2000, **options):
    options = EncodeOptions(append_eod=True, **options)
    sources = find_sources(inputs)
    tokenizer = load_tokenizer(tokenizer)
    return encode_sources(sources, tokenizer, str(prefix), options, block_bytes=block_bytes)


# The tool with small units and a worker slow enough to be killed in the middle.
SLOW_TOOL = """
import sys, time
sys.path.insert(0, "tools")
import preprocess_data
from lclm.prepare import encoder, worker
original = worker.Worker.encode
def slow(self, unit):
    time.sleep(float(sys.argv[1]))
    return original(self, unit)
worker.Worker.encode = slow
encoder.encode_sources.__defaults__ = ("", None, 2000)
sys.exit(preprocess_data.main(sys.argv[2:]))
"""


def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path, tokenizer_files):
    write_lines(tmp_path / "a.jsonl", 300)
    encode([tmp_path / "a.jsonl"], tokenizer_files["hf"], tmp_path / "x" / "whole")
    expected = contents(tmp_path / "x" / "whole")
    prefix = tmp_path / "whole"
    common = ["--input", tmp_path / "a.jsonl", "--tokenizer", tokenizer_files["hf"],
              "--append-eod", "--output-prefix", prefix, "--workers", "1"]  # fmt: skip
    command = [sys.executable, "-c", SLOW_TOOL, "0.03", *map(str, common)]
    state = Path(f"{prefix}.unfinished/state.json")
    seen = []
    for wanted in (3, 9):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (state.is_file() and json.loads(state.read_text())["units"] >= wanted):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.append(json.loads(state.read_text())["units"])
        # what a kill between appending and noting leaves
        with open(f"{prefix}.unfinished/tokens-0", "ab") as file:
            file.write(b"torn")
    assert 3 <= seen[0] < seen[1] and not Path(f"{prefix}.bin").exists()
    done = subprocess.run(
        [*command[:3], "0", *command[4:]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and f"going on after {seen[1]} units" in done.stderr
    assert contents(prefix) == expected
    assert not state.parent.exists()


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_a_kill_between_the_renames(tmp_path, tokenizer_files, monkeypatch, renamed):
    write_lines(tmp_path / "a.jsonl", 60)
    encode([tmp_path / "a.jsonl"], tokenizer_files["hf"], tmp_path / "x" / "whole")
    replace, count = os.replace, [0]

    class Killed(BaseException):
        pass

    def dying(source, target):
        if str(target).startswith(str(tmp_path / "whole.")) and "unfinished/" not in str(target):
            if count[0] == renamed:
                raise Killed
            count[0] += 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(Killed):
        encode([tmp_path / "a.jsonl"], tokenizer_files["hf"], tmp_path / "whole")
    monkeypatch.undo()
    encode([tmp_path / "a.jsonl"], tokenizer_files["hf"], tmp_path / "whole")
    assert contents(tmp_path / "whole") == contents(tmp_path / "x" / "whole")


def test_work_on_other_input_is_not_used(tmp_path, tokenizer_files, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("lclm"), "propagate", True)
    write_lines(tmp_path / "a.jsonl", 60)
    monkeypatch.setattr(
        "lclm.prepare.encoder._check_result", lambda *_: (_ for _ in ()).throw(KeyError)
    )
    with pytest.raises(KeyError):
        encode([tmp_path / "a.jsonl"], tokenizer_files["hf"], tmp_path / "x")
    monkeypatch.undo()
    monkeypatch.setattr(logging.getLogger("lclm"), "propagate", True)
    assert (tmp_path / "x.unfinished").is_dir()
    write_lines(tmp_path / "a.jsonl", 50, seed=1)
    encode([tmp_path / "a.jsonl"], tokenizer_files["hf"], tmp_path / "x")
    assert "held work on other inputs" in caplog.text
    encode([tmp_path / "a.jsonl"], tokenizer_files["hf"], tmp_path / "y" / "x")
    assert contents(tmp_path / "x") == contents(tmp_path / "y" / "x")


def test_two_runs_of_one_prefix_at_once_are_refused(tmp_path, tokenizer_files):
    from lclm.prepare.resume import State, Unfinished

    write_lines(tmp_path / "a.jsonl", 5)
    with (
        Unfinished(str(tmp_path / "x.unfinished"), State()),
        pytest.raises(ValueError, match="another process is writing this prefix"),
    ):
        encode([tmp_path / "a.jsonl"], tokenizer_files["hf"], tmp_path / "x")


@pytest.mark.parametrize("count", [2, 5, 40])
def test_shards_join_to_one_run(tmp_path, tokenizer_files, count):
    import gzip

    texts = write_lines(tmp_path / "a.jsonl", 120)
    packed = gzip.compress((tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "b.jsonl.gz").write_bytes(packed)
    for number in range(8):
        (tmp_path / "c").mkdir(exist_ok=True)
        (tmp_path / "c" / f"{number}.txt").write_text(texts[number] + "x")
    inputs = [tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c")]
    encode(inputs, tokenizer_files["tiktoken"], tmp_path / "whole", min_tokens=2)
    shards = [str(tmp_path / f"part{number}") for number in range(count)]
    for number, prefix in enumerate(shards):
        shard = (number, count)
        encode(inputs, tokenizer_files["tiktoken"], prefix, min_tokens=2, shard=shard)
    tokens = [IndexedReader(prefix).num_tokens for prefix in shards]
    assert sum(t > 0 for t in tokens) >= 2
    merge_prefixes(shards[::-1], str(tmp_path / "m" / "whole"))
    assert contents(tmp_path / "m" / "whole") == contents(tmp_path / "whole")
    with pytest.raises(ValueError, match=rf"missing: 2/{count}"):
        merge_prefixes([shards[0], *shards[2:]], str(tmp_path / "n"))
    with pytest.raises(ValueError, match="only with the other shards"):
        merge_prefixes([shards[0], str(tmp_path / "whole")], str(tmp_path / "n"))
    assert not list(tmp_path.glob("n.*"))


def test_merging_prefixes_that_differ_is_refused(tmp_path, tokenizer_files):
    write_lines(tmp_path / "a.jsonl", 5)
    for name, kind, options in (
        ("a", "hf", {}),
        ("b", "tiktoken", {}),
        ("c", "hf", {"max_tokens": 900}),
    ):
        encode([tmp_path / "a.jsonl"], tokenizer_files[kind], tmp_path / name, **options)
    a, b, c = (str(tmp_path / name) for name in "abc")
    for prefixes, message in (
        ([a, b], "different tokenizers"),
        ([a, c], "they must be equal"),
        ([a, a], "each once"),
        ([a, str(tmp_path / "none")], "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_prefixes(prefixes, str(tmp_path / "m"))
    with pytest.raises(ValueError, match=r"a\.bin: is the input"):
        merge_prefixes([a], a)
    done = subprocess.run(
        [sys.executable, ROOT / "tools/merge_data.py", "--input", a, b, "--output-prefix",
         tmp_path / "m"], capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2 and "different tokenizers" in done.stderr
    assert "Traceback" not in done.stderr


def test_documents_left_out_by_length(tmp_path, tokenizer_files):
    texts = write_lines(tmp_path / "a.jsonl", 100)
    summary = encode(
        [tmp_path / "a.jsonl"], tokenizer_files["hf"], tmp_path / "x", min_tokens=5, max_tokens=40
    )
    ids = [load_tokenizer(tokenizer_files["hf"]).encode(text) for text in texts]
    reader = IndexedReader(tmp_path / "x")
    kept = [[*item, 1] for item in ids if 5 <= len(item) <= 40]
    assert [reader.read(n).tolist() for n in range(len(reader))] == kept
    assert summary.num_short == sum(len(item) < 5 for item in ids) > 0
    assert summary.num_long == sum(len(item) > 40 for item in ids) > 0
    with pytest.raises(ValueError, match="nor the first above the second"):
        encode(
            [tmp_path / "a.jsonl"],
            tokenizer_files["hf"],
            tmp_path / "y",
            min_tokens=9,
            max_tokens=3,
        )


def test_a_full_disk_keeps_the_old_files(tmp_path, tokenizer_files):
    write_lines(tmp_path / "a.jsonl", 3)
    encode([tmp_path / "a.jsonl"], tokenizer_files["hf"], tmp_path / "x")
    before = contents(tmp_path / "x")
    write_lines(tmp_path / "a.jsonl", 3000)
    command = [sys.executable, ROOT / "tools/preprocess_data.py", "--input", tmp_path / "a.jsonl",
               "--tokenizer", tokenizer_files["hf"], "--output-prefix", tmp_path / "x",
               "--workers", "1"]  # fmt: skip
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert done.returncode == 1 and "nothing was written" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert contents(tmp_path / "x") == before
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "x.bin", "x.idx", "x.json"}


@pytest.mark.parametrize("kind", ["hf", "tiktoken"])
def test_gigatoken_gives_the_same_bytes(tmp_path, tokenizer_files, kind):
    write_lines(tmp_path / "a.jsonl", 300)
    with open(tmp_path / "a.jsonl", "a") as file:
        spaces = "\u00e9" * 11 + "\u3000 " * 50_001 + "x"  # blocks begin inside a character
        for text in (
            "a <|end_of_text|> b",
            " " * 250_000,
            "x" + "\n" * 100_000,
            spaces,
            *gigatoken.PROBES,
        ):
            file.write(json.dumps({"text": text}) + "\n")
    for library in ("gigatoken", "standard"):
        prefix = tmp_path / library / "x"
        encode([tmp_path / "a.jsonl"], tokenizer_files[kind], prefix, library=library)
    assert contents(tmp_path / "gigatoken" / "x") == contents(tmp_path / "standard" / "x")


def train_sentencepiece(path, **options):
    """A model with Llama 2's settings but for its size."""
    import io

    import sentencepiece

    texts = write_lines(path.with_suffix(".txt"), 200)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, *gigatoken.PROBES, "the quick brown fox " * 9]),
        model_writer=model,
        vocab_size=420,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        byte_fallback=True,
        allow_whitespace_only_pieces=True,
        max_sentence_length=100_000,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path


def test_gigatoken_gives_the_bytes_of_sentencepiece(tmp_path):
    model = train_sentencepiece(tmp_path / "tokenizer.model", model_type="bpe")
    write_lines(tmp_path / "a.jsonl", 300, seed=1)
    with open(tmp_path / "a.jsonl", "a") as file:
        for text in ("a</s> b<s>", "\u2581x \u2581", "x" + " " * 5000, *gigatoken.PROBES):
            file.write(json.dumps({"text": text}) + "\n")
    for library in ("gigatoken", "standard"):
        encode([tmp_path / "a.jsonl"], model, tmp_path / library / "x", library=library)
    assert contents(tmp_path / "gigatoken" / "x") == contents(tmp_path / "standard" / "x")


def test_sentencepiece_models_that_gigatoken_cannot_do_are_refused(tmp_path):
    model = load_tokenizer(train_sentencepiece(tmp_path / "m", model_type="unigram"))
    with pytest.raises(ValueError, match="only BPE sentencepiece models are supported"):
        choose_library(model, "gigatoken", [])


def test_a_library_that_differs_is_not_used_and_said(tokenizer_files, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("lclm"), "propagate", True)
    tokenizer = load_tokenizer(tokenizer_files["tiktoken"])
    right = Encoder.encode

    def wrong(self, texts):
        for ids in right(self, texts):
            yield ids[::-1]

    monkeypatch.setattr(Encoder, "encode", wrong)
    assert choose_library(tokenizer, "auto", ["some words"]) is None
    assert "many times slower: gigatoken gives other ids" in caplog.text
    with pytest.raises(ValueError, match="gigatoken gives other ids"):
        choose_library(tokenizer, "gigatoken", [])


def test_a_library_that_is_missing_is_said(tokenizer_files, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("lclm"), "propagate", True)
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    tokenizer = load_tokenizer(tokenizer_files["hf"])
    assert choose_library(tokenizer, "auto", []) is None
    assert "not installed (pip install gigatoken)" in caplog.text
    with pytest.raises(ValueError, match="not installed"):
        choose_library(tokenizer, "gigatoken", [])


def test_the_json_made_of_ranks_encodes_as_tiktoken(tokenizer_files):
    """The tokenizers library reads it, so this holds without gigatoken."""
    import tokenizers

    tokenizer = load_tokenizer(tokenizer_files["tiktoken"])
    made = tokenizers.Tokenizer.from_str(make_plain_json(tokenizer))
    for text in (*gigatoken.PROBES, "a <|end_of_text|> b", "hello hello worldhellor"):
        assert made.encode(text).ids == tokenizer.encode(text)


@pytest.mark.long
def test_a_line_of_200_mb_stays_within_memory(tmp_path, tokenizer_files):
    """Its bytes, its text and its ids are there at once; not several copies of each."""
    with open(tmp_path / "a.jsonl", "w") as file:
        file.write('{"text": "')
        for _ in range(2000):
            file.write("hello world, the cat sat. " * 4000)
        file.write('"}\n{"text": "hill"}\n')
    command = [sys.executable, ROOT / "tools/preprocess_data.py", "--input", tmp_path / "a.jsonl",
               "--tokenizer", tokenizer_files["hf"], "--output-prefix", tmp_path / "x"]  # fmt: skip
    code = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, done.returncode)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=True
    )
    kilobytes, status = map(int, shown.stdout.split())
    assert status == 0 and kilobytes < 1_500_000
    assert len(IndexedReader(tmp_path / "x")) == 2
