"""What a run leaves behind: whole records, and versions that are true."""

import json
import logging
import os
import subprocess
from pathlib import Path

import pytest

from lclm.train import loop
from lclm.train.metrics import METRICS_NAME, RunLog


def test_damaged_lines_are_dropped_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lclm"), "propagate", True)
    path = tmp_path / METRICS_NAME
    good = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    damaged = [b"\0" * 300 + b"\n", b'{"loss": 1.0}\n', b"[1]\n", b'{"step": 2, "lo']
    path.write_bytes("".join(good).encode() + b"".join(damaged))
    RunLog(tmp_path, False, 2).close()
    assert path.read_text() == "".join(good[:2])
    assert [record.getMessage().split(" is damaged")[0] for record in caplog.records] == [
        f"{path}: line {number}" for number in (4, 5, 6, 7)
    ]
    caplog.clear()
    RunLog(tmp_path, False, 2).close()
    assert not caplog.records


def test_only_lclms_own_commit_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None without git, outside of a repository, or in somebody else's."""
    identity = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER")
                for what in ("NAME", "EMAIL")}  # fmt: skip
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(
            ["git", "-C", str(tmp_path), *command], check=True, env={**os.environ, **identity}
        )
    assert loop._commit(tmp_path) is None
    (tmp_path / "setup.py").write_text('setup(name="other")\n')
    assert loop._commit(tmp_path) is None
    (tmp_path / "setup.py").write_text('setup(\n    name="lclm",\n)\n')
    command = ["git", "-C", str(tmp_path), "rev-parse", "HEAD"]
    head = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    assert loop._commit(tmp_path) == head and len(head) == 40
    monkeypatch.setenv("PATH", str(tmp_path))
    assert loop._commit(tmp_path) is None
    assert set(loop.versions()) >= {"lclm", "torch"}
