"""Which steps a folder holds, which is gone on from, which retention deletes."""

import pytest

from lclm.checkpoint.folder import CheckpointError, find_newest, list_steps, write_info
from lclm.checkpoint.store import remove_old, set_aside
from tests.checkpoint.samples import checkpoint_info


def make_steps(folder, *steps, is_whole=True):
    for step in steps:
        path = folder / f"step_{step:08d}"
        path.mkdir(parents=True)
        if is_whole:
            write_info(path, checkpoint_info(step=step))
            (path / ".metadata").touch()
            (path / "metadata.json").touch()


def test_other_names_are_not_ours(tmp_path):
    make_steps(tmp_path, 2, 11)
    for name in ("step_old_good", "step_00000004.tmp", "step_0000000x", "step_000000012"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000005").touch()
    assert list(list_steps(tmp_path)) == [2, 11]


def test_retention_counts_only_what_led_to_this_step(tmp_path):
    make_steps(tmp_path, 1, 2, 3, 4, 8, 9)
    (tmp_path / "step_old_good").mkdir()
    remove_old(tmp_path, 2, 4, {1})
    assert list(list_steps(tmp_path)) == [1, 3, 4, 8, 9]
    assert (tmp_path / "step_old_good").is_dir()


def test_without_latest_the_newest_whole_step_counts(tmp_path):
    assert find_newest(tmp_path / "absent") is None
    make_steps(tmp_path, 7, is_whole=False)
    with pytest.raises(CheckpointError, match=r"none of the steps \[7\] is whole"):
        find_newest(tmp_path)
    make_steps(tmp_path, 3, 5)
    assert find_newest(tmp_path).name == "step_00000005"
    (tmp_path / "latest").write_text("step_00000003\n")
    assert find_newest(tmp_path).name == "step_00000003"
    (tmp_path / "latest").write_text("step_00000099\n")
    with pytest.raises(CheckpointError, match="names 'step_00000099'"):
        find_newest(tmp_path)


def test_later_steps_are_set_aside_and_numbered(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    for _ in range(2):
        make_steps(checkpoints, 6)
        set_aside(tmp_path, checkpoints, 4, ["metrics.jsonl"])
    assert list_steps(checkpoints) == {}
    for number in (1, 2):
        assert list(list_steps(tmp_path / f"abandoned-{number}" / "checkpoints")) == [6]
    set_aside(tmp_path, checkpoints, 4, [])
    assert not (tmp_path / "abandoned-3").exists()
