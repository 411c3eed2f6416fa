"""Strings of one key out of JSON lines; see json_lines.cpp."""

import ctypes
from collections.abc import Iterator

import numpy as np

from lclm_kernels.native.ops import load_native

__all__ = ["json_texts"]

MAX_LINES = 1024  # of one call
MAX_TEXT = 1 << 17  # bytes of text of one call, unless a line has more; stays in the cache
BLOCK = 64  # bytes written at once, beyond the text too
BLANK, LEFT = 1, 2  # of json_lines.cpp


def json_texts(
    data: bytes, key: str, as_utf8: bool = False
) -> Iterator[str | bytes | slice | None]:
    """The string under a key of each line's object.

    Args:
        data: lines, each one JSON object.
        key: of the object itself, not of objects in it.
        as_utf8: give bytes.

    Yields:
        One item per line: the string; None for a line of white space; the line's place in data
        where it is not plainly right (wrong JSON, no such key, no string, half a surrogate pair),
        is unusual (the key twice, deep nesting, a byte order mark), or the native library is not
        built: look at such a line by other means.
    """
    library = load_native()
    if library is None:
        yield from _lines(data)
        return
    name = key.encode("utf-8")
    source = ctypes.c_char_p(data)  # keeps data alive
    text = np.empty(len(data) + BLOCK, np.uint8)
    line_ends, text_ends = np.empty((2, MAX_LINES), np.int64)
    kinds = np.empty(MAX_LINES, np.int8)
    pointers = [array.ctypes.data for array in (text, line_ends, text_ends, kinds)]
    start = 0
    while start < len(data):
        count = library.lclm_json_texts(
            source, start, len(data), name, len(name), MAX_LINES, MAX_TEXT, *pointers
        )
        view, first = text.data, 0
        columns = (kinds[:count].tolist(), line_ends[:count].tolist(), text_ends[:count].tolist())
        for kind, line_end, text_end in zip(*columns):
            if kind == BLANK:
                yield None
            elif kind == LEFT:
                yield slice(start, line_end)
            else:
                text_of_line = view[first:text_end]
                yield bytes(text_of_line) if as_utf8 else str(text_of_line, "utf-8")
            start, first = line_end + 1, text_end


def _lines(data: bytes) -> Iterator[slice | None]:
    start = 0
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        yield slice(start, end) if data[start:end].strip() else None
        start = end + 1
