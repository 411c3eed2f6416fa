"""Rows drawn from a histogram of document lengths."""

from pathlib import Path

import numpy as np
import pytest

from lclm.context.plan.lengths import LengthHistogram, read_histogram

PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "data" / "doc_lengths_magi.csv"


def test_published_histogram_has_the_known_totals() -> None:
    """13.4 million documents, 97.4 % of at most 8K, 0.14 % above 128K: the source's own figures."""
    histogram = read_histogram(PUBLISHED)
    counts, total = histogram.documents, histogram.documents.sum()
    assert total == 13_463_214
    assert counts[histogram.longest <= 8192].sum() / total == pytest.approx(0.9742, abs=5e-5)
    assert counts[histogram.shortest > 131072].sum() / total == pytest.approx(0.0014, abs=5e-5)


def test_rows_are_full_and_repeatable() -> None:
    histogram = read_histogram(PUBLISHED)
    for seed in range(20):
        row = histogram.draw_row(np.random.default_rng(seed), 65536, 16384)
        assert row.sum() == 65536 and row.min() >= 1 and row.max() <= 16384
        again = histogram.draw_row(np.random.default_rng(seed), 65536, 16384)
        assert row.tolist() == again.tolist()


def test_lengths_stay_in_their_bins() -> None:
    histogram = LengthHistogram(np.array([3, 10]), np.array([4, 12]), np.array([1, 1]))
    row = histogram.draw_row(np.random.default_rng(0), 10000)
    odd_ones = [n for n in row.tolist() if n not in (3, 4, 10, 11, 12)]
    assert len(odd_ones) <= 1  # the one that the row's end cuts
    assert {3, 4, 10, 11, 12} <= set(row.tolist())


def test_long_documents_come_in_pieces() -> None:
    histogram = LengthHistogram(np.array([25]), np.array([25]), np.array([1]))
    row = histogram.draw_row(np.random.default_rng(0), 100, 10)
    assert sorted(row.tolist()) == [5] * 4 + [10] * 8


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a,b\n1,2\n", "columns"),
        ("", "columns"),
        ("shortest,longest,documents\n", "three numbers"),
        ("shortest,longest,documents\n1,2\n", "something else|three numbers"),
        ("shortest,longest,documents\n1,x,3\n", "something else"),
        ("shortest,longest,documents\n3,2,1\n", "shortest <= longest"),
        ("shortest,longest,documents\n1,2,0\n", "no documents"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text(text, encoding="ascii")
    with pytest.raises(ValueError, match=match):
        read_histogram(path)


def test_missing_file_and_bad_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a file"):
        read_histogram(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="row_length=0"):
        read_histogram(PUBLISHED).draw_row(np.random.default_rng(0), 0)
