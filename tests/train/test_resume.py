"""A run that stops and goes on equals one that never stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lclm.config_file import dump_toml
from lclm.context.plan.rates import RATES_NAME
from tests import tolerances
from tests.distributed import run_distributed
from tests.train.sample_data import write_domain
from tests.train.tiny import tiny_config

pytestmark = pytest.mark.slow

KEYS = ("step", "stage", "loss", "grad_norm", "lr", "tokens", "domain_loss")


def run_all(argument_lists: list[list[str]]) -> list[int]:
    """Call the trainer's command line once per list, in one process of each rank."""
    from lclm.train.__main__ import main

    codes = []
    for arguments in argument_lists:
        codes.append(main(arguments))
    return codes


def records(run_dir: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says of each step, without times."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{key: json.loads(line)[key] for key in KEYS} for line in lines]


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages over two domains: shares change within the first, the second starts with fresh
    optimizer state."""
    folder = tmp_path_factory.mktemp("resume")
    a = write_domain(folder / "a", num_docs=60, max_length=90, seed=1)
    b = write_domain(folder / "b", num_docs=40, max_length=700, seed=2)
    first = [
        {"prefix": a, "packing": "concat", "share": [0.75, 0.25]},
        {"prefix": b, "packing": "exact", "piece_length": 32, "share": [0.25, 0.75]},
    ]
    second = [
        {"prefix": a, "packing": "concat", "share": 0.25},
        {"prefix": b, "packing": "exact", "piece_length": 256, "share": 0.25},
        {"prefix": b, "packing": "exact", "piece_length": 64, "share": 0.5},
    ]
    config = tiny_config(
        folder / "unused",
        stage__0__mixture=first,
        stage__1__mixture=second,
        stage__1__seq_length=256,
        stage__1__tokens_per_step=1024,
        stage__1__tokens=4096,
        stage__1__optimizer_state="fresh",
        stage__1__rope_base=1e5,
        checkpoint__every_steps=1,
        checkpoint__keep=9,
        validation__every_steps=3,
        validation__rows_per_domain=4,
        metrics__tensorboard=False,
    )
    path = folder / "run.toml"
    path.write_text(dump_toml(config))
    return path


@pytest.fixture(scope="module")
def straight(run_file: Path) -> Path:
    """Run folder of eight steps without a stop, cp = 2."""
    run_dir = run_file.parent / "straight"
    arguments = [str(run_file), f"run.dir={run_dir}", "parallel.cp=2"]
    assert run_distributed(run_all, 2, [arguments], timeout=200) == [[0], [0]]
    return run_dir


def test_straight_run_has_every_record(straight: Path) -> None:
    found = records(straight)
    assert [record["step"] for record in found] == list(range(1, 9))
    assert [record["stage"] for record in found] == ["first"] * 4 + ["second"] * 4
    assert found[-1]["tokens"] == 4 * 256 + 4096
    validated = (straight / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in validated] == [3, 4, 6, 8]
    assert set(json.loads(validated[0])["loss"]) == {"a", "b"}


def test_resumed_equals_straight_bit_for_bit(run_file: Path, straight: Path) -> None:
    """Stops within a stage (3), at its end (4) and within the next (6)."""
    run_dir = run_file.parent / "resumed"
    run_dir.mkdir()
    rates = (straight / RATES_NAME).read_text()
    (run_dir / RATES_NAME).write_text(rates)
    common = [str(run_file), f"run.dir={run_dir}", "parallel.cp=2"]
    stops = [[*common, f"train.max_steps={stop}"] for stop in (3, 4, 6, 8)]
    assert run_distributed(run_all, 2, stops, timeout=280) == [[0] * 4] * 2
    assert records(run_dir) == records(straight)
    assert (run_dir / RATES_NAME).read_text() == rates  # not measured again
    assert (run_dir / "validation.jsonl").read_text() == (straight / "validation.jsonl").read_text()


@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [(1, [[]]), (2, [["parallel.tp=2"], ["parallel.pp=2"], []])],
    ids=["one process", "tp2, pp2 and dp2"],
)
def test_resumes_on_another_layout(
    run_file: Path, straight: Path, ranks: int, layouts: list[list[str]]
) -> None:
    step = straight / "checkpoints" / "step_00000002"
    calls = []
    for layout in layouts:
        run_dir = run_file.parent / f"other-{ranks}-{'-'.join(layout)}"
        shutil.copytree(step, run_dir / "checkpoints" / step.name)
        (run_dir / "checkpoints" / "latest").write_text(step.name + "\n")
        fields = [f"run.dir={run_dir}", "checkpoint.resume=required", "checkpoint.every_steps=0"]
        calls.append([str(run_file), *fields, *layout])
    codes = run_distributed(run_all, ranks, calls, timeout=280)
    assert codes == [[0] * len(layouts)] * ranks
    for layout in layouts:
        found = records(run_file.parent / f"other-{ranks}-{'-'.join(layout)}")
        assert [record["step"] for record in found] == list(range(3, 9))
        for got, want in zip(found, records(straight)[2:], strict=True):
            where = (layout, got["step"])
            assert got["tokens"] == want["tokens"]
            for key in ("loss", "grad_norm"):
                assert got[key] == pytest.approx(want[key], rel=tolerances.RESUME_REL), where
            near = pytest.approx(want["domain_loss"], rel=tolerances.RESUME_REL)
            assert got["domain_loss"] == near, where


def test_record_of_the_data_is_in_the_checkpoint(straight: Path) -> None:
    info = json.loads((straight / "checkpoints" / "step_00000006" / "lclm.json").read_text())
    assert (info["step"], info["stage"], info["stage_step"]) == (6, 1, 2)
    assert info["tokens"] == sum(info["ledger"].values()) == 4 * 256 + 2 * 1024
