"""ProLong's data: MDS shards of mosaicml-streaming, read without that package.

A folder holds `index.json` and shards, plain or each compressed by zstd. A shard is, little endian,
u32 number of samples n, u32[n + 1] offsets of the samples in the file, JSON about the writer, then
the samples: u32 size of every column of no fixed size, then the bytes of all columns in the order
of the index. An `ndarray` column carries its dtype (one byte) unless the index names it, then
dimensions << 2 | width (one byte) and the shape, unless the index names that too.

ProLong's columns: `input_ids`; `indices` u32 [documents, 2], spans [start, end) of the documents in
a packed sequence; `mask` u8, 1 where a token is a target (chat). arXiv 2410.02660, appendix A.
"""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lclm.data.indexed import Document
from lclm.files import import_optional, zstd_decompressor

READ = ("input_ids", "indices", "mask")  # columns
_VALUE_TYPES = {
    8: np.uint8, 9: np.int8, 16: np.uint16, 17: np.int16, 32: np.uint32, 33: np.int32,
    64: np.uint64, 65: np.int64,
}  # fmt: skip
_NUMBERS = {"int": "<i8"} | {f"{sign}int{bits}": f"<{sign or 'i'}{bits // 8}"
                             for sign in ("", "u") for bits in (8, 16, 32, 64)}  # fmt: skip


class MdsReader:
    """The documents of one MDS folder, shard by shard.

    Attributes:
        num_samples: of all shards, as the index says.
        has_weights: whether samples carry a `mask`.
        is_chat: the same: ProLong's shards have masks for conversations and no others.
        weight_values: what 0 and 1 of a mask stand for.
        num_outside: tokens read so far that lie in no span of `indices` and so in no document.
    """

    def __init__(self, folder: Path) -> None:
        """Read the index.

        Raises:
            ValueError: there is no index, or one of another format or without `input_ids`.
        """
        self.folder = folder
        path = folder / "index.json"
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            self._shards = list(index["shards"])
            formats = {(shard["format"], index["version"]) for shard in self._shards}
            columns = {name for shard in self._shards for name in shard["column_names"]}
            self.num_samples = sum(int(shard["samples"]) for shard in self._shards)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: is not the index of an MDS folder ({error}); give the folder that holds "
                "index.json and the shards"
            ) from error
        if formats - {("mds", 2)} or "input_ids" not in columns:
            raise ValueError(
                f"{path}: has format and version {sorted(formats)} and columns {sorted(columns)}; "
                "only mds of version 2 with a column input_ids is read"
            )
        for shard in self._shards:
            for name, encoding in zip(shard["column_names"], shard["column_encodings"]):
                parts = [*str(encoding).split(":"), ""]
                if name in READ and (parts[0] != "ndarray" or parts[1] not in ("", *_NUMBERS)):
                    raise ValueError(
                        f"{path}: column {name} is stored as {encoding}; only ndarray of "
                        f"{', '.join(_NUMBERS)} is read: write the shards with one of these"
                    )
        self.has_weights = self.is_chat = "mask" in columns
        self.weight_values = (0.0, 1.0) if self.has_weights else ()
        self.num_outside = 0

    def documents(self) -> Iterator[Document]:
        """Every document: each span of `indices`, or each sample where there are none.

        Yields:
            tokens, integers [n], and uint8 [n], 1 for a target; None where no shard has a mask.

        Raises:
            ValueError: a shard is missing, cut short or does not fit the index, or its spans or
                mask do not fit its tokens.
        """
        for shard in self._shards:
            data, path = self._open(shard)
            for number in range(int(shard["samples"])):
                where = f"{path}, sample {number}"
                try:
                    sample = _read_sample(data, number, shard)
                except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
                    raise ValueError(
                        f"{where}: cannot be read ({error}); the shard is damaged: fetch it again"
                    ) from error
                if self.has_weights:
                    sample.setdefault("mask", np.ones(len(sample["input_ids"]), np.uint8))
                spans = _spans(sample, where)
                tokens, mask = sample["input_ids"], sample.get("mask")
                self.num_outside += len(tokens) - sum(end - start for start, end in spans)
                for start, end in spans:
                    yield tokens[start:end], None if mask is None else mask[start:end]

    def _open(self, shard: dict[str, Any]) -> tuple[np.ndarray, Path]:
        """uint8: the shard, decompressed; mapped where it is plain."""
        path = self.folder / shard["raw_data"]["basename"]
        size = int(shard["raw_data"]["bytes"])
        if path.is_file():
            data = np.memmap(path, np.uint8, "r").view(np.ndarray)
        else:
            packed = shard.get("zip_data") or {"basename": path.name}
            path = self.folder / packed["basename"]
            if not path.is_file():
                raise ValueError(f"{path}: no such file, but index.json lists it; fetch it again")
            if not str(shard.get("compression", "")).startswith("zstd"):
                raise ValueError(
                    f"{path}: is compressed by {shard.get('compression')}; only zstd and plain "
                    "shards are read: decompress it first"
                )
            zstandard = import_optional("zstandard", "zstandard", path)
            try:
                raw = zstd_decompressor(path).decompress(path.read_bytes())
                data = np.frombuffer(raw, np.uint8)
            except zstandard.ZstdError as error:
                raise ValueError(
                    f"{path}: cannot be decompressed ({error}); fetch it again"
                ) from error
        if len(data) != size:
            raise ValueError(
                f"{path}: holds {len(data)} bytes, index.json says {size}; the shard is cut short "
                "or of another version: fetch it again"
            )
        return data, path


def _read_sample(data: np.ndarray, number: int, shard: dict[str, Any]) -> dict[str, Any]:
    if int(data[:4].view("<u4")[0]) != int(shard["samples"]):
        raise ValueError("the number of samples differs from the index")
    start, end = data[4 + 4 * number :][:8].copy().view("<u4").tolist()
    if not start < end <= len(data):
        raise ValueError(f"its bytes [{start}, {end}) are not in the shard")
    body = data[start:end]
    sizes = list(shard["column_sizes"])
    missing = sum(size is None for size in sizes)
    stored = iter(body[: 4 * missing].copy().view("<u4").tolist())
    at = 4 * missing
    sample: dict[str, Any] = {}
    for name, encoding, size in zip(shard["column_names"], shard["column_encodings"], sizes):
        size = next(stored) if size is None else size
        if at + size > len(body):
            raise ValueError(f"column {name} ends behind the sample")
        if name in READ:
            sample[name] = _decode_array(body[at : at + size].tobytes(), encoding)
        at += size
    return sample


def _decode_array(raw: bytes, encoding: str) -> np.ndarray:
    _, *given = encoding.split(":")
    at = 0
    if given:
        dtype = np.dtype(_NUMBERS[given[0]])
    else:
        dtype, at = np.dtype(_VALUE_TYPES[raw[0]]), 1
    if len(given) > 1:
        shape = tuple(int(size) for size in given[1].split(","))
    else:
        dimensions, width = raw[at] >> 2, 1 << (raw[at] & 3)
        at += 1
        shape = tuple(np.frombuffer(raw, f"<u{width}", dimensions, at).tolist())
        at += dimensions * width
    if len(raw) - at != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(raw) - at} bytes do not hold {dtype} of shape {shape}")
    return np.frombuffer(raw, dtype, offset=at).reshape(shape)


def _spans(sample: dict[str, Any], where: str) -> list[tuple[int, int]]:
    """Where the documents of a sample start and end; checks all that was read of it."""
    tokens, mask = sample["input_ids"], sample.get("mask")
    spans = sample.get("indices")
    if tokens.ndim != 1 or (mask is not None and mask.shape != tokens.shape):
        raise ValueError(
            f"{where}: input_ids of shape {tokens.shape} and mask of shape "
            f"{None if mask is None else mask.shape} must be one-dimensional and equal"
        )
    if mask is not None and len(mask) and mask.max() > 1:
        raise ValueError(f"{where}: mask holds {mask.max()}, not only 0 and 1")
    if spans is None:
        spans = np.array([[0, len(tokens)]])
    if spans.ndim != 2 or spans.shape[1] != 2 or (spans[:, 0] > spans[:, 1]).any():
        raise ValueError(f"{where}: indices {spans.tolist()[:4]} must be pairs of start <= end")
    if len(spans) and int(spans.max()) > len(tokens):
        raise ValueError(
            f"{where}: indices reach to {spans.max()}, the sample has {len(tokens)} tokens"
        )
    pairs = [(start, end) for start, end in spans.tolist()]
    for (_, end), (start, _) in itertools.pairwise(sorted(pairs)):
        if start < end:
            raise ValueError(
                f"{where}: indices overlap at token {start}, which would be in two documents; the "
                "shard is damaged: fetch it again"
            )
    return pairs
