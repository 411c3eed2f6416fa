"""Items made on a thread of their own, some in advance of whoever uses them."""

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
POLL_SECONDS = 0.1  # how often the thread looks whether it is still wanted


class Prefetcher(Generic[T]):
    """Reads an iterator on a thread, at most `ahead` items in advance; itself an iterator.

    What the iterator raises is raised by `next` in its place in the order. Use as a context
    manager: leaving it ends the thread.
    """

    def __init__(self, items: Iterator[T], ahead: int) -> None:
        """Start the thread.

        Args:
            items: read by the thread alone from now on.
            ahead: items kept ready beside the one being made, at least 1.
        """
        if ahead < 1:
            raise ValueError(f"prefetch: ahead({ahead}) must be at least 1")
        self._items = items
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(ahead)
        self._is_wanted = True
        self._end: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="lclm-prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        error: BaseException = StopIteration()
        try:
            for item in self._items:
                if not self._put((item, None)):
                    return
        except BaseException as raised:  # handed to whoever asks for the next item
            error = raised
        self._put((None, error))

    def _put(self, entry: tuple[T | None, BaseException | None]) -> bool:
        while self._is_wanted:
            try:
                self._ready.put(entry, timeout=POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> "Prefetcher[T]":
        return self

    def __next__(self) -> T:
        if self._end is not None:
            raise self._end
        item, error = self._ready.get()
        if error is not None:
            self._end = error
            raise error
        return item  # type: ignore[return-value]

    def __enter__(self) -> "Prefetcher[T]":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread; items that are ready are dropped."""
        self._is_wanted = False
        self._thread.join()
