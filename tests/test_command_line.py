"""Tools end in one line and an exit status, whatever goes wrong."""

import argparse

import pytest

from lclm.checkpoint.folder import CheckpointError
from lclm.command_line import ToolFailedError, make_parser, run_tool


def run_raising(error: BaseException | None, **options) -> int:
    def run(_: argparse.Namespace) -> None:
        if error is not None:
            raise error

    return run_tool("tool", run, argparse.Namespace(), has_log=False, **options)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("bad value"), 2),
        (CheckpointError("bad value"), 2),
        (ToolFailedError("bad value"), 1),
        (OSError("bad value"), 1),
        (FileNotFoundError("bad value"), 1),
    ],
)
def test_an_error_is_one_line(error, status, capsys):
    assert run_raising(error) == status
    written = capsys.readouterr()
    assert written.out == "" and written.err == "tool: error: bad value\n"


def test_a_failing_file_system_as_the_tool_wants_it(capsys):
    assert run_raising(OSError("full"), os_error_status=2, os_error_note="; nothing") == 2
    assert capsys.readouterr().err == "tool: error: full; nothing\n"


def test_success_says_nothing(capsys):
    assert run_raising(None) == 0
    assert capsys.readouterr().err == ""


def test_an_interrupt_is_one_line_too(capsys):
    assert run_raising(KeyboardInterrupt(), interrupt_note="; go on") == 130
    assert capsys.readouterr().err == "tool: error: interrupted; go on\n"


@pytest.mark.parametrize("error", [SystemExit(3), TypeError("a bug")])
def test_the_rest_goes_on(error):
    with pytest.raises(type(error)):
        run_raising(error)


def test_help_keeps_its_lines():
    assert "first\n  second\n" in make_parser("What it does.", "first\n  second\n").format_help()
