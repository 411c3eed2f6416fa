"""Read and write Megatron's `torch_dist` step folders in one process, one tensor at a time.

Neither a process group nor Megatron is needed: the format is PyTorch's distributed checkpoint
(`.metadata` and `*.distcp`) plus two files that `megatron.core.dist_checkpointing` (0.16.1:
core.py, strategies/common.py) looks for: `metadata.json`, which names the format, and `common.pt`
with what is not a tensor (nothing here).
"""

import json
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from lclm.checkpoint.data_files import read_metadata
from lclm.checkpoint.folder import CheckpointError
from lclm.hf.safetensors_folder import TensorSpec

FORMAT_NAME = "metadata.json"
COMMON_NAME = "common.pt"
# megatron.core.dist_checkpointing.core.CheckpointingConfig
FORMAT_FIELDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class TorchDistReader:
    """Tensors of a step folder, each read when asked for.

    Peak memory of `load` is the tensor plus its largest stored piece.

    Raises:
        CheckpointError: if this is no torch_dist checkpoint, or a data file is absent or short.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._metadata = read_metadata(self.folder)
        self._storage = FileSystemReader(self.folder)
        # No collectives and no coordinator: this process reads alone.
        self._storage.set_up_storage_reader(self._metadata, True)

    def tensors(self) -> dict[str, TensorSpec]:
        """Global shape and type of every tensor, by key; objects of other kinds are left out."""
        return {
            key: TensorSpec(key, tuple(entry.size), entry.properties.dtype)
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def load(self, key: str) -> torch.Tensor:
        """The whole global tensor on the CPU, in its stored type.

        Raises:
            CheckpointError: if there is no tensor of that key, or its data is damaged or not whole.
        """
        entry = self._metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"checkpoint {self.folder}: holds no tensor '{key}'")
        num_stored = sum(chunk.sizes.numel() for chunk in entry.chunks)
        if num_stored != entry.size.numel():
            raise CheckpointError(
                f"checkpoint {self.folder}: {num_stored} of the {entry.size.numel()} elements of "
                f"'{key}' were stored; every element must be stored once"
            )
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner({key: tensor}, self._metadata, is_coordinator=True)
        plan = planner.finish_plan(planner.create_local_plan())
        try:
            self._storage.read_data(plan, planner).wait()
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            first_line = str(error).split("\n")[0]
            raise CheckpointError(
                f"{self.folder}/*.distcp: the data of '{key}' cannot be read ({first_line}); "
                "the checkpoint is damaged: copy it again, or use another step"
            ) from error
        return tensor


class _LazySavePlanner(DefaultSavePlanner):
    """Plans with tensors on the meta device and fetches each when its file is written."""

    def __init__(self, load: Callable[[str], torch.Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._load = load

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        planned = self.state_dict[index.fqn]
        spec = TensorSpec(index.fqn, tuple(planned.shape), planned.dtype)
        return spec.checked(self._load(index.fqn))


def write_torch_dist(
    folder: str | Path,
    tensors: Iterable[TensorSpec],
    load: Callable[[str], torch.Tensor],
) -> None:
    """Write a step folder that `megatron.core.dist_checkpointing.load` reads at any layout.

    `load(name)` is called once for each name, in the order of `tensors`, when that tensor is due.
    Every tensor has a file of its own and is let go when it is written, so peak memory is one
    tensor (twice that, if `load` returns a view of a larger storage). `folder` must exist.

    Raises:
        CheckpointError: if `load` returns another shape or type than `tensors` says.
        OSError: the disk is full, say.
    """
    try:
        _write(Path(folder), tensors, load)
    except RuntimeError as error:  # what torch's writer says when a file cannot be finished
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise cause from error


def _write(
    folder: Path, tensors: Iterable[TensorSpec], load: Callable[[str], torch.Tensor]
) -> None:
    # One file for everything would be smaller in number, but torch keeps all tensors of a file
    # until that file is closed.
    writer = FileSystemWriter(folder, single_file_per_rank=False, thread_count=1)
    planner = _LazySavePlanner(load)
    placeholders: dict[str, Any] = {
        spec.name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in tensors
    }
    # The steps of torch.distributed.checkpoint.save for a world of one process.
    writer.set_up_storage_writer(True)
    planner.set_up_planner(placeholders, writer.storage_meta(), is_coordinator=True)
    local_plan = writer.prepare_local_plan(planner.create_local_plan())
    global_plans, metadata = planner.create_global_plan([local_plan])
    plan = planner.finish_plan(writer.prepare_global_plan(global_plans)[0])
    results = writer.write_data(plan, planner).wait()
    writer.finish(metadata, [results])
    torch.save({}, folder / COMMON_NAME)
    (folder / FORMAT_NAME).write_text(json.dumps(FORMAT_FIELDS), encoding="utf-8")
