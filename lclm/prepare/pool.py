"""Worker processes that encode units and write their tokens where they belong.

All write into the same files. Where a unit's tokens start is known once the units before it are
encoded; `Places` passes that on from process to process, so tokens are written once, by the process
that made them.
"""

import concurrent.futures
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.context import SpawnContext
from typing import TypeVar

from lclm.prepare.readers import Unit
from lclm.prepare.resume import Unfinished, write_tokens
from lclm.prepare.worker import Encoded, Worker, WorkerState

UNITS_AHEAD = 3  # per worker, handed out before the oldest result is needed
PARENT_SECONDS = 1.0
Future = TypeVar("Future")


class Places:
    """The end of what is written so far, given to one unit after the other; shared by processes."""

    def __init__(self, context: SpawnContext, first_unit: int, ends: Sequence[int]) -> None:
        self._turn = context.Condition()
        self._unit = context.RawValue("q", first_unit)
        self._ends = context.RawArray("q", list(ends))

    def take(self, number: int, sizes: Sequence[int]) -> list[int]:
        """Wait for the unit's turn; the byte at which each column's tokens start."""
        with self._turn:
            self._turn.wait_for(lambda: self._unit.value == number)
            starts = list(self._ends)
            self._ends[:] = [start + size for start, size in zip(starts, sizes, strict=True)]
            self._unit.value += 1
            self._turn.notify_all()
        return starts


_worker: Worker | None = None  # of this process of a pool
_places: Places | None = None


def encode_in_pool(
    units: Iterable[Unit], state: WorkerState, num_workers: int, work: Unfinished
) -> Iterator[tuple[Unit, Encoded]]:
    """Encode units by several processes.

    Args:
        units: those after the ones that `work` holds already.
        state: for the workers.
        num_workers: processes.
        work: into whose files tokens are written.

    Yields:
        The units in order and what they gave, their tokens written.

    Raises:
        concurrent.futures.process.BrokenProcessPool: a worker died.
    """
    # spawn: a forked child would inherit the tokenizer library's threads half alive
    context = multiprocessing.get_context("spawn")
    places = Places(context, work.state.units, work.state.token_bytes)
    numbers = itertools.count(work.state.units)
    with concurrent.futures.ProcessPoolExecutor(
        num_workers, context, _start_worker, (state, places)
    ) as pool:
        try:
            submit = lambda unit: pool.submit(_encode, next(numbers), unit, work.folder)  # noqa: E731
            for unit, future in submit_ahead(units, submit, num_workers):
                yield unit, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def submit_ahead(
    units: Iterable[Unit], submit: Callable[[Unit], Future], num_workers: int
) -> Iterator[tuple[Unit, Future]]:
    """Units in order and what `submit` returns for each, UNITS_AHEAD per worker under way."""
    waiting: deque[tuple[Unit, Future]] = deque()
    for unit in units:
        waiting.append((unit, submit(unit)))
        if len(waiting) >= num_workers * UNITS_AHEAD:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def _start_worker(state: WorkerState, places: Places) -> None:
    global _worker, _places
    # Ctrl-C reaches every process; the first one ends the others, who finish the unit they are at
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    _worker, _places = Worker(state), places


def _end_with_parent(parent: int) -> None:
    """A killed parent cannot end its pool, and the pool's queues never close."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)


def _encode(number: int, unit: Unit, folder: str) -> Encoded:
    """Encode a unit in a process of the pool and write its tokens."""
    assert _worker is not None and _places is not None, "the pool's initializer ran"
    sizes = [0] * len(_worker.dtypes)
    try:
        done = _worker.encode(unit)
        sizes = done.num_bytes
    finally:
        starts = _places.take(number, sizes)  # also after an error: others wait for their turn
    for column, start in enumerate(starts):
        write_tokens(folder, column, start, done.tokens[column])
        done.tokens[column] = done.tokens[column][:0]
    return done
