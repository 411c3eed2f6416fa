"""Labels of a row. They are made on the whole row, before it is sharded."""

import numpy as np

IGNORED_LABEL = -100  # what torch's cross entropy ignores by default


def build_labels(tokens: np.ndarray, doc_lengths: np.ndarray) -> np.ndarray:
    """The next token at each position, -100 at the last token of each piece.

    Args:
        tokens: int64 [T].
        doc_lengths: int64, positive, adding up to T.

    Returns:
        int64 [T].
    """
    ends = np.cumsum(doc_lengths)
    assert ends[-1] == len(tokens), "a Row checks its lengths"
    labels = np.empty(len(tokens), np.int64)
    labels[:-1] = tokens[1:]
    labels[ends - 1] = IGNORED_LABEL
    return labels


def build_label_weights(
    token_weights: np.ndarray, doc_lengths: np.ndarray, labels: np.ndarray
) -> np.ndarray | None:
    """Weight of each label; labels of weight 0 become -100 in place.

    Args:
        token_weights: float32 [T], at least 0, of each token as a target.
        doc_lengths: as for `build_labels`.
        labels: int64 [T], from `build_labels`.

    Returns:
        float32 [T], 0 where there is no label; None where every weight left is 1.

    Raises:
        ValueError: a weight is negative or not finite.
    """
    if not (np.isfinite(token_weights).all() and (token_weights >= 0).all()):
        raise ValueError(
            f"row: token weights from {token_weights.min()} to {token_weights.max()} must be "
            "finite and not negative; write the domain again"
        )
    weights = np.zeros(len(labels), np.float32)
    weights[:-1] = token_weights[1:]
    weights[np.cumsum(doc_lengths) - 1] = 0
    labels[weights == 0] = IGNORED_LABEL
    weights[labels == IGNORED_LABEL] = 0
    return None if ((weights == 0) | (weights == 1)).all() else weights
