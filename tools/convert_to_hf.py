#!/usr/bin/env python3
"""Export a checkpoint as a Hugging Face folder that transformers, vLLM and lm-eval load."""

import argparse
import re
import sys
from pathlib import Path

from lclm.command_line import add_output, make_parser, run_tool
from lclm.hf.convert import DEFAULT_SHARD_BYTES, OS_ERROR_NOTE, add_weight_options, convert_to_hf

EPILOG = """\
The folder holds the weights (safetensors, streamed: memory stays at about one tensor), config.json,
generation_config.json and the tokenizer files that travel in the checkpoint. What the folder that
the model comes from said, and training did not change, is said again. Limits of length become the
longest stage trained, or stay the starting model's if that is more. The folder appears under its
name only when it is complete.

examples:
  python tools/convert_to_hf.py --checkpoint runs/prolong/checkpoints --output runs/prolong/hf
  python tools/convert_to_hf.py --checkpoint runs/x/checkpoints/step_00000200 --output out \\
      --dtype bf16 --tokenizer models/Llama-3-8B

exit status: 0 done; 2 bad usage or input that cannot be converted; 1 the file system failed.
Unless it is 0, nothing is written.
"""

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `200MB` or a plain number; decimal units, as Hugging Face counts them."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    num_bytes = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if num_bytes < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no size; write for example 5GB or 200MB")
    return num_bytes


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(__doc__, EPILOG)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="CKPT_DIR",
        help="one step's folder, or a folder with `latest`",
    )
    add_output(parser, "HF_DIR")
    add_weight_options(parser)
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="folder with a tokenizer, or its file, to take instead of the checkpoint's own",
    )
    parser.add_argument(
        "--max-shard-size",
        type=parse_size,
        default=DEFAULT_SHARD_BYTES,
        metavar="SIZE",
        help="largest weight file (default: 5GB)",
    )
    return parser


def run(options: argparse.Namespace) -> None:
    """Do what the command line asks for; CheckpointError for bad input."""
    convert_to_hf(
        options.checkpoint,
        options.output,
        dtype=options.dtype,
        allow_non_finite=options.allow_non_finite,
        tokenizer=options.tokenizer,
        max_shard_bytes=options.max_shard_size,
        overwrite=options.overwrite,
        report=lambda line: print(line, flush=True),
    )
    print(f"wrote {options.output}")


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    options = build_parser().parse_args(arguments)
    return run_tool("convert_to_hf", run, options, has_log=False, os_error_note=OS_ERROR_NOTE)


if __name__ == "__main__":
    sys.exit(main())
