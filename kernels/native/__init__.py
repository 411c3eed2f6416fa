"""Row packing and plans of rows in C++ (C ABI, opened by ctypes), with twins in NumPy."""

from lclm_kernels.native.best_fit import BestFitRows, pack_best_fit, seeded_order
from lclm_kernels.native.ops import (
    ConcatRows,
    ExactPieces,
    assign_rows,
    load_native,
    pack_concat,
    pack_exact,
)

__all__ = [
    "BestFitRows",
    "ConcatRows",
    "ExactPieces",
    "assign_rows",
    "load_native",
    "pack_best_fit",
    "pack_concat",
    "pack_exact",
    "seeded_order",
]
