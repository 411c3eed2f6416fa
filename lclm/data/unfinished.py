"""The folder `<prefix>.unfinished` of work that can go on after a kill.

    state.json       how far the parts are joined: written in one step after each
    tokens-K         tokens of key number K, all parts so far
    lengths-K        int32, tokens of every document so far, 0 for one without
    part-*           parts that are complete but not joined yet (see encode_worker)

Joining appends to tokens-K and lengths-K, then writes state.json. Whatever a killed run appended
beyond state.json is cut off by the next.
"""

import fcntl
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np

from lclm.data.encode_worker import Part, part_file
from lclm.data.indexed import COPY_BYTES, temporary_name

__all__ = ["State", "Unfinished"]


@dataclass
class State:
    """How far the work has come; everything in it counts what is joined."""

    inputs: str = ""  # hash of all that decides the output
    parts: int = 0
    bytes_read: int = 0  # of input on disk
    token_bytes: list[int] = field(default_factory=list)  # per key
    length_bytes: list[int] = field(default_factory=list)
    tokens: int = 0  # over all keys
    documents: list[int] = field(default_factory=list)  # per source, of the first key
    empty: int = 0
    skipped: int = 0
    binary: int = 0
    short: int = 0
    long: int = 0
    named: list[str] = field(default_factory=list)
    file: list[str] = field(default_factory=list)  # source and path of the last unit
    lines: int = 0  # of that file so far
    is_complete: bool = False  # only the renaming is left


class Unfinished:
    """The folder, held by one process; use as a context manager.

    Attributes:
        state: of this work; what an earlier run left, or new.
        has_resumed: whether an earlier run's work goes on.
        was_discarded: whether an earlier run's work was of other inputs and is gone.
    """

    def __init__(self, prefix: str, inputs: str, num_keys: int, num_sources: int) -> None:
        self.folder = f"{prefix}.unfinished"
        self._num_keys = num_keys
        new = State(inputs, token_bytes=[0] * num_keys, length_bytes=[0] * num_keys)
        new.documents = [0] * num_sources
        self.state = new
        self.has_resumed = self.was_discarded = False

    def __enter__(self) -> "Unfinished":
        """Take the folder.

        Raises:
            ValueError: another process works in it.
        """
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        self._lock = open(self._path("lock"), "wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ValueError(
                f"{self.folder}: another process is writing this prefix; wait for it, or give "
                "another --output-prefix"
            ) from error
        earlier = Path(self._path("state.json"))
        if earlier.is_file():
            state = State(**json.loads(earlier.read_text(encoding="utf-8")))
            self.has_resumed = state.inputs == self.state.inputs
            self.was_discarded = not self.has_resumed
            if self.has_resumed:
                self.state = state
        for path in Path(self.folder).iterdir():
            is_part = path.name.startswith("part-") and ".tmp-" not in path.name
            if path.name != "lock" and not (
                self.has_resumed and (is_part or path.name.startswith(("tokens-", "lengths-")))
            ):
                path.unlink()
        for key in range(self._num_keys):
            for name, size in (
                (f"tokens-{key}", self.state.token_bytes[key]),
                (f"lengths-{key}", self.state.length_bytes[key]),
            ):
                if not (self.state.is_complete and not os.path.exists(self._path(name))):
                    with open(self._path(name), "ab") as file:
                        file.truncate(size)
        self.save()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.close()

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def save(self) -> None:
        """Write state.json in one step."""
        name = temporary_name(self._path("state.json"))
        Path(name).write_text(json.dumps(asdict(self.state)), encoding="utf-8")
        os.replace(name, self._path("state.json"))

    def has_part(self, number: int) -> bool:
        """Whether an earlier run completed this part."""
        return os.path.isfile(part_file(self.folder, number, None, ".json"))

    def join(self, number: int) -> tuple[Part, list[np.ndarray]]:
        """Append a part; its report and the lengths of its documents, int32, per key.

        `remove_part` follows once the state is saved.
        """
        part = Part.load(part_file(self.folder, number, None, ".json"))
        every = []
        for key in range(self._num_keys):
            lengths = np.fromfile(part_file(self.folder, number, key, ".len"), np.int32)
            every.append(lengths)
            with (
                open(part_file(self.folder, number, key, ".bin"), "rb") as source,
                open(self._path(f"tokens-{key}"), "ab") as target,
            ):
                shutil.copyfileobj(source, target, COPY_BYTES)
                self.state.token_bytes[key] = target.tell()
            with open(self._path(f"lengths-{key}"), "ab") as target:
                target.write(lengths.tobytes())
                self.state.length_bytes[key] = target.tell()
        return part, every

    def remove_part(self, number: int) -> None:
        """Remove the files of a part that is joined."""
        for key in range(self._num_keys):
            for ending in (".bin", ".len"):
                Path(part_file(self.folder, number, key, ending)).unlink()
        Path(part_file(self.folder, number, None, ".json")).unlink()

    def tokens(self, key: int) -> Path:
        """The file of all tokens of a key."""
        return Path(self._path(f"tokens-{key}"))

    def lengths(self, key: int) -> np.ndarray:
        """int32, tokens of every document of a key; memory-mapped."""
        path = self._path(f"lengths-{key}")
        return np.memmap(path, np.int32, "r") if os.path.getsize(path) else np.empty(0, np.int32)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)
