"""JSON-lines, Parquet and text files and folders, cut into units of work.

A unit is some millions of bytes of input. Cutting depends on the input alone, so that whoever reads
the units in order sees the same documents whatever the number of workers.
"""

import gzip
import io
import itertools
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from lclm.files import import_optional, zstd_decompressor

GroupBy = Literal["file", "repo"]

BLOCK_BYTES = 4 << 20  # input of one unit; one document may be longer
JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = ".parquet"
COMPRESSED = (".gz", ".zst")
UNREAD = (".zst", ".gz", ".zip", ".xz", ".bz2")
NUM_LISTED = 5  # files named in a line of the log
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One --input argument and the files it stands for, in the order they are read."""

    path: Path
    line_files: tuple[Path, ...]  # JSON lines (.gz, .zst or not), Parquet; read first
    documents: tuple[tuple[Path, ...], ...]  # files joined into each document
    num_bytes: int  # on disk
    is_folder: bool

    def files(self) -> Iterator[Path]:
        """Every file, in the order they are read."""
        return itertools.chain(self.line_files, *self.documents)


@dataclass(frozen=True)
class Unit:
    """A piece of a source for one worker."""

    source: int  # number of the source
    num_bytes: int  # of input on disk that is done after this unit
    path: Path | None = None  # lines: of this file ...
    start: int = 0  # ... these bytes; of a Parquet file these row groups
    end: int = 0
    lines: bytes | None = None  # ... or these, already decompressed
    documents: tuple[tuple[Path, ...], ...] = ()
    is_folder: bool = False  # files that are not text are left out rather than an error


@dataclass(frozen=True)
class Problem:
    """A line or file that gives no document."""

    path: Path
    line: int  # within the unit, from 1; 0: the file as a whole
    reason: str
    is_binary: bool = False  # a file of a folder that is not text: counted, never an error

    def describe(self, lines_before: int) -> str:
        """Where it is and what is wrong, lines_before being those of the file before the unit."""
        if not self.line:
            return f"{self.path}: {self.reason}"
        word = "row" if self.path.name.lower().endswith(PARQUET) else "line"
        return f"{self.path}, {word} {lines_before + self.line}: {self.reason}"


def find_sources(inputs: Sequence[Path], group_by: GroupBy | None = None) -> list[Source]:
    """Find the files behind the inputs.

    A file ending in .jsonl, .ndjson or .json, also with .gz or .zst, holds one JSON object per
    line, a .parquet file one document per row; any other file is one document. A folder stands for
    the files below it in path order, links followed and names that start with a dot left out:
    without group_by they are read by their names as above; with "file" every file is one document;
    with "repo" the files of each subfolder are joined into one document, and files beside the
    subfolders into another. The log says how many files of a folder are read as what, and which
    files come twice.

    Raises:
        ValueError: an input does not exist, holds no file, is empty, or is of a kind not read.
    """
    sources = []
    for path in inputs:
        if not path.exists():
            raise ValueError(f"input {path}: no such file or folder; check the path")
        source = _folder(path, group_by) if path.is_dir() else _file(path)
        if source.num_bytes == 0:
            raise ValueError(
                f"input {path}: is empty or holds no file to read; leave it out or check the path"
            )
        sources.append(source)
    _name_repeated(sources)
    return sources


def _name_repeated(sources: Sequence[Source]) -> None:
    """Say which files are read more than once."""
    seen: dict[tuple[int, int], Path] = {}
    repeated = []
    for path in itertools.chain.from_iterable(source.files() for source in sources):
        status = path.stat()
        first = seen.setdefault((status.st_dev, status.st_ino), path)
        if first is not path:
            repeated.append(f"{path} is {first}" if path != first else str(path))
    if repeated:
        logger.warning(
            "input: %d files are given more than once, and their documents come as often: %s",
            len(repeated),
            _some(repeated),
        )


def _some(names: Sequence[str]) -> str:
    """The first names, for a line of the log."""
    more = f" and {len(names) - NUM_LISTED} more" if len(names) > NUM_LISTED else ""
    return ", ".join(names[:NUM_LISTED]) + more


def _plain_name(path: Path) -> str:
    """The name in lower case without the ending of a compression."""
    name = path.name.lower()
    return name.removesuffix(".gz").removesuffix(".zst")


def _file(path: Path) -> Source:
    size = path.stat().st_size
    if _plain_name(path).endswith((*JSON_LINES, PARQUET)):
        return Source(path, (path,), (), size, False)
    if path.name.lower().endswith(UNREAD):
        raise ValueError(
            f"input {path}: files ending in {path.suffix} are not read (only .jsonl.gz and "
            ".jsonl.zst are decompressed here); convert it to .jsonl, .jsonl.gz or text first"
        )
    return Source(path, (), ((path,),), size, False)


def _folder(root: Path, group_by: GroupBy | None) -> Source:
    left_out: list[str] = []
    found = list(_files_below(root, root, frozenset(), left_out))
    found.sort(key=lambda path: path.relative_to(root).as_posix())
    lines: list[Path] = []
    documents: list[tuple[Path, ...]] = []
    if group_by == "repo":
        groups: dict[str, list[Path]] = {}
        for path in found:
            parts = path.relative_to(root).parts
            groups.setdefault(parts[0] if len(parts) > 1 else "", []).append(path)
        documents = [tuple(groups[name]) for name in sorted(groups)]
    else:
        for path in found:
            if group_by is None and _plain_name(path).endswith((*JSON_LINES, PARQUET)):
                lines.append(path)
            else:
                documents.append((path,))
    num_bytes = sum(path.stat().st_size for path in found)
    _say_what_is_read(root, lines, documents, left_out)
    return Source(root, tuple(lines), tuple(documents), num_bytes, True)


def _files_below(
    root: Path, folder: Path, above: frozenset[tuple[int, int]], left_out: list[str]
) -> Iterator[Path]:
    """The files of a folder and its subfolders, linked ones too; what is no input to `left_out`.

    Args:
        root: of the walk.
        folder: to go through.
        above: device and inode of the folders it lies in, to which links must not lead back.
        left_out: gets what is left out, relative to root, and why.
    """
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        left_out.append(f"{folder.relative_to(root)} (a link to a folder that it lies in)")
        return
    for path in folder.iterdir():
        name = path.relative_to(root)
        if path.name.startswith("."):
            left_out.append(f"{name} (starts with a dot)")
        elif path.is_dir():
            yield from _files_below(root, path, above | {here}, left_out)
        elif path.is_file():
            yield path
        else:
            left_out.append(f"{name} (a link that leads nowhere, or no file)")


def _say_what_is_read(
    root: Path, lines: list[Path], documents: list[tuple[Path, ...]], left_out: list[str]
) -> None:
    num_rows = sum(path.name.lower().endswith(PARQUET) for path in lines)
    num_files = sum(map(len, documents))
    names = [str(path.relative_to(root)) for files in documents for path in files]
    parts = {
        f"{len(lines) - num_rows} files as JSON lines": len(lines) - num_rows,
        f"{num_rows} as rows of Parquet": num_rows,
        f"{num_files} as {len(documents)} documents of text ({_some(names)})": num_files,
    }
    logger.info(
        "input %s: read are %s; left out are %s",
        root,
        ", ".join(text for text, count in parts.items() if count) or "no files",
        f"{len(left_out)}: {_some(sorted(left_out))}" if left_out else "none",
    )


def iterate_units(
    sources: Sequence[Source], block_bytes: int = BLOCK_BYTES, shard: tuple[int, int] = (0, 1)
) -> Iterator[Unit]:
    """Cut the sources into units, in input order.

    Args:
        sources: from `find_sources`.
        block_bytes: input of one unit.
        shard: (number, count): only the units whose first byte lies in that part of all bytes on
            disk. A compressed file belongs to one part as a whole. The parts in order are the
            whole.

    Raises:
        ValueError: a compressed or Parquet file is damaged, or its package is not installed.
    """
    number, count = shard
    total = sum(source.num_bytes for source in sources)

    def is_ours(first_byte: int) -> bool:
        return min(first_byte * count // max(total, 1), count - 1) == number

    at = 0
    for source_number, source in enumerate(sources):
        for path in source.line_files:
            name, size = path.name.lower(), path.stat().st_size
            if name.endswith(COMPRESSED):
                if is_ours(at):
                    yield from _cut_compressed(source_number, path, block_bytes)
            else:
                cut = _cut_parquet if name.endswith(PARQUET) else _cut_lines
                done = at
                for unit in cut(source_number, path, block_bytes):
                    if is_ours(done):
                        yield unit
                    done += unit.num_bytes
            at += size
        for unit in _cut_documents(source_number, source, block_bytes):
            if is_ours(at):
                yield unit
            at += unit.num_bytes


def _cut_documents(number: int, source: Source, block_bytes: int) -> Iterator[Unit]:
    first = size = 0
    for end, document in enumerate(source.documents, start=1):
        size += sum(path.stat().st_size for path in document)
        if size >= block_bytes or end == len(source.documents):
            batch = source.documents[first:end]
            yield Unit(number, size, documents=batch, is_folder=source.is_folder)
            first, size = end, 0


def _cut_lines(number: int, path: Path, block_bytes: int) -> Iterator[Unit]:
    """Byte ranges that end after a newline, found without reading the whole file."""
    size = path.stat().st_size
    start = 0
    with open(path, "rb") as file:
        while start < size:
            file.seek(min(start + block_bytes, size) - 1)
            file.readline()
            end = file.tell()
            yield Unit(number, end - start, path=path, start=start, end=end)
            start = end


def _cut_parquet(number: int, path: Path, block_bytes: int) -> Iterator[Unit]:
    """Row groups, several together while they are small; bytes are those of the file."""
    parquet = import_optional("pyarrow.parquet", "pyarrow", path)
    try:
        metadata = parquet.read_metadata(path)
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise ValueError(
            f"input {path}: cannot be read as Parquet ({error}); the file is damaged or cut short: "
            "fetch it again"
        ) from error
    sizes = [
        sum(group.column(n).total_compressed_size for n in range(group.num_columns))
        for group in map(metadata.row_group, range(metadata.num_row_groups))
    ]
    size_on_disk = path.stat().st_size
    start = size = done = 0
    for group, group_bytes in enumerate(sizes, start=1):
        size += group_bytes
        if group == len(sizes):
            size = size_on_disk - done  # with what the file holds besides
        if size >= block_bytes or group == len(sizes):
            yield Unit(number, size, path=path, start=start, end=group)
            done += size
            start, size = group, 0


def _cut_compressed(number: int, path: Path, block_bytes: int) -> Iterator[Unit]:
    done = 0
    with open(path, "rb") as raw, _decompress(path, raw) as file:
        while True:
            try:
                block = file.read(block_bytes) + file.readline()
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(
                    f"input {path}: cannot be decompressed ({error}); the file is damaged or not "
                    f"{path.suffix[1:]}: fetch it again"
                ) from error
            if not block:
                return
            here = raw.tell()
            yield Unit(number, here - done, path=path, lines=block)
            done = here


def _decompress(path: Path, raw: BinaryIO) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(raw)  # type: ignore[return-value]
    return io.BufferedReader(_ZstdFrames(raw, path), 1 << 20)  # type: ignore[return-value]


class _ZstdFrames(io.RawIOBase):
    """The frames of a .zst file one after another; a last frame that is cut short is an error.

    zstandard's own reader ends quietly there.
    """

    def __init__(self, raw: BinaryIO, path: Path) -> None:
        self._raw = raw
        self._path = path
        self._zstandard = import_optional("zstandard", "zstandard", path)
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; 0 at the end. OSError for damaged input."""
        while not self._ready:
            chunk = self._raw.read(1 << 18)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the last frame is cut short")
                return 0
            if self._frame is None:
                self._frame = zstd_decompressor(self._path)
            try:
                self._ready = self._frame.decompress(chunk)
            except self._zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            if self._frame.eof:  # go on behind this frame
                self._raw.seek(-len(self._frame.unused_data), io.SEEK_CUR)
                self._frame = None
        taken = self._ready[: len(buffer)]
        buffer[: len(taken)] = taken
        self._ready = self._ready[len(taken) :]
        return len(taken)
