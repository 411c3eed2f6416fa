"""torch_dist step folders: Megatron reads what is written here, and the other way round."""

import json
import os
import pickle
import socket
import subprocess
import sys
import weakref
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lclm.checkpoint.folder import CheckpointError
from lclm.hf.names import build_weight_table
from lclm.hf.safetensors_folder import TensorSpec
from lclm.hf.torch_dist import TorchDistReader, write_torch_dist
from tests.checkpoint.samples import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
MODEL = tiny_llama(num_layers=2, hidden_size=16, ffn_hidden_size=24, vocab_size=48)


def make_weights(dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        entry.ours: torch.randn(entry.shape, generator=generator).to(dtype)
        for entry in build_weight_table(MODEL)
    }


def write(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    stored = [TensorSpec(name, tuple(w.shape), w.dtype) for name, w in weights.items()]
    write_torch_dist(folder, stored, weights.__getitem__)
    return folder


def assert_reads(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    reader = TorchDistReader(folder)
    assert set(reader.tensors()) == set(weights)
    for key, weight in weights.items():
        loaded = reader.load(key)
        assert loaded.dtype == weight.dtype and torch.equal(loaded, weight), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, dtype):
    weights = make_weights(dtype)
    folder = write(tmp_path / "step", weights)
    assert_reads(folder, weights)
    assert json.loads((folder / "metadata.json").read_text()) == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    name = "model.output_layer.weight"
    assert TorchDistReader(folder).tensors()[name] == TensorSpec(name, (48, 16), dtype)


def run_ranks(world_size: int, *arguments: Path) -> None:
    """Start the ranks of megatron_ranks.py and wait for all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "PYTHONWARNINGS": "ignore",
            "CUDA_VISIBLE_DEVICES": "",
        }
        program = str(ROOT / "tests" / "hf" / "megatron_ranks.py")
        ranks.append(
            subprocess.Popen(
                [sys.executable, program, *map(str, arguments)],
                env=environment,
                cwd=arguments[-1].parent,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        told = [rank.communicate(timeout=200)[0] for rank in ranks]
    finally:  # a rank that waits for one that died
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world_size, "\n".join(told)
    assert all(f"equal {len(build_weight_table(MODEL))}" in text for text in told), told


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_megatron_loads_and_saves_at_any_tp(tmp_path, world_size):
    weights = make_weights(torch.bfloat16)
    folder = write(tmp_path / "step", weights)
    save_file(weights, tmp_path / "expected.safetensors")
    saved = tmp_path / "saved"
    run_ranks(world_size, folder, tmp_path / "expected.safetensors", saved)
    assert_reads(saved, weights)
    entry = TorchDistReader(saved)._metadata.state_dict_metadata["model.output_layer.weight"]
    assert len(entry.chunks) == world_size  # it was cut, so the reader did join


def test_one_tensor_is_held_while_writing(tmp_path):
    alive: list[weakref.ref] = []
    stored = [TensorSpec(f"t{number}", (7, 3), torch.float32) for number in range(6)]

    def load(key):
        assert sum(ref() is not None for ref in alive) <= 1  # the one before, at most
        array = np.full((7, 3), float(key[1:]), dtype=np.float32)
        alive.append(weakref.ref(array))  # lives as long as any tensor on its memory
        return torch.from_numpy(array)

    write_torch_dist(tmp_path, stored, load)
    assert len(alive) == 6
    for number in range(6):
        assert TorchDistReader(tmp_path).load(f"t{number}").eq(number).all()


def test_a_view_is_written_alone(tmp_path):
    large = torch.arange(100_000.0)
    stored = [TensorSpec("small", (5,), torch.float32)]
    write_torch_dist(tmp_path, stored, lambda key: large[10:15])
    assert TorchDistReader(tmp_path).load("small").tolist() == [10, 11, 12, 13, 14]
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 10_000


def test_a_tensor_other_than_planned_is_an_error(tmp_path):
    stored = [TensorSpec("t", (2,), torch.float32)]
    with pytest.raises(CheckpointError, match="'t'"):
        write_torch_dist(tmp_path, stored, lambda key: torch.ones(3))


def test_absent_and_damaged_files_are_named(tmp_path):
    folder = write(tmp_path / "step", make_weights())
    reader = TorchDistReader(folder)
    with pytest.raises(CheckpointError, match="holds no tensor 'ghost'"):
        reader.load("ghost")
    file = sorted(folder.glob("*.distcp"))[2]
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=rf"{file.name}: {len(content) - 1} bytes, but"):
        TorchDistReader(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"{file.name}: absent, but"):
        TorchDistReader(folder)
    file.write_bytes(b"\0" * len(content))
    reader = TorchDistReader(folder)
    with pytest.raises(CheckpointError, match="cannot be read"):
        deque(map(reader.load, reader.tensors()), maxlen=0)
    (folder / ".metadata").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"\.metadata: cannot be read"):
        TorchDistReader(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"has no \.metadata"):
        TorchDistReader(folder)


def test_a_tensor_with_a_hole_is_refused(tmp_path):
    folder = write(tmp_path / "step", make_weights())
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata["model.output_layer.weight"].size = torch.Size([50, 16])
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="768 of the 800 elements"):
        TorchDistReader(folder).load("model.output_layer.weight")


class Payload:
    """Pickles as a call of a function that must never run."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "payload",
    [
        lambda folder: Payload(os.mkdir, str(folder / "ran")),
        lambda folder: Payload(eval, f"__import__('os').mkdir({str(folder / 'ran')!r})"),
        lambda folder: Payload(torch.save, {}, str(folder / "ran")),
    ],
)
def test_an_index_runs_no_code(tmp_path, payload):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(payload(tmp_path)))
    with pytest.raises(CheckpointError, match="does not belong into this file"):
        TorchDistReader(tmp_path)
    assert not (tmp_path / "ran").exists()
