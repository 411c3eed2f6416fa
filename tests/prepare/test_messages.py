"""What goes wrong is named as what it is, before the work where that can be."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lclm.data.indexed import IndexedReader, IndexedWriter
from lclm.data.mds import MdsReader
from lclm.data.stage_rows import StageRows
from tests.data_fixtures import mixture_entry
from tests.prepare.test_preprocess_damage import ROOT, load_tool
from tests.prepare.test_preprocess_large import SLOW_TOOL

ROWS = [{"text": f"hello world {number}"} for number in range(40)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture
def preprocess(tmp_path, tokenizer_files, capsys):
    """preprocess(path, ...): exit status and what was said on stderr."""

    def run(path, *extra, prefix="out"):
        arguments = ["--input", path, "--output-prefix", f"{tmp_path}/{prefix}", "--workers", "1",
                     "--tokenizer", tokenizer_files["hf"], *extra]  # fmt: skip
        status = load_tool("preprocess_data").main([*map(str, arguments)])
        return status, capsys.readouterr().err

    return run


@pytest.mark.parametrize("window", [28, 31])
def test_long_windows_of_zstd_are_read(tmp_path, preprocess, window):
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters(
        window_log=window, hash_log=10, chain_log=10, search_log=1, strategy=1
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    raw = compressor.compress(LINES.encode()) + compressor.flush()
    assert zstandard.get_frame_parameters(raw).window_size == 1 << window
    (tmp_path / "a.jsonl.zst").write_bytes(raw)
    assert preprocess(tmp_path / "a.jsonl.zst")[0] == 0
    assert len(IndexedReader(tmp_path / "out")) == len(ROWS)


@pytest.mark.parametrize("prefix", ["new/", "new/.", ".."])
def test_a_prefix_without_a_name_is_refused(tmp_path, preprocess, prefix):
    (tmp_path / "a.jsonl").write_text(LINES)
    status, said = preprocess(tmp_path / "a.jsonl", prefix=prefix)
    assert status == 2 and "ends in no name" in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_key_with_a_slash(tmp_path, preprocess):
    rows = [{"a/b": "hello", "c": "world"}] * 3
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, said = preprocess(tmp_path / "a.jsonl", "--json-keys", "c", "a/b")
    assert status == 2 and "--json-keys a/b: would be part of the name" in said
    assert preprocess(tmp_path / "a.jsonl", "--json-keys", "a/b")[0] == 0


def test_a_parquet_column_that_is_there_twice(tmp_path, preprocess):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    arrays = [pyarrow.array(["a"]), pyarrow.array(["b"]), pyarrow.array(["c"])]
    table = pyarrow.Table.from_arrays(arrays, names=["text", "text", "other"])
    parquet.write_table(table, tmp_path / "a.parquet")
    status, said = preprocess(tmp_path / "a.parquet")
    assert status == 2 and "has the column 'text' twice (its columns: text, text, other)" in said
    assert preprocess(tmp_path / "a.parquet", "--json-keys", "other")[0] == 0


def test_the_first_reason_is_named_where_every_line_is_skipped(tmp_path, preprocess):
    (tmp_path / "a.jsonl").write_text('{"text": 1}\n{"body": ""}\n')
    status, said = preprocess(tmp_path / "a.jsonl", "--on-error", "skip")
    assert status == 2 and "2 lines or files skipped" in said
    assert "the first that was left out: " in said and "line 1: has int under key 'text'" in said


@pytest.mark.parametrize("encoding", ["ndarray:bool", "ndarray:float32:5", "pkl"])
def test_columns_of_shards_that_hold_no_integers(tmp_path, encoding):
    shard = {"format": "mds", "samples": 1, "column_names": ["input_ids", "text", "mask"],
             "column_encodings": ["ndarray", "str", encoding],
             "column_sizes": [None, None, None]}  # fmt: skip
    (tmp_path / "index.json").write_text(json.dumps({"version": 2, "shards": [shard]}))
    with pytest.raises(ValueError, match=f"index.json: column mask is stored as {encoding}; only"):
        MdsReader(tmp_path)


def test_conversations_that_are_all_longer_than_a_row(tmp_path):
    prefix = str(tmp_path / "talks")
    with IndexedWriter(prefix, 100, (0.0, 1.0)) as writer:
        writer.metadata["is_chat"] = True
        for length in (40, 33, 50):
            writer.add_document(np.ones(length, int), np.ones(length, np.uint8))
    entries = [mixture_entry(prefix, "best-fit", 0, 1.0)]
    with pytest.raises(ValueError, match=r"all 3 conversations of .* longer than a row of 32") as e:
        StageRows(entries, 32, 1, 1, max_epochs=5)
    assert "the shortest has 33" in str(e.value) and "add data" not in str(e.value)
    assert len(StageRows(entries, 33, 1, 1)) == 1


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_interrupt_is_a_line_and_the_work_is_kept(tmp_path, tokenizer_files, workers):
    (tmp_path / "a.jsonl").write_text(LINES * 40)
    prefix = tmp_path / "out"
    command = [sys.executable, "-c", SLOW_TOOL, "0.1", "--input", str(tmp_path / "a.jsonl"),
               "--output-prefix", str(prefix), "--tokenizer", str(tokenizer_files["hf"]),
               "--workers", workers]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    state = tmp_path / "out.unfinished" / "state.json"
    deadline = time.monotonic() + 100
    while not (state.is_file() and json.loads(state.read_text())["units"] >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == (
        "preprocess_data: error: interrupted; the same command goes on where this one stopped"
    )
    assert "Traceback" not in said and state.is_file()
