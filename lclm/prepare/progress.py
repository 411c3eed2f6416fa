"""How far a tool has come: a bar on a terminal, a line now and then in a log."""

import logging
import sys
import time

from tqdm import tqdm

LOG_SECONDS = 10.0
logger = logging.getLogger(__name__)


class Progress:
    """Counts bytes of input; use as a context manager."""

    def __init__(self, label: str, total_bytes: int, done_bytes: int = 0) -> None:
        """Start at done_bytes, which an earlier run did: they count as done, not in the speed."""
        self._label = label
        self._total = total_bytes
        self._before = self._done = done_bytes
        self._start = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total_bytes, initial=done_bytes, desc=label, unit="B", unit_scale=True
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *raised: object) -> None:
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
            rate = max(self._done - self._before, 1) / max(now - self._start, 1e-9)
            left = format_seconds((self._total - self._done) / rate)
            speed = f"{rate / 1e6:.1f} MB/s"
            logger.info(
                "%s: %.0f %% of input, %s, %s left, %s", self._label, share, speed, left, note
            )


def format_seconds(seconds: float) -> str:
    """A duration as 42 s, 3 min 20 s or 2 h 05 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
