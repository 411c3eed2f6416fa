"""No work is lost, and none goes on that should not, while the exit status says all is well."""

import logging
import os
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest

from lclm.checkpoint.folder import read_info
from lclm.config import ConfigError
from lclm.config_file import load_config
from lclm.data.indexed import IndexedWriter
from lclm.train.run_folder import LOCK_NAME, hold_run_folder
from lclm.train.stages import plan_stages
from tests.distributed import run_distributed
from tests.train.runs import Ended, read_records, run_calls, steps_of, write_run_file
from tests.train.tiny import VOCAB_SIZE

HUGE = float(np.float32(3e38))  # times a loss above 1.2 it is infinite in fp32


COPIES = ("never", "back", "lost", "changed")


def run_everything(run_file: Path) -> dict[str, list[Ended]]:
    """Three steps, then, each on a copy of their run folder, what a user may do with it.

    One process runs all, for importing costs more than training.
    """

    def start(name: str, *changes: str) -> Ended:
        run_dir = run_file.parent / name
        return run_calls([[str(run_file), f"run.dir={run_dir}", *changes]])[0]

    ended = {"base": [start("base", "train.max_steps=3")]}
    for name in COPIES:
        shutil.copytree(run_file.parent / "base", run_file.parent / name)
    (run_file.parent / "back" / "checkpoints" / "step_old_good").mkdir()
    (run_file.parent / "back" / "checkpoints" / "latest").write_text("step_00000002\n")
    (run_file.parent / "lost" / "checkpoints" / "latest").unlink()
    ended["never"] = [
        start("never", "checkpoint.resume=never", "train.max_steps=1"),
        start("never", "train.max_steps=2"),
    ]
    ended["back"] = [start("back", "train.max_steps=4", "checkpoint.keep=1")]
    ended["lost"] = [start("lost", "train.max_steps=4")]
    shares = ("stage.0.mixture.0.share=0.75", "stage.0.mixture.1.share=0.25")
    meant = ("train.max_steps=4", "data.allow_changed=true", "optimizer.beta2=0.9", *shares)
    ended["changed"] = [start("changed", "seed=8"), start("changed", *meant)]
    ended["nan"] = [start("nan", "stage.0.lr=1e30", "optimizer.clip_grad=0")]
    ended["locked"] = [start("locked")]
    return ended


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lost work")


@pytest.fixture(scope="module")
def ended(folder: Path) -> dict[str, list[Ended]]:
    """What `run_everything` did in `folder`; the run folder `locked` is held meanwhile."""
    run_file = write_run_file(folder)
    with hold_run_folder(folder / "locked"):
        found: dict[str, list[Ended]] = run_distributed(run_everything, 1, run_file)[0]
    codes = {name: [one.code for one in each] for name, each in found.items()}
    assert codes == {
        "base": [0],
        "never": [0, 0],
        "back": [0],
        "lost": [0],
        "changed": [2, 0],
        "nan": [1],
        "locked": [2],
    }, found
    assert steps_of(folder / "base" / "checkpoints") == ["step_00000002", "step_00000003"]
    return found


def test_a_start_anew_keeps_its_steps_and_those_before(
    folder: Path, ended: dict[str, list[Ended]]
) -> None:
    first, second = ended["never"]
    assert "step_00000002, step_00000003 of earlier work moved to" in first.said
    assert "resumed from" in second.said
    never = folder / "never"
    assert steps_of(never / "checkpoints") == ["step_00000001", "step_00000002"]
    assert (never / "checkpoints" / "latest").read_text() == "step_00000002\n"
    assert steps_of(never / "abandoned-1" / "checkpoints") == ["step_00000002", "step_00000003"]
    assert [r["step"] for r in read_records(never / "abandoned-1")] == [1, 2, 3]


def test_going_back_keeps_what_is_saved_and_what_was_later(
    folder: Path, ended: dict[str, list[Ended]]
) -> None:
    back = folder / "back"
    assert "step_00000003 of earlier work moved to" in ended["back"][0].said
    assert steps_of(back / "checkpoints") == ["step_00000004", "step_old_good"]
    assert (back / "checkpoints" / "latest").read_text() == "step_00000004\n"
    assert steps_of(back / "abandoned-1" / "checkpoints") == ["step_00000003"]


def test_a_lost_latest_is_found_again(folder: Path, ended: dict[str, list[Ended]]) -> None:
    said = ended["lost"][0].said
    text = "latest is missing; of its steps [2, 3] the newest whole one is step_00000003"
    assert said.count(text) == 1
    assert [record["step"] for record in read_records(folder / "lost")] == [1, 2, 3, 4]
    assert steps_of(folder / "lost" / "checkpoints") == ["step_00000003", "step_00000004"]


def test_a_loss_that_is_not_finite_stops_the_run(
    folder: Path, ended: dict[str, list[Ended]]
) -> None:
    said = ended["nan"][0].said
    assert "Traceback" not in said
    assert "is not finite, from rows [" in said and "of stage.0 (" in said
    done = len(read_records(folder / "nan"))
    assert 1 <= done < 4
    assert (folder / "nan" / "checkpoints" / "latest").read_text() == f"step_{done:08d}\n"


def test_changed_data_is_refused_and_the_ledger_is_carried(
    folder: Path, ended: dict[str, list[Ended]]
) -> None:
    refused, meant = ended["changed"]
    assert "seed: 1234 -> 8" in refused.said
    assert "changed, as data.allow_changed says: stage.0.mixture.0.share" in meant.said
    assert "changed: optimizer.beta2: 0.95 -> 0.9" in meant.said
    steps = folder / "changed" / "checkpoints"
    old, new = (read_info(steps / f"step_0000000{step}").ledger for step in (3, 4))
    assert sum(old.values()) == 3 * 256 and sum(new.values()) == 4 * 256
    assert all(new[prefix] >= tokens for prefix, tokens in old.items())


def test_a_run_is_told_who_holds_its_folder(ended: dict[str, list[Ended]]) -> None:
    holder = f'{{"host": "{socket.gethostname()}", "pid": {os.getpid()}}}'
    assert f"is in use by the run {holder}" in ended["locked"][0].said


def test_the_rows_whose_loss_is_not_finite_are_named_by_every_rank(tmp_path: Path) -> None:
    """A weight too large for the loss, in one document; two data-parallel ranks share the rows."""
    run_file = write_run_file(tmp_path, data__held_out_fraction=0.0)
    with IndexedWriter(str(tmp_path / "a"), VOCAB_SIZE, (1.0, HUGE)) as writer:
        for number in range(9):
            writer.add_document(np.arange(64) % VOCAB_SIZE, np.full(64, int(number == 7)))
    config = load_config(run_file, [f"run.dir={tmp_path / 'run'}"])
    rows = plan_stages(config)[0]
    weights = [rows.row(number).token_weights for number in range(len(rows))]
    bad = [n for n, each in enumerate(weights) if each is not None and (each == HUGE).any()]
    step = bad[0] // 4 + 1
    named = [row for row in bad if row // 4 + 1 == step]
    assert len(named) < 4
    calls = [[str(run_file), f"run.dir={config.run.dir}"]]
    for (ended,) in run_distributed(run_calls, 2, calls):
        assert ended.code == 1, ended.said
        message = f"step {step}: the loss is not finite, from rows {named} of stage.0 (a); stopped"
        assert message in ended.said
    done = read_records(tmp_path / "run") if step > 1 else []
    assert [record["step"] for record in done] == list(range(1, step))


def test_a_folder_serves_one_run_at_a_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lclm"), "propagate", True)
    run_dir = tmp_path / "run"
    holder = f'{{"host": "{socket.gethostname()}", "pid": {os.getpid()}}}'
    with hold_run_folder(run_dir):
        assert (run_dir / LOCK_NAME).read_text() == holder
        message = re.escape(f"is in use by the run {holder}")
        with pytest.raises(ConfigError, match=message), hold_run_folder(run_dir):
            pass
    assert (run_dir / LOCK_NAME).read_text() == ""
    assert not caplog.records
    # a dead process holds no lock, but its name stays
    (run_dir / LOCK_NAME).write_text('{"host": "far", "pid": 7}')
    with hold_run_folder(run_dir):
        assert (run_dir / LOCK_NAME).read_text() == holder
    assert 'its run {"host": "far", "pid": 7} ended without a word; taken over' in caplog.text
