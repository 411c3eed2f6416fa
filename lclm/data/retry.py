"""Reads that are tried again: file systems of clusters fail now and then, for seconds."""

import logging
import os
import time
from pathlib import Path

__all__ = ["RetryingFile"]

WAITS = (0.5, 2.0, 8.0, 30.0)  # seconds before each further try
_LOG = logging.getLogger("lclm.data")


class RetryingFile:
    """A file read by position, safe from several threads.

    Not memory-mapped: a failing read of a mapped file ends the process by SIGBUS, unnamed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  open as long as the object

    def read(self, start: int, num_bytes: int) -> bytes:
        """Bytes [start, start + num_bytes).

        Raises:
            OSError: every try failed or gave fewer bytes; names the file.
        """
        for wait in (*WAITS, None):
            try:
                return self._read_once(start, num_bytes)
            except OSError as error:
                at = f"{self.path}: bytes [{start}, {start + num_bytes}) cannot be read"
                if wait is None:
                    raise OSError(
                        f"{at}, also not when tried {len(WAITS)} times again ({error}); check the "
                        "file and its file system"
                    ) from error
                _LOG.warning("%s (%s); trying again in %g s", at, error, wait)
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")

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
