"""The documents of a unit of input: JSON lines, rows of Parquet files, whole text files."""

import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lclm.files import import_optional
from lclm.prepare.readers import PARQUET, Problem, Unit

try:
    import orjson
except ImportError:  # an optional package; json gives the same documents, only slower
    orjson = None  # type: ignore[assignment]

PARQUET_ROWS = 256  # read at once
T = TypeVar("T")


def read_unit(unit: Unit, keys: Sequence[str]) -> Iterator[tuple[str, ...] | Problem | None]:
    """The documents of a unit, or what is wrong with a line or file.

    Yields one item per line of a JSON-lines file (None for a blank line) and one per document of
    other files (a tuple of one text), with a Problem before it for every file left out.
    """
    if unit.path is not None:
        if unit.path.name.lower().endswith(PARQUET):
            for number, row in enumerate(_read_rows(unit, unit.path, keys), start=1):
                yield _texts_of_row(unit.path, number, row)
        else:
            escaped = _escapes_in(keys)
            yield from _read_lines(unit, lambda line: _texts_of(line, keys, escaped))
    for files in unit.documents:
        yield from _read_document(files, unit.is_folder)


def read_records(unit: Unit) -> Iterator[dict[str, Any] | Problem | None]:
    """The objects of a unit of JSON lines, or the rows of one of Parquet, as `read_unit`."""
    assert unit.path is not None, "a unit of lines or rows"
    if unit.path.name.lower().endswith(PARQUET):
        yield from _read_rows(unit, unit.path)
    else:
        yield from _read_lines(unit, _unambiguous_record)


def _read_lines(unit: Unit, parse: Callable[[bytes], T]) -> Iterator[T | Problem | None]:
    """What parse makes of each line; a ValueError of it becomes a Problem."""
    assert unit.path is not None, "a unit of lines"
    data = unit.lines
    if data is None:
        with open(unit.path, "rb") as file:
            file.seek(unit.start)
            data = file.read(unit.end - unit.start)
    # one line at a time: a list of all would be fresh memory, slow
    for number, line in enumerate(io.BytesIO(data), start=1):
        if not line.strip():
            yield None
            continue
        try:
            yield parse(line.removesuffix(b"\n"))
        except ValueError as error:
            yield Problem(unit.path, number, str(error))


def _texts_of(line: bytes, keys: Sequence[str], escaped: re.Pattern[bytes]) -> tuple[str, ...]:
    texts = None if orjson is None else _texts_fast(line, keys, escaped)
    return _texts_slowly(line, keys) if texts is None else texts


def _escapes_in(keys: Sequence[str]) -> re.Pattern[bytes]:
    """What a line contains if it writes a letter of a key as an escape, as \\u0074 for t."""
    codes = "".join(keys).encode("utf-16-be").hex(" ", 2).split() or ["0000"]
    return re.compile(rb"\\u(?:%s)" % "|".join(codes).encode(), re.IGNORECASE)


def _texts_fast(
    line: bytes, keys: Sequence[str], escaped: re.Pattern[bytes]
) -> tuple[str, ...] | None:
    """Texts of a line that orjson reads as json does; None where json must look at the line."""
    if any(line.count(b'"%s"' % key.encode()) != 1 or not key.isascii() for key in keys):
        return None  # a key may be there twice, of which orjson keeps the last
    if b"\\u00" in line and escaped.search(line):
        return None  # so may one whose letters are escapes
    try:
        record = orjson.loads(line)
        texts = tuple(record[key] for key in keys)
    except (ValueError, KeyError, TypeError, IndexError):
        return None  # json has the words for what is wrong
    return texts if all(type(text) is str for text in texts) else None


def _record_of_line(line: bytes) -> "_Pairs":
    try:
        record = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_Pairs)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        array = "; a file of one JSON array must become one object per line (jq -c '.[]')"
        raise ValueError(f"is not JSON ({error}{array if line[:1] == b'[' else ''})") from error
    if not isinstance(record, _Pairs):
        raise ValueError(f"is a JSON {type(record).__name__}, not an object")
    return record


def _unambiguous_record(line: bytes) -> dict[str, Any]:
    """The object of a line in which no key, at any depth, stands twice."""
    record = _record_of_line(line)
    values: list[Any] = [record]
    for value in values:  # grows while it is walked
        if isinstance(value, _Pairs):
            if value.repeated:
                raise ValueError(f"has the key {min(value.repeated)!r} twice")
            values.extend(value.values())
        elif isinstance(value, list):
            values.extend(value)
    return record


def _texts_slowly(line: bytes, keys: Sequence[str]) -> tuple[str, ...]:
    record = _record_of_line(line)
    texts = []
    for key in keys:
        if key not in record:
            raise ValueError(f"has no key {key!r} (its keys: {', '.join(record) or 'none'})")
        if key in record.repeated:
            raise ValueError(f"has the key {key!r} twice")
        text = record[key]
        if isinstance(text, _Pairs):
            text = dict(text)
        if not isinstance(text, str):
            raise ValueError(f"has {type(text).__name__} under key {key!r}, not a string")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"has half a surrogate pair under key {key!r}") from error
        texts.append(text)
    return tuple(texts)


class _Pairs(dict[str, Any]):
    """A JSON object that remembers which keys it has more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs] if len(pairs) != len(self) else []
        self.repeated = {name for name in names if names.count(name) > 1}


def _read_rows(
    unit: Unit, path: Path, keys: Sequence[str] | None = None
) -> Iterator[dict[str, Any] | Problem]:
    """The rows of a unit of Parquet with the columns `keys`, or with all."""
    parquet = import_optional("pyarrow.parquet", "pyarrow", path)
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = list(names if keys is None else keys)
            bad = [key for key in columns if names.count(key) != 1]
            if bad:
                how = f"the column {bad[0]!r} twice" if bad[0] in names else f"no column {bad[0]!r}"
                yield Problem(path, 0, f"has {how} (its columns: {', '.join(names)})")
                return
            groups = list(range(unit.start, unit.end))
            for batch in file.iter_batches(PARQUET_ROWS, row_groups=groups, columns=columns):
                for row in zip(*(batch.column(key).to_pylist() for key in columns)):
                    number += 1
                    yield dict(zip(columns, row))
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise ValueError(
            f"input {path}, behind row {number} of row group {unit.start}: cannot be read "
            f"({error}); the file is damaged: fetch it again"
        ) from error


def _texts_of_row(
    path: Path, number: int, row: dict[str, Any] | Problem
) -> tuple[str, ...] | Problem:
    if isinstance(row, Problem):
        return row
    for key, text in row.items():
        if not isinstance(text, str):
            kind = type(text).__name__
            return Problem(path, number, f"has {kind} in column {key!r}, not a string")
    return tuple(row.values())


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
