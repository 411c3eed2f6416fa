"""A run folder belongs to one run at a time."""

import json
import logging
import os
import socket
from pathlib import Path
from types import TracebackType

from lclm.config import ConfigError
from lclm.files import lock_file

LOCK_NAME = "run.lock"

logger = logging.getLogger(__name__)


class RunFolder:
    """Makes a run folder and holds it, by a lock that ends with the process at the latest.

    A context manager of rank 0. The lock file says who holds it; it is empty while nobody does.
    """

    def __init__(self, path: Path) -> None:
        """Take the folder.

        Raises:
            ConfigError: another process holds it, or a part of it is a file.
            OSError: it cannot be made.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ConfigError(
                f"run.dir({path}): a part of it is a file ({error}); give another folder"
            ) from error
        lock = path / LOCK_NAME
        try:
            self._file = lock_file(lock, wait=False)
        except BlockingIOError as error:
            holder = lock.read_text(encoding="utf-8")
            raise ConfigError(
                f"run.dir({path}): is in use by the run {holder or 'that is just starting'}; wait "
                "for its end, end it, or give another run.dir"
            ) from error
        self._file.seek(0)
        before = self._file.read().decode()
        if before:
            logger.warning("%s: its run %s ended without a word; taken over", path, before)
        self._file.truncate(0)
        holder = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
        self._file.write(holder.encode())
        self._file.flush()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.truncate(0)
        self._file.close()
