"""A run folder belongs to one run at a time."""

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lclm.config import ConfigError
from lclm.files import lock_file

LOCK_NAME = "run.lock"

logger = logging.getLogger(__name__)


@contextmanager
def hold_run_folder(path: Path) -> Iterator[None]:
    """Make a run folder and hold it, by a lock that ends with the process at the latest.

    For rank 0. The lock file says who holds it; it is empty while nobody does.

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
        file = lock_file(lock, wait=False)
    except BlockingIOError as error:
        holder = lock.read_text(encoding="utf-8")
        raise ConfigError(
            f"run.dir({path}): is in use by the run {holder or 'that is just starting'}; wait for "
            "its end, end it, or give another run.dir"
        ) from error
    with file:
        file.seek(0)
        before = file.read().decode()
        if before:
            logger.warning("%s: its run %s ended without a word; taken over", path, before)
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
