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


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_file(tmp_path_factory.mktemp("lost work"))


@pytest.fixture(scope="module")
def base(run_file: Path) -> Path:
    """Run folder after three steps; copies of it are used."""
    run_dir = run_file.parent / "base"
    (ended,) = call([str(run_file), f"run.dir={run_dir}", "train.max_steps=3"])
    assert ended.code == 0, ended.said
    assert steps_of(run_dir / "checkpoints") == ["step_00000002", "step_00000003"]
    return run_dir


def call(*argument_lists: list[str]) -> list[Ended]:
    return run_distributed(run_calls, 1, list(argument_lists))[0]


def test_a_used_folder_keeps_what_is_saved_and_what_was_there(run_file: Path, base: Path) -> None:
    """Starts anew, goes on by the same command, goes back to an earlier step; `latest` lost."""
    folder = run_file.parent
    never, back, lost = (folder / name for name in ("never", "back", "lost"))
    for copy in (never, back, lost):
        shutil.copytree(base, copy)
    strange = back / "checkpoints" / "step_old_good"
    strange.mkdir()
    (back / "checkpoints" / "latest").write_text("step_00000002\n")
    (lost / "checkpoints" / "latest").unlink()

    def start(run_dir: Path, *changes: str) -> list[str]:
        return [str(run_file), f"run.dir={run_dir}", *changes]

    ended = call(
        start(never, "checkpoint.resume=never", "train.max_steps=1"),
        start(never, "train.max_steps=2"),
        start(back, "train.max_steps=4", "checkpoint.keep=1"),
        start(lost, "train.max_steps=4"),
    )
    assert [one.code for one in ended] == [0] * 4, ended
    assert "step_00000002, step_00000003 of earlier work moved to" in ended[0].said
    assert "resumed from" in ended[1].said
    assert steps_of(never / "checkpoints") == ["step_00000001", "step_00000002"]
    assert (never / "checkpoints" / "latest").read_text() == "step_00000002\n"
    assert steps_of(never / "abandoned-1" / "checkpoints") == ["step_00000002", "step_00000003"]
    assert [r["step"] for r in read_records(never / "abandoned-1")] == [1, 2, 3]

    assert "step_00000003 of earlier work moved to" in ended[2].said
    assert steps_of(back / "checkpoints") == ["step_00000004", "step_old_good"]
    assert (back / "checkpoints" / "latest").read_text() == "step_00000004\n"
    assert steps_of(back / "abandoned-1" / "checkpoints") == ["step_00000003"]

    assert "latest is missing; of its steps [2, 3] the newest whole one is step_00000003" in (
        ended[3].said
    )
    assert [record["step"] for record in read_records(lost)] == [1, 2, 3, 4]
    assert steps_of(lost / "checkpoints") == ["step_00000003", "step_00000004"]


def test_a_loss_that_is_not_finite_stops_the_run(run_file: Path, base: Path) -> None:
    run_dir = run_file.parent / "nan"
    fields = [str(run_file), f"run.dir={run_dir}", "stage.0.lr=1e30", "optimizer.clip_grad=0"]
    (ended,) = call(fields)
    assert ended.code == 1
    assert "Traceback" not in ended.said
    assert "is not finite, from rows [" in ended.said and "of stage.0 (" in ended.said
    done = len(read_records(run_dir))
    assert 1 <= done < 4
    assert (run_dir / "checkpoints" / "latest").read_text() == f"step_{done:08d}\n"


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
    run_file: Path, base: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lclm"), "propagate", True)
    run_dir = run_file.parent / "locked"
    holder = f'{{"host": "{socket.gethostname()}", "pid": {os.getpid()}}}'
    with hold_run_folder(run_dir):
        assert (run_dir / LOCK_NAME).read_text() == holder
        message = re.escape(f"is in use by the run {holder}")
        with pytest.raises(ConfigError, match=message), hold_run_folder(run_dir):
            pass
        (ended,) = call([str(run_file), f"run.dir={run_dir}"])
        assert ended.code == 2 and f"is in use by the run {holder}" in ended.said
    assert (run_dir / LOCK_NAME).read_text() == ""
    assert not caplog.records
    # a dead process holds no lock, but its name stays
    (run_dir / LOCK_NAME).write_text('{"host": "far", "pid": 7}')
    with hold_run_folder(run_dir):
        assert (run_dir / LOCK_NAME).read_text() == holder
    assert 'its run {"host": "far", "pid": 7} ended without a word; taken over' in caplog.text


def test_changed_data_is_refused_and_the_ledger_is_carried(run_file: Path, base: Path) -> None:
    run_dir = run_file.parent / "changed"
    shutil.copytree(base, run_dir)
    start = [str(run_file), f"run.dir={run_dir}", "train.max_steps=4"]
    shares = ["stage.0.mixture.0.share=0.75", "stage.0.mixture.1.share=0.25"]
    ended = call(
        [*start, "seed=8"], [*start, *shares, "data.allow_changed=true", "optimizer.beta2=0.9"]
    )
    assert ended[0].code == 2 and "seed: 1234 -> 8" in ended[0].said
    assert ended[1].code == 0, ended[1].said
    assert "changed, as data.allow_changed says: stage.0.mixture.0.share" in ended[1].said
    assert "changed: optimizer.beta2: 0.95 -> 0.9" in ended[1].said
    old, new = (
        read_info(run_dir / "checkpoints" / f"step_0000000{step}").ledger for step in (3, 4)
    )
    assert sum(old.values()) == 3 * 256 and sum(new.values()) == 4 * 256
    assert all(new[prefix] >= tokens for prefix, tokens in old.items())
