"""Shards are planned within bounds, streamed, and aligned."""

import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lclm.checkpoint.folder import CheckpointError
from lclm.hf.safetensors_folder import (
    SafetensorsFolder,
    TensorSpec,
    plan_shards,
    write_shards,
)


def make_groups(*counts, dtype=torch.float32):
    """One group per count, of that many tensors of 10 elements."""
    return [
        [TensorSpec(f"g{group}.t{number}", (10,), dtype) for number in range(count)]
        for group, count in enumerate(counts)
    ]


@pytest.mark.parametrize(
    ("max_bytes", "expected"),
    [
        (10**9, [[0, 1, 2, 3]]),
        (120, [[0, 1], [2], [3]]),
        (119, [[0], [1], [2], [3]]),
        (1, [[0], [1], [2], [3]]),
        (240, [[0, 1, 2], [3]]),
    ],
)
def test_shards_are_filled_in_order(max_bytes, expected):
    assert plan_shards(make_groups(1, 2, 3, 1), max_bytes) == expected


def test_wide_types_come_first_so_that_data_is_aligned(tmp_path):
    narrow = [TensorSpec("narrow", (3,), torch.bfloat16)]
    wide = [TensorSpec("wide", (5,), torch.float32)]
    assert plan_shards([narrow, wide], 10**9) == [[1, 0]]
    tensors = {"narrow": torch.ones(3, dtype=torch.bfloat16), "wide": torch.arange(5.0)}
    groups = [narrow, wide]
    write_shards(tmp_path, groups, lambda n: [tensors[groups[n][0].name]], 10**9, print)
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded["narrow"].dtype == torch.bfloat16
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_only_one_group_is_held(tmp_path):
    alive: list[weakref.ref] = []
    groups = make_groups(2, 2, 2, 2, 2)

    def load_group(number):
        assert sum(ref() is not None for ref in alive) <= 2  # the group before, at most
        arrays = [np.full(10, number, dtype=np.float32) for _ in groups[number]]
        alive.extend(weakref.ref(array) for array in arrays)  # live as long as tensors on them
        return [torch.from_numpy(array) for array in arrays]

    write_shards(tmp_path, groups, load_group, 160, lambda line: None)
    assert len(alive) == 10
    folder = SafetensorsFolder(tmp_path)
    assert len(set(folder.shard_of.values())) == 3
    for number in range(5):
        assert folder.load(f"g{number}.t1").eq(number).all()


def test_a_tensor_other_than_planned_is_an_error(tmp_path):
    groups = make_groups(1)
    with pytest.raises(CheckpointError, match="planned"):
        write_shards(tmp_path, groups, lambda n: [torch.ones(11)], 100, print)
    with pytest.raises(CheckpointError, match="planned"):
        write_shards(tmp_path, groups, lambda n: [torch.ones(10).half()], 100, print)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: None, None),
        (lambda t: t["g1.t0"].fill_(1), r"differ in 1 tensors \(g1\.t0\)"),
        (lambda t: t.update({"g0.t0": t["g0.t0"].bfloat16()}), r"differ in 1 tensors \(g0\.t0\)"),
        (lambda t: t.update({"g0.t0": t["g0.t0"][None]}), r"differ in 1 tensors \(g0\.t0\)"),
        (lambda t: t.pop("g0.t0"), r"differ in 1 tensors \(g0\.t0\)"),
        (lambda t: t.update(more=torch.ones(1)), r"differ in 1 tensors \(more\)"),
    ],
)
def test_single_file_beside_shards_must_hold_the_same(tmp_path, change, message):
    groups = make_groups(1, 1)
    tensors = {group[0].name: torch.full((10,), float("nan")) for group in groups}
    write_shards(tmp_path, groups, lambda n: [tensors[groups[n][0].name]], 40, print)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    if message is None:
        assert SafetensorsFolder(tmp_path).specs.keys() == tensors.keys()
        return
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFolder(tmp_path)
