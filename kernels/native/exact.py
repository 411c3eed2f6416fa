"""Pieces of fixed lengths cut out of a stream of documents, in NumPy alone."""

from typing import NamedTuple

import numpy as np

from lclm_kernels.native.ops import check_lengths


class ExactPieces(NamedTuple):
    """Pieces of fixed lengths cut out of a stream."""

    pieces: list[tuple[np.ndarray, np.ndarray]]  # per target: place, offset, both int32 [need]
    num_documents: int  # cut up; the next stage starts after them
    num_tail_tokens: int  # dropped because shorter than the shortest target
    num_unused_tokens: int  # in pieces that were cut but not needed


def pack_exact(lengths: np.ndarray, targets: np.ndarray, needs: np.ndarray) -> ExactPieces | None:
    """Cut each document from the front into the longest target it still fills, until needs are met.

    This is ProLong's cutting of long documents (arXiv 2410.02660, appendix A.2).

    Args:
        lengths: int32 [documents], tokens of each document in stream order.
        targets: int64 [targets], piece lengths, falling, at least 1.
        needs: int64 [targets], pieces wanted of each target.

    Returns:
        The pieces, or None when the documents run out first.

    Raises:
        ValueError: lengths of another type, targets that do not fall, needs that do not fit them.
    """
    lengths = check_lengths(lengths)
    is_falling = len(targets) > 0 and bool((np.diff(targets) < 0).all()) and targets[-1] >= 1
    if not is_falling or len(needs) != len(targets) or needs.min() < 0:
        raise ValueError(
            f"native: targets {targets.tolist()} must be positive and falling, with one need >= 0 "
            f"each, got {needs.tolist()}"
        )
    rest = lengths.astype(np.int64)
    start = np.zeros(len(lengths), np.int64)
    pieces, counts = [], []
    num_used = 0
    for target, need in zip(targets.tolist(), needs.tolist()):
        count, rest = np.divmod(rest, target)
        running = np.cumsum(count)
        if need > (running[-1] if len(running) else 0):
            return None
        num_documents = int(np.searchsorted(running, need, side="left")) + 1 if need else 0
        num_used = max(num_used, num_documents)
        place = np.repeat(np.arange(num_documents), count[:num_documents])[:need]
        within = np.arange(need) - (running - count)[place]
        offset = start[place] + within * target
        pieces.append((place.astype(np.int32), offset.astype(np.int32)))
        counts.append(count)
        start += count * target
    num_cut = np.array([count[:num_used].sum() for count in counts])
    num_unused_tokens = int(((num_cut - needs) * targets).sum())
    return ExactPieces(pieces, num_used, int(rest[:num_used].sum()), num_unused_tokens)
