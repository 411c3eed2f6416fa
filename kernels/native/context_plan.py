"""Deal the chunks of a row of documents out to context-parallel ranks: C++ or NumPy, same plan."""

import numpy as np

from lclm_kernels.native import context_plan_reference as reference
from lclm_kernels.native.ops import choose_library


def assign_chunks(
    doc_lengths: np.ndarray, num_ranks: int, chunk: int, implementation: str = "auto"
) -> np.ndarray:
    """Rank that holds each chunk of a row; every rank gets equally many chunks.

    Balances attention area (visible query-key pairs) over the ranks and keeps small what the worst
    rank must receive: keys its queries see that it does not hold. Deterministic; both
    implementations give the same result.

    Args:
        doc_lengths: int64 [documents], tokens, all positive; num_ranks * chunk must divide their
            sum. The caller has checked it.
        num_ranks: at least 1.
        chunk: tokens per chunk, at least 1.
        implementation: "native" (C++), "reference" (NumPy), or "auto": native where it is built.

    Returns:
        int32 [row length / chunk].

    Raises:
        ValueError: an unknown implementation, or a native library that is missing or too old.
    """
    library = choose_library(implementation)
    if library is None:
        return reference.assign_chunks(doc_lengths, num_ranks, chunk)
    lengths = np.ascontiguousarray(doc_lengths, dtype=np.int64)
    numbers, deals = np.array(reference.NUMBERS, np.int64), np.array(reference.DEALS, np.int64)
    owner = np.empty(int(lengths.sum()) // chunk, dtype=np.int32)
    inputs = (lengths.ctypes.data, len(lengths), num_ranks, chunk, numbers.ctypes.data)
    library.lclm_assign_chunks(*inputs, deals.ctypes.data, len(deals), owner.ctypes.data)
    return owner
