"""tools/preprocess_data.py as users run it: equal to Megatron's tool, whatever --workers."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from megatron.core.tokenizers.text.libraries import HuggingFaceTokenizer

from lclm.data.indexed import IndexedReader
from lclm.data.tokenizer import load_tokenizer
from lclm.prepare.encoder import encode_sources
from lclm.prepare.readers import find_sources
from lclm.prepare.worker import EncodeOptions

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("hf", "tiktoken", "sentencepiece")
TEXTS = ["hello world", "", "the cat sat on the mat\n" * 30, "x", "a <|end_of_text|> b", "hill"]


def run_tool(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "in" / "a.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS))
    return path


def documents_of(prefix):
    reader = IndexedReader(prefix)
    return [reader.read(number).tolist() for number in range(len(reader))]


def test_bytes_equal_megatrons_tool(tmp_path, jsonl, tokenizer_files):
    """Its loop, with its tokenizer class and its builder (tools/preprocess_data.py, encode)."""
    folder = tokenizer_files["hf"].parent
    config = folder / "tokenizer_config.json"
    config.write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end_of_text|>"}'
    )
    texts = [text for text in TEXTS if "<|" not in text]
    jsonl.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    done = run_tool(
        "--input", jsonl, "--output-prefix", tmp_path / "ours", "--tokenizer", folder,
        "--append-eod", "--workers", 2, "--json-keys", "text",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = HuggingFaceTokenizer(str(folder), use_fast=True)
    builder = IndexedDatasetBuilder(
        str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(theirs.vocab_size)
    )
    for text in texts:
        ids = theirs.text_to_ids(text)
        lengths = [len(ids)] if ids else []
        if ids:
            ids.append(theirs.eod)
            lengths[-1] += 1
        builder.add_document(ids, lengths)
    builder.finalize(str(tmp_path / "theirs.idx"))
    config.unlink()
    for ending in (".bin", ".idx"):
        ours = (tmp_path / f"ours{ending}").read_bytes()
        assert ours == (tmp_path / f"theirs{ending}").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_documents_and_metadata(tmp_path, jsonl, tokenizer_files, kind):
    prefix = tmp_path / "new" / "books"
    done = run_tool(
        "--input", jsonl, "--output-prefix", prefix, "--tokenizer", tokenizer_files[kind],
        "--append-eod", "--domain", "library",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "5 documents" in done.stderr and "1 empty documents" in done.stderr
    tokenizer = load_tokenizer(tokenizer_files[kind])
    expected = [[*tokenizer.encode(text), tokenizer.eod_id] for text in TEXTS if text]
    assert documents_of(prefix) == expected
    flat = [token for ids in expected for token in ids]
    assert flat.count(tokenizer.eod_id) == 5, "text that spells a special token stays text"
    metadata = IndexedReader(prefix).metadata
    assert metadata["domain"] == "library"
    assert metadata["tokenizer"]["sha256"] == tokenizer.sha256
    assert metadata["tokenizer"]["kind"] == kind
    assert metadata["tokenizer"]["eod_id"] == tokenizer.eod_id
    assert (metadata["documents"], metadata["empty_documents"]) == (5, 1)
    assert metadata["tokens"] == len(flat) and metadata["vocab_size"] == tokenizer.vocab_size
    assert sum(metadata["length_histogram"].values()) == 5
    assert metadata["sources"] == [
        {"path": str(jsonl), "bytes": jsonl.stat().st_size, "documents": 5}
    ]
    assert metadata["options"]["append_eod"] is True
    assert sorted(path.name for path in prefix.parent.iterdir()) == [
        "books.bin", "books.idx", "books.json"
    ]  # fmt: skip


def test_output_does_not_depend_on_the_number_of_workers(tmp_path, tokenizer_files):
    rng = np.random.default_rng(0)
    words = np.array(["hello", "world", "cat", "hill", "\n", "42"])
    texts = [" ".join(rng.choice(words, rng.integers(0, 60))) for _ in range(400)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for number in range(30):
        file = tmp_path / "folder" / f"{number:02d}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(texts[number] + "\n")
    names = ("a.jsonl", "folder", "b.jsonl.gz")
    sources = find_sources([tmp_path / name for name in names])
    tokenizer = load_tokenizer(tokenizer_files["hf"])
    results = []
    for workers, block_bytes in ((1, 3000), (3, 3000), (2, 700)):
        prefix = tmp_path / f"out{workers}" / "x"
        options = EncodeOptions(append_eod=True, num_workers=workers)
        encode_sources(sources, tokenizer, str(prefix), options, block_bytes=block_bytes)
        results.append([Path(f"{prefix}{end}").read_bytes() for end in (".bin", ".idx", ".json")])
    assert results[0] == results[1] == results[2]
    read = [texts, [text + "\n" for text in texts[:30]], texts]
    expected = [[*tokenizer.encode(text), 1] for part in read for text in part if text]
    assert documents_of(tmp_path / "out3" / "x") == expected


def test_several_keys_write_a_prefix_each(tmp_path, tokenizer_files):
    (tmp_path / "a.jsonl").write_text('{"q": "hello", "a": "world"}\n{"q": "", "a": "hill"}\n')
    done = run_tool(
        "--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "qa",
        "--tokenizer", tokenizer_files["tiktoken"], "--json-keys", "q", "a", "--prepend-bos",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    encode, bos = load_tokenizer(tokenizer_files["tiktoken"]).encode, 264
    assert documents_of(tmp_path / "qa_q") == [[bos, *encode("hello")]]
    assert documents_of(tmp_path / "qa_a") == [[bos, *encode("world")], [bos, *encode("hill")]]
    assert not (tmp_path / "qa.bin").exists()


def test_repositories(tmp_path, tokenizer_files):
    for name, text in (("b/z.py", "hello\n"), ("b/a.py", "world"), ("a/x.py", "hill\n")):
        file = tmp_path / "code" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "code" / "b" / "icon").write_bytes(b"\0\xff")
    done = run_tool(
        "--input", tmp_path / "code", "--group-by", "repo", "--output-prefix", tmp_path / "out",
        "--tokenizer", tokenizer_files["hf"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 files that are not text" in done.stderr and "icon: is not UTF-8" in done.stderr
    encode = load_tokenizer(tokenizer_files["hf"]).encode
    assert documents_of(tmp_path / "out") == [encode("hill\n"), encode("world\nhello\n")]


BAD_LINES = '{"text": "hello"}\n{"text": 1}\n\nnonsense\n{"body": "x"}\n{"text": "world"}\n'


@pytest.mark.parametrize("block_bytes", [1, 1000])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_bad_line_stops_with_its_number(tmp_path, tokenizer_files, block_bytes, num_workers):
    path = tmp_path / "a.jsonl"
    path.write_text(BAD_LINES)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: has int under key 'text'.*skip"):
        encode_sources(
            find_sources([path]),
            load_tokenizer(tokenizer_files["hf"]),
            str(tmp_path / "x"),
            EncodeOptions(num_workers=num_workers),
            block_bytes=block_bytes,
        )
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("block_bytes", [1, 1000])
def test_bad_lines_are_skipped_counted_and_named(tmp_path, tokenizer_files, block_bytes):
    path = tmp_path / "a.jsonl"
    path.write_text(BAD_LINES)
    tokenizer = load_tokenizer(tokenizer_files["hf"])
    options = EncodeOptions(on_error="skip")
    summary = encode_sources(
        find_sources([path, path]), tokenizer, str(tmp_path / "x"), options, block_bytes=block_bytes
    )
    assert (summary.num_skipped, summary.num_documents) == (6, 4)
    lines = [text.split(":")[0].rsplit(" ", 1)[1] for text in summary.named]
    assert lines == ["2", "4", "5", "2", "4"]
    assert IndexedReader(tmp_path / "x").metadata["skipped"] == 6


@pytest.mark.parametrize(
    ("content", "extra", "message"),
    [
        ("", (), "is empty or holds no file"),
        ("\n\n", (), "gives no tokens"),
        ('{"text": ""}\n', (), "gives no tokens (1 empty documents"),
        ("nonsense\n", (), "line 1: is not JSON"),
        ("nonsense\n", ("--on-error", "skip"), "gives no tokens (0 empty documents, 1 lines"),
        ('{"text": "a"}\n', ("--json-keys", "text", "text"), "each once"),
        ('{"text": "a"}\n', ("--workers", "0"), "must be at least 1"),
        ('{"text": "a"}\n', ("--group-by", "repo"), "applies to folders"),
        ('{"text": "a"}\n', ("--input", "nowhere.jsonl"), "no such file or folder"),
        ('{"text": "a"}\n', ("--tokenizer", "nowhere"), "no such file or folder"),
    ],
)
def test_bad_input_ends_with_2_and_leaves_nothing(
    tmp_path, tokenizer_files, content, extra, message
):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    done = run_tool(
        "--input", path, "--output-prefix", tmp_path / "out", "--tokenizer", tokenizer_files["hf"],
        *extra,
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [path]


def test_a_tokenizer_without_an_end_token(tmp_path, tokenizer_files, monkeypatch):
    monkeypatch.setattr("lclm.data.tokenizer.COMMON_EOD", ())
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    tokenizer = load_tokenizer(tokenizer_files["hf"])
    sources = find_sources([tmp_path / "a.jsonl"])
    with pytest.raises(ValueError, match=r"names no end-of-document token \(eos_token\)"):
        encode_sources(sources, tokenizer, str(tmp_path / "x"), EncodeOptions(append_eod=True))
    encode_sources(sources, tokenizer, str(tmp_path / "x"), EncodeOptions())
    assert documents_of(tmp_path / "x") == [tokenizer.encode("a")]


def test_usage_errors_end_with_2_and_help_with_0():
    assert run_tool("--input", "x").returncode == 2
    done = run_tool("--help")
    assert done.returncode == 0 and "--group-by repo" in done.stdout and "example" in done.stdout
