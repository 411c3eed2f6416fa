"""Row packing and mixture assignment in C++ (C ABI, opened by ctypes), with a NumPy twin."""

from lclm_kernels.native.ops import (
    ConcatRows,
    ExactPieces,
    assign_rows,
    load_native,
    pack_concat,
    pack_exact,
)

__all__ = [
    "ConcatRows",
    "ExactPieces",
    "assign_rows",
    "load_native",
    "pack_concat",
    "pack_exact",
]
