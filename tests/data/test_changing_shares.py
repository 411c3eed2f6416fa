"""Shares that change within a stage, in everything that counts rows: ledger, epochs, plans."""

import numpy as np
import pytest

from lclm.data.stage_rows import HeldOutRows, StageRows
from tests.data_fixtures import mixture_entry

NUM_ROWS = 64
ROW = 32


@pytest.fixture
def prefixes(write_prefix):
    """Two domains of 100 and 60 documents."""
    return write_prefix("long", [70] * 100), write_prefix("short", [11, 30, 3, 25] * 15)


def build(prefixes, share=(0.25, 0.75), num_rows=NUM_ROWS, **options):
    long, short = prefixes
    rest = tuple(1 - end for end in share)
    entries = [mixture_entry(long, "exact", 0, share), mixture_entry(short, "concat", 0, rest)]
    return StageRows(entries, ROW, num_rows, **({"seed": 3, "max_epochs": 4} | options))


def rows_of(stage):
    return [stage.row(n).tokens.tobytes() for n in range(stage.num_rows)]


def test_the_ledger_follows_the_integral_of_the_share(prefixes):
    stage = build(prefixes)
    for num_rows in range(NUM_ROWS + 1):
        target = 0.25 * num_rows + 0.5 * num_rows**2 / (2 * NUM_ROWS)
        tokens = stage.ledger(num_rows)
        assert abs(tokens[prefixes[0]] - target * ROW) < ROW
        assert sum(tokens.values()) == num_rows * ROW
    assert stage.ledger(NUM_ROWS)[prefixes[0]] == NUM_ROWS * ROW / 2
    assert "share 0.25 to 0.75, exact of 32, 32 rows" in stage.summary()


def test_the_next_stage_goes_on_where_all_rows_end(prefixes):
    """As many rows of each domain as constant shares of the mean: the same documents are used."""
    changing, constant = build(prefixes), build(prefixes, (0.5, 0.5))
    assert changing.next_cursors == constant.next_cursors
    assert rows_of(changing) != rows_of(constant)
    assert sorted(rows_of(changing)) == sorted(rows_of(constant))
    after = [build(prefixes, stage_index=1, cursors=s.next_cursors) for s in (changing, constant)]
    assert rows_of(after[0]) == rows_of(after[1])


def test_plans_are_kept_by_both_ends(prefixes, tmp_path, monkeypatch):
    shares = [(0.25, 0.75), (0.25, 0.5), (0.5, 0.75)]
    fresh = [rows_of(build(prefixes, share)) for share in shares]
    assert len({tuple(rows) for rows in fresh}) == 3
    for share in shares:
        build(prefixes, share, cache_dir=tmp_path)
    monkeypatch.setattr(StageRows, "_pack_stage", lambda *_: pytest.fail("packed again"))
    assert [rows_of(build(prefixes, share, cache_dir=tmp_path)) for share in shares] == fresh


def test_held_out_documents_stay_apart(prefixes):
    stage = build(prefixes, held_out_fraction=0.1)
    held = HeldOutRows(prefixes[0], ROW, 4, 3, 0.1)
    apart = set(np.concatenate([held.row(n).tokens for n in range(len(held))]).tolist())
    rows = [stage.row(n) for n in range(NUM_ROWS)]
    trained = np.concatenate([row.tokens for row in rows if row.domain == "long"])
    assert len(trained) == NUM_ROWS * ROW / 2 and not apart & set(trained.tolist())


def test_a_domain_too_small_for_its_mean_share_is_refused(prefixes):
    # 1035 tokens an epoch: 32 rows of them fit, a constant share at the higher end would not
    assert len(build(prefixes, max_epochs=1)) == NUM_ROWS
    with pytest.raises(
        ValueError, match=r"stage\.0: .*short needs 1088 tokens, 1035 are left of 1"
    ):
        build(prefixes, (0.1875, 0.75), max_epochs=1)
    with pytest.raises(ValueError, match="lower its share or the stage's tokens"):
        build(prefixes, (0.0, 0.75), max_epochs=1)
