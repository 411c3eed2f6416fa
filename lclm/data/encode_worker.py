"""One unit of input to one part of tokens: what a worker process of `encode` does.

A part is three kinds of file in the folder of the unfinished work: `part-N-K.bin` (tokens of key
number K), `part-N-K.len` (int32, tokens of each document, 0 for one without) and `part-N.json`,
written last under its name: where it stands, the part is complete.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from lclm.data.documents import read_unit
from lclm.data.fast import Encoder, Library
from lclm.data.indexed import dtype_for_vocab, temporary_name
from lclm.data.readers import Problem, Unit

__all__ = ["EncodeOptions", "Part", "Worker", "WorkerState", "encode_in_worker", "start_worker"]

BATCH_CHARS = 1 << 20  # characters handed to the tokenizer at once, unless one text is longer
BATCH_TEXTS = 1024
WRITE_BYTES = 1 << 20  # buffer of a part's file
PARENT_SECONDS = 1.0


@dataclass(frozen=True)
class EncodeOptions:
    """How documents become tokens."""

    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    prepend_bos: bool = False
    on_error: Literal["stop", "skip"] = "stop"
    num_workers: int = 1
    min_tokens: int = 0  # documents of fewer are left out; special tokens do not count
    max_tokens: int = 0  # documents of more are left out; 0: no limit
    library: Library = "auto"
    shard: tuple[int, int] = (0, 1)  # number and count


@dataclass(frozen=True)
class WorkerState:
    """What every worker needs; picklable."""

    tokenizer_path: str
    vocab_size: int
    eod_id: int | None
    bos_id: int | None
    plain_json_file: str  # for gigatoken; empty: the ordinary library
    options: EncodeOptions
    folder: str


@dataclass
class Part:
    """What one unit gave, beside its tokens."""

    num_lines: int = 0
    num_short: int = 0  # documents left out by min_tokens, over all keys
    num_long: int = 0
    problems: list[Problem] = field(default_factory=list)

    def save(self, path: str) -> None:
        """Write it under its name in one step."""
        problems = [[str(p.path), p.line, p.reason, p.is_binary] for p in self.problems]
        text = json.dumps([self.num_lines, self.num_short, self.num_long, problems])
        name = temporary_name(path)
        Path(name).write_text(text, encoding="utf-8")
        os.replace(name, path)

    @staticmethod
    def load(path: str) -> "Part":
        """Read what `save` wrote."""
        lines, short, long, problems = json.loads(Path(path).read_text(encoding="utf-8"))
        return Part(lines, short, long, [Problem(Path(p[0]), *p[1:]) for p in problems])


def part_file(folder: str, number: int, key: int | None, ending: str) -> str:
    """Path of one file of a part."""
    suffix = "" if key is None else f"-{key}"
    return os.path.join(folder, f"part-{number:09d}{suffix}{ending}")


class Worker:
    """State of one worker process."""

    def __init__(self, state: WorkerState) -> None:
        self._state = state
        self._dtype = dtype_for_vocab(state.vocab_size)
        plain = state.plain_json_file
        plain_json = Path(plain).read_text(encoding="utf-8") if plain else None
        self._encoder = Encoder(state.tokenizer_path, self._dtype, plain_json)
        options = state.options
        self._before = self._special(state.bos_id if options.prepend_bos else None)
        self._after = self._special(state.eod_id if options.append_eod else None)
        self._num_special = int(options.prepend_bos) + int(options.append_eod)

    def _special(self, token: int | None) -> bytes:
        return b"" if token is None else np.array([token], self._dtype).tobytes()

    def encode(self, number: int, unit: Unit) -> None:
        """Encode unit `number` into its part; on an error nothing is left."""
        part = Part()
        with contextlib.ExitStack() as stack:
            names, files = [], []
            for key in range(len(self._state.options.json_keys)):
                name = part_file(self._state.folder, number, key, ".bin")
                names.append(name)
                files.append(stack.enter_context(open(temporary_name(name), "wb", WRITE_BYTES)))
            lengths: list[list[int]] = [[] for _ in files]
            for batch in self._batches(unit, part):
                self._write(batch, part, files, lengths)
        for name, key_lengths in zip(names, lengths):
            lengths_name = name.removesuffix(".bin") + ".len"
            np.array(key_lengths, np.int32).tofile(temporary_name(lengths_name))
            os.replace(temporary_name(lengths_name), lengths_name)
            os.replace(temporary_name(name), name)
        part.save(part_file(self._state.folder, number, None, ".json"))

    def _batches(self, unit: Unit, part: Part) -> Iterator[list[tuple[str, ...]]]:
        batch: list[tuple[str, ...]] = []
        num_chars = 0
        for item in read_unit(unit, self._state.options.json_keys):
            part.num_lines += 1
            if isinstance(item, Problem):
                part.problems.append(item)
                if self._state.options.on_error == "stop" and not item.is_binary:
                    break
            elif item is not None:
                batch.append(item)
                num_chars += sum(len(text) for text in item)
            if num_chars >= BATCH_CHARS or len(batch) >= BATCH_TEXTS:
                yield batch
                batch, num_chars = [], 0
        if batch:
            yield batch

    def _write(
        self,
        batch: list[tuple[str, ...]],
        part: Part,
        files: list[BinaryIO],
        lengths: list[list[int]],
    ) -> None:
        options = self._state.options
        for key, file in enumerate(files):
            for ids in self._encoder.encode([texts[key] for texts in batch]):
                if len(ids) < options.min_tokens:
                    part.num_short += 1
                elif options.max_tokens and len(ids) > options.max_tokens:
                    part.num_long += 1
                elif len(ids) == 0:
                    # Megatron's rule: a document without tokens gets no end-of-document either
                    lengths[key].append(0)
                else:
                    file.write(self._before)
                    file.write(ids.data)
                    file.write(self._after)
                    lengths[key].append(len(ids) + self._num_special)


_worker: Worker | None = None  # of this process, when it is one of the pool


def start_worker(state: WorkerState) -> None:
    """Prepare this process of a pool."""
    global _worker
    # one process per core is the parallelism; threads inside each would only compete
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    _worker = Worker(state)


def _end_with_parent(parent: int) -> None:
    """A killed parent cannot end its pool, and the pool's queues stay open for ever."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)


def encode_in_worker(number: int, unit: Unit) -> None:
    """`Worker.encode` in a process of the pool."""
    assert _worker is not None, "the pool's initializer ran"
    _worker.encode(number, unit)
