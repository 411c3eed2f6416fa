"""`examples/pretrain_prolong.sh` at its tiny scale, started in each way that its head names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "pretrain_prolong.sh"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs start: data lands here, once, outside the run folders."""
    return tmp_path_factory.mktemp("prolong")


def start(folder: Path, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "SCALE": "tiny", "PATH": path, **environment}
    return subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, timeout=280, check=False
    )


def losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_plain_and_under_torchrun_give_one_result(folder: Path) -> None:
    """Data parallel from NPROC, and context parallel under torchrun, on the same data."""
    plain = ["bash", str(SCRIPT), "run.dir=plain", "train.max_steps=2"]
    result = start(folder, plain, NPROC="2")
    assert result.returncode == 0, result.stderr
    assert "preparing data/prolong_tiny" in result.stderr
    inner = [*TORCHRUN, "--standalone", "--no-python", "--nproc-per-node", "2", str(SCRIPT)]
    result = start(folder, [*inner, "run.dir=inner", "train.max_steps=2", "parallel.cp=2"])
    assert result.returncode == 0, result.stderr
    assert "preparing" not in result.stderr
    module = ["-m", "lclm.train", str(ROOT / "examples/configs/prolong_tiny.toml")]
    outer = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *module, "run.dir=outer"]
    result = start(folder, [*outer, "train.max_steps=2", "parallel.tp=2"])
    assert result.returncode == 0, result.stderr
    assert len(losses(folder / "plain")) == 2
    assert losses(folder / "inner") == pytest.approx(losses(folder / "plain"), rel=1e-5)
    assert losses(folder / "outer") == pytest.approx(losses(folder / "plain"), rel=1e-5)
    assert {path.name for path in folder.iterdir()} == {"data", "plain", "inner", "outer"}


def test_unknown_scale_and_unknown_field(folder: Path) -> None:
    result = start(folder, ["bash", str(SCRIPT)], SCALE="huge")
    assert (result.returncode, result.stdout) == (2, "")
    assert "SCALE=huge; use full or tiny" in result.stderr


def test_failed_preparation_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where a folder must be")
    result = start(tmp_path, ["bash", str(SCRIPT)])
    assert result.returncode != 0
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
