#!/usr/bin/env python3
"""Show what indexed prefixes hold, check them, and decode rows as training sees them."""

import argparse
import importlib
import itertools
import sys
from pathlib import Path
from typing import get_args

import numpy as np

from lclm.command_line import make_parser, run_tool
from lclm.config import MixtureEntry, Packing
from lclm.data.domain import Domain
from lclm.data.indexed import IndexedReader, length_histogram, prefix_files
from lclm.data.labels import IGNORED_LABEL, build_label_weights, build_labels
from lclm.data.remote import fetch_prefix
from lclm.data.stage_rows import Row, StageRows
from lclm.data.tokenizer import Tokenizer, load_tokenizer
from lclm.files import refuse_overwriting
from lclm.prepare.verify import verify_prefix

DETAILS = """
Without options: documents, tokens and a histogram of document lengths of every prefix.
  --verify        reads everything: index against file, ids against the vocabulary, .json against
                  both; prints the SHA-256 of each .bin
  --seq-length T  packs one epoch of every prefix by --packing into rows of T tokens, says what is
                  dropped, cut and padded
  --row N         with --seq-length and --tokenizer: row N, a line for each document: place in the
                  row, targets, text

example
  python tools/inspect_data.py data/books data/code --verify --histogram lengths.png
  python tools/inspect_data.py data/sft --seq-length 65536 --packing best-fit --row 0 \\
      --tokenizer llama3/tokenizer.model

exit status: 0 success, 2 bad usage or bad data
"""
BAR = 40  # characters of the longest bar
TEXT = 200  # characters of a document's start and end


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(__doc__, DETAILS)
    add = parser.add_argument
    add("prefix", nargs="+", help="without .bin or .idx")
    add("--verify", action="store_true", help="read everything and check it")
    add("--histogram", type=Path, metavar="PNG", help="draw the lengths (package matplotlib)")
    add("--seq-length", type=int, default=0, metavar="T", help="tokens of a row")
    add("--packing", choices=get_args(Packing), default="concat", help="default: %(default)s")
    add("--row", type=int, metavar="N", help="decode this row")
    add("--tokenizer", metavar="PATH", help="to decode with")
    add("--seed", type=int, default=1234, help="of the run (default: %(default)s)")
    return parser


def describe_prefix(reader: IndexedReader) -> str:
    """Counts and a histogram in text."""
    lengths = reader.lengths
    lines = [
        f"{reader.prefix}: {len(lengths):,} documents, {reader.num_tokens:,} tokens, "
        f"{reader.dtype}, tokenizer "
        f"{reader.metadata.get('tokenizer', {}).get('sha256', 'not known')[:12]}"
    ]
    if len(lengths):
        middle = int(np.median(lengths))
        lines.append(f"  shortest {lengths.min():,}, median {middle:,}, longest {lengths.max():,}")
        counts = length_histogram(lengths)
        exponents = np.frexp(lengths.astype(np.float64))[1] - 1
        tokens = np.bincount(exponents, weights=lengths)
        for start, count in counts.items():
            share = tokens[int(start).bit_length() - 1] / reader.num_tokens
            bar = "#" * round(BAR * count / max(counts.values()))
            lines.append(f"  {int(start):>10,} {count:>12,} {share:>6.1%} of tokens {bar}")
    return "\n".join(lines)


def describe_packing(prefix: str, arguments: argparse.Namespace) -> str:
    """What one epoch of a prefix gives as rows."""
    domain = Domain(prefix, arguments.seed, 0.0)
    length, packing = arguments.seq_length, arguments.packing
    counts = (domain.train_lengths // length).sum() if packing == "exact" else 0
    num_rows = int(counts) or max(1, domain.reader.num_tokens // length)
    while True:  # best-fit: as many rows as one epoch opens
        try:
            rows = open_rows(prefix, arguments, num_rows)
            break
        except ValueError:
            if packing != "best-fit" or num_rows == 1:
                raise
            num_rows = num_rows * 99 // 100
    documents = int(np.count_nonzero(domain.train_lengths > length))
    return (
        f"  {packing}, rows of {length:,}: {num_rows:,} rows; {documents:,} documents are longer "
        f"than a row\n  {rows.summary().splitlines()[-1]}"
    )


def open_rows(prefix: str, arguments: argparse.Namespace, num_rows: int) -> StageRows:
    """The first rows of one epoch of a prefix."""
    entry = MixtureEntry(prefix=prefix, packing=arguments.packing, share=1.0)
    return StageRows([entry], arguments.seq_length, num_rows, arguments.seed)


def describe_row(row: Row, tokenizer: Tokenizer) -> str:
    """Every piece of a row: its place, its targets, its text."""
    labels = build_labels(row.tokens, row.doc_lengths)
    weights = None
    if row.token_weights is not None:
        weights = build_label_weights(row.token_weights, row.doc_lengths, labels)
    lines = []
    start = 0
    for length in row.doc_lengths.tolist():
        end = start + length
        num_labels = int((labels[start:end] != IGNORED_LABEL).sum())
        line = f"[{start}, {end}) {length} tokens at positions 0..{length - 1}, {num_labels} labels"
        if weights is not None:
            line += f" weighing {weights[start:end].sum():.1f}"
        text = tokenizer.decode(row.tokens[start:end].tolist())
        if len(text) > 2 * TEXT:
            text = f"{text[:TEXT]} [...] {text[-TEXT:]}"
        lines += [f"--- {line}", text if num_labels or length == 1 else "(no labels) " + text]
        start = end
    return "\n".join(lines)


def draw_histogram(readers: list[IndexedReader], path: Path) -> None:
    """Documents by length, one line per prefix, as PNG."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError as error:
        raise ValueError("--histogram: needs matplotlib; run: pip install matplotlib") from error
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for reader in readers:
        counts = length_histogram(reader.lengths)
        axes.step([int(start) for start in counts], list(counts.values()), where="post",
                  label=reader.prefix)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="tokens of a document", ylabel="documents")
    axes.legend()
    figure.savefig(path, dpi=120)


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line asks for; ValueError for bad data."""
    if arguments.row is not None and not (arguments.seq_length and arguments.tokenizer):
        raise ValueError("--row: give --seq-length and --tokenizer too")
    prefixes = [fetch_prefix(prefix) for prefix in arguments.prefix]
    if arguments.histogram:
        refuse_overwriting([arguments.histogram], itertools.chain(*map(prefix_files, prefixes)))
    readers = list(map(IndexedReader, prefixes))
    for reader in readers:
        print(describe_prefix(reader))
        if arguments.verify:
            max_id, sha256 = verify_prefix(reader.prefix)
            print(f"  verified: largest id {max_id}, sha256 of .bin {sha256}")
        if arguments.seq_length:
            print(describe_packing(reader.prefix, arguments))
        if arguments.row is not None:
            rows = open_rows(reader.prefix, arguments, arguments.row + 1)
            print(describe_row(rows.row(arguments.row), load_tokenizer(arguments.tokenizer)))
    total = sum(reader.num_tokens for reader in readers)
    if len(readers) > 1:
        for reader in readers:
            print(f"{reader.num_tokens / max(total, 1):>7.2%} {reader.prefix}")
    if arguments.histogram:
        draw_histogram(readers, arguments.histogram)


def main(command_line: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    options = build_parser().parse_args(command_line)
    return run_tool("inspect_data", run, options, has_log=False, os_error_status=2)


if __name__ == "__main__":
    sys.exit(main())
