"""Rows of a stage: what they hold, in which order, what they leave for the next stage."""

import hashlib
import time

import numpy as np
import pytest

from lclm.data.domain import Cursor, Domain, distinct_names, seeded_order
from lclm.data.indexed import IndexedReader, IndexedWriter
from lclm.data.stage_rows import HeldOutRows, StageRows
from tests.data_fixtures import mixture_entry

LENGTHS = [70, 5, 130, 33, 64, 9, 200, 41, 16, 90]


def build(entries, seq_length, num_rows, **options):
    return StageRows(entries, seq_length, num_rows, **({"seed": 1, "max_epochs": 9} | options))


def digest_of(stage):
    sha = hashlib.sha256()
    for number in range(stage.num_rows):
        row = stage.row(number)
        sha.update(row.tokens.tobytes() + row.doc_lengths.tobytes() + row.domain.encode())
    return sha.hexdigest()


def pieces_of(stage, prefix):
    """Every piece of every row as (document, offset, length), by the unique tokens of a prefix."""
    lengths = IndexedReader(prefix).lengths
    ends = np.cumsum(lengths)
    found = []
    for number in range(stage.num_rows):
        row = stage.row(number)
        if row.domain != prefix.rsplit("/", 1)[-1]:
            continue
        for piece in np.split(row.tokens, np.cumsum(row.doc_lengths)[:-1]):
            doc = int(np.searchsorted(ends, piece[0] - 1, side="right"))
            start = int(ends[doc] - lengths[doc])
            assert np.array_equal(piece, np.arange(piece[0], piece[0] + len(piece)))
            assert piece[-1] <= ends[doc], "a piece crosses a document border"
            found.append((doc, int(piece[0]) - 1 - start, len(piece)))
    return found


def tokens_of(pieces):
    return sorted((doc, at) for doc, first, n in pieces for at in range(first, first + n))


def test_seeded_order_is_a_permutation_fixed_for_ever():
    order = seeded_order(1000, "epoch", 1, "x", 0)
    assert sorted(order.tolist()) == list(range(1000))
    assert not np.array_equal(order, seeded_order(1000, "epoch", 1, "x", 1))
    # written down on purpose: a change here reorders the data of every run that is resumed
    assert seeded_order(8, "epoch", 1, "x", 0).tolist() == [5, 0, 1, 3, 7, 4, 6, 2]


def test_concat_uses_every_token_of_an_epoch_once(write_prefix):
    prefix = write_prefix("a", LENGTHS)
    num_rows = sum(LENGTHS) // 32
    stage = build([mixture_entry(prefix, "concat", 0, 1.0)], 32, num_rows)
    used = tokens_of(pieces_of(stage, prefix))
    assert len(used) == len(set(used)) == num_rows * 32


def test_concat_keeps_document_order_of_the_epoch(write_prefix):
    prefix = write_prefix("a", LENGTHS)
    stage = build([mixture_entry(prefix, "concat", 0, 1.0)], 32, 20)
    domain = Domain(prefix, 1, 0.0)
    stream = np.concatenate([domain.reader.read(d) for d in domain.stream(0, len(LENGTHS))])
    expected = {stream[n * 32 : n * 32 + 32].tobytes() for n in range(20)}
    rows = [stage.row(n).tokens.astype(stream.dtype).tobytes() for n in range(20)]
    assert set(rows) == expected
    in_order = [stream[n * 32 : n * 32 + 32].tobytes() for n in range(20)]
    assert rows != in_order, "rows are not shuffled"


def test_concat_wraps_into_the_next_epoch(write_prefix):
    prefix = write_prefix("a", LENGTHS)
    total = sum(LENGTHS)
    stage = build([mixture_entry(prefix, "concat", 0, 1.0)], 50, 3 * total // 50)
    counts = np.bincount(np.concatenate([stage.row(n).tokens for n in range(len(stage))]))[1:]
    assert counts.min() >= 2 and counts.max() <= 3
    # rows are shuffled within an epoch only: those that start in the first hold all of it
    first = np.concatenate([stage.row(n).tokens for n in range(-(-total // 50))])
    assert set(first.tolist()) == set(range(1, total + 1))


@pytest.mark.parametrize("packing", ["concat", "exact"])
def test_epochs_are_reshuffled_and_not_mixed(write_prefix, packing):
    """Documents that each fill a row: every epoch is a permutation of them, each another one."""
    prefix = write_prefix("a", [16] * 30)
    stage = build([mixture_entry(prefix, packing, 0, 1.0)], 16, 90)
    docs = [doc for doc, _, _ in pieces_of(stage, prefix)]
    epochs = [docs[:30], docs[30:60], docs[60:]]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    # rows of an epoch are shuffled once more: the documents' own order is the domain's
    domain = Domain(prefix, 1, 0.0)
    orders = [domain.stream(30 * n, 30 * n + 30).tolist() for n in range(3)]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert domain.stream(20, 70).tolist() == (orders[0] + orders[1] + orders[2])[20:70]


def test_exact_cuts_the_longest_target_first(write_prefix):
    lengths = LENGTHS * 2
    prefix = write_prefix("a", lengths)
    entries = [mixture_entry(prefix, "exact", 64, 0.5), mixture_entry(prefix, "exact", 16, 0.5)]
    stage = build(entries, 64, 4)
    assert stage.next_cursors[prefix].ordinal <= len(lengths)
    pieces = pieces_of(stage, prefix)
    assert sorted(n for _, _, n in pieces) == [16] * 8 + [64] * 2
    used = tokens_of(pieces)
    assert len(used) == len(set(used))
    for doc, offset, length in pieces:
        if length == 64:
            assert offset % 64 == 0
        else:
            head = lengths[doc] // 64 * 64
            assert offset >= head and (offset - head) % 16 == 0


def test_prolongs_second_stage(write_prefix):
    """One prefix as pieces of 8x and as rows of eight 1x pieces, each with a share of its own."""
    long = write_prefix("long", [8 * 32 + 37] * 40 + [70] * 40)
    short = write_prefix("short", [11, 30, 3] * 200)
    entries = [
        mixture_entry(long, "exact", 256, 0.15),
        mixture_entry(long, "exact", 32, 0.25),
        mixture_entry(short, "concat", 0, 0.6),
    ]
    stage = build(entries, 256, 40)
    kinds = {}
    for number in range(40):
        row = stage.row(number)
        key = (row.domain, tuple(row.doc_lengths.tolist()) if row.domain == "long" else ())
        kinds[key] = kinds.get(key, 0) + 1
    assert kinds == {("long", (256,)): 6, ("long", (32,) * 8): 10, ("short", ()): 24}
    assert stage.ledger(40) == {long: 16 * 256, short: 24 * 256}
    assert sum(stage.ledger(7).values()) == 7 * 256


def test_tails_and_unused_pieces_are_counted(write_prefix):
    prefix = write_prefix("a", [100] * 10)
    stage = build([mixture_entry(prefix, "exact", 32, 1.0)], 64, 4)
    # 8 pieces wanted, 3 of each document: 3 documents, 1 piece over, 3 tails of 4 tokens
    assert "12 tokens of tails dropped, 32 in pieces not needed" in stage.summary()
    assert stage.next_cursors == {prefix: Cursor(3, 0)}


def test_row_order_is_a_pure_function(write_prefix):
    a, b = write_prefix("a", LENGTHS), write_prefix("b", LENGTHS[::-1])
    entries = [mixture_entry(a, "concat", 0, 0.3), mixture_entry(b, "exact", 16, 0.7)]
    digests = [digest_of(build(entries, 32, 12, seed=seed)) for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]
    stage = build(entries, 32, 12)
    backwards = {n: stage.row(n).tokens.tobytes() for n in reversed(range(12))}
    assert all(stage.row(n).tokens.tobytes() == backwards[n] for n in range(12))


@pytest.mark.parametrize("packing", ["concat", "exact"])
def test_stages_continue_where_the_one_before_stopped(write_prefix, packing):
    prefix = write_prefix("a", [37] * 60)
    entries = [mixture_entry(prefix, packing, 16 if packing == "exact" else 0, 1.0)]
    first = build(entries, 32, 13)
    second = build(entries, 32, 11, stage_index=1, cursors=first.next_cursors)
    pieces = [pieces_of(stage, prefix) for stage in (first, second)]
    used = [tokens_of(p) for p in pieces]
    assert not set(used[0]) & set(used[1])
    if packing == "concat":
        together = build(entries, 32, 24)
        assert tokens_of(pieces_of(together, prefix)) == sorted(used[0] + used[1])
        assert together.next_cursors == second.next_cursors


def test_prefixes_that_a_stage_does_not_use_keep_their_cursors(write_prefix):
    prefix = write_prefix("a", LENGTHS)
    entries = [mixture_entry(prefix, "concat", 0, 1.0)]
    first = build(entries, 32, 5, cursors={"elsewhere": Cursor(7, 3)})
    second = build(entries, 32, 5, stage_index=1, cursors=first.next_cursors)
    assert second.next_cursors["elsewhere"] == Cursor(7, 3)


def test_exact_after_concat_leaves_out_the_document_in_use(write_prefix):
    prefix = write_prefix("a", [64] * 20)
    first = build([mixture_entry(prefix, "concat", 0, 1.0)], 32, 3)
    assert first.next_cursors[prefix] == Cursor(1, 32)
    second = build(
        [mixture_entry(prefix, "exact", 32, 1.0)],
        32, 4, stage_index=1, cursors=first.next_cursors,
    )  # fmt: skip
    assert second.next_cursors[prefix] == Cursor(4, 0)
    used = [tokens_of(pieces_of(stage, prefix)) for stage in (first, second)]
    assert not set(used[0]) & set(used[1])


def test_held_out_documents_are_never_trained_on(write_prefix):
    prefix = write_prefix("a", [20] * 50)
    held = HeldOutRows(prefix, 16, 3, seed=1, held_out_fraction=0.1)
    stage = build([mixture_entry(prefix, "concat", 0, 1.0)], 16, 100, held_out_fraction=0.1)
    trained = {doc for doc, _, _ in pieces_of(stage, prefix)}
    apart = {doc for doc, _, _ in pieces_of(held, prefix)}
    assert len(trained) == 45 and apart and not trained & apart
    assert digest_of(held) == digest_of(HeldOutRows(prefix, 16, 3, 1, 0.1))


@pytest.mark.parametrize(
    ("num_docs", "fraction", "expected"),
    [(100, 0.05, 5), (10, 0.01, 1), (2, 0.9, 1), (1, 0.5, 0), (10, 0.0, 0)],
)
def test_number_of_held_out_documents(write_prefix, num_docs, fraction, expected):
    domain = Domain(write_prefix("a", [3] * num_docs), 1, fraction)
    assert len(domain.held_out_docs) == expected
    assert domain.num_docs == num_docs - expected


def test_few_held_out_tokens_make_fewer_rows(write_prefix):
    prefix = write_prefix("a", [10] * 20)
    assert HeldOutRows(prefix, 8, 4, 1, 0.1).num_rows == 2
    single = HeldOutRows(prefix, 48, 4, 1, 0.1)
    assert single.num_rows == 1
    assert single.row(0).doc_lengths.tolist() == [10, 10, 10, 10, 8]


def test_held_out_rows_need_documents(write_prefix):
    prefix = write_prefix("a", [10] * 20)
    with pytest.raises(ValueError, match="0 documents are held out"):
        HeldOutRows(prefix, 8, 4, 1, 0.0)


def test_domain_name_comes_from_the_metadata(write_prefix):
    prefix = write_prefix("a", [40] * 4, domain="books")
    stage = build([mixture_entry(prefix, "concat", 0, 1.0)], 8, 2)
    assert stage.row(0).domain == "books"


def test_rows_outside_the_stage(write_prefix):
    stage = build([mixture_entry(write_prefix("a", [40]), "concat", 0, 1.0)], 8, 2)
    for number in (-1, 2):
        with pytest.raises(IndexError, match="of 2 rows"):
            stage.row(number)


def test_without_a_mask_attention_sees_one_document_and_labels_see_all(write_prefix):
    prefix = write_prefix("a", [10] * 20)
    entries = [mixture_entry(prefix, "concat", 0, 1.0)]
    masked, whole = (build(entries, 48, 4, document_mask=mask) for mask in (True, False))
    held_out = HeldOutRows(prefix, 48, 1, 1, 0.1, document_mask=False).row(0)
    assert held_out.attention_lengths.tolist() == [48] and len(held_out.doc_lengths) == 5
    for number in range(4):
        row, other = masked.row(number), whole.row(number)
        assert np.array_equal(row.doc_lengths, other.doc_lengths) and len(row.doc_lengths) > 4
        assert np.array_equal(row.attention_lengths, row.doc_lengths)
        assert np.array_equal(masked.attention_lengths(number), row.doc_lengths)
        for lengths in (other.attention_lengths, whole.attention_lengths(number)):
            assert lengths.tolist() == [48] and lengths.dtype == np.int64


@pytest.mark.parametrize(
    ("packing", "num_rows", "numbers"),
    [
        ("concat", 21, "needs 210 tokens, 200 are left of 2 epochs of 100 tokens"),
        ("exact", 17, "needs 170 tokens in 17 pieces of 10, 160 in 16 pieces are left"),
    ],
)
def test_too_few_tokens_is_an_error_before_training(write_prefix, packing, num_rows, numbers):
    prefix = write_prefix("a", [25] * 4)
    entries = [mixture_entry(prefix, packing, 0, 1.0)]
    assert len(build(entries, 10, num_rows - 1, max_epochs=2)) == num_rows - 1
    with pytest.raises(ValueError, match=rf"stage\.0: .*a {numbers}.*max_epochs"):
        build(entries, 10, num_rows, max_epochs=2)


@pytest.mark.parametrize("packing", ["concat", "exact"])
def test_max_epochs_counts_over_all_stages(write_prefix, packing):
    prefix = write_prefix("a", [20] * 5)
    entries = [mixture_entry(prefix, packing, 0, 1.0)]
    first = build(entries, 10, 10, max_epochs=1)
    with pytest.raises(ValueError, match=r"stage\.1: .* 0 (in 0 pieces )?are left of 1 epochs"):
        build(entries, 10, 1, stage_index=1, cursors=first.next_cursors, max_epochs=1)


def test_no_document_long_enough(write_prefix):
    prefix = write_prefix("a", [25] * 4)
    with pytest.raises(ValueError, match=r"no document that fills a piece of 32 .* has 25"):
        build([mixture_entry(prefix, "exact", 0, 1.0)], 32, 1)


def test_nothing_left_after_the_longer_pieces(write_prefix):
    prefix = write_prefix("a", [32] * 4)
    entries = [mixture_entry(prefix, "exact", 0, 0.5), mixture_entry(prefix, "exact", 8, 0.5)]
    with pytest.raises(ValueError, match=r"piece of 8 tokens after pieces of \[32\] tokens"):
        build(entries, 32, 2)


def test_empty_domain(tmp_path):
    with IndexedWriter(tmp_path / "a", 10) as writer:
        writer.add_document([])
    with pytest.raises(ValueError, match="holds no document with tokens"):
        build([mixture_entry(str(tmp_path / "a"), "concat", 0, 1.0)], 8, 1)


@pytest.mark.parametrize(("num_rows", "seq_length"), [(0, 8), (3, 0)])
def test_a_stage_has_rows(write_prefix, num_rows, seq_length):
    with pytest.raises(ValueError, match="both must be at least 1"):
        build([mixture_entry(write_prefix("a", [9]), "concat", 0, 1.0)], seq_length, num_rows)


def test_prefixes_of_different_tokenizers(write_prefix):
    a = write_prefix("a", [40] * 4, tokenizer={"sha256": "1" * 64})
    b = write_prefix("b", [40] * 4, tokenizer={"sha256": "2" * 64})
    entries = [mixture_entry(a, "concat", 0, 0.5), mixture_entry(b, "concat", 0, 0.5)]
    with pytest.raises(ValueError, match="written with different tokenizers"):
        build(entries, 8, 2)


def test_a_million_documents_are_planned_in_a_second(tmp_path):
    """Construction is array work; a Python loop over documents would take several seconds."""
    lengths = np.random.default_rng(0).integers(1, 60, 1_000_000).astype(np.int32)
    prefix = tmp_path / "a"
    tokens = tmp_path / "tokens"
    tokens.write_bytes(bytes(2 * int(lengths.sum())))
    with open(tokens, "rb") as source, IndexedWriter(prefix, 300) as writer:
        writer.add_tokens(source, tokens.stat().st_size, lengths)
    entries = [mixture_entry(str(prefix), "concat", 0, 1.0)]
    start = time.process_time()
    stage = build(entries, 1024, 25_000, held_out_fraction=0.01)
    assert time.process_time() - start < 3, "a second on a slow machine; three with a margin"
    assert stage.row(24_999).doc_lengths.sum() == 1024


def test_domains_of_one_name_are_told_apart(tmp_path, write_prefix, monkeypatch):
    for folder in ("x", "y", "deep/x", "z"):
        (tmp_path / folder).mkdir(parents=True)
    x, y, deep = (write_prefix(f"{name}/text", LENGTHS) for name in ("x", "y", "deep/x"))
    named = write_prefix("z/other", LENGTHS, domain="text")
    plain = write_prefix("code", LENGTHS)
    assert distinct_names([x, plain]) == {x: "text", plain: "code"}
    assert distinct_names([x, y]) == {x: "x/text", y: "y/text"}
    assert distinct_names([x, named]) == {x: "x/text", named: "z/other"}
    root = tmp_path.name
    assert distinct_names([x, deep]) == {x: f"{root}/x/text", deep: "deep/x/text"}
    monkeypatch.chdir(tmp_path)
    assert distinct_names(["x/text", x]) == {"x/text": "text", x: "text"}, "one file"
    assert distinct_names([x, "y/text", "x/text"])["x/text"] == "x/text"
    entries = [mixture_entry(prefix, "concat", 0, 0.5) for prefix in (x, y)]
    stage = build(entries, 32, 8)
    assert {stage.row(number).domain for number in range(8)} == {"x/text", "y/text"}
    assert stage.domain_names == {x: "x/text", y: "y/text"}
    assert HeldOutRows(x, 16, 1, 1, 0.1, name="x/text").row(0).domain == "x/text"
    assert HeldOutRows(x, 16, 1, 1, 0.1).row(0).domain == "text"


def documents_read(stage):
    """Numbers of the documents: tokens of `write_prefix` are all different."""
    return [token for row in map(stage.row, range(len(stage))) for token in row.tokens.tolist()]


@pytest.mark.parametrize("spelling", ["a", "./a", "../{}/a", "link/a", "b"])
def test_a_prefix_spelled_two_ways_is_one(tmp_path, write_prefix, monkeypatch, spelling):
    prefix = write_prefix("a", [24] * 20)
    (tmp_path / "link").symlink_to(tmp_path)
    for ending in (".bin", ".idx", ".json"):
        (tmp_path / f"b{ending}").symlink_to(f"a{ending}")
    monkeypatch.chdir(tmp_path)
    other = spelling.format(tmp_path.name)
    first = build([mixture_entry(prefix, "concat", 0, 1.0)], 16, 8)
    entries = [mixture_entry(other, "concat", 0, 1.0)]
    second = build(entries, 16, 22, stage_index=1, cursors=first.next_cursors)
    read = documents_read(first) + documents_read(second)
    assert sorted(read) == list(range(1, 481)), "every token once"
    with pytest.raises(ValueError, match="with packing"):
        build([mixture_entry(prefix, "concat", 0, 0.5), mixture_entry(other, "concat", 0, 0.5)],
              16, 8)  # fmt: skip
    both = build(
        [mixture_entry(prefix, "exact", 8, 0.5), mixture_entry(other, "exact", 16, 0.5)], 16, 8
    )
    read = documents_read(both)
    assert len(set(read)) == len(read) == 128 and list(both.domain_names) == [prefix]
