"""Packing, in C++ and NumPy: the same in both, and equal to a plain Python loop."""

import itertools
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lclm_kernels.native import load_native, ops, pack_concat, pack_exact

IMPLEMENTATIONS = ["reference"] + (["native"] if load_native() else [])
document_lengths = st.lists(st.integers(0, 40), max_size=30)
both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def concat_by_hand(lengths, start_offset, row_length, num_rows):
    """Rows as lists of (place, offset, length), and the next place and offset."""
    stream = [(p, o) for p, n in enumerate(lengths) for o in range(n)]
    stream = [at for at in stream if at[0] > 0 or at[1] >= start_offset]
    if len(stream) < row_length * num_rows:
        return None
    rows = []
    for r in range(num_rows):
        pieces = []
        for place, offset in stream[r * row_length : (r + 1) * row_length]:
            if pieces and pieces[-1][0] == place:
                pieces[-1][2] += 1
            else:
                pieces.append([place, offset, 1])
        rows.append(pieces)
    rest = stream[row_length * num_rows :]
    return rows, rest[0] if rest else (len(lengths), 0)


def exact_by_hand(lengths, targets, needs):
    pieces = [[] for _ in targets]
    num_tail = num_unused = num_documents = 0
    for place, length in enumerate(lengths):
        if all(len(have) >= need for have, need in zip(pieces, needs)):
            break
        num_documents += 1
        at = 0
        for have, target, need in zip(pieces, targets, needs):
            while length - at >= target:
                if len(have) < need:
                    have.append((place, at))
                else:
                    num_unused += target
                at += target
        num_tail += length - at
    if any(len(have) < need for have, need in zip(pieces, needs)):
        return None
    return pieces, num_documents, num_tail, num_unused


@both
@settings(max_examples=150, deadline=None)
@given(document_lengths, st.integers(0, 5), st.integers(1, 25), st.integers(0, 12))
def test_concat_equals_a_plain_loop(implementation, lengths, start, row_length, num_rows):
    array = np.array(lengths, np.int32)
    start = min(start, lengths[0] if lengths else 0)
    found = pack_concat(array, start, row_length, num_rows, implementation)
    expected = concat_by_hand(lengths, start, row_length, num_rows)
    if expected is None or found is None:
        assert expected is None and found is None
        return
    pieces = np.stack([found.place, found.offset, found.length], axis=1).tolist()
    borders = found.row_start.tolist()
    assert [pieces[a:b] for a, b in itertools.pairwise(borders)] == expected[0]
    if num_rows:
        assert (found.next_place, found.next_offset) == expected[1]
    assert [item.dtype for item in found[:4]] == [np.int64, np.int32, np.int32, np.int32]


@settings(max_examples=150, deadline=None)
@given(
    document_lengths,
    st.sets(st.integers(1, 20), min_size=1, max_size=3),
    st.lists(st.integers(0, 9), min_size=3, max_size=3),
)
def test_exact_equals_a_plain_loop(lengths, targets, needs):
    falling = sorted(targets, reverse=True)
    needs = needs[: len(falling)]
    found = pack_exact(np.array(lengths, np.int32), np.array(falling), np.array(needs))
    expected = exact_by_hand(lengths, falling, needs)
    if expected is None or found is None:
        assert expected is None and found is None
        return
    assert [list(zip(p.tolist(), o.tolist())) for p, o in found.pieces] == expected[0]
    assert tuple(found[1:]) == expected[1:]


@both
def test_large_random_input_uses_only_what_it_needs(implementation):
    lengths = np.random.default_rng(0).integers(1, 3000, 50_000).astype(np.int32)
    rows = pack_concat(lengths, 17, 8192, 100, implementation)
    assert rows is not None and rows.place.max() < 2000
    assert rows.length.sum() == 100 * 8192
    ends = rows.row_start[1:] - 1
    assert np.array_equal(np.add.reduceat(rows.length, rows.row_start[:-1]), np.full(100, 8192))
    cut = rows.offset[ends] + rows.length[ends] < lengths[rows.place[ends]]
    follows = np.flatnonzero(cut)[:-1]
    heads = rows.row_start[follows + 1]
    assert np.array_equal(rows.place[heads], rows.place[ends[follows]])
    assert np.array_equal(
        rows.offset[heads], rows.offset[ends[follows]] + rows.length[ends[follows]]
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_concat(np.array([1]), 0, 4, 1), "must be int32"),
        (lambda: pack_concat(np.array([1], np.int32), 0, 0, 1), "row_length"),
        (lambda: pack_concat(np.array([1], np.int32), 2, 1, 1), "beyond the first document"),
        (lambda: pack_concat(np.array([1], np.int32), 0, 1, 1, "cuda"), "does not exist"),
        (
            lambda: pack_exact(np.array([9], np.int32), np.array([2, 4]), np.array([1, 1])),
            "positive and falling",
        ),
    ],
)
def test_bad_requests_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_missing_library_is_said_once(tmp_path, monkeypatch, caplog):
    logger = logging.getLogger("lclm_kernels")
    monkeypatch.setattr(logger, "propagate", True)
    ops._open_first.cache_clear()
    with caplog.at_level(logging.WARNING, logger="lclm_kernels"):
        assert ops._open_first((tmp_path,)) is None
        assert ops._open_first((tmp_path,)) is None
    assert [r.message for r in caplog.records] == [
        "native: liblclm_native.so is not built; its slower NumPy twin is used"
    ]
    monkeypatch.setattr(ops, "load_native", lambda: None)
    lengths = np.array([3], np.int32)
    assert pack_concat(lengths, 0, 3, 1) is not None
    with pytest.raises(ValueError, match="is not built"):
        pack_concat(lengths, 0, 3, 1, "native")


def test_a_broken_library_is_refused(tmp_path):
    (tmp_path / ops.LIBRARY_NAME).write_bytes(b"not a library")
    with pytest.raises(ValueError, match="cannot be used"):
        ops._open_first((tmp_path,))


def test_the_library_is_built_where_a_compiler_is():
    """The twin hides a missing build; on a machine that can build, the tests must cover C++."""
    if shutil.which("cmake") and shutil.which("g++"):
        assert load_native() is not None, (
            f"{Path(ops.__file__).parent / ops.LIBRARY_NAME} is missing: pip install -e ."
        )
