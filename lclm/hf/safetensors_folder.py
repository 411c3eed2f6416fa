"""The weights of a Hugging Face folder: read tensor by tensor, written shard by shard.

The writer lays out a shard's header from shapes and types alone, so tensors are streamed to disk
and none is kept. Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header
length, JSON header padded with spaces, data without gaps).
"""

import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lclm.checkpoint.folder import CheckpointError, read_json

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
DTYPES_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPE_NAMES}
# Shards kept open while reading: the two around a border.
MAX_OPEN_SHARDS = 2


def is_weight_file(name: str) -> bool:
    """Whether `write_shards` may have written a file of that name."""
    shard = r"model-\d{5}-of-\d{5}\.safetensors"
    return name in (SINGLE_NAME, INDEX_NAME) or re.fullmatch(shard, name) is not None


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and type of a tensor that is not there yet."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def checked(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself. Raises CheckpointError unless shape and type are these."""
        if tuple(tensor.shape) != self.shape or tensor.dtype != self.dtype:
            raise CheckpointError(
                f"'{self.name}' came as {tuple(tensor.shape)} {tensor.dtype}, "
                f"planned {self.shape} {self.dtype}"
            )
        return tensor


class SafetensorsFolder:
    """Tensors of a folder with `model.safetensors`, or with shards and their index.

    Every header is read at once; data when asked for. Where both are there they must hold the same,
    since transformers takes the single file and others the shards.

    Raises:
        CheckpointError: if a shard is absent or damaged, the index does not fit the shards, or
            shards and single file differ.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.specs: dict[str, TensorSpec] = {}
        self.shard_of: dict[str, str] = {}
        self._shard = lru_cache(MAX_OPEN_SHARDS)(self._open_shard)
        index = self._read_index()
        for shard in sorted(set(index.values())) if index else [SINGLE_NAME]:
            self._read_header(shard)
        if index:
            self._check_index(index)
            if SINGLE_NAME not in index.values() and (folder / SINGLE_NAME).is_file():
                self._check_same_as_single()

    def _read_index(self) -> dict[str, str]:
        path = self.folder / INDEX_NAME
        if not path.is_file():
            if (self.folder / SINGLE_NAME).is_file():
                return {}
            raise CheckpointError(
                f"{self.folder}: holds neither {SINGLE_NAME} nor {INDEX_NAME}; give a folder with "
                "safetensors weights (save .bin weights again with safe_serialization=True)"
            )
        index = read_json(path).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise CheckpointError(f"{path}: 'weight_map' is missing or empty; copy the file again")
        return {str(name): str(shard) for name, shard in index.items()}

    def _read_header(self, shard: str) -> None:
        file = self._shard(shard)
        for name in file.keys():  # noqa: SIM118 (not a dict)
            view = file.get_slice(name)
            dtype = view.get_dtype()
            if dtype not in DTYPES:
                raise CheckpointError(
                    f"{self.folder / shard}: '{name}' is of type {dtype}, must be one of "
                    f"{', '.join(DTYPES)}; convert weights that are not quantized"
                )
            self.specs[name] = TensorSpec(name, tuple(view.get_shape()), DTYPES[dtype])
            self.shard_of[name] = shard

    def _check_index(self, index: dict[str, str]) -> None:
        wrong = sorted(name for name in index if self.shard_of.get(name) != index[name])
        extra = sorted(name for name in self.shard_of if name not in index)
        if wrong or extra:
            raise CheckpointError(
                f"{self.folder / INDEX_NAME}: does not fit the shards: {_some(wrong)} not where it "
                f"says, {_some(extra)} in a shard but not in it; copy the folder again"
            )

    def _check_same_as_single(self) -> None:
        single = self._open_shard(SINGLE_NAME)
        names = set(single.keys())
        different = sorted(names ^ self.specs.keys())
        for name in sorted(names & self.specs.keys()):
            one, other = single.get_tensor(name), self.load(name)
            is_same_kind = (one.dtype, one.shape) == (other.dtype, other.shape)
            # bytes: a NaN equals itself
            if not (is_same_kind and torch.equal(_bytes(one), _bytes(other))):
                different.append(name)
        if different:
            raise CheckpointError(
                f"{self.folder}: holds {SINGLE_NAME} and {INDEX_NAME} with its shards, which "
                f"differ in {_some(different)}, and transformers reads the former; delete the one "
                "that is stale"
            )

    def _open_shard(self, shard: str) -> Any:
        path = self.folder / shard
        if not path.is_file():
            raise CheckpointError(f"{path}: this shard is missing; copy the folder again, whole")
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(
                f"{path}: is damaged or not whole ({error}); copy the file again"
            ) from error

    def load(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in its stored type."""
        return self._shard(self.shard_of[name]).get_tensor(name)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


def _some(names: Sequence[str], most: int = 3) -> str:
    """`3 tensors (a, b, c)`, cut after a few names."""
    shown = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
    return f"{len(names)} tensors" + (f" ({shown})" if names else "")


def check_names_and_shapes(
    found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], where: str, remedy: str
) -> None:
    """Compare tensors with what the architecture asks for.

    Raises:
        CheckpointError: naming missing, unexpected and ill-shaped tensors.
    """
    missing = [name for name in expected if name not in found]
    unexpected = sorted(name for name in found if name not in expected)
    ill_shaped = [
        f"{name} is {list(found[name])}, must be {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    groups = {"missing": missing, "unexpected": unexpected, "wrong shape of": ill_shaped}
    problems = [f"{kind} {_some(names)}" for kind, names in groups.items() if names]
    if problems:
        raise CheckpointError(f"{where}: {'; '.join(problems)}; {remedy}")


def plan_shards(groups: Sequence[Sequence[TensorSpec]], max_bytes: int) -> list[list[int]]:
    """Numbers of the groups in each shard, filled in order; a group is never split.

    A shard is larger than `max_bytes` only if one group alone is. Within a shard, wide types come
    first, so that every tensor is aligned to its element size.
    """
    shards: list[list[int]] = []
    room = 0
    for number, group in enumerate(groups):
        num_bytes = sum(spec.num_bytes for spec in group)
        if not shards or num_bytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(number)
        room -= num_bytes
    widths = [max(spec.dtype.itemsize for spec in group) for group in groups]
    return [sorted(shard, key=lambda n: -widths[n]) for shard in shards]


def write_shards(
    folder: Path,
    groups: Sequence[Sequence[TensorSpec]],
    load_group: Callable[[int], Iterable[torch.Tensor]],
    max_bytes: int,
    report: Callable[[str], None],
) -> None:
    """Write all groups as `model.safetensors`, or as shards with their index if it takes several.

    `load_group(n)` gives the tensors of group n and is called once for each, when it is due, so
    peak memory is that of one group. `max_bytes` bounds a shard. `report` gets a line per shard.

    Raises:
        CheckpointError: if a tensor is not as its spec says.
    """
    shards = plan_shards(groups, max_bytes)
    weight_map: dict[str, str] = {}
    for count, shard in enumerate(shards, start=1):
        name = f"model-{count:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            name = SINGLE_NAME
        specs = [spec for number in shard for spec in groups[number]]
        weight_map.update({spec.name: name for spec in specs})
        tensors = (tensor for number in shard for tensor in load_group(number))
        num_bytes = _write_shard(folder / name, specs, tensors)
        size = f"{len(specs)} tensors, {num_bytes / 1e9:.3f} GB"
        report(f"shard {count} of {len(shards)}: {name}, {size}")
    if len(shards) > 1:
        total = sum(spec.num_bytes for group in groups for spec in group)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(path: Path, specs: Sequence[TensorSpec], tensors: Iterable[torch.Tensor]) -> int:
    """Write one file and return its size in bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        start, end = end, end + spec.num_bytes
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for spec, tensor in zip(specs, tensors, strict=True):
            data = spec.checked(tensor).contiguous().view(torch.uint8).numpy()
            file.write(memoryview(data))  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(encoded) + end
