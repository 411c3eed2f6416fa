"""`python -m lclm.train` as a user calls it: what it prints, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lclm.config_file import dump_toml
from tests.train.sample_data import write_domain
from tests.train.tiny import tiny_config

pytestmark = pytest.mark.slow


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Start the trainer in a process of its own."""
    command = [sys.executable, "-m", "lclm.train", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command line")
    prefix = write_domain(folder / "a", num_docs=60, max_length=90, seed=1)
    mixture = [{"prefix": prefix, "packing": "concat", "share": 1.0}]
    config = tiny_config(folder / "run", stage__0__mixture=mixture, stage__1__mixture=mixture)
    (folder / "run.toml").write_text(dump_toml(config))
    return folder / "run.toml"


def test_run_leaves_its_records(run_file: Path) -> None:
    result = call(str(run_file), "train.max_steps=2")
    assert result.returncode == 0, result.stderr
    assert "step 2/2 first loss" in result.stderr
    assert "Warning" not in result.stderr
    folder = run_file.parent / "run"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.resolved.toml", "metrics.jsonl", "checkpoints", "tensorboard"}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2
    assert all(0 <= record["data_seconds"] <= record["seconds"] for record in records)
    assert (folder / "checkpoints" / "latest").read_text() == "step_00000002\n"


def test_dry_run_prints_the_numbers_and_trains_nothing(run_file: Path) -> None:
    result = call(str(run_file), "--dry-run", "--world-size", "4", "run.dir=never", "parallel.cp=2")
    assert result.returncode == 0, result.stderr
    assert "4 ranks = tp 1 x cp 2 (auto, auto) x dp 2 x pp 1" in result.stdout
    assert "steps 5..8 of 256 tokens = 4 rows = 2 micro-batches on each of 2" in result.stdout
    assert not Path("never").exists()


def test_dry_run_without_data_prints_what_is_known_and_refuses(run_file: Path) -> None:
    result = call(str(run_file), "--dry-run", "stage.0.mixture.0.prefix=absent")
    assert result.returncode == 2, result.stderr
    assert "steps 5..8 of 256 tokens" in result.stdout
    assert "error: absent" in result.stderr


REFUSALS = {
    "layout": (["parallel.tp=2"], "= 2 does not divide the world size 1"),
    "unknown field": (["train.max_step=2"], "did you mean 'max_steps'?"),
    "no data": (["stage.0.mixture.0.prefix=absent"], "absent"),
    "vocabulary": (["model.vocab_size=64"], "more than model.vocab_size(64)"),
    "no checkpoint": (["checkpoint.resume=required"], "has no checkpoint"),
    "no init": (["model.init_from=absent"], "checkpoint absent: no such folder"),
    "no tokenizer": (["data.tokenizer=absent"], "absent"),
}


@pytest.mark.parametrize("name", list(REFUSALS))
def test_refusals(run_file: Path, tmp_path: Path, name: str) -> None:
    changes, message = REFUSALS[name]
    result = call(str(run_file), f"run.dir={tmp_path / 'run'}", *changes)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_checkpoint_of_another_architecture(run_file: Path, tmp_path: Path) -> None:
    assert call(str(run_file), f"run.dir={tmp_path}", "train.max_steps=1").returncode == 0
    for changes in (
        [f"run.dir={tmp_path}"],
        [f"run.dir={tmp_path / 'new'}", f"model.init_from={tmp_path / 'checkpoints'}"],
    ):
        result = call(str(run_file), "model.ffn_hidden_size=32", *changes)
        assert result.returncode == 2, result.stderr
        assert "ffn_hidden_size is 64 there and 32 here" in result.stderr
    result = call(str(run_file), f"run.dir={tmp_path}", "stage.0.tokens_per_step=512")
    assert result.returncode == 2, result.stderr
    assert "give the stages their old tokens and tokens_per_step" in result.stderr


def test_weights_only_start(run_file: Path, tmp_path: Path) -> None:
    """`init_from` takes the weights, not the step or the optimizer."""
    first = call(str(run_file), f"run.dir={tmp_path / 'a'}", "train.max_steps=2")
    assert first.returncode == 0, first.stderr
    second = call(
        str(run_file),
        f"run.dir={tmp_path / 'b'}",
        f"model.init_from={tmp_path / 'a' / 'checkpoints'}",
        "train.max_steps=1",
    )
    assert second.returncode == 0, second.stderr
    assert "weights from" in second.stderr and "(step 2)" in second.stderr
    assert "step 1/1" in second.stderr
