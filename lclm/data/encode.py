"""Text files to indexed token files, with worker processes.

Each worker encodes units of input and appends the tokens to a shard of its own; only lengths and a
place in the shard travel back. The parent takes results in input order and copies the tokens from
the shards into `<prefix>.bin`, so the output does not depend on the number of workers.
"""

import concurrent.futures
import contextlib
import logging
import multiprocessing
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from lclm.data.indexed import IndexedWriter, dtype_for_vocab
from lclm.data.progress import Progress
from lclm.data.readers import BLOCK_BYTES, Problem, Source, Unit, iterate_units, read_unit
from lclm.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["EncodeOptions", "EncodeSummary", "encode_sources"]

BATCH_CHARS = 1 << 20  # characters handed to the tokenizer at once, unless one text is longer
BATCH_TEXTS = 1024
UNITS_AHEAD = 3  # per worker, handed out before the oldest result is needed
NUM_NAMED = 5  # problems named in full
_LOG = logging.getLogger("lclm.data")


@dataclass(frozen=True)
class EncodeOptions:
    """How documents become tokens."""

    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    prepend_bos: bool = False
    on_error: Literal["stop", "skip"] = "stop"
    num_workers: int = 1


@dataclass
class EncodeSummary:
    """What came out of it."""

    prefixes: list[str]
    num_documents: int = 0  # with tokens, of the first key
    num_empty: int = 0
    num_tokens: int = 0  # over all keys
    num_skipped: int = 0  # lines and files left out because of --on-error skip
    num_binary: int = 0  # files of folders that are not text
    named: list[str] = field(default_factory=list)  # the first of both


@dataclass(frozen=True)
class _UnitResult:
    num_lines: int
    lengths: list[np.ndarray]  # per key: int32, tokens of each document
    shard: str  # path without the key's number
    starts: list[int]  # per key: first byte in the shard
    problems: list[Problem]


class _Worker:
    """State of one worker process: tokenizer and open shards."""

    def __init__(self, tokenizer_path: str, options: EncodeOptions, folder: str) -> None:
        self.tokenizer = load_tokenizer(tokenizer_path)
        self.options = options
        self.dtype = dtype_for_vocab(self.tokenizer.vocab_size)
        self.shard = os.path.join(folder, f"shard-{os.getpid()}")
        self.files: list[BinaryIO] = [
            open(f"{self.shard}-{key}", "wb")  # noqa: SIM115  open as long as the process
            for key in range(len(options.json_keys))
        ]

    def encode(self, unit: Unit) -> _UnitResult:
        """Encode one unit into the shards."""
        keys = range(len(self.files))
        starts = [file.tell() for file in self.files]
        lengths: list[list[int]] = [[] for _ in keys]
        problems: list[Problem] = []
        num_lines = num_chars = 0
        batch: list[tuple[str, ...]] = []
        for item in read_unit(unit, self.options.json_keys):
            num_lines += 1
            if isinstance(item, Problem):
                problems.append(item)
                if self.options.on_error == "stop" and not item.is_binary:
                    break
            elif item is not None:
                batch.append(item)
                num_chars += sum(len(text) for text in item)
            if num_chars >= BATCH_CHARS or len(batch) >= BATCH_TEXTS:
                self._write(batch, lengths)
                batch, num_chars = [], 0
        self._write(batch, lengths)
        for file in self.files:
            file.flush()
        arrays = [np.array(key_lengths, np.int32) for key_lengths in lengths]
        return _UnitResult(num_lines, arrays, self.shard, starts, problems)

    def close(self) -> None:
        """Close the shards; a process of the pool leaves that to its end."""
        for file in self.files:
            file.close()

    def _write(self, batch: list[tuple[str, ...]], lengths: list[list[int]]) -> None:
        if not batch:
            return
        for key, file in enumerate(self.files):
            for ids in self.tokenizer.encode_batch([texts[key] for texts in batch]):
                # Megatron's rule: a document without tokens gets no end-of-document token either
                if ids and self.options.prepend_bos:
                    ids.insert(0, self.tokenizer.bos_id)  # type: ignore[arg-type]  # was checked
                if ids and self.options.append_eod:
                    ids.append(self.tokenizer.eod_id)  # type: ignore[arg-type]
                file.write(np.array(ids, self.dtype).tobytes())
                lengths[key].append(len(ids))


_worker: _Worker | None = None  # of this process, when it is one of the pool


def _start_worker(tokenizer_path: str, options: EncodeOptions, folder: str) -> None:
    global _worker
    # one process per core is the parallelism; threads inside each would only compete
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = _Worker(tokenizer_path, options, folder)


def _encode_in_worker(unit: Unit) -> _UnitResult:
    assert _worker is not None, "the pool's initializer ran"
    return _worker.encode(unit)


def encode_sources(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    output_prefix: str,
    options: EncodeOptions,
    domain: str = "",
    group_by: str | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> EncodeSummary:
    """Encode sources into `<output_prefix>.bin/.idx/.json`, or one such set per key.

    Args:
        sources: from `find_sources`.
        tokenizer: its file is loaded again by every worker.
        output_prefix: with several keys the sets are called `<output_prefix>_<key>`.
        options: see `EncodeOptions`.
        domain: name for the `.json`; empty: the last part of the prefix.
        group_by: for the `.json` only.
        block_bytes: input of one unit.

    Raises:
        ValueError: a token asked for does not exist, on_error is "stop" and a line or file is bad,
            or there is no document at all. Nothing is written then.
        concurrent.futures.process.BrokenProcessPool: a worker died.
    """
    _check_options(tokenizer, options)
    keys = options.json_keys
    prefixes = [output_prefix] if len(keys) == 1 else [f"{output_prefix}_{key}" for key in keys]
    summary = EncodeSummary(prefixes)
    folder = Path(f"{output_prefix}.tmp-{os.getpid()}")
    folder.mkdir(parents=True)
    documents_of: Counter[int] = Counter()
    try:
        with contextlib.ExitStack() as stack:
            writers = [
                stack.enter_context(IndexedWriter(prefix, tokenizer.vocab_size))
                for prefix in prefixes
            ]
            results = _encode_units(sources, tokenizer, options, str(folder), block_bytes)
            label = Path(output_prefix).name
            total_bytes = sum(source.num_bytes for source in sources)
            progress = stack.enter_context(Progress(label, total_bytes))
            lines_before: Counter[tuple[int, Path | None]] = Counter()
            for unit, result in results:
                at = (unit.source, unit.path)
                _note_problems(summary, result, lines_before[at], options.on_error)
                lines_before[at] += result.num_lines
                for number, writer in enumerate(writers):
                    _copy(writer, result, number)
                lengths = result.lengths[0]
                documents_of[unit.source] += int(np.count_nonzero(lengths))
                summary.num_empty += int(np.count_nonzero(lengths == 0))
                summary.num_tokens += sum(int(item.sum()) for item in result.lengths)
                summary.num_documents = documents_of.total()
                progress.add(
                    unit.num_bytes, f"{summary.num_documents} docs, {summary.num_tokens} tokens"
                )
            if summary.num_tokens == 0:
                raise ValueError(
                    f"input {', '.join(str(source.path) for source in sources)}: gives no tokens "
                    f"({summary.num_empty} empty documents, {summary.num_skipped} lines or files "
                    f"skipped, {summary.num_binary} files that are not text); nothing was written"
                )
            for key, prefix, writer in zip(keys, prefixes, writers):
                writer.metadata = {
                    "format": 1,
                    "domain": domain or Path(prefix).name,
                    "tokenizer": tokenizer.describe(),
                    "sources": _describe_sources(sources, documents_of),
                    "options": _describe_options(options, key, group_by),
                    "skipped": summary.num_skipped,
                    "binary_files": summary.num_binary,
                }
    finally:
        shutil.rmtree(folder)
    return summary


def _describe_sources(
    sources: Sequence[Source], documents_of: Counter[int]
) -> list[dict[str, str | int]]:
    return [
        {"path": str(source.path), "bytes": source.num_bytes, "documents": documents_of[number]}
        for number, source in enumerate(sources)
    ]


def _describe_options(
    options: EncodeOptions, key: str, group_by: str | None
) -> dict[str, str | bool | None]:
    """Whatever changes the output; the number of workers does not."""
    return {
        "json_key": key,
        "append_eod": options.append_eod,
        "prepend_bos": options.prepend_bos,
        "group_by": group_by,
        "on_error": options.on_error,
    }


def _check_options(tokenizer: Tokenizer, options: EncodeOptions) -> None:
    for is_wanted, token, name in (
        (options.append_eod, tokenizer.eod_id, "end-of-document token (eos_token)"),
        (options.prepend_bos, tokenizer.bos_id, "beginning-of-text token (bos_token)"),
    ):
        if is_wanted and token is None:
            raise ValueError(
                f"tokenizer {tokenizer.path}: names no {name}; name it in tokenizer_config.json "
                "beside the tokenizer, or leave the option out"
            )
    if len(set(options.json_keys)) != len(options.json_keys) or not options.json_keys:
        raise ValueError(f"--json-keys {options.json_keys}: give at least one key, each once")
    if options.num_workers < 1:
        raise ValueError(f"--workers {options.num_workers}: must be at least 1")


def _encode_units(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    options: EncodeOptions,
    folder: str,
    block_bytes: int,
) -> Iterator[tuple[Unit, _UnitResult]]:
    """Units and results in input order, from worker processes when more than one is of use."""
    units = iterate_units(sources, block_bytes)
    most_units = -(-sum(source.num_bytes for source in sources) // block_bytes)
    num_workers = min(options.num_workers, most_units)
    state = (str(tokenizer.path), options, folder)
    if num_workers == 1:
        worker = _Worker(*state)
        try:
            for unit in units:
                yield unit, worker.encode(unit)
        finally:
            worker.close()
        return
    # spawn: a forked child would inherit the tokenizer library's threads half alive
    with concurrent.futures.ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("spawn"), _start_worker, state
    ) as pool:
        waiting: deque[tuple[Unit, concurrent.futures.Future[_UnitResult]]] = deque()
        try:
            for unit in units:
                waiting.append((unit, pool.submit(_encode_in_worker, unit)))
                if len(waiting) >= num_workers * UNITS_AHEAD:
                    oldest, future = waiting.popleft()
                    yield oldest, future.result()
            while waiting:
                oldest, future = waiting.popleft()
                yield oldest, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _copy(writer: IndexedWriter, result: _UnitResult, key: int) -> None:
    lengths = result.lengths[key]
    num_bytes = int(lengths.sum(dtype=np.int64)) * writer.dtype.itemsize
    with open(f"{result.shard}-{key}", "rb") as shard:
        shard.seek(result.starts[key])
        writer.add_tokens(shard, num_bytes, lengths)


def _note_problems(
    summary: EncodeSummary, result: _UnitResult, lines_before: int, on_error: str
) -> None:
    """Count what gave no document; raise for the first that may not be skipped."""
    for problem in result.problems:
        where = f"{problem.path}, line {lines_before + problem.line}"
        text = f"{where if problem.line else problem.path}: {problem.reason}"
        if problem.is_binary:
            summary.num_binary += 1
        elif on_error == "stop":
            raise ValueError(f"{text}; mend it, or leave such input out with --on-error skip")
        else:
            summary.num_skipped += 1
        if len(summary.named) < NUM_NAMED:
            summary.named.append(text)
