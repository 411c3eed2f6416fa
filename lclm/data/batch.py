"""Labels of a row. They are made on the whole row, before it is sharded."""

import numpy as np

__all__ = ["IGNORED_LABEL", "build_labels"]

IGNORED_LABEL = -100  # what torch's cross entropy ignores by default


def build_labels(tokens: np.ndarray, doc_lengths: np.ndarray) -> np.ndarray:
    """The next token at each position, -100 at the last token of each piece.

    Args:
        tokens: int64 [T].
        doc_lengths: int64, positive, adding up to T.

    Returns:
        int64 [T].

    Raises:
        ValueError: doc_lengths do not cut the row into pieces.
    """
    ends = np.cumsum(doc_lengths)
    if len(ends) == 0 or ends[-1] != len(tokens) or np.min(doc_lengths) < 1:
        raise ValueError(
            f"row: pieces of {np.asarray(doc_lengths).tolist()[:8]} tokens must be positive and "
            f"add up to the row's {len(tokens)}"
        )
    labels = np.empty(len(tokens), np.int64)
    labels[:-1] = tokens[1:]
    labels[ends - 1] = IGNORED_LABEL
    return labels
