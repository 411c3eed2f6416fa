"""The checkpoint folder: which step it stands for, `lclm.json`, atomic replacement."""

import json
import re

import pytest
from pydantic import ValidationError

from lclm.checkpoint.folder import (
    CheckpointError,
    new_folder,
    read_info,
    resolve_step_folder,
    step_folder_name,
    write_info,
    write_latest,
)
from tests.checkpoint.samples import checkpoint_info

INFO = checkpoint_info()


@pytest.fixture
def checkpoint_dir(tmp_path):
    for step in (4, 12):
        folder = tmp_path / step_folder_name(step)
        folder.mkdir()
        write_info(folder, checkpoint_info(step=step))
    write_latest(tmp_path, "step_00000004")
    return tmp_path


def test_latest_and_step_folders_resolve(checkpoint_dir):
    assert resolve_step_folder(checkpoint_dir).name == "step_00000004"
    write_latest(checkpoint_dir, "step_00000012")
    assert resolve_step_folder(checkpoint_dir).name == "step_00000012"
    step_folder = checkpoint_dir / "step_00000004"
    assert resolve_step_folder(step_folder) == step_folder
    assert read_info(step_folder).step == 4
    assert sorted(p.name for p in checkpoint_dir.iterdir()) == [
        "latest",
        "step_00000004",
        "step_00000012",
    ]


def test_info_survives_the_file(checkpoint_dir):
    assert read_info(checkpoint_dir / "step_00000012") == INFO


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format = 2, but this version reads format 1"),
        ({"step": ...}, "step: missing; set it"),
        ({"stages": 1}, "stages: unknown field; did you mean 'stage'?"),
        ({"step": "12"}, "step = '12': Input should be a valid integer"),
        ({"tokens": True}, "tokens = True: Input should be a valid integer"),
        ({"has_optimizer": 1}, "has_optimizer = 1: Input should be a valid boolean"),
        ({"stage": -1}, "stage = -1: Input should be greater than or equal to 0"),
        ({"seq_length": 0}, "seq_length = 0: Input should be greater than or equal to 1"),
        ({"dtype": "int8"}, "dtype = 'int8': String should match pattern"),
        ({"model": []}, "model = []: Input should be a valid dictionary"),
    ],
)
def test_bad_info_is_refused(checkpoint_dir, change, message):
    path = checkpoint_dir / "step_00000012" / "lclm.json"
    tree = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: v for name, v in tree.items() if v is not ...}))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_info(path.parent)


def test_unreadable_info_is_refused(checkpoint_dir):
    path = checkpoint_dir / "step_00000012" / "lclm.json"
    path.write_text('{"format": 1')
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_info(path.parent)
    path.write_text("[1]")
    with pytest.raises(CheckpointError, match="one JSON object"):
        read_info(path.parent)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"lclm\.json: no such file"):
        read_info(path.parent)


def test_bad_info_cannot_be_made():
    with pytest.raises(ValidationError, match="dtype"):
        checkpoint_info(dtype="int8")


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc", "step_00000099"])
def test_latest_must_name_a_step_beside_it(checkpoint_dir, name):
    (checkpoint_dir / "latest").write_text(name)
    with pytest.raises(CheckpointError, match=r"latest: (holds|names)"):
        resolve_step_folder(checkpoint_dir)
    with pytest.raises(CheckpointError, match="cannot name"):
        write_latest(checkpoint_dir, "step_00000099")


def test_other_folders_are_no_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match="holds neither"):
        resolve_step_folder(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_step_folder(tmp_path / "absent")


def test_new_folder_appears_only_when_whole(tmp_path):
    target = tmp_path / "a" / "out"

    def fail():
        with new_folder(target) as staging:
            (staging / "half").write_text("x")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        fail()
    assert list((tmp_path / "a").iterdir()) == []
    with new_folder(target) as staging:
        assert not target.exists()
        (staging / "whole").write_text("x")
    assert [p.name for p in target.iterdir()] == ["whole"]
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def test_new_folder_replaces_only_when_told(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    with new_folder(target) as staging:  # empty: taken
        (staging / "first").write_text("1")
    with pytest.raises(CheckpointError, match="not empty"), new_folder(target):
        pass
    with new_folder(target, overwrite=True) as staging:
        (staging / "second").write_text("2")
        assert [p.name for p in target.iterdir()] == ["first"]
    assert [p.name for p in target.iterdir()] == ["second"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with (
        pytest.raises(CheckpointError, match="is a file"),
        new_folder(target / "second", overwrite=True),
    ):
        pass
