#!/usr/bin/env python3
"""Join indexed prefixes into one: the shards of a cluster, or several sources of one domain."""

import argparse
import logging
import sys

from lclm.command_line import make_parser, run_tool
from lclm.data.remote import fetch_prefix
from lclm.prepare.merge import merge_prefixes

logger = logging.getLogger("lclm.tools")

DETAILS = """
Shards written by preprocess_data.py --shard I/N are joined in their order, whatever the order of
--input, and must all be there; the three files then equal those of one run without --shard.
Other prefixes follow one another in the order given. All must come from one tokenizer and the same
options. Inputs stay as they are.

example
  for i in 1 2 3 4; do   # on four machines
    python tools/preprocess_data.py --input books/*.jsonl --tokenizer llama3/ --append-eod \\
        --shard $i/4 --output-prefix data/books.$i-of-4
  done
  python tools/merge_data.py --input data/books.{1,2,3,4}-of-4 --output-prefix data/books

exit status: 0 success, 1 the machine failed (disk full), 2 bad usage or bad input
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(__doc__, DETAILS)
    parser.add_argument("--input", nargs="+", required=True, metavar="PREFIX")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX")
    parser.add_argument("--domain", default="", metavar="NAME", help="name in metrics")
    return parser


def run(options: argparse.Namespace) -> None:
    """Do what the command line asks for; ValueError for bad input."""
    tokens = merge_prefixes(
        list(map(fetch_prefix, options.input)), options.output_prefix, options.domain
    )
    logger.info(
        "%s.bin: %d tokens of %d prefixes", options.output_prefix, tokens, len(options.input)
    )


def main(command_line: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    options = build_parser().parse_args(command_line)
    return run_tool("merge_data", run, options, os_error_note="; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
