"""Documents of JSON-lines files, text files and folders, cut into units of work.

A unit is some millions of bytes of input. Cutting depends on the input alone, so that whoever reads
the units in order sees the same documents whatever the number of workers.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["Problem", "Source", "Unit", "find_sources", "iterate_units", "read_unit"]

GroupBy = Literal["file", "repo"]

BLOCK_BYTES = 4 << 20  # input of one unit; one document may be longer
JSON_LINES = (".jsonl", ".ndjson")
UNREAD = (".zst", ".parquet", ".gz", ".zip", ".xz", ".bz2")


@dataclass(frozen=True)
class Source:
    """One --input argument and the files it stands for, in the order they are read."""

    path: Path
    line_files: tuple[Path, ...]  # JSON lines, .gz or not; read before the documents
    documents: tuple[tuple[Path, ...], ...]  # files joined into each document
    num_bytes: int  # on disk
    is_folder: bool


@dataclass(frozen=True)
class Unit:
    """A piece of a source for one worker."""

    source: int  # number of the source
    num_bytes: int  # of input on disk that is done after this unit
    path: Path | None = None  # lines: of this file ...
    start: int = 0  # ... these bytes
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


def find_sources(inputs: Sequence[Path], group_by: GroupBy | None = None) -> list[Source]:
    """Find the files behind the inputs.

    A file ending in .jsonl, .ndjson or .json, also with .gz, holds one JSON object per line; any
    other file is one document. A folder stands for the files below it in path order, names that
    start with a dot left out: without group_by its .jsonl and .ndjson files hold JSON lines and
    any other file is one document; with "file" every file is one document; with "repo" the files
    of each subfolder are joined into one document, and files beside the subfolders into another.

    Raises:
        ValueError: an input does not exist, holds no file, is empty, or is of a kind not read.
    """
    sources = []
    for path in inputs:
        if path.is_dir():
            sources.append(_folder(path, group_by))
        elif not path.is_file():
            raise ValueError(f"input {path}: no such file or folder; check the path")
        else:
            name = path.name.lower().removesuffix(".gz")
            is_lines = name.endswith((*JSON_LINES, ".json"))
            if not is_lines:
                _refuse_unread(path)
            lines, documents = ((path,), ()) if is_lines else ((), ((path,),))
            sources.append(Source(path, lines, documents, path.stat().st_size, False))
    for source in sources:
        if source.num_bytes == 0:
            raise ValueError(
                f"input {source.path}: is empty or holds no file to read; leave it out or check "
                "the path"
            )
    return sources


def _refuse_unread(path: Path) -> None:
    if path.name.lower().endswith(UNREAD):
        raise ValueError(
            f"input {path}: files ending in {path.suffix} are not read (only .jsonl.gz is "
            "decompressed here); convert it to .jsonl, .jsonl.gz or text first"
        )


def _folder(root: Path, group_by: GroupBy | None) -> Source:
    found = []
    for path in root.rglob("*"):
        parts = path.relative_to(root).parts
        if not any(part.startswith(".") for part in parts) and path.is_file():
            found.append(path)
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
            name = path.name.lower().removesuffix(".gz")
            if group_by is None and name.endswith(JSON_LINES):
                lines.append(path)
            else:
                documents.append((path,))
    num_bytes = sum(path.stat().st_size for path in found)
    return Source(root, tuple(lines), tuple(documents), num_bytes, True)


def iterate_units(sources: Sequence[Source], block_bytes: int = BLOCK_BYTES) -> Iterator[Unit]:
    """Cut the sources into units, in input order.

    Raises:
        ValueError: a .gz file is damaged.
    """
    for number, source in enumerate(sources):
        for path in source.line_files:
            if path.suffix == ".gz":
                yield from _cut_compressed(number, path, block_bytes)
            else:
                yield from _cut_lines(number, path, block_bytes)
        batch: list[tuple[Path, ...]] = []
        size = 0
        for document in source.documents:
            batch.append(document)
            size += sum(path.stat().st_size for path in document)
            if size >= block_bytes:
                yield Unit(number, size, documents=tuple(batch), is_folder=source.is_folder)
                batch, size = [], 0
        if batch:
            yield Unit(number, size, documents=tuple(batch), is_folder=source.is_folder)


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


def _cut_compressed(number: int, path: Path, block_bytes: int) -> Iterator[Unit]:
    done = 0
    with open(path, "rb") as raw, gzip.open(raw) as file:
        while True:
            try:
                block = file.read(block_bytes) + file.readline()
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(
                    f"input {path}: cannot be decompressed ({error}); the file is damaged or not "
                    "gzip: fetch it again"
                ) from error
            if not block:
                return
            here = raw.tell()
            yield Unit(number, here - done, path=path, lines=block)
            done = here


def read_unit(unit: Unit, keys: Sequence[str]) -> Iterator[tuple[str, ...] | Problem | None]:
    """The documents of a unit, or what is wrong with a line or file.

    Yields one item per line of a JSON-lines file (None for a blank line) and one per document of
    other files (a tuple of one text), with a Problem before it for every file left out.
    """
    if unit.path is not None:
        yield from _read_lines(unit, unit.path, keys)
    for files in unit.documents:
        yield from _read_document(files, unit.is_folder)


def _read_lines(
    unit: Unit, path: Path, keys: Sequence[str]
) -> Iterator[tuple[str, ...] | Problem | None]:
    lines = unit.lines
    if lines is None:
        with open(path, "rb") as file:
            file.seek(unit.start)
            lines = file.read(unit.end - unit.start)
    for number, line in enumerate(lines.removesuffix(b"\n").split(b"\n"), start=1):
        if not line.strip():
            yield None
            continue
        try:
            yield _texts_of_line(line, keys)
        except ValueError as error:
            yield Problem(path, number, str(error))


def _texts_of_line(line: bytes, keys: Sequence[str]) -> tuple[str, ...]:
    """Texts of one JSON line; ValueError says what is wrong with it."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"is a JSON {type(record).__name__}, not an object")
    texts = []
    for key in keys:
        if key not in record:
            raise ValueError(f"has no key {key!r} (its keys: {', '.join(record) or 'none'})")
        text = record[key]
        if not isinstance(text, str):
            raise ValueError(f"has {type(text).__name__} under key {key!r}, not a string")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"has half a surrogate pair under key {key!r}") from error
        texts.append(text)
    return tuple(texts)


def _read_document(files: tuple[Path, ...], is_folder: bool) -> Iterator[tuple[str] | Problem]:
    parts = []
    for path in files:
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8-sig")
            if is_folder and "\0" in text:
                raise ValueError("holds a zero byte")
        except ValueError as error:
            reason = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
            yield Problem(path, 0, reason, is_binary=is_folder)
        else:
            parts.append(text)
    # a file of a repository ends in a newline before the next one starts
    ended = [part if part.endswith("\n") or not part else part + "\n" for part in parts[:-1]]
    if parts:
        yield ("".join(ended + parts[-1:]),)
