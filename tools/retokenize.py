#!/usr/bin/env python3
"""Turn ProLong's MDS shards, or an indexed prefix, into an indexed prefix of any tokenizer."""

import argparse
import logging
import sys

from lclm.command_line import make_parser, run_tool
from lclm.data.remote import fetch_dataset
from lclm.data.tokenizer import load_tokenizer
from lclm.prepare.retokenize import retokenize

logger = logging.getLogger("lclm.tools")

DETAILS = """
input
  a folder with index.json and MDS shards, plain or zstd (package zstandard), as ProLong publishes
  them: every span of `indices` becomes a document, `mask` becomes weights of targets;
  or the prefix of .bin and .idx files. Either may be a URL (s3://, gs://, hf://, https://; pip
  install lclm[remote]), fetched to $LCLM_CACHE (default ~/.cache/lclm) first.

Without --to-tokenizer tokens stay as they are. With it documents are decoded, beginning-of-text and
end-of-document tokens at their ends left out, and encoded anew. Such tokens inside a document
become those of the other tokenizer; any other special token there is refused by name.

examples
  python tools/retokenize.py --input prolong-data-64K/thestackv1_concat_by_repo-65536 \\
      --tokenizer llama3/tokenizer.model --output-prefix data/code64k
  python tools/retokenize.py --input data/code64k --tokenizer llama3/tokenizer.model \\
      --to-tokenizer other/ --append-eod --output-prefix data/code64k-other

exit status: 0 success, 1 the machine failed (disk full), 2 bad usage or bad input
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(__doc__, DETAILS)
    add = parser.add_argument
    add("--input", required=True, metavar="PATH", help="MDS folder or indexed prefix")
    add("--tokenizer", required=True, metavar="PATH", help="the tokenizer that wrote the input")
    add("--to-tokenizer", metavar="PATH", help="the tokenizer of the output, if another")
    add("--output-prefix", required=True, metavar="PREFIX")
    add("--append-eod", action="store_true", help="end every document with the eos token")
    add("--eod-token", metavar="NAME", help="end with this token instead, such as <|eot_id|>")
    add("--prepend-bos", action="store_true", help="start every document with the bos token")
    add("--domain", default="", metavar="NAME", help="name in metrics")
    return parser


def run(options: argparse.Namespace) -> None:
    """Do what the command line asks for; ValueError for bad input."""
    new = load_tokenizer(options.to_tokenizer) if options.to_tokenizer else None
    if options.append_eod and new is not None:
        new.choose_eod(options.eod_token)
    elif options.eod_token:
        raise ValueError("--eod-token: applies with --append-eod and --to-tokenizer only")
    num_documents, num_tokens = retokenize(
        fetch_dataset(options.input),
        options.output_prefix,
        load_tokenizer(options.tokenizer),
        new,
        options.append_eod,
        options.prepend_bos,
        options.domain,
    )
    logger.info("%s.bin: %d documents, %d tokens", options.output_prefix, num_documents, num_tokens)


def main(command_line: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    options = build_parser().parse_args(command_line)
    return run_tool("retokenize", run, options, os_error_note="; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
