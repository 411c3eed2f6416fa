"""The index of a step folder's tensors, read without running code, and the files it counts on."""

import pickle
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from lclm.checkpoint.folder import CheckpointError

METADATA_NAME = ".metadata"


class _MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata`, a pickle, without running code that somebody put into it.

    Only the classes of torch.distributed.checkpoint, and the few values that their fields hold,
    are looked up. Megatron adds no class of its own to this file.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" or module.startswith("torch.distributed.checkpoint."):
            value = super().find_class(module, name)
            is_known_class = isinstance(value, type) and module != "torch"
            if is_known_class or value is torch.Size or isinstance(value, torch.dtype):
                return value
        elif (module, name) in {
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),  # Python 3.13
            ("collections", "OrderedDict"),
        }:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"'{module}.{name}' does not belong into this file")


def read_metadata(folder: Path) -> Metadata:
    """The index of a step folder's tensors; every file that it counts on is there, and whole.

    Raises:
        CheckpointError: this is no torch_dist checkpoint, or a data file is absent or short.
    """
    path = folder / METADATA_NAME
    remedy = "give a step folder written by lclm or Megatron in the torch_dist format"
    if not path.is_file():
        raise CheckpointError(f"checkpoint {folder}: has no {METADATA_NAME}; {remedy}")
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; {remedy}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{path}: is not the index of a distributed checkpoint; {remedy}")
    _check_files(folder, metadata)
    return metadata


def _check_files(folder: Path, metadata: Metadata) -> None:
    needed: dict[str, int] = {}
    for stored in cast(dict[MetadataIndex, Any], metadata.storage_data).values():
        end = stored.offset + stored.length
        needed[stored.relative_path] = max(needed.get(stored.relative_path, 0), end)
    for name, num_bytes in sorted(needed.items()):
        path = folder / name
        if not path.is_file() or path.stat().st_size < num_bytes:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "absent"
            raise CheckpointError(
                f"{path}: {found}, but {METADATA_NAME} counts on {num_bytes} bytes; "
                "the checkpoint is incomplete: copy it again, or use another step"
            )
