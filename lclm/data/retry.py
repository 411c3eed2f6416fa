"""Reads with retries: file systems and networks sometimes fail for a few seconds."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
WAITS = (0.5, 2.0, 8.0, 30.0)  # seconds before each retry
SLOW_SECONDS = 10.0  # reads that take longer are logged
logger = logging.getLogger(__name__)


def try_again(
    action: Callable[[], T],
    problem: str,
    errors: type[Exception] = OSError,
    final: tuple[type[Exception], ...] = (),
) -> T:
    """What action returns, tried again after each of WAITS while it raises one of errors.

    Args:
        action: may be called several times.
        problem: names what is read and says that it cannot be, for messages.
        errors: those worth a retry.
        final: those not worth one; raised unchanged.

    Raises:
        OSError: every try failed; starts with problem.
    """
    for wait in (*WAITS, None):
        try:
            return action()
        except final:
            raise
        except errors as error:
            if wait is None:
                raise OSError(
                    f"{problem}, even after {len(WAITS)} retries ({error}); check the file and its "
                    "file system"
                ) from error
            logger.warning("%s (%s); trying again in %g s", problem, error, wait)
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


class RetryingFile:
    """A file read by position, safe from several threads.

    Not memory-mapped: a failing read of a mapped file ends the process by SIGBUS and names nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  open while the object lives

    def read(self, start: int, num_bytes: int) -> bytes:
        """Bytes [start, start + num_bytes); a slow read is logged.

        Raises:
            OSError: every try failed or gave fewer bytes; names the file.
        """
        where = f"{self.path}: bytes [{start}, {start + num_bytes})"
        began = time.perf_counter()
        data = try_again(lambda: self._read_once(start, num_bytes), f"{where} cannot be read")
        seconds = time.perf_counter() - began
        if seconds > SLOW_SECONDS:
            logger.warning("%s took %.1f s to read", where, seconds)
        return data

    def _read_once(self, start: int, num_bytes: int) -> bytes:
        parts = []
        while num_bytes:
            part = os.pread(self._file.fileno(), num_bytes, start)
            if not part:
                raise OSError(f"the file ends {num_bytes} bytes too early")
            parts.append(part)
            start += len(part)
            num_bytes -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
