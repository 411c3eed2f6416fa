#!/usr/bin/env python3
"""Import a Hugging Face folder (Llama, safetensors) as a checkpoint to start training from."""

import argparse
import sys
from pathlib import Path

from lclm.command_line import add_output, make_parser, run_tool
from lclm.hf.convert import OS_ERROR_NOTE, add_weight_options, convert_from_hf

EPILOG = """\
The checkpoint folder holds `latest` and step_00000000 with the weights, lclm.json and the tokenizer
files found beside the weights. Give it to a run as model.init_from; the [model] section for that is
printed. It loads at any tp, pp and cp, and appears under its name only when it is complete. Every
key of config.json is read, kept for the export, or refused by name. Memory stays at a few tensors.

example:
  python tools/convert_from_hf.py --hf-model models/Llama-3-8B --output checkpoints/llama3-8b

exit status: 0 done; 2 bad usage or input that cannot be converted; 1 the file system failed.
Unless it is 0, nothing is written.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(__doc__, EPILOG)
    parser.add_argument(
        "--hf-model",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder with config.json and *.safetensors",
    )
    add_output(parser, "CKPT_DIR")
    add_weight_options(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    """Do what the command line asks for; CheckpointError for bad input."""
    convert_from_hf(
        options.hf_model,
        options.output,
        dtype=options.dtype,
        overwrite=options.overwrite,
        allow_non_finite=options.allow_non_finite,
        report=lambda line: print(line, flush=True),
    )
    print(f"wrote {options.output}")


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    options = build_parser().parse_args(arguments)
    return run_tool("convert_from_hf", run, options, has_log=False, os_error_note=OS_ERROR_NOTE)


if __name__ == "__main__":
    sys.exit(main())
