"""Preprocessing on a Ray cluster of several nodes on this machine: the same bytes as here."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from lclm.data.tokenizer import load_tokenizer
from lclm.prepare.encoder import encode_sources
from lclm.prepare.ray import _encode, encode_on_ray
from lclm.prepare.readers import Unit, find_sources
from lclm.prepare.worker import EncodeOptions, WorkerState

ROOT = Path(__file__).resolve().parents[2]
BLOCK_BYTES = 2000
NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}
# The tool with small units.
TOOL = f"""
import sys
sys.path.insert(0, "tools")
import preprocess_data
from lclm.prepare import encoder
encoder.encode_sources.__defaults__ = ("", None, {BLOCK_BYTES})
sys.exit(preprocess_data.main(sys.argv[1:]))
"""


def contents(prefix):
    return [Path(f"{prefix}{ending}").read_bytes() for ending in (".bin", ".idx", ".json")]


@pytest.fixture(scope="module")
def cluster():
    """A head without cores and a node with one: whatever is encoded, is encoded on the other."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    head = NODE | {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(**NODE)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def work(tmp_path, tokenizer_files):
    """Lines to encode, and the bytes that one process here makes of them."""
    texts = (f"hello world, the cat is number {n}\n" * (n % 9) for n in range(4000))
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    encode_sources(
        find_sources([tmp_path / "a.jsonl"]),
        load_tokenizer(tokenizer_files["hf"]),
        str(tmp_path / "local" / "whole"),
        EncodeOptions(append_eod=True),
        block_bytes=BLOCK_BYTES,
    )
    return tmp_path, tokenizer_files["hf"], contents(tmp_path / "local" / "whole")


def start_tool(cluster, folder, tokenizer):
    command = [sys.executable, "-c", TOOL, "--input", folder / "a.jsonl", "--tokenizer", tokenizer,
               "--append-eod", "--engine", "ray", "--output-prefix", folder / "whole"]  # fmt: skip
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, text=True,
                            stderr=subprocess.PIPE)  # fmt: skip


def wait_for_units(process, folder, wanted):
    state = folder / "whole.unfinished" / "state.json"
    deadline = time.monotonic() + 120
    while not (state.is_file() and json.loads(state.read_text())["units"] >= wanted):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.long
def test_a_killed_run_goes_on_and_gives_the_same_bytes(cluster, work):
    folder, tokenizer, expected = work
    process = start_tool(cluster, folder, tokenizer)
    wait_for_units(process, folder, 20)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    process = start_tool(cluster, folder, tokenizer)
    _, errors = process.communicate()
    assert process.returncode == 0 and "going on after" in errors, errors
    assert contents(folder / "whole") == expected


@pytest.mark.long
def test_a_node_that_dies_costs_nothing(cluster, work):
    folder, tokenizer, expected = work
    node = cluster.add_node(**NODE)
    process = start_tool(cluster, folder, tokenizer)
    wait_for_units(process, folder, 20)
    cluster.remove_node(node, allow_graceful=False)
    _, errors = process.communicate()
    assert process.returncode == 0 and "going on after" not in errors, errors
    assert contents(folder / "whole") == expected


@pytest.mark.long
def test_bad_input_is_named_as_here(cluster, work):
    folder, tokenizer, _ = work
    with open(folder / "a.jsonl", "a") as file:
        file.write("nonsense\n")
    process = start_tool(cluster, folder, tokenizer)
    _, errors = process.communicate()
    assert process.returncode == 2 and "a.jsonl, line 4001" in errors
    assert "Traceback" not in errors and not list(folder.glob("whole*"))


def test_nodes_that_see_other_files_are_named(tmp_path, tokenizer_files):
    state = WorkerState(str(tokenizer_files["hf"]), 300, 1, 0, "", EncodeOptions())
    with pytest.raises(ValueError, match=r"node .* has no .*/none\.jsonl; input, tokenizer and"):
        _encode((state, str(tmp_path)), Unit(0, 9, path=Path("none.jsonl"), end=9))
    with pytest.raises(ValueError, match=r"node .* has no .*/elsewhere; "):
        _encode((state, str(tmp_path / "elsewhere")), Unit(0, 9, lines=b"{}"))


def test_an_address_without_a_cluster_is_refused_at_once(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=rf"no cluster at RAY_ADDRESS={address} .*unset RAY_ADD"):
        next(encode_on_ray([], None))


def test_workers_do_not_apply(tmp_path, tokenizer_files):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    command = [sys.executable, ROOT / "tools/preprocess_data.py", "--input", tmp_path / "a.jsonl",
               "--tokenizer", tokenizer_files["hf"], "--output-prefix", tmp_path / "x",
               "--engine", "ray", "--workers", "2"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--workers: does not apply to --engine ray" in done.stderr
