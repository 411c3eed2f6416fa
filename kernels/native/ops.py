"""Public functions of the native library: dispatch to C++ or to the NumPy twin, same results.

The library is looked for beside this file, where an install puts it, then in the build folders of a
checkout. Where it is missing, `implementation="auto"` uses the twin and logs it once.
"""

import ctypes
import functools
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np

LIBRARY_NAME = "liblclm_native.so"
ABI = 5  # lclm_native_abi() of pack.cpp
logger = logging.getLogger(__name__)


class ConcatRows(NamedTuple):
    """Rows cut out of a stream; row r is the pieces row_start[r] .. row_start[r + 1]."""

    row_start: np.ndarray  # int64 [rows + 1]
    place: np.ndarray  # int32 [pieces], index into the stream
    offset: np.ndarray  # int32 [pieces], tokens into the document
    length: np.ndarray  # int32 [pieces]
    next_place: int  # document of the first unused token
    next_offset: int


def load_native() -> ctypes.CDLL | None:
    """The native library, or None (logged once) where it is not built."""
    package = Path(__file__).resolve().parent
    build = package.parents[1] / "build"
    return _open_first((package, build / "native", build))


@functools.cache
def _open_first(folders: tuple[Path, ...]) -> ctypes.CDLL | None:
    """Open the library of the first folder that has one; ValueError if it cannot be used."""
    for folder in folders:
        path = folder / LIBRARY_NAME
        if path.is_file():
            return _open(path)
    logger.warning("native: %s is not built; its slower NumPy twin is used", LIBRARY_NAME)
    return None


def _open(path: Path) -> ctypes.CDLL:
    remedy = "rebuild it (pip install -e .) or delete it to use the NumPy twin"
    try:
        library = ctypes.CDLL(str(path))
        library.lclm_native_abi.restype = ctypes.c_int32
        abi = library.lclm_native_abi()
    except (OSError, AttributeError) as error:
        raise ValueError(f"native: {path} cannot be used: {error}; {remedy}") from error
    if abi != ABI:
        raise ValueError(f"native: {path} has ABI {abi}, this package needs {ABI}; {remedy}")
    i32, i64 = ctypes.c_int32, ctypes.c_int64
    array = ctypes.c_void_p
    library.lclm_pack_concat.argtypes = [array, i64, i64, i64, i64, *[array] * 5]
    library.lclm_pack_concat.restype = i64
    library.lclm_pack_best_fit.argtypes = [array, i64, i64, i64, i32, array, array]
    library.lclm_pack_best_fit.restype = i32
    library.lclm_sort_best_fit.argtypes = [array, i64, i64, i64, i32, array, i64, *[array] * 4]
    library.lclm_sort_best_fit.restype = None
    library.lclm_seeded_order.argtypes = [ctypes.c_uint64, i64, array]
    library.lclm_seeded_order.restype = None
    library.lclm_assign_chunks.argtypes = [array, i64, i64, i64, array, array, i64, array]
    library.lclm_assign_chunks.restype = None
    return library


def choose_library(implementation: str) -> ctypes.CDLL | None:
    """The library when it is to be used, None for the twin."""
    if implementation not in ("auto", "native", "reference"):
        raise ValueError(
            f"native: implementation={implementation!r} does not exist; "
            "use auto, native or reference"
        )
    library = None if implementation == "reference" else load_native()
    if library is None and implementation == "native":
        raise ValueError(
            f"native: implementation='native' was requested, but {LIBRARY_NAME} is not built; "
            "build it (pip install -e .) or use auto"
        )
    return library


def check_lengths(lengths: np.ndarray) -> np.ndarray:
    """Contiguous, aligned int32 lengths; ValueError for another type or shape."""
    if lengths.ndim != 1 or lengths.dtype != np.int32:
        raise ValueError(
            f"native: lengths must be int32 and one-dimensional, got {lengths.dtype} of shape "
            f"{lengths.shape}; convert them"
        )
    return np.require(lengths, requirements=["C", "A"])


def pack_concat(
    lengths: np.ndarray,
    start_offset: int,
    row_length: int,
    num_rows: int,
    implementation: str = "auto",
) -> ConcatRows | None:
    """Cut a stream of documents into rows; a document cut by a row's end continues in the next.

    Args:
        lengths: int32 [documents], tokens of each document in stream order (0 is allowed).
        start_offset: tokens of the first document that are already used.
        row_length: tokens of a row.
        num_rows: rows wanted.
        implementation: auto, native or reference.

    Returns:
        The rows, or None when the documents do not fill them.

    Raises:
        ValueError: lengths of another type, a negative number, an implementation that is not there.
    """
    lengths = check_lengths(lengths)
    if start_offset < 0 or row_length < 1 or num_rows < 0:
        raise ValueError(
            f"native: start_offset({start_offset}) >= 0, row_length({row_length}) >= 1 and "
            f"num_rows({num_rows}) >= 0 must hold"
        )
    if start_offset > (lengths[0] if len(lengths) else 0):
        raise ValueError(
            f"native: start_offset({start_offset}) lies beyond the first document of "
            f"{lengths[:1].tolist()} tokens; start at the next document"
        )
    library = choose_library(implementation)
    if library is None:
        return _pack_concat_twin(lengths, start_offset, row_length, num_rows)
    request = (lengths.ctypes.data, len(lengths), start_offset, row_length, num_rows)
    num_pieces = library.lclm_pack_concat(*request, None, None, None, None, None)
    if num_pieces < 0:
        return None
    row_start = np.empty(num_rows + 1, np.int64)
    place, offset, length = (np.empty(num_pieces, np.int32) for _ in range(3))
    upcoming = np.empty(2, np.int64)
    outputs = (row_start, place, offset, length, upcoming)
    library.lclm_pack_concat(*request, *(item.ctypes.data for item in outputs))
    return ConcatRows(row_start, place, offset, length, int(upcoming[0]), int(upcoming[1]))


def _pack_concat_twin(
    lengths: np.ndarray, start_offset: int, row_length: int, num_rows: int
) -> ConcatRows | None:
    total = num_rows * row_length
    document_start = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, dtype=np.int64, out=document_start[1:])
    document_start -= start_offset
    if total and document_start[-1] < total:
        return None
    first, last = np.searchsorted(document_start, (0, total), side="left")
    rows = np.arange(num_rows + 1, dtype=np.int64) * row_length
    borders = np.unique(np.concatenate([rows, document_start[first:last]]))
    starts = borders[:-1]
    # side="right": of several documents that start here, all but the last are empty
    place = np.searchsorted(document_start, starts, side="right").astype(np.int64) - 1
    offset = starts - document_start[place]
    row_start = np.searchsorted(starts, rows, side="left").astype(np.int64)
    next_place = min(int(np.searchsorted(document_start, total, side="right")) - 1, len(lengths))
    next_offset = total - int(document_start[next_place]) if next_place < len(lengths) else 0
    pieces = (place.astype(np.int32), offset.astype(np.int32), np.diff(borders).astype(np.int32))
    return ConcatRows(row_start, *pieces, next_place, next_offset)
