"""Best-fit packing: C++ and twin equal and right, padding without labels, plans kept on disk."""

import itertools
import multiprocessing
import os
import shutil

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lclm.data.domain import Cursor
from lclm.data.labels import build_label_weights, build_labels
from lclm.data.packing_cache import hash_packing, load_or_make
from lclm.data.stage_rows import StageRows
from lclm_kernels.native import load_native, pack_best_fit, seeded_order
from tests.data_fixtures import mixture_entry

IMPLEMENTATIONS = ["reference"] + (["native"] if load_native() else [])
both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
LENGTHS = [3, 9, 1, 14, 6, 6, 2, 30, 5, 8, 4, 7, 1, 1, 12, 10]


def best_fit_by_hand(lengths, row_length, num_rows, drop_long):
    """Rows as lists of (place, offset, length), with what stops and what is left out."""
    rows, last_used, clock = [], [], 0
    dropped = unused = 0
    for place, tokens in enumerate(lengths):
        if tokens > row_length and drop_long:
            dropped += 1
            continue
        if tokens > row_length and len(rows) == num_rows:
            return rows, place, dropped, unused
        for at in range(0, tokens, row_length):
            length = min(row_length, tokens - at)
            room = [row_length - sum(n for _, _, n in row) for row in rows]
            fitting = [r for r in range(len(rows)) if room[r] >= length]
            if fitting:
                best = min(fitting, key=lambda r: (room[r], -last_used[r]))
            elif len(rows) < num_rows:
                rows.append([])
                last_used.append(0)
                best = len(rows) - 1
            elif tokens > row_length:
                unused += tokens - at
                break
            else:
                return rows, place, dropped, unused
            clock += 1
            last_used[best] = clock
            rows[best].append((place, at, length))
    return (rows, len(lengths), dropped, unused) if len(rows) == num_rows else None


@both
@example([10, 6, 1], 3, 5, False)  # the end of the second finds no row, the third does
@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, 40), max_size=40), st.integers(1, 25), st.integers(0, 12), st.booleans()
)
def test_equals_a_plain_loop(implementation, lengths, row_length, num_rows, drop_long):
    found = pack_best_fit(
        np.array(lengths, np.int32), row_length, num_rows, drop_long, implementation
    )
    expected = best_fit_by_hand(lengths, row_length, num_rows, drop_long)
    if expected is None or found is None:
        assert expected is None and found is None
        return
    pieces = list(zip(found.place.tolist(), found.offset.tolist(), found.length.tolist()))
    borders = found.row_start.tolist()
    assert [pieces[a:b] for a, b in itertools.pairwise(borders)] == expected[0]
    assert (found.num_documents, found.num_dropped, found.num_unused_tokens) == expected[1:]


def test_both_give_the_same_large_plan_with_little_padding():
    lengths = np.random.default_rng(0).lognormal(6.5, 1.5, 20_000).astype(np.int32) + 1
    plans = [pack_best_fit(lengths, 8192, 2000, False, name) for name in IMPLEMENTATIONS]
    for plan in plans:
        assert all(np.array_equal(a, b) for a, b in zip(plan, plans[0]))
        sums = np.add.reduceat(plan.length, plan.row_start[:-1])
        assert sums.max() <= 8192 and sums.sum() / (2000 * 8192) > 0.985


def test_a_large_tree_of_rooms():
    """Rooms beyond 64^3, and documents that meet in the upper levels of the tree."""
    lengths = np.random.default_rng(1).integers(1, 500_000, 3000).astype(np.int32)
    plans = [pack_best_fit(lengths, 524_288, 1300, False, name) for name in IMPLEMENTATIONS]
    for plan in plans:
        assert all(np.array_equal(a, b) for a, b in zip(plan, plans[0]))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 9000))
def test_orders_are_the_same_in_both(start, num_items):
    orders = [seeded_order(start, num_items, name) for name in IMPLEMENTATIONS]
    assert np.array_equal(np.sort(orders[0]), np.arange(num_items))
    assert all(np.array_equal(order, orders[0]) for order in orders)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_best_fit(np.array([1]), 4, 1), "must be int32"),
        (lambda: pack_best_fit(np.array([1], np.int32), 0, 1), "row_length"),
        (lambda: seeded_order(0, -1), "0 to 2147483647"),
        (lambda: seeded_order(0, 1, "cuda"), "does not exist"),
    ],
)
def test_bad_requests_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def stage(prefix, num_rows, cursors=None, **options):
    entries = [mixture_entry(prefix, "best-fit", 0, 1.0)]
    return StageRows(entries, 16, num_rows, 5, cursors=cursors, **options)


def pieces_of(rows):
    """Every document of rows, in one list of its tokens."""
    found = []
    for number in range(len(rows)):
        row = rows.row(number)
        ends = np.cumsum(row.doc_lengths)
        assert ends[-1] == 16
        for start, end in zip(ends - row.doc_lengths, ends):
            weights = None if row.token_weights is None else row.token_weights[start:end]
            if weights is not None and not weights.any():
                assert end == 16 and not row.tokens[start:].any(), "padding is at the end"
            else:
                assert weights is None or weights.all()
                found.append(row.tokens[start:end].tolist())
    return found


def test_stages_use_every_document_once(write_prefix):
    prefix = write_prefix("a", LENGTHS)
    first = stage(prefix, 4)
    second = stage(prefix, 2, first.next_cursors)
    pieces = sorted(pieces_of(first) + pieces_of(second))
    # tokens are 1, 2, 3, ... over the documents: any document twice or cut would show
    starts = dict(zip(np.cumsum([1, *LENGTHS]).tolist(), LENGTHS))
    used = second.next_cursors[prefix].ordinal
    whole = [piece for piece in pieces if starts.get(piece[0]) == len(piece)]
    of_long = [piece for piece in pieces if piece not in whole]
    assert all(len(piece) in (16, 14) for piece in of_long)
    assert len(whole) + (len(of_long) > 0) == used and used > 5
    assert len({piece[0] for piece in pieces}) == len(pieces)
    assert "of padding" in first.summary()


def test_more_epochs_then_an_error(write_prefix):
    prefix = write_prefix("a", LENGTHS)
    twice = stage(prefix, 14, max_epochs=2)
    assert twice.next_cursors[prefix].ordinal > len(LENGTHS)
    with pytest.raises(ValueError, match=r"needs 40 rows of 16 tokens.*2 epochs of 16 documents"):
        stage(prefix, 40, max_epochs=2)
    with pytest.raises(ValueError, match="its 0 tokens left"):
        stage(prefix, 1, {prefix: Cursor(40)}, max_epochs=2)


def test_conversations_are_left_out_not_cut(write_prefix):
    prefix = write_prefix("a", LENGTHS, is_chat=True)
    rows = stage(prefix, 6)
    assert all(len(piece) in LENGTHS and len(piece) <= 16 for piece in pieces_of(rows))
    assert "1 conversations longer than a row left out" in rows.summary()


def test_padding_has_no_labels(write_prefix):
    rows = stage(write_prefix("a", [10, 10]), 2)
    row = rows.row(0)
    assert row.doc_lengths.tolist() == [10, 6] and row.token_weights.tolist() == [1] * 10 + [0] * 6
    labels = build_labels(row.tokens, row.doc_lengths)
    assert build_label_weights(row.token_weights, row.doc_lengths, labels) is None
    assert (labels != -100).sum() == 9 and labels[:9].tolist() == row.tokens[1:10].tolist()


def test_weights_follow_their_token():
    tokens, lengths = np.arange(8), np.array([5, 3])
    labels = build_labels(tokens, lengths)
    weights = np.array([1, 0.5, 0, 1, 1, 0.25, 1, 0], np.float32)
    found = build_label_weights(weights, lengths, labels)
    assert found.tolist() == [0.5, 0, 1, 1, 0, 1, 0, 0]
    assert labels.tolist() == [1, -100, 3, 4, -100, 6, -100, -100]
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="must be finite and not negative"):
            build_label_weights(np.full(8, bad, np.float32), lengths, labels)


def rows_of(rows):
    return [(r.tokens.tolist(), r.doc_lengths.tolist()) for r in map(rows.row, range(len(rows)))]


def test_a_kept_plan_is_used_and_gives_the_same_rows(write_prefix, tmp_path, monkeypatch):
    prefixes = [
        write_prefix("a", LENGTHS),
        write_prefix("b", [24] * 8),
        write_prefix("c", [99]),
    ]
    entries = [
        mixture_entry(prefixes[0], "best-fit", 0, 0.25),
        mixture_entry(prefixes[1], "exact", 16, 0.25),
        mixture_entry(prefixes[1], "exact", 8, 0.25),
        mixture_entry(prefixes[2], "concat", 0, 0.25),
    ]
    fresh = StageRows(entries, 16, 12, 1)
    made = StageRows(entries, 16, 12, 1, cache_dir=tmp_path / "plans")
    monkeypatch.setattr(StageRows, "_pack_stage", lambda *_: pytest.fail("packed again"))
    kept = StageRows(entries, 16, 12, 1, cache_dir=tmp_path / "plans")
    assert rows_of(fresh) == rows_of(made) == rows_of(kept)
    assert fresh.next_cursors == made.next_cursors == kept.next_cursors
    assert fresh.summary() == kept.summary() and fresh.ledger(7) == kept.ledger(7)
    monkeypatch.undo()
    for change in ({"num_rows": 8}, {"seed": 2}, {"cursors": {prefixes[0]: Cursor(2)}}):
        request = {"num_rows": 12, "seed": 1} | change
        other = StageRows(entries, 16, cache_dir=tmp_path / "plans", **request)
        assert rows_of(other) == rows_of(StageRows(entries, 16, **request))
    assert len([p for p in (tmp_path / "plans").iterdir() if p.is_dir()]) == 4


def make_slowly(folder, log):
    def make():
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        return {"numbers": np.arange(1000)}, {"sum": 499_500}

    arrays, facts = load_or_make(folder, "key", make)
    assert arrays["numbers"].sum() == facts["sum"]


def test_one_of_many_processes_makes_a_plan(tmp_path):
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "plans", tmp_path / "log")
    processes = [context.Process(target=make_slowly, args=arguments) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_a_plan_that_fails_leaves_nothing_and_a_damaged_one_is_named(tmp_path):
    def fail():
        raise ValueError("too few documents")

    with pytest.raises(ValueError, match="too few"):
        load_or_make(tmp_path, "key", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]
    load_or_make(tmp_path, "key", lambda: ({"a": np.arange(5)}, {}))
    np.save(tmp_path / "key" / "a.npy", np.arange(4))
    with pytest.raises(ValueError, match=r"key: is damaged \(a.npy has 4 items instead of 5\)"):
        load_or_make(tmp_path, "key", fail)
    shutil.rmtree(tmp_path / "key")
    load_or_make(tmp_path, "key", lambda: ({"a": np.arange(5)}, {}))
    assert hash_packing([1, 2]) != hash_packing([1, 3])
