"""Files behind URLs, from an HTTP server on this machine: fetched once, whole, or named."""

import fcntl
import functools
import http.server
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fsspec.registry import known_implementations

from lclm.data import remote, retry
from lclm.data.indexed import IndexedReader
from lclm.data.remote import fetch_dataset, fetch_inputs, fetch_prefix
from lclm.data.stage_rows import StageRows
from tests.data_fixtures import mixture_entry

ROOT = Path(__file__).resolve().parents[2]
SHARDS = Path(__file__).resolve().parent / "mds"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; `server.failures` answers are errors, `server.cuts` end too early."""

    def do_GET(self):
        if Path(self.translate_path(self.path)).exists():
            self.server.gets.append(self.path)
        if self.path.endswith("/") or self.server.failures == self.server.cuts == 0:
            super().do_GET()
        elif self.server.failures:
            self.server.failures -= 1
            self.send_error(503)
        else:
            self.server.cuts -= 1
            body = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.end_headers()  # no Content-Length: the client cannot tell
            self.wfile.write(body[: len(body) // 2])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of tmp_path/served; server.url, server.gets: paths of bodies sent."""
    monkeypatch.setenv("LCLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retry, "WAITS", (0.001, 0.002))
    (tmp_path / "served").mkdir()
    handler = functools.partial(Handler, directory=str(tmp_path / "served"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.gets, server.failures, server.cuts = [], 0, 0
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def served(tmp_path):
    return tmp_path / "served"


def test_local_paths_stay_as_they_are():
    assert fetch_inputs(["a/b", "c*"]) == [Path("a/b"), Path("c*")]
    assert fetch_prefix("data/books") == fetch_dataset("data/books") == "data/books"


def test_a_file_is_fetched_once_until_it_changes(server, served, tmp_path):
    (served / "a.jsonl").write_text("one")
    url = f"{server.url}/a.jsonl"
    paths = [fetch_inputs([url])[0] for _ in range(2)]
    assert paths[0] == paths[1] and paths[0].read_text() == "one" and paths[0].name == "a.jsonl"
    assert server.gets == ["/a.jsonl"]
    assert str(paths[0]).startswith(f"{tmp_path}/cache/http/127.0.0.1:")
    (served / "a.jsonl").write_text("two")
    os.utime(served / "a.jsonl", (1e9, 1e9))
    changed = fetch_inputs([url])[0]
    assert changed.read_text() == "two" and paths[0].read_text() == "one"
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_patterns_and_folders_in_order(server, served):
    for name in ("c.txt", "a.txt", "b.md", "sub/x/d.txt"):
        (served / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (served / "in" / name).write_text(name)
    found = fetch_inputs([f"{server.url}/in/*.txt"])
    assert [path.read_text() for path in found] == ["a.txt", "c.txt"]
    folder = fetch_inputs([f"{server.url}/in/"])[0]
    files = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.*")}
    assert files == {name: name for name in ("c.txt", "a.txt", "b.md", "sub/x/d.txt")}
    assert fetch_inputs([f"file://{served}/in"])[0].joinpath("a.txt").read_text() == "a.txt"
    with pytest.raises(ValueError, match=r"\*\.zip: nothing matches"):
        fetch_inputs([f"{server.url}/in/*.zip"])


def test_failing_answers_are_asked_again_and_then_name_the_url(server, served, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lclm"), "propagate", True)
    (served / "a.txt").write_text("whole")
    server.failures = 2
    assert fetch_inputs([f"{server.url}/a.txt"])[0].read_text() == "whole"
    assert caplog.text.count("trying again in") == 2 and f"{server.url}/a.txt: " in caplog.text
    (served / "b.txt").write_text("whole")
    server.failures = 99
    with pytest.raises(OSError, match=r"b\.txt: .*cannot be fetched, even after 2 retries"):
        fetch_inputs([f"{server.url}/b.txt"])


def test_what_is_cut_short_is_fetched_again(server, served, tmp_path):
    (served / "a.txt").write_text("whole" * 100)
    server.cuts = 2
    assert fetch_inputs([f"{server.url}/a.txt"])[0].read_text() == "whole" * 100
    (served / "b.txt").write_text("whole" * 100)
    server.cuts = 99
    with pytest.raises(OSError, match=r"250 bytes arrived instead of 500"):
        fetch_inputs([f"{server.url}/b.txt"])
    assert not [path for path in (tmp_path / "cache").rglob("*b.txt*") if path.is_file()
                and path.suffix != ".lock"]  # fmt: skip


def test_a_fetch_that_was_killed_goes_on(server, served, write_prefix):
    prefix = write_prefix("served/books", [30, 5, 60])
    url = f"{server.url}/books"
    real = remote._fetch_file

    class Killed(BaseException):
        pass

    def dying(system, url, info, path):
        if path.suffix == ".bin":
            raise Killed
        real(system, url, info, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "_fetch_file", dying)
        with pytest.raises(Killed):
            fetch_prefix(url)
    assert server.gets == ["/books.idx"]
    local = fetch_prefix(url)
    assert sorted(server.gets) == ["/books.bin", "/books.idx", "/books.json"]
    for ending in (".bin", ".idx", ".json"):
        assert Path(local + ending).read_bytes() == Path(prefix + ending).read_bytes()


def fetch_and_report(url, results):
    results.put(Path(fetch_prefix(url) + ".bin").read_bytes())


def test_many_processes_fetch_once(server, write_prefix):
    write_prefix("served/books", [1000] * 50)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (f"{server.url}/books", results)
    processes = [context.Process(target=fetch_and_report, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    bodies = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(bodies) == 1 and [process.exitcode for process in processes] == [0] * 4
    assert sorted(server.gets) == ["/books.bin", "/books.idx", "/books.json"]


def test_others_wait_for_the_lock(server, served, tmp_path):
    (served / "a.txt").write_text("whole")
    path = fetch_inputs([f"{server.url}/a.txt"])[0]
    folder = path.parent
    folder.rename(tmp_path / "away")
    with open(f"{folder}.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(target=fetch_inputs, args=([f"{server.url}/a.txt"],))
        waiting.start()
        time.sleep(0.3)
        assert waiting.is_alive() and not folder.exists()
        (tmp_path / "away").rename(folder)
    waiting.join(timeout=20)
    assert server.gets == ["/a.txt"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("{url}/none.txt", r"none\.txt: no such file; check the URL"),
        ("nowhere://x/y", "nowhere://x/y: cannot be opened"),
        ("needy://bucket/x", r"needy://bucket/x: needs a package .*pip install lclm\[remote\]"),
    ],
)
def test_urls_that_cannot_be_fetched(server, monkeypatch, url, message):
    missing = {"class": "package_that_is_missing.Files", "err": "Install package_that_is_missing"}
    monkeypatch.setitem(known_implementations, "needy", missing)
    with pytest.raises(ValueError, match=message):
        fetch_inputs([url.format(url=server.url)])
    assert server.gets == []


def test_urls_that_climb_are_refused(server, served):
    (served / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"must not contain '\.\.'"):
        fetch_inputs([f"file://{served}/../served/a.txt"])


def test_a_prefix_that_is_not_there(server):
    with pytest.raises(ValueError, match=r"/books\.idx: no such file"):
        fetch_prefix(f"{server.url}/books")


def test_rows_of_a_remote_prefix_equal_those_of_the_local_one(server, write_prefix):
    prefix = write_prefix("served/books", [70, 5, 130, 33, 64, 9, 200, 41, 16, 90])
    stages = [
        StageRows([mixture_entry(name, "concat", 0, 1.0)], 32, 12, 1)
        for name in (prefix, f"{server.url}/books")
    ]
    for number in range(12):
        rows = [stage.row(number) for stage in stages]
        assert np.array_equal(rows[0].tokens, rows[1].tokens) and rows[1].domain == "books"
    assert stages[1].ledger(12) == {f"{server.url}/books": 12 * 32}


def run_tool(name, *arguments):
    command = [sys.executable, ROOT / "tools" / name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_tools_read_urls(server, served, tmp_path, tokenizer_files):
    lines = [json.dumps({"text": f"hello world {n}"}) + "\n" for n in range(50)]
    (served / "a.jsonl").write_text("".join(lines[:20]))
    (served / "b.jsonl").write_text("".join(lines[20:]))
    common = ["--tokenizer", tokenizer_files["hf"], "--append-eod", "--workers", "1"]
    for name, inputs in (
        ("local", [served / "a.jsonl", served / "b.jsonl"]),
        ("fetched", [f"{server.url}/*.jsonl"]),
    ):
        done = run_tool("preprocess_data.py", "--input", *inputs, *common,
                        "--output-prefix", served / name)  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert (served / "fetched.bin").read_bytes() == (served / "local.bin").read_bytes()
    sources = IndexedReader(served / "fetched").metadata["sources"]
    assert "http/127.0.0.1:" in sources[0]["path"], "where it came from is recorded"
    urls = [f"{server.url}/{name}" for name in ("local", "fetched")]
    done = run_tool("inspect_data.py", *urls, "--verify")
    assert done.returncode == 0 and "50 documents" in done.stdout, done.stderr
    done = run_tool("retokenize.py", "--input", urls[0], "--tokenizer", tokenizer_files["hf"],
                    "--output-prefix", tmp_path / "same")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "same.bin").read_bytes() == (served / "local.bin").read_bytes()
    done = run_tool("merge_data.py", "--input", *urls, "--output-prefix", tmp_path / "both")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "both.bin").read_bytes() == 2 * (served / "local.bin").read_bytes()
    done = run_tool("preprocess_data.py", "--input", f"{server.url}/c.jsonl", *common,
                    "--output-prefix", tmp_path / "c")  # fmt: skip
    assert done.returncode == 2 and "c.jsonl: no such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_remote_folder_of_shards(server, served):
    """Every file of ProLong's folders, as hf:// would list them."""
    (served / "packed").symlink_to(SHARDS / "packed")
    folder = Path(fetch_dataset(f"{server.url}/packed/"))
    for path in (SHARDS / "packed").iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
