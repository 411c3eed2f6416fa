"""What the command-line tools share: a parser with long help, and errors as one line."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from lclm.log import setup_logging

INTERRUPTED = 130  # exit status, as shells give it for SIGINT


class ToolFailedError(Exception):
    """The machine failed, not the input; the message says what to do. Exit status 1."""


def make_parser(description: str | None, details: str) -> argparse.ArgumentParser:
    """A parser whose help shows both texts as they are, `details` below the options."""
    return argparse.ArgumentParser(
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_output(parser: argparse.ArgumentParser, metavar: str) -> None:
    """Add `--output` and `--overwrite` of a tool that writes a folder."""
    parser.add_argument(
        "--output", type=Path, required=True, metavar=metavar, help="folder to write"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what an earlier call wrote to the output folder; other files stay",
    )


def run_tool(
    name: str,
    run: Callable[[argparse.Namespace], None],
    options: argparse.Namespace,
    *,
    has_log: bool = True,
    os_error_status: int = 1,
    os_error_note: str = "",
    interrupt_note: str = "",
) -> int:
    """Run a tool and return its exit status; an error becomes the line `<name>: error: ...`.

    Args:
        name: of the tool, in messages.
        run: does the work. ValueError means bad input and gives status 2, an interrupt 130; any
            exception that is not named here goes on.
        options: parsed, for `run`.
        has_log: whether log lines go to stderr.
        os_error_status: exit status where the file system fails: 1, or 2 for a tool that only
            reads its input.
        os_error_note: what follows the message of an OSError.
        interrupt_note: what follows that of an interrupt.
    """
    if has_log:
        setup_logging()
    try:
        run(options)
    except ValueError as error:
        message, status = str(error), 2
    except ToolFailedError as error:
        message, status = str(error), 1
    except OSError as error:
        message, status = f"{error}{os_error_note}", os_error_status
    except KeyboardInterrupt:
        message, status = f"interrupted{interrupt_note}", INTERRUPTED
    else:
        return 0
    sys.stderr.write(f"{name}: error: {message}\n")
    return status
