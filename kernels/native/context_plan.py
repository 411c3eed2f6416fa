"""Deal the chunks of a row of documents out to context-parallel ranks: C++ or NumPy, same plan."""

import ctypes

import numpy as np

from lclm_kernels.native import context_plan_reference
from lclm_kernels.native.ops import load_native

IMPLEMENTATIONS = ("auto", "native", "reference")


def assign_chunks(
    doc_lengths: np.ndarray, num_ranks: int, chunk: int, implementation: str = "auto"
) -> np.ndarray:
    """Rank that holds each chunk of a row; every rank gets equally many chunks.

    Balances attention area (visible query-key pairs) over the ranks and keeps small what the worst
    rank must receive: keys its queries see that it does not hold. Deterministic; both
    implementations give the same result.

    Args:
        doc_lengths: int64 [documents], tokens, all positive.
        num_ranks: at least 1.
        chunk: tokens per chunk.
        implementation: "native" (C++), "reference" (NumPy), or "auto": native where it is built.

    Returns:
        int32 [row length / chunk].

    Raises:
        ValueError: lengths that are not positive or that num_ranks * chunk does not divide, an
            unknown implementation, or a native library that is missing or too old.
    """
    lengths = np.ascontiguousarray(doc_lengths, dtype=np.int64)
    if lengths.ndim != 1 or not lengths.size or (lengths <= 0).any():
        raise ValueError("assign_chunks: doc_lengths must be a list of positive numbers of tokens")
    if num_ranks < 1 or chunk < 1:
        raise ValueError(
            f"assign_chunks: num_ranks={num_ranks} and chunk={chunk} must be at least 1"
        )
    row_length = int(lengths.sum())
    if row_length % (num_ranks * chunk):
        raise ValueError(
            f"assign_chunks: row of {row_length} tokens is not a multiple of num_ranks * chunk = "
            f"{num_ranks} * {chunk} = {num_ranks * chunk}; choose another chunk"
        )
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"assign_chunks: implementation={implementation!r} does not exist; use one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    library = None if implementation == "reference" else load_native()
    if library is None and implementation == "native":
        raise ValueError(
            "assign_chunks: implementation='native' asked for, but the native library is not "
            "built; pip install -e . builds it"
        )
    if library is None:
        return context_plan_reference.assign_chunks(lengths, num_ranks, chunk)
    return _native(library, lengths, num_ranks, chunk)


def _native(library: ctypes.CDLL, lengths: np.ndarray, num_ranks: int, chunk: int) -> np.ndarray:
    numbers = np.array(context_plan_reference.NUMBERS, np.int64)
    deals = np.array(context_plan_reference.DEALS, np.int64)
    owner = np.empty(int(lengths.sum()) // chunk, dtype=np.int32)
    inputs = (lengths.ctypes.data, len(lengths), num_ranks, chunk, numbers.ctypes.data)
    library.lclm_assign_chunks(*inputs, deals.ctypes.data, len(deals), owner.ctypes.data)
    return owner
