"""The prefetching thread, and reads that fail for a while."""

import logging
import os
import threading
import time

import numpy as np
import pytest

from lclm.data import retry
from lclm.data.indexed import IndexedReader
from lclm.data.prefetch import Prefetcher
from lclm.data.stage_rows import StageRows
from tests.data_fixtures import mixture_entry


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_items_are_made_ahead_in_order_and_no_further():
    made = []

    def items():
        for number in range(10):
            made.append((number, threading.current_thread().name))
            yield number

    with Prefetcher(items(), 2) as ready:
        wait_for(lambda: len(made) == 3)
        time.sleep(0.05)
        assert len(made) == 3, "two ready and one in the thread's hand"
        assert next(ready) == 0
        wait_for(lambda: len(made) == 4)
        assert list(ready) == list(range(1, 10))
        with pytest.raises(StopIteration):
            next(ready)
    assert {name for _, name in made} == {"lclm-prefetch"}


def test_an_exception_comes_in_its_place():
    def items():
        yield 1
        yield 2
        raise KeyError("broken row")

    with Prefetcher(items(), 5) as ready:
        assert [next(ready), next(ready)] == [1, 2]
        for _ in range(2):
            with pytest.raises(KeyError, match="broken row"):
                next(ready)


def test_leaving_early_ends_the_thread():
    before = threading.active_count()
    with Prefetcher(iter(range(10**9)), 1) as ready:
        assert next(ready) == 0
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="at least 1"):
        Prefetcher(iter([]), 0)


@pytest.fixture
def flaky(monkeypatch):
    """os.pread that fails `left` times more."""
    state = {"left": 0, "calls": 0}
    real = os.pread

    def pread(*arguments):
        state["calls"] += 1
        if state["left"]:
            state["left"] -= 1
            raise OSError(5, "Input/output error")
        return real(*arguments)

    monkeypatch.setattr(retry.os, "pread", pread)
    monkeypatch.setattr(retry, "WAITS", (0.001, 0.002))
    return state


def test_reads_are_tried_again_and_then_name_the_file(write_prefix, flaky, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("lclm"), "propagate", True)
    reader = IndexedReader(write_prefix("a", [5, 4]))
    flaky["left"] = 2
    assert reader.read(1).tolist() == [6, 7, 8, 9] and flaky["calls"] == 3
    assert caplog.text.count("trying again in") == 2
    flaky["left"] = 3
    with pytest.raises(OSError, match=r"a\.bin: bytes \[20, 36\) cannot be read, even after"):
        reader.read(1)


def test_a_slow_read_is_named(write_prefix, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("lclm"), "propagate", True)
    reader = IndexedReader(write_prefix("a", [5, 4]))
    reader.read(1)
    assert not caplog.records
    monkeypatch.setattr(retry, "SLOW_SECONDS", 0.0)
    reader.read(1)
    assert "a.bin: bytes [20, 36) took 0.0 s to read" in caplog.text


def test_a_file_cut_short_under_way_is_named(write_prefix, flaky):
    prefix = write_prefix("a", [5, 4])
    reader = IndexedReader(prefix)
    os.truncate(f"{prefix}.bin", 30)
    with pytest.raises(OSError, match="the file ends 6 bytes too early"):
        reader.read(1)


def test_lengths_without_tokens(write_prefix):
    prefix = write_prefix("a", [7, 20, 3, 9, 30, 5])
    for packing in ("concat", "best-fit"):
        rows = StageRows([mixture_entry(prefix, packing, 0, 1.0)], 16, 4, 3)
        for number in range(4):
            lengths = rows.attention_lengths(number)
            assert lengths.tolist() == rows.row(number).doc_lengths.tolist()
            assert lengths.dtype == np.int64
