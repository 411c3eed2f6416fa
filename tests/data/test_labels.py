"""Labels stop at the end of every piece."""

import numpy as np
import pytest

from lclm.data.labels import build_labels
from lclm.data.stage_rows import Row


def test_labels_by_hand():
    tokens = np.array([5, 6, 7, 8, 9, 10])
    labels = build_labels(tokens, np.array([3, 1, 2]))
    assert labels.tolist() == [6, 7, -100, -100, 10, -100]
    assert labels.dtype == np.int64


def test_one_piece_labels_all_but_the_last():
    assert build_labels(np.arange(4), np.array([4])).tolist() == [1, 2, 3, -100]


@pytest.mark.parametrize("doc_lengths", [[2, 1], [], [4, 0], [5, -1]])
def test_pieces_that_do_not_fill_the_row(doc_lengths):
    with pytest.raises(ValueError, match="add up to the row's 4"):
        Row(np.arange(4), np.array(doc_lengths, np.int64), "a")
