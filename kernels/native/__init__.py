"""Packing and planning of rows: C++ (C ABI, opened by ctypes) with NumPy twins, or NumPy alone."""

from lclm_kernels.native.best_fit import BestFitRows, pack_best_fit, seeded_order
from lclm_kernels.native.exact import ExactPieces, pack_exact
from lclm_kernels.native.ops import ConcatRows, load_native, pack_concat

__all__ = [
    "BestFitRows",
    "ConcatRows",
    "ExactPieces",
    "load_native",
    "pack_best_fit",
    "pack_concat",
    "pack_exact",
    "seeded_order",
]
