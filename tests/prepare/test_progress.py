"""Progress: a bar on a terminal, plain lines in a log."""

import logging
import sys

import pytest

from lclm.prepare import progress
from lclm.prepare.progress import Progress


@pytest.fixture
def lines(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("lclm"), "propagate", True)
    caplog.set_level(logging.INFO, logger="lclm.prepare")
    return caplog


def test_plain_lines_in_a_log(monkeypatch, lines, capsys):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    with Progress("books", 200) as bar:
        bar.add(50, "3 docs")
        bar.add(150, "9 docs")
    assert [record.message.split(",")[0] for record in lines.records] == [
        "books: 25 % of input",
        "books: 100 % of input",
    ]
    assert "9 docs" in lines.records[1].message
    assert capsys.readouterr().err == ""


def test_lines_come_now_and_then(lines):
    with Progress("books", 200) as bar:
        for _ in range(200):
            bar.add(1)
    assert lines.records == []


def test_a_bar_on_a_terminal(monkeypatch, lines, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("books", 200) as bar:
        bar.add(200, "9 docs")
    written = capsys.readouterr().err
    assert "books: 100%" in written and "9 docs" in written
    assert lines.records == []
