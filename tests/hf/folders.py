"""Folders imported, exported, read and compared."""

import torch
from safetensors.torch import load_file, save_file

from lclm.hf.convert import convert_from_hf, convert_to_hf


def import_hf(source, target, **options) -> list[str]:
    lines: list[str] = []
    convert_from_hf(source, target, report=lines.append, **options)
    return lines


def export_hf(source, target, **options) -> list[str]:
    lines: list[str] = []
    convert_to_hf(source, target, report=lines.append, **options)
    return lines


def load_folder(folder) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, shards or not."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        loaded = load_file(path)
        assert not loaded.keys() & tensors.keys()
        tensors.update(loaded)
    return tensors


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def change_tensors(folder, change):
    """Load the only shard, let `change` edit the mapping, save it."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
