"""One unit of input to tokens: what a worker process of `encode` does."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lclm.data.indexed import dtype_for_vocab
from lclm.data.tokenizer import load_tokenizer
from lclm.prepare.chat import ChatOptions, ChatTemplate, check_conversation
from lclm.prepare.documents import read_records, read_unit
from lclm.prepare.gigatoken import Encoder, Library
from lclm.prepare.readers import Problem, Unit

BATCH_CHARS = 1 << 18  # characters handed to the tokenizer at once, unless one text is longer
BATCH_TEXTS = 1024


# of a field that changes how the work is done but no byte of its output
HOW = {"decides_output": False}
VERSION = 2  # raised when the same inputs give other tokens


@dataclass(frozen=True)
class EncodeOptions:
    """How documents become tokens."""

    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    prepend_bos: bool = False
    on_error: Literal["stop", "skip"] = "stop"
    num_workers: int = field(default=1, metadata=HOW)
    min_tokens: int = 0  # documents of fewer are left out; special tokens do not count
    max_tokens: int = 0  # documents of more are left out; 0: no limit
    library: Library = field(default="auto", metadata=HOW)
    shard: tuple[int, int] = (0, 1)  # number and count
    chat: ChatOptions | None = None  # the input holds conversations, under the one json key
    # ray: num_workers is the cluster's affair
    engine: Literal["local", "ray"] = field(default="local", metadata=HOW)


@dataclass(frozen=True)
class WorkerState:
    """What every worker needs, and so all but the input that decides the output; picklable."""

    tokenizer_path: str = field(metadata=HOW)
    tokenizer_files: tuple[tuple[str, str], ...]  # name and SHA-256 of each
    vocab_size: int
    before: tuple[int, ...]  # ids put before and behind every document
    after: tuple[int, ...]
    options: EncodeOptions
    plain_json_file: str = field(default="", metadata=HOW)  # gigatoken; empty: ordinary library
    version: int = VERSION


def what_decides(value: Any) -> Any:
    """A dataclass as a dict for JSON, without the fields that change no byte of the output."""
    if not is_dataclass(value):
        return value
    kept = [item.name for item in fields(value) if item.metadata.get("decides_output", True)]
    return {name: what_decides(getattr(value, name)) for name in kept}


@dataclass
class Encoded:
    """What one unit gave; lists have one element per column.

    The columns are the tokens of each key, or the tokens of conversations and, uint8, whether each
    is a target.
    """

    tokens: list[np.ndarray]  # of its documents, valid until the worker's next unit; empty: written
    lengths: list[np.ndarray]  # int32, tokens of every document, 0 for one without
    num_bytes: list[int]  # of all tokens
    num_lines: int = 0
    num_short: int = 0  # documents left out by min_tokens, over all columns
    num_long: int = 0
    problems: list[Problem] = field(default_factory=list)


class Worker:
    """Encodes units; one per process."""

    def __init__(self, state: WorkerState) -> None:
        # one process per core is the parallelism; threads inside each would only compete
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        os.environ["RAYON_NUM_THREADS"] = "1"
        self._options = options = state.options
        plain = state.plain_json_file
        plain_json = Path(plain).read_text(encoding="utf-8") if plain else None
        self._before, self._after = np.array(state.before, int), np.array(state.after, int)
        if options.chat is None:
            self._encoder = Encoder(state.tokenizer_path, plain_json)
        else:
            self._chat = ChatTemplate(options.chat, load_tokenizer(state.tokenizer_path))
        self.dtypes = column_dtypes(options, state.vocab_size)
        # tokens of a unit; kept from unit to unit, because fresh memory costs more than writing it
        self._rooms = [np.empty(0, dtype) for dtype in self.dtypes]

    def encode(self, unit: Unit) -> Encoded:
        """The tokens of a unit."""
        done = Encoded([], [], [])
        lengths: list[list[int]] = [[] for _ in self._rooms]
        pieces: list[list[np.ndarray]] = [[] for _ in self._rooms]
        if self._options.chat is None:
            for batch in self._batches(unit, done):
                for key in range(len(self._rooms)):
                    texts = [texts[key] for texts in batch]
                    self._encode_texts(texts, pieces[key], lengths[key], done)
        else:
            self._encode_conversations(unit, pieces, lengths, done)
        for column, size in enumerate(map(sum, lengths)):
            if size > len(self._rooms[column]):
                self._rooms[column] = np.empty(2 * size, self.dtypes[column])
            done.tokens.append(self._rooms[column][:size])
            if size:
                np.concatenate(pieces[column], out=done.tokens[column], casting="unsafe")
        done.lengths = [np.array(item, np.int32) for item in lengths]
        done.num_bytes = [tokens.nbytes for tokens in done.tokens]
        return done

    def _batches(self, unit: Unit, done: Encoded) -> Iterator[list[tuple[str, ...]]]:
        batch: list[tuple[str, ...]] = []
        num_chars = 0
        for item in read_unit(unit, self._options.json_keys):
            done.num_lines += 1
            if isinstance(item, Problem):
                done.problems.append(item)
                if self._options.on_error == "stop" and not item.is_binary:
                    break
            elif item is not None:
                batch.append(item)
                num_chars += sum(map(len, item))
                if num_chars >= BATCH_CHARS or len(batch) >= BATCH_TEXTS:
                    yield batch
                    batch, num_chars = [], 0
        if batch:
            yield batch

    def _encode_texts(
        self, texts: Sequence[str], pieces: list[np.ndarray], lengths: list[int], done: Encoded
    ) -> None:
        """Append the tokens of the texts that are kept, and how many each has."""
        before, after = self._before, self._after
        for ids in self._encoder.encode(texts):
            size = len(ids)
            if not self._is_kept(size, done):
                continue
            if size == 0:
                # Megatron's rule: a document without tokens gets no end-of-document either
                lengths.append(0)
            else:
                pieces += (before, ids, after)
                lengths.append(len(before) + size + len(after))

    def _is_kept(self, size: int, done: Encoded) -> bool:
        """Whether a document is neither too short nor too long; counted otherwise."""
        low, high = self._options.min_tokens, self._options.max_tokens
        if size < low:
            done.num_short += 1
        elif high and size > high:
            done.num_long += 1
        else:
            return True
        return False

    def _encode_conversations(
        self, unit: Unit, pieces: list[list[np.ndarray]], lengths: list[list[int]], done: Encoded
    ) -> None:
        """Append tokens and targets of the conversations of a unit."""
        for item in read_records(unit):
            done.num_lines += 1
            if item is None:
                continue
            if not isinstance(item, Problem):
                try:
                    talk = check_conversation(item, self._options.json_keys[0])
                    columns = self._chat.encode(talk)
                except ValueError as error:
                    assert unit.path is not None, "conversations do not come from whole files"
                    item = Problem(unit.path, done.num_lines, str(error))
            if isinstance(item, Problem):
                done.problems.append(item)
                if self._options.on_error == "stop":
                    break
            elif self._is_kept(len(columns[0]), done):
                for column, values in enumerate(columns):
                    pieces[column].append(np.array(values))
                    lengths[column].append(len(values))


def column_dtypes(options: EncodeOptions, vocab_size: int) -> list[np.dtype]:
    """Of the columns of `Encoded`."""
    if options.chat is not None:
        return [dtype_for_vocab(vocab_size), np.dtype(np.uint8)]
    return [dtype_for_vocab(vocab_size)] * len(options.json_keys)
