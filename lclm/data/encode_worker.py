"""One unit of input to tokens: what a worker process of `encode` does."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from lclm.data.documents import read_unit
from lclm.data.fast import Encoder, Library
from lclm.data.indexed import dtype_for_vocab
from lclm.data.readers import Problem, Unit

__all__ = ["EncodeOptions", "Encoded", "Worker", "WorkerState"]

BATCH_CHARS = 1 << 20  # characters handed to the tokenizer at once, unless one text is longer
BATCH_TEXTS = 1024


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


@dataclass
class Encoded:
    """What one unit gave; lists have one element per key."""

    tokens: list[list[np.ndarray]]  # of its documents, in order; empty lists once written to disk
    lengths: list[np.ndarray]  # int32, tokens of every document, 0 for one without
    num_bytes: list[int]  # of all tokens
    num_lines: int = 0
    num_short: int = 0  # documents left out by min_tokens, over all keys
    num_long: int = 0
    problems: list[Problem] = field(default_factory=list)


class Worker:
    """Encodes units; one per process."""

    def __init__(self, state: WorkerState) -> None:
        self._options = options = state.options
        self._dtype = dtype_for_vocab(state.vocab_size)
        plain = state.plain_json_file
        plain_json = Path(plain).read_text(encoding="utf-8") if plain else None
        self._encoder = Encoder(state.tokenizer_path, plain_json)
        self._before = _special(state.bos_id if options.prepend_bos else None)
        self._after = _special(state.eod_id if options.append_eod else None)
        self._num_special = len(self._before) + len(self._after)
        self.num_keys = len(options.json_keys)

    def encode(self, unit: Unit) -> Encoded:
        """The tokens of a unit."""
        keys = range(self.num_keys)
        done = Encoded([[] for _ in keys], [], [])
        lengths: list[list[int]] = [[] for _ in keys]
        for batch in self._batches(unit, done):
            for key in keys:
                pieces = self._encode_texts([texts[key] for texts in batch], lengths[key], done)
                if pieces:
                    # gigatoken gives uint32; ids lie in the vocabulary, so no bit is lost
                    joined = np.concatenate(pieces, dtype=self._dtype, casting="unsafe")
                    done.tokens[key].append(joined)
        done.lengths = [np.array(item, np.int32) for item in lengths]
        done.num_bytes = [sum(array.nbytes for array in arrays) for arrays in done.tokens]
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
        self, texts: Sequence[str], lengths: list[int], done: Encoded
    ) -> list[np.ndarray]:
        """Tokens of the texts that are kept, special tokens between them."""
        low, high = self._options.min_tokens, self._options.max_tokens
        pieces: list[np.ndarray] = []
        for ids in self._encoder.encode(texts):
            if len(ids) < low:
                done.num_short += 1
            elif high and len(ids) > high:
                done.num_long += 1
            elif len(ids) == 0:
                # Megatron's rule: a document without tokens gets no end-of-document either
                lengths.append(0)
            else:
                pieces += (*self._before, ids, *self._after)
                lengths.append(len(ids) + self._num_special)
        return pieces


def _special(token: int | None) -> list[np.ndarray]:
    return [] if token is None else [np.array([token], np.uint32)]
