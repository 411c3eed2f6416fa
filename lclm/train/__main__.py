"""Command line: `torchrun --nproc-per-node N -m lclm.train run.toml [key=value ...]`."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

from lclm.checkpoint.folder import complete_model
from lclm.command_line import make_parser, run_tool
from lclm.config import Config
from lclm.config_file import load_config
from lclm.train.ranks import agree, end_with_launcher, rank_name

logger = logging.getLogger("lclm.train")

HELP = """\
Train a model through the stages of a TOML file.

  python -m lclm.train run.toml                              one process
  torchrun --nproc-per-node 8 -m lclm.train run.toml parallel.cp=8
  python -m lclm.train run.toml --dry-run --world-size 64    print what would run

Overrides are written key.path=value; lists are counted from 0: stage.0.seq_length=65536.
A run continues from the newest checkpoint in its run folder unless checkpoint.resume=never.
"""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(HELP, "")
    parser.prog = "lclm.train"
    parser.add_argument("config", help="TOML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields to change")
    parser.add_argument(
        "--dry-run", action="store_true", help="print every stage's derived numbers and stop"
    )
    parser.add_argument(
        "--world-size",
        type=int,
        default=0,
        help="number of processes to plan for with --dry-run (default: those of this launch)",
    )
    return parser.parse_intermixed_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Do what the command line asks for.

    Raises:
        ValueError: the user's input cannot be run.
        ToolFailedError: the run had to stop.
    """
    config = load_config(options.config, options.overrides, complete_model)
    if options.dry_run:
        dry_run(config, options.world_size or int(os.environ.get("WORLD_SIZE", "1")))
        return
    from lclm.mesh import build_mesh, leave
    from lclm.train.stages import plan_stages

    mesh = build_mesh(config)
    from lclm.train.loop import Run
    from lclm.train.run_folder import hold_run_folder
    from lclm.train.start import check_unchanged, find_start

    folder = Path(config.run.dir)
    start = agree(lambda: find_start(config))
    with ExitStack() as stack:
        hold = hold_run_folder(folder) if mesh.rank == 0 else nullcontext()
        agree(lambda: stack.enter_context(hold))
        agree(lambda: check_unchanged(config, start))
        planned = agree(lambda: plan_stages(config, folder / "plans"))
        Run(config, mesh, planned, start).train()
    leave(mesh)


def dry_run(config: Config, world_size: int) -> None:
    """Print what would run on so many processes, then what a start would refuse, if anything.

    Raises:
        ValueError, OSError: as a start.
    """
    from lclm.train.stages import describe, plan_stages, plan_validation
    from lclm.train.start import find_start

    planned, problem = [], None
    try:
        start = find_start(config)
        plan_validation(config)
        planned = plan_stages(config)
    except (ValueError, OSError) as error:
        problem = error
    sys.stdout.write(describe(config, world_size, planned) + "\n")
    if problem is not None:
        raise problem
    source = start.checkpoint or start.weights
    sys.stdout.write(f"start      {f'from {source}' if source else 'from random weights'}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 on success, 2 when the user's input cannot be run, 1 when the run had to stop."""
    end_with_launcher()
    name = f"lclm.train: {rank_name()}"
    try:
        return run_tool(name, run, parse_arguments(arguments))
    except Exception as error:
        logger.error("%s failed with what is no user's error: %r", name, error)
        raise


if __name__ == "__main__":
    sys.exit(main())
