"""The checkpoint folder: which step it stands for, `lclm.json`, atomic replacement."""

import dataclasses
import json

import pytest

from lclm.checkpoint.folder import (
    CheckpointError,
    CheckpointInfo,
    new_folder,
    read_info,
    resolve_step_folder,
    step_folder_name,
    write_info,
    write_latest,
)

INFO = CheckpointInfo(
    format=1,
    step=12,
    stage=1,
    stage_step=2,
    tokens=49152,
    model={"family": "llama", "num_layers": 2},
    rope_base=8e6,
    seq_length=4096,
    dtype="bfloat16",
    has_optimizer=True,
    ledger={"books": 100},
    versions={"torch": "2.13.0"},
)


@pytest.fixture
def checkpoint_dir(tmp_path):
    for step in (4, 12):
        folder = tmp_path / step_folder_name(step)
        folder.mkdir()
        write_info(folder, dataclasses.replace(INFO, step=step))
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
        ({"step": ...}, r"missing fields \['step'\]"),
        ({"extra": 1}, r"unknown fields \['extra'\]"),
        ({"step": "12"}, "step = '12' is str, must be int"),
        ({"tokens": True}, "tokens = True is bool, must be int"),
        ({"has_optimizer": 1}, "has_optimizer = 1 is int, must be bool"),
        ({"stage": -1}, "stage = -1 must not be negative"),
        ({"seq_length": 0}, "seq_length = 0 must be at least 1"),
        ({"dtype": "float16"}, "dtype = 'float16' must be one of"),
        ({"model": []}, r"model = \[\] is list"),
    ],
)
def test_bad_info_is_refused(checkpoint_dir, change, message):
    path = checkpoint_dir / "step_00000012" / "lclm.json"
    tree = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: v for name, v in tree.items() if v is not ...}))
    with pytest.raises(CheckpointError, match=message):
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
    with pytest.raises(CheckpointError, match=r"lclm\.json is absent"):
        read_info(path.parent)


def test_bad_info_is_not_written(checkpoint_dir):
    folder = checkpoint_dir / "step_00000012"
    with pytest.raises(CheckpointError, match="dtype"):
        write_info(folder, dataclasses.replace(INFO, dtype="int8"))
    assert read_info(folder) == INFO


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
