#!/usr/bin/env python3
"""Turn text into indexed token files: <prefix>.bin, <prefix>.idx and <prefix>.json."""

import argparse
import dataclasses
import datetime
import logging
import os
import re
import sys
from concurrent.futures.process import BrokenProcessPool

from lclm.command_line import ToolFailedError, make_parser, run_tool
from lclm.data.remote import fetch_inputs
from lclm.data.tokenizer import Tokenizer, load_tokenizer
from lclm.prepare.chat import TEMPLATES, ChatOptions, ChatTemplate
from lclm.prepare.encoder import encode_sources
from lclm.prepare.readers import find_sources
from lclm.prepare.resume import EncodeSummary
from lclm.prepare.worker import EncodeOptions

logger = logging.getLogger("lclm.tools")
NUM_CORES = len(os.sched_getaffinity(0))

DETAILS = """
input
  .jsonl, .ndjson, .json       one JSON object per line, the text under --json-keys; also compressed
                               as .jsonl.gz, and .jsonl.zst with the package zstandard
  .parquet                     one document per row, columns named by --json-keys (package pyarrow)
  any other file               one document (UTF-8)
  folder                       the files below it in path order, links followed, names starting with
                               a dot left out: each read by its name as above; the log says how many
                               as what. Files that are not text are counted and left out
  folder, --group-by repo      source code: each first-level subfolder is a repository, whose files
                               joined in path order are one document (ProLong, arXiv 2410.02660)
  folder, --group-by file      source code: every file is one document
  URL                          s3://, gs://, hf://, https:// (pip install lclm[remote]): a file, a
                               folder (over HTTP its name ends in /) or a pattern such as
                               s3://bucket/books/*.jsonl, fetched to $LCLM_CACHE (default
                               ~/.cache/lclm) first

tokenizer (told by content, not by name)
  a Hugging Face tokenizer.json or a folder with one; a tiktoken rank file (Llama 3's
  tokenizer.model); a SentencePiece model (Llama 2's tokenizer.model).
  Text that spells a special token, such as <|end_of_text|>, stays text.
  The package gigatoken encodes tens of times faster. It is used where it is installed and gives the
  ids of the ordinary library on test texts and on the first documents; the log says which runs.

conversations (--chat)
  JSON lines or Parquet with a list of {"role", "content"} under messages (or --json-keys). What an
  assistant says and the token that ends its turn are targets; the rest weighs --prompt-weight, 0 as
  ProLong by default (<prefix>.weights). --chat-template llama3 and chatml are built in; tokenizer
  is the Jinja template in the tokenizer's folder (package jinja2), which also gets tool_calls,
  tools, reasoning_content and whatever else it knows; what a template does not use is refused by
  name. A message with "weight": 0 is no target. --end-token names the token that ends a turn where
  the template goes on with the next role instead (GLM-4.5: <|user|>). In training, packing
  best-fit never cuts a conversation.

output
  The format of Megatron-LM, byte for byte what its own tool writes with --append-eod, but that text
  which spells a special token stays text; a document without text has no tokens and is counted.
  <prefix>.json records tokenizer, sources, options, tokens, documents and a histogram of document
  lengths. The output does not depend on --workers, and on an error nothing is written. Work lies in
  <prefix>.unfinished meanwhile: after a kill the same command goes on where it stopped.
  --shard 3/16 does the third of sixteen parts, on any machine; tools/merge_data.py joins the
  sixteen prefixes to what one run would have written.
  --engine ray encodes on every core of a Ray cluster (pip install lclm[ray]) and writes the same
  files here. All nodes must see input, tokenizer and output under the same paths: a file system
  they share. Work of a node that dies goes to the others.

examples
  python tools/preprocess_data.py --input books/*.jsonl.gz --output-prefix data/books \\
      --tokenizer llama3/tokenizer.model --append-eod --workers 16
  python tools/preprocess_data.py --input repositories/ --group-by repo --domain code \\
      --output-prefix data/code --tokenizer llama3/ --append-eod

exit status: 0 success, 1 the machine failed (disk full, a worker killed), 2 bad usage or bad
input, 130 interrupted
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(__doc__, DETAILS)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files, folders, URLs")
    add("--output-prefix", required=True, metavar="PREFIX", help="for example data/books")
    add("--tokenizer", required=True, metavar="PATH", help="tokenizer file or folder")
    add(
        "--workers",
        type=int,
        metavar="N",
        help=f"worker processes (default: the cores of this machine, {NUM_CORES})",
    )
    add(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: on the cluster of $RAY_ADDRESS or of this machine, see below (default: local)",
    )
    add("--append-eod", action="store_true", help="end every document with the eos token")
    add("--eod-token", metavar="NAME", help="end with this token instead, such as <|eot_id|>")
    add("--prepend-bos", action="store_true", help="start every document with the bos token")
    add(
        "--json-keys",
        nargs="+",
        default=None,
        metavar="KEY",
        help="keys that hold text (default: text; messages with --chat); several keys write "
        "<prefix>_<key> each",
    )
    add("--min-tokens", type=int, default=0, metavar="N", help="leave out shorter documents")
    add(
        "--max-tokens",
        type=int,
        default=0,
        metavar="N",
        help="leave out longer documents (0: none); both count the text's tokens alone",
    )
    add("--shard", default="1/1", metavar="I/N", help="do part I of N, from 1 to N (default: 1/1)")
    add(
        "--tokenizer-library",
        choices=("auto", "gigatoken", "standard"),
        default="auto",
        help="what encodes; auto: gigatoken where it gives the same ids (default: auto)",
    )
    add("--chat", action="store_true", help="input holds conversations, see below")
    add("--chat-template", choices=TEMPLATES, help="needed with --chat")
    add("--prompt-weight", type=float, metavar="W", help="with --chat, from 0 (default) to 1")
    add("--end-token", metavar="TOKEN", help="with --chat, see below")
    add("--group-by", choices=("file", "repo"), help="folders hold source code, see below")
    add(
        "--domain", default="", metavar="NAME", help="name in metrics (default: prefix's last part)"
    )
    add(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="what to do with a line that is not JSON, lacks a key or holds no string there, and "
        "with a file that is not UTF-8: stop, or count it and go on (default: stop)",
    )
    return parser


def parse_shard(text: str) -> tuple[int, int]:
    """ "3/16" as (2, 16); ValueError for anything else."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    number, count = (int(part) for part in match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise ValueError(f"--shard {text}: give I/N with I from 1 to N, for example 3/16")
    return number - 1, count


def encode(arguments: argparse.Namespace) -> EncodeSummary:
    """Encode what the command line asks for; ValueError for bad input."""
    tokenizer = load_tokenizer(arguments.tokenizer)
    if arguments.append_eod:
        tokenizer.choose_eod(arguments.eod_token)
    elif arguments.eod_token:
        raise ValueError("--eod-token: applies with --append-eod only")
    sources = find_sources(fetch_inputs(arguments.input), arguments.group_by)
    options = EncodeOptions(
        json_keys=tuple(arguments.json_keys or ("messages" if arguments.chat else "text",)),
        append_eod=arguments.append_eod,
        prepend_bos=arguments.prepend_bos,
        on_error=arguments.on_error,
        num_workers=NUM_CORES if arguments.workers is None else arguments.workers,
        min_tokens=arguments.min_tokens,
        max_tokens=arguments.max_tokens,
        library=arguments.tokenizer_library,
        shard=parse_shard(arguments.shard),
        engine=arguments.engine,
        chat=chat_options(arguments, tokenizer),
    )
    if arguments.engine == "ray" and arguments.workers is not None:
        raise ValueError("--workers: does not apply to --engine ray, which uses the whole cluster")
    if arguments.group_by and not any(source.is_folder for source in sources):
        raise ValueError(
            f"--group-by {arguments.group_by}: applies to folders, and every --input is a file; "
            "give the folder or leave the option out"
        )
    return encode_sources(
        sources, tokenizer, arguments.output_prefix, options, arguments.domain, arguments.group_by
    )


def chat_options(arguments: argparse.Namespace, tokenizer: Tokenizer) -> ChatOptions | None:
    """What --chat asks for, or None."""
    template, weight, end = arguments.chat_template, arguments.prompt_weight, arguments.end_token
    if not arguments.chat:
        if any(value is not None for value in (template, weight, end)):
            raise ValueError(
                "--chat-template, --prompt-weight and --end-token: apply with --chat only"
            )
        return None
    if not template:
        raise ValueError(f"--chat: give --chat-template, one of {', '.join(TEMPLATES)}")
    options = ChatOptions(template, weight or 0.0, end or "")
    if ChatTemplate(options, tokenizer).uses_date:
        options = dataclasses.replace(options, today=datetime.date.today().isoformat())
    return options


def run(arguments: argparse.Namespace) -> None:
    """Encode and say what came out; ToolFailedError where a worker died, else as `encode`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # --workers says how many cores to use
    try:
        summary = encode(arguments)
    except BrokenProcessPool as error:
        raise ToolFailedError(
            "a worker process died, most often because memory ran out; the same command with "
            "fewer --workers goes on where this one stopped"
        ) from error
    if summary.num_skipped or summary.num_binary:
        logger.warning(
            "left out: %d lines or files with errors, %d files that are not text; the first: %s",
            summary.num_skipped,
            summary.num_binary,
            "; ".join(summary.named),
        )
    if summary.num_short or summary.num_long:
        logger.info(
            "left out: %d documents of fewer than --min-tokens, %d of more than --max-tokens",
            summary.num_short,
            summary.num_long,
        )
    logger.info(
        "%s: %d documents, %d tokens, %d empty documents",
        ", ".join(f"{prefix}.bin" for prefix in summary.prefixes),
        summary.num_documents,
        summary.num_tokens,
        summary.num_empty,
    )


def main(command_line: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    options = build_parser().parse_args(command_line)
    nothing, goes_on = "; nothing was written", "; the same command goes on where this one stopped"
    return run_tool(
        "preprocess_data",
        run,
        options,
        os_error_note=nothing,
        interrupt_note=nothing if options.chat else goes_on,
    )


if __name__ == "__main__":
    sys.exit(main())
