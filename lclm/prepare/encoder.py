"""Text files to indexed token files, with worker processes.

Each worker turns units of input into arrays of tokens and writes them where they belong in the file
of all tokens; the parent notes in input order what is done. So the output does not depend on the
number of workers, memory does not depend on the size of the input, tokens are written once, and a
run that was killed goes on from the last unit noted.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lclm.data.indexed import adopt_tokens, check_new_prefix, prefix_files
from lclm.data.tokenizer import Tokenizer, hash_file
from lclm.files import refuse_overwriting
from lclm.prepare.chat import ChatOptions, ChatTemplate
from lclm.prepare.documents import read_unit
from lclm.prepare.gigatoken import choose_library
from lclm.prepare.pool import encode_in_pool
from lclm.prepare.progress import Progress
from lclm.prepare.ray import encode_on_ray
from lclm.prepare.readers import BLOCK_BYTES, Problem, Source, Unit, iterate_units
from lclm.prepare.resume import EncodeSummary, State, Unfinished
from lclm.prepare.worker import (
    Encoded,
    EncodeOptions,
    Worker,
    WorkerState,
    column_dtypes,
    what_decides,
)

NUM_NAMED = 5  # problems named in full
SAMPLE_UNITS = 4  # of which documents are taken to compare tokenizer libraries
SAMPLE_TEXTS = 8  # of each
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Job:
    """What `encode_sources` was called with."""

    sources: Sequence[Source]
    tokenizer: Tokenizer
    options: EncodeOptions
    block_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(source.num_bytes for source in self.sources)

    def units(self, block_bytes: int) -> Iterator[Unit]:
        return iterate_units(self.sources, block_bytes, self.options.shard)


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

    Conversations bring `.weights` as well: of every token the prompt's weight or 1.

    Work lies in `<output_prefix>.unfinished` until it is complete. A ValueError or OSError removes
    it; a kill, an interrupt or a dead worker leaves it, and the same call goes on from there.

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
            or there is no document at all.
        concurrent.futures.process.BrokenProcessPool: a worker died.
    """
    check_new_prefix(output_prefix)
    check_options(tokenizer, options)
    if options.chat is not None and any(source.documents for source in sources):
        raise ValueError("--chat: reads JSON lines and Parquet; leave other files out of --input")
    keys = options.json_keys
    prefixes = [output_prefix] if len(keys) == 1 else [f"{output_prefix}_{key}" for key in keys]
    job = _Job(sources, tokenizer, options, block_bytes)
    work_folder = Path(f"{output_prefix}.unfinished")
    check_outputs([*itertools.chain(*map(prefix_files, prefixes))], sources, tokenizer)
    refuse_overwriting([work_folder], [source.path for source in sources])
    described = _describe_options(options, group_by)
    num_columns = len(column_dtypes(options, tokenizer.vocab_size))
    state = _worker_state(tokenizer, options)
    new = State(
        prefixes,
        inputs=_hash_inputs(sources, state, block_bytes),
        token_bytes=[0] * num_columns,
        length_bytes=[0] * num_columns,
        documents=[0] * len(sources),
    )
    with Unfinished(str(work_folder), new) as work:
        try:
            _encode_rest(job, state, work)
            _check_result(job, work.state)
            work.state.is_complete = True
            work.save()
            for number, prefix in enumerate(prefixes):
                metadata = {
                    "format": 1,
                    "domain": domain or Path(prefix).name,
                    "tokenizer": tokenizer.describe(),
                    "sources": [
                        {"path": str(source.path), "bytes": source.num_bytes, "documents": count}
                        for source, count in zip(sources, work.state.documents)
                    ],
                    "options": {"json_key": keys[number]} | described,
                    "skipped": work.state.num_skipped,
                    "binary_files": work.state.num_binary,
                    "short_documents": work.state.num_short,
                    "long_documents": work.state.num_long,
                }
                weights = None
                if options.chat is not None:
                    weights = work.tokens(1)
                    metadata["weight_values"] = [options.chat.prompt_weight, 1.0]
                    metadata["is_chat"] = True
                lengths, size = work.lengths(number), tokenizer.vocab_size
                adopt_tokens(prefix, work.tokens(number), lengths, size, metadata, weights)
        except (ValueError, OSError):
            work.remove()
            raise
        work.remove()
        return work.state


def _hash_inputs(sources: Sequence[Source], state: WorkerState, block_bytes: int) -> str:
    """SHA-256 of all that decides the output: files by path, size and time of change."""
    digest = hashlib.sha256(json.dumps([what_decides(state), block_bytes]).encode())
    for source in sources:
        digest.update(json.dumps([len(source.line_files), *map(len, source.documents)]).encode())
        for path in source.files():
            status = path.stat()
            at = [str(path.absolute()), status.st_size, status.st_mtime_ns]
            digest.update(json.dumps(at).encode())
    return digest.hexdigest()


def _describe_options(options: EncodeOptions, group_by: str | None) -> dict[str, object]:
    """Whatever changes the output; the number of workers and the library do not."""
    described: dict[str, object] = {
        "append_eod": options.append_eod,
        "prepend_bos": options.prepend_bos,
        "group_by": group_by,
        "on_error": options.on_error,
        "min_tokens": options.min_tokens,
        "max_tokens": options.max_tokens,
    }
    if options.shard[1] > 1:
        described["shard"] = list(options.shard)
    if options.chat is not None:
        described |= dataclasses.asdict(options.chat)
    return described


def check_outputs(
    outputs: Sequence[Path], sources: Sequence[Source], tokenizer: Tokenizer | None = None
) -> None:
    """Raise ValueError where files to be written are among those that are read."""
    files = itertools.chain.from_iterable(source.files() for source in sources)
    roots = (source.path for source in sources)
    refuse_overwriting(outputs, itertools.chain(roots, files), reads_folders=True)
    if tokenizer is not None:
        refuse_overwriting(outputs, tokenizer.files)


def check_options(tokenizer: Tokenizer, options: EncodeOptions) -> None:
    """Refuse options that cannot be met; ValueError says which and why."""
    tokenizer.end_tokens(options.prepend_bos, options.append_eod)
    if len(set(options.json_keys)) != len(options.json_keys) or not options.json_keys:
        raise ValueError(f"--json-keys {options.json_keys}: give at least one key, each once")
    slashed = [key for key in options.json_keys if "/" in key]
    if slashed and len(options.json_keys) > 1:
        raise ValueError(
            f"--json-keys {slashed[0]}: would be part of the name <prefix>_<key>, which cannot "
            "hold a slash; give this key alone"
        )
    if options.num_workers < 1:
        raise ValueError(f"--workers {options.num_workers}: must be at least 1")
    if options.chat is not None:
        _check_chat(tokenizer, options, options.chat)
    low, high = options.min_tokens, options.max_tokens
    if low < 0 or high < 0 or (high and low > high):
        raise ValueError(
            f"--min-tokens {low} --max-tokens {high}: neither may be negative, nor the first above "
            "the second; --max-tokens 0 sets no limit"
        )


def _check_chat(tokenizer: Tokenizer, options: EncodeOptions, chat: ChatOptions) -> None:
    ChatTemplate(chat, tokenizer)
    if options.append_eod or options.prepend_bos:
        raise ValueError(
            "--chat: does not go with --append-eod or --prepend-bos; the template says where "
            "special tokens stand: leave them out"
        )
    if len(options.json_keys) > 1:
        raise ValueError(f"--chat: reads one key, not {', '.join(options.json_keys)}; give one")


def _check_result(job: _Job, state: State) -> None:
    if state.num_tokens == 0 and job.options.shard[1] == 1:
        first = f"; the first that was left out: {state.named[0]}" if state.named else ""
        raise ValueError(
            f"input {', '.join(str(source.path) for source in job.sources)}: gives no tokens "
            f"({state.num_empty} empty documents, {state.num_skipped} lines or files skipped, "
            f"{state.num_binary} files that are not text, {state.num_short + state.num_long} "
            f"documents shorter or longer than asked for){first}; nothing was written"
        )


def _encode_rest(job: _Job, worker_state: WorkerState, work: Unfinished) -> None:
    """Encode the units that are not done, and note each in input order."""
    state = work.state
    if state.is_complete:
        return
    total_bytes = job.total_bytes // job.options.shard[1]
    label = Path(work.folder).stem
    with Progress(label, total_bytes, state.bytes_read) as progress:
        for unit, done in _encode_units(job, worker_state, work):
            work.add(done)
            at = [str(unit.source), str(unit.path)]
            state.lines = state.lines if state.file == at else 0
            state.file = at
            _note_problems(state, done.problems, job.options.on_error)
            state.lines += done.num_lines
            num_documents = int(np.count_nonzero(done.lengths[0]))
            state.documents[unit.source] += num_documents
            state.num_documents += num_documents
            state.num_empty += len(done.lengths[0]) - num_documents
            lengths = done.lengths[: len(job.options.json_keys)]
            state.num_tokens += sum(int(item.sum(dtype=np.int64)) for item in lengths)
            state.num_short += done.num_short
            state.num_long += done.num_long
            state.bytes_read += unit.num_bytes
            state.units += 1
            work.save()
            note = f"{state.num_documents} docs, {state.num_tokens} tokens"
            progress.add(unit.num_bytes, note)


def _encode_units(
    job: _Job, state: WorkerState, work: Unfinished
) -> Iterator[tuple[Unit, Encoded]]:
    """The units that are not done, in input order; by worker processes when several help."""
    rest = itertools.islice(job.units(job.block_bytes), work.state.units, None)
    first = next(rest, None)
    if first is None:
        return
    left = itertools.chain([first], rest)
    most_units = -(-job.total_bytes // job.block_bytes)
    num_workers = min(job.options.num_workers, max(1, most_units))
    state = dataclasses.replace(state, plain_json_file=_choose_library(job, work.folder))
    if job.options.engine == "ray":
        yield from encode_on_ray(left, state)
        return
    if num_workers > 1:
        yield from encode_in_pool(left, state, num_workers, work)
        return
    worker = Worker(state)
    for unit in left:
        yield unit, worker.encode(unit)


def _worker_state(tokenizer: Tokenizer, options: EncodeOptions) -> WorkerState:
    before, after = tokenizer.end_tokens(options.prepend_bos, options.append_eod)
    files = tuple((file.name, hash_file(file)) for file in tokenizer.files)
    path = str(tokenizer.path)
    return WorkerState(path, files, tokenizer.vocab_size, before, after, options)


def _choose_library(job: _Job, folder: str) -> str:
    """Choose the tokenizer library on a sample of the input; the file that workers load or ""."""
    samples: list[str] = []
    tokenizer, options = job.tokenizer, job.options
    if options.chat is not None:
        return ""  # gigatoken gives no places of tokens
    units = job.units(min(job.block_bytes, BLOCK_BYTES))
    if options.library != "standard":
        for unit in itertools.islice(units, SAMPLE_UNITS):
            texts = (item for item in read_unit(unit, options.json_keys) if type(item) is tuple)
            samples += [text for item in itertools.islice(texts, SAMPLE_TEXTS) for text in item]
    plain_json = choose_library(tokenizer, options.library, samples)
    if plain_json is None:
        return ""
    plain_json_file = os.path.join(folder, "gigatoken.json")
    Path(plain_json_file).write_text(plain_json, encoding="utf-8")
    return plain_json_file


def _note_problems(state: State, problems: Sequence[Problem], on_error: str) -> None:
    """Count what gave no document; raise for the first that may not be skipped."""
    for problem in problems:
        text = problem.describe(state.lines)
        if problem.is_binary:
            state.num_binary += 1
        elif on_error == "stop":
            raise ValueError(f"{text}; mend it, or leave such input out with --on-error skip")
        else:
            state.num_skipped += 1
        if len(state.named) < NUM_NAMED:
            state.named.append(text)
