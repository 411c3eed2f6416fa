#!/usr/bin/env python3
"""Turn ProLong's MDS shards, or an indexed prefix, into an indexed prefix of any tokenizer."""

import argparse
import logging
import sys

from lclm.data.remote import fetch_dataset
from lclm.data.tokenizer import load_tokenizer
from lclm.log import setup_logging
from lclm.prepare.retokenize import retokenize

LOG = logging.getLogger("lclm.tools")

DETAILS = """
input
  a folder with index.json and MDS shards, plain or zstd (package zstandard), as ProLong publishes
  them: every span of `indices` becomes a document, `mask` becomes weights of targets;
  or the prefix of .bin and .idx files. Either may be a URL (s3://, gs://, hf://, https://; pip
  install lclm[remote]), fetched to $LCLM_CACHE (default ~/.cache/lclm) first.

Without --to-tokenizer tokens stay as they are. With it documents are decoded, beginning-of-text and
end-of-document tokens at their ends left out, and encoded anew.

examples
  python tools/retokenize.py --input prolong-data-64K/thestackv1_concat_by_repo-65536 \\
      --tokenizer llama3/tokenizer.model --output-prefix data/code64k
  python tools/retokenize.py --input data/code64k --tokenizer llama3/tokenizer.model \\
      --to-tokenizer other/ --append-eod --output-prefix data/code64k-other

exit status: 0 success, 1 the machine failed (disk full), 2 bad usage or bad input
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=DETAILS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--input", required=True, metavar="PATH", help="MDS folder or indexed prefix")
    add("--tokenizer", required=True, metavar="PATH", help="the tokenizer that wrote the input")
    add("--to-tokenizer", metavar="PATH", help="the tokenizer of the output, if another")
    add("--output-prefix", required=True, metavar="PREFIX")
    add("--append-eod", action="store_true", help="end every document with the eos token")
    add("--prepend-bos", action="store_true", help="start every document with the bos token")
    add("--domain", default="", metavar="NAME", help="name in metrics")
    return parser


def main(command_line: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    arguments = build_parser().parse_args(command_line)
    setup_logging()
    try:
        num_documents, num_tokens = retokenize(
            fetch_dataset(arguments.input),
            arguments.output_prefix,
            load_tokenizer(arguments.tokenizer),
            load_tokenizer(arguments.to_tokenizer) if arguments.to_tokenizer else None,
            arguments.append_eod,
            arguments.prepend_bos,
            arguments.domain,
        )
    except ValueError as error:
        print(f"retokenize: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"retokenize: error: {error}; nothing was written", file=sys.stderr)
        return 1
    LOG.info("%s.bin: %d documents, %d tokens", arguments.output_prefix, num_documents, num_tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
