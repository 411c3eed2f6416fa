#!/usr/bin/env python3
"""Train a byte-level BPE tokenizer on the same inputs that preprocess_data.py takes."""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lclm.command_line import make_parser, run_tool
from lclm.data.remote import fetch_inputs
from lclm.data.tokenizer import llama3_splitter
from lclm.files import replace_text
from lclm.prepare.documents import read_unit
from lclm.prepare.encoder import check_outputs
from lclm.prepare.progress import Progress
from lclm.prepare.readers import Problem, Source, find_sources, iterate_units

logger = logging.getLogger("lclm.tools")

BOS, EOD = "<|begin_of_text|>", "<|end_of_text|>"
NUM_FIXED = 256 + 2  # every byte, and the two special tokens: any text can be encoded

DETAILS = f"""
input
  Files and folders as `preprocess_data.py --help` describes them: .jsonl (also .jsonl.gz), text
  files, folders, --group-by.

output
  DIR/tokenizer.json and DIR/tokenizer_config.json, which preprocess_data.py --tokenizer DIR and
  transformers.AutoTokenizer load. Text is split as for Llama 3, then into bytes; {BOS}
  and {EOD} are special tokens, and text that spells them does not become them.
  The vocabulary has exactly --vocab-size tokens, {NUM_FIXED} of them fixed (256 bytes, 2 special),
  or fewer where the text has no more pairs to merge; the last line says how many: give that number
  to model.vocab_size. The same input gives the same files.

example
  python tools/train_tokenizer.py --input books.jsonl code/ --vocab-size 32000 --output tokenizer

exit status: 0 success, 1 the file system failed, 2 bad usage or bad input
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(__doc__, DETAILS)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files, folders, URLs")
    add("--vocab-size", required=True, type=int, metavar="N", help=f"at least {NUM_FIXED}")
    add("--output", required=True, type=Path, metavar="DIR", help="folder for the two files")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="default: text")
    add("--group-by", choices=("file", "repo"), help="folders hold source code")
    return parser


def iterate_texts(
    sources: Sequence[Source], json_keys: Sequence[str], progress: Progress
) -> Iterator[str]:
    """Every text of the sources, in input order.

    Raises:
        ValueError: a line or file is bad.
    """
    num_lines: dict[tuple[int, Path | None], int] = {}  # of each file, in the units done
    for unit in iterate_units(sources):
        at = (unit.source, unit.path)
        before = num_lines.get(at, 0)
        for number, item in enumerate(read_unit(unit, json_keys), start=1):
            num_lines[at] = before + number
            if not isinstance(item, Problem):
                yield from item or ()
            elif not item.is_binary:
                raise ValueError(f"{item.describe(before)}; mend it or leave it out")
        progress.add(unit.num_bytes)


def train(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A tokenizer with at most vocab_size tokens, the special ones included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = llama3_splitter()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def run(arguments: argparse.Namespace) -> None:
    """Train and write; ValueError for bad input."""
    if arguments.vocab_size < NUM_FIXED:
        raise ValueError(
            f"--vocab-size {arguments.vocab_size}: must be at least {NUM_FIXED}, one token for each"
            " of the 256 bytes and 2 special tokens"
        )
    sources = find_sources(fetch_inputs(arguments.input), arguments.group_by)
    names = ("tokenizer.json", "tokenizer_config.json")
    model, described = (arguments.output / name for name in names)
    check_outputs([model, described], sources)
    failure: list[ValueError] = []

    def texts() -> Iterator[str]:
        # the library reports an exception of the iterator in words of its own: keep the original
        try:
            yield from iterate_texts(sources, arguments.json_keys, progress)
        except ValueError as error:
            failure.append(error)

    total_bytes = sum(source.num_bytes for source in sources)
    with Progress("reading", total_bytes) as progress:
        tokenizer = train(texts(), arguments.vocab_size)
    if failure:
        raise failure[0]
    size = tokenizer.get_vocab_size()
    if size == NUM_FIXED and arguments.vocab_size > NUM_FIXED:
        raise ValueError(
            f"input {', '.join(map(str, arguments.input))}: has no text to merge; give more text"
        )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # transformers' way to say: no limit
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    replace_text(model, tokenizer.to_str(pretty=True) + "\n")
    replace_text(described, json.dumps(config, indent=2) + "\n")
    if size < arguments.vocab_size:
        logger.warning(
            "the vocabulary has %d tokens, not the %d asked for: the text has no more pairs to "
            "merge; give more text or set model.vocab_size to %d",
            size,
            arguments.vocab_size,
            size,
        )
    logger.info("%s: %d tokens", model, size)


def main(command_line: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    options = build_parser().parse_args(command_line)
    return run_tool("train_tokenizer", run, options)


if __name__ == "__main__":
    sys.exit(main())
