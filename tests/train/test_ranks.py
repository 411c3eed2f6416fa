"""Ranks that fail say so, each by its name; ranks end with their launcher."""

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lclm.config import ConfigError
from lclm.config_file import load_config
from lclm.mesh import _join, build_mesh
from tests.distributed import run_distributed
from tests.train.runs import Ended, read_records, run_calls, steps_of, write_run_file
from tests.train.sample_data import write_lengths
from tests.train.tiny import VOCAB_SIZE, tiny_config

ROOT = Path(__file__).parents[2]
RANK = """
import pathlib, sys, time
from lclm.train.ranks import end_with_launcher
end_with_launcher()
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""
LAUNCHER = """
import os, subprocess, sys
process = subprocess.Popen([sys.executable, *sys.argv[1:]], start_new_session=True)
print(process.pid, flush=True)
process.wait()
"""


def wait_until(condition: object, seconds: float = 30.0) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False


def is_alive(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("is_torchrun", [True, False], ids=["torchrun", "plain"])
def test_a_rank_ends_with_torchrun_but_outlives_a_shell(tmp_path: Path, is_torchrun: bool) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    environment = {name: v for name, v in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    if is_torchrun:
        environment["TORCHELASTIC_RUN_ID"] = "none"
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path / "rank.py"), str(tmp_path / "ready")]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert launcher.stdout is not None
    rank = int(launcher.stdout.readline())
    try:
        assert wait_until((tmp_path / "ready").exists)
        launcher.kill()
        launcher.wait()
        if is_torchrun:
            assert wait_until(lambda: not is_alive(rank), 10)
        else:
            time.sleep(0.5)
            assert is_alive(rank)
    finally:
        if is_alive(rank):
            os.kill(rank, signal.SIGKILL)


@pytest.mark.long
def test_torchruns_ranks_end_with_it(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK.replace("sys.argv[1]", "f'{sys.argv[1]}{os.getpid()}'")
                                      .replace("import ", "import os, ", 1))  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(tmp_path / "rank.py"), str(tmp_path / "pid-")]
    launcher = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        assert wait_until(lambda: len(list(tmp_path.glob("pid-*"))) == 2, 120)
        ranks = [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]
        time.sleep(1)
        assert all(is_alive(pid) for pid in ranks)
    finally:
        launcher.kill()
        launcher.wait()
    assert wait_until(lambda: not any(is_alive(pid) for pid in ranks), 10)


def run_from(folders: list[str], arguments: list[str]) -> Ended:
    """Start in a folder of this rank's own."""
    os.chdir(folders[int(os.environ["RANK"])])
    return run_calls([arguments])[0]


def test_a_rank_that_cannot_read_its_data_says_so_and_stops_all(tmp_path: Path) -> None:
    """As on a node whose disk lacks the data."""
    run_file = write_run_file(tmp_path)
    text = run_file.read_text().replace(f'"{tmp_path}/', '"')
    (tmp_path / "relative.toml").write_text(text)
    (tmp_path / "empty").mkdir()
    folders = [str(tmp_path), str(tmp_path / "empty")]
    fields = [str(tmp_path / "relative.toml"), f"run.dir={tmp_path / 'run'}"]
    first, second = run_distributed(run_from, 2, folders, fields)
    host = socket.gethostname()
    assert (first.code, second.code) == (2, 2)
    assert f"lclm.train: rank 1 on {host}: error: a.bin" in second.said
    assert f"rank 0 on {host}: error: cannot start, because of rank 1 on {host}: a.bin" in (
        first.said
    )
    assert "Traceback" not in first.said + second.said
    assert not (tmp_path / "run").exists()


def run_without_room(calls: list[list[str]], most_bytes: int) -> list[Ended]:
    """No file may grow further: fails as a full disk does, where it is written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    return run_calls(calls)


def test_a_disk_without_room_and_damaged_data_are_one_line(tmp_path: Path) -> None:
    run_file = write_run_file(tmp_path)
    run_dir = tmp_path / "run"
    start = [str(run_file), f"run.dir={run_dir}"]
    whole = run_distributed(run_calls, 1, [[*start, "train.max_steps=1"]])[0]
    assert whole[0].code == 0, whole[0].said
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    bad_file = write_run_file(damaged)
    size = (damaged / "a.bin").stat().st_size // 2
    np.full(size, VOCAB_SIZE, np.uint16).tofile(damaged / "a.bin")
    (damaged / "a.json").unlink()
    bad_start = [str(bad_file), f"run.dir={tmp_path / 'bad'}"]
    under_a_file = [str(run_file), f"run.dir={run_file / 'run'}"]
    full, bad, below = run_distributed(
        run_without_room, 1, [start, bad_start, under_a_file], 30_000
    )[0]
    assert full.code == 1 and "Traceback" not in full.said
    assert f"checkpoint {run_dir}/checkpoints/step_00000002: cannot be written (" in full.said
    assert steps_of(run_dir / "checkpoints") == ["step_00000001", "step_00000002.tmp"]
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_00000001\n"
    assert below.code == 2 and "Traceback" not in below.said
    assert f"run.dir({run_file}/run): a part of it is a file" in below.said
    assert bad.code == 1 and "Traceback" not in bad.said
    assert "cannot be read" in bad.said and f"{damaged}/a.bin: tokens [" in bad.said


def test_a_pods_master_address_does_not_ask_for_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process without the rest of torchrun's variables stands alone; several are refused."""
    config = tiny_config(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    assert _join(torch.device("cpu"), 1)
    assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
    dist.destroy_process_group()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE = 2 but RANK, MASTER_PORT is not set"):
        build_mesh(config)


def test_a_step_without_labels_and_the_mode_of_each_stage_are_written(tmp_path: Path) -> None:
    """Documents of one token have no label; two context ranks choose how keys travel."""
    run_file = write_run_file(tmp_path, parallel__cp=2, train__deterministic=True)
    for name in ("a", "b"):
        (tmp_path / name).with_suffix(".json").unlink()
        write_lengths(tmp_path / name, [1] * 3000)
    run_dir = tmp_path / "run"
    calls = [[str(run_file), f"run.dir={run_dir}", "train.max_steps=1"]]
    first, second = run_distributed(run_calls, 2, calls)
    assert first[0].code == second[0].code == 0, first[0].said
    assert "step 1 has no label: nothing was learned from it" in first[0].said
    assert "first loss none grad 0.000" in first[0].said
    (record,) = read_records(run_dir)
    assert record["loss"] is None and record["labels"] == 0 and record["domain_loss"] == {}
    resolved = (run_dir / "config.resolved.toml").read_text()
    modes = re.findall(r"^# stage 0 cp_comm: (\w+)", resolved, re.MULTILINE)
    assert modes and modes[0] in ("ring", "ulysses", "gather")
    assert load_config(run_dir / "config.resolved.toml").train.deterministic
    assert not (run_dir / "context_rates.json").exists()
