"""The folder `<prefix>.unfinished` of work that can go on after a kill.

    state.json       how far the work has come: written in one step after each unit of input
    tokens-K         tokens of column number K (of `Encoded`)
    lengths-K        int32, tokens of every document so far, 0 for one without

What is in the two files beyond the sizes in state.json is of units that were not done when the run
was killed; the next run cuts it off.
"""

import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from lclm.files import lock_file, replace_files
from lclm.prepare.worker import Encoded

logger = logging.getLogger(__name__)


@dataclass
class EncodeSummary:
    """What came out of it so far."""

    prefixes: list[str] = field(default_factory=list)
    num_documents: int = 0  # with tokens, of the first column
    num_empty: int = 0
    num_tokens: int = 0  # over all keys
    num_skipped: int = 0  # lines and files left out because of --on-error skip
    num_binary: int = 0  # files of folders that are not text
    num_short: int = 0  # documents left out by min_tokens
    num_long: int = 0  # and by max_tokens
    named: list[str] = field(default_factory=list)  # the first skipped lines and binary files


@dataclass
class State(EncodeSummary):
    """How far the work has come; everything in it counts what is joined."""

    inputs: str = ""  # hash of all that decides the output
    units: int = 0  # of input
    bytes_read: int = 0  # of input on disk
    token_bytes: list[int] = field(default_factory=list)  # per column
    length_bytes: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)  # per source, of the first column
    file: list[str] = field(default_factory=list)  # source and path of the last unit
    lines: int = 0  # of that file so far
    is_complete: bool = False  # only the renaming is left


class Unfinished:
    """The folder, held by one process; use as a context manager.

    Attributes:
        state: of this work; what an earlier run left, or new.
    """

    def __init__(self, folder: str, new: State) -> None:
        """Prepare it; `new` is the state of work that has not begun."""
        self.folder = folder
        self.state = new

    def __enter__(self) -> "Unfinished":
        """Take the folder.

        Raises:
            ValueError: another process works in it.
        """
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        try:
            self._lock = lock_file(Path(self._path("lock")), wait=False)
        except BlockingIOError as error:
            raise ValueError(
                f"{self.folder}: another process is writing this prefix; wait for it, or give "
                "another --output-prefix"
            ) from error
        earlier = Path(self._path("state.json"))
        has_resumed = earlier.is_file() and self._resume(earlier)
        for path in Path(self.folder).iterdir():
            is_held = has_resumed and path.name.startswith(("tokens-", "lengths-"))
            if path.name != "lock" and not is_held:
                path.unlink()
        for name, size in self._sizes(self.state).items():
            if not self.state.is_complete or os.path.exists(self._path(name)):
                with open(self._path(name), "ab") as file:
                    file.truncate(size)
        self.save()
        return self

    def __exit__(self, *raised: object) -> None:
        self._lock.close()

    def _resume(self, earlier: Path) -> bool:
        """Whether what an earlier run left goes on."""
        try:
            state = State(**json.loads(earlier.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:  # after a power cut, or of another version
            logger.warning("%s: cannot be read (%s); started anew", earlier, error)
            return False
        if state.inputs != self.state.inputs or not self._holds(state):
            logger.warning("%s: held work on other inputs or options; started anew", self.folder)
            return False
        state.prefixes = self.state.prefixes
        self.state = state
        logger.info("%s: going on after %d units", self.folder, state.units)
        return True

    def _sizes(self, state: State) -> dict[str, int]:
        """Bytes of each file that a state stands for."""
        sizes = {"tokens": state.token_bytes, "lengths": state.length_bytes}
        return {f"{name}-{k}": size for name in sizes for k, size in enumerate(sizes[name])}

    def _holds(self, state: State) -> bool:
        """Whether the files hold what the state says; not so after a crash of the machine."""
        sizes = self._sizes(state)
        names = [name for name in sizes if os.path.exists(self._path(name))]
        # tokens that are complete may have got their final name already
        is_whole = state.is_complete or len(names) == len(sizes)
        return is_whole and all(os.path.getsize(self._path(name)) >= sizes[name] for name in names)

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def save(self) -> None:
        """Write state.json in one step."""
        with replace_files(Path(self._path("state.json"))) as (file,):
            file.write_text(json.dumps(asdict(self.state)), encoding="utf-8")

    def add(self, done: Encoded) -> None:
        """Append a unit; tokens that are not written yet are. `save` follows."""
        for column, tokens in enumerate(done.tokens):
            write_tokens(self.folder, column, self.state.token_bytes[column], tokens)
            self.state.token_bytes[column] += done.num_bytes[column]
            with open(self._path(f"lengths-{column}"), "ab") as file:
                file.write(done.lengths[column].tobytes())
                self.state.length_bytes[column] = file.tell()

    def tokens(self, column: int) -> Path:
        """The file of all tokens of a column."""
        return Path(self._path(f"tokens-{column}"))

    def lengths(self, column: int) -> np.ndarray:
        """int32, tokens of every document of a column; memory-mapped."""
        path = self._path(f"lengths-{column}")
        return np.memmap(path, np.int32, "r") if os.path.getsize(path) else np.empty(0, np.int32)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)


def write_tokens(folder: str, column: int, start: int, tokens: np.ndarray) -> None:
    """Write tokens into the file of a column, from byte `start` on."""
    if len(tokens):
        with open(os.path.join(folder, f"tokens-{column}"), "r+b") as file:
            file.seek(start)
            file.write(tokens.data)
