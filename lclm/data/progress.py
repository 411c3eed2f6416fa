"""How far a tool has come: a bar on a terminal, a line now and then in a log."""

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

__all__ = ["Progress"]

LOG_SECONDS = 10.0
_LOG = logging.getLogger("lclm.data")


class Progress:
    """Counts bytes of input; use as a context manager."""

    def __init__(self, label: str, total_bytes: int) -> None:
        self._label = label
        self._total = total_bytes
        self._done = 0
        self._start = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_bytes, desc=label, unit="B", unit_scale=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, num_bytes: int, note: str = "") -> None:
        """Report num_bytes more of input, with a few words of what came of them so far."""
        self._done += num_bytes
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(num_bytes)
            return
        now = time.monotonic()
        if now - self._last >= LOG_SECONDS:
            self._last = now
            share = 100 * self._done / max(self._total, 1)
            rate = self._done / (now - self._start) / 1e6
            _LOG.info("%s: %.0f %% of input, %.1f MB/s, %s", self._label, share, rate, note)
