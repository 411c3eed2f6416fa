"""Short runs of the trainer's command line for tests: many in one process, what each said."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

from lclm.config_file import dump_toml
from tests.train.sample_data import write_domain
from tests.train.tiny import tiny_config


class Ended(NamedTuple):
    """How a run ended."""

    code: int
    """Exit status."""
    said: str
    """What went to stderr."""


def write_run_file(folder: Path, **changes: Any) -> Path:
    """A TOML file of two stages of 4 steps over two domains that saves every step and keeps two."""
    a = write_domain(folder / "a", num_docs=60, max_length=90, seed=1)
    b = write_domain(folder / "b", num_docs=60, max_length=90, seed=2)
    mixture = [
        {"prefix": a, "packing": "concat", "share": 0.5},
        {"prefix": b, "packing": "concat", "share": 0.5},
    ]
    config = tiny_config(
        folder / "unused",
        stage__0__mixture=mixture,
        stage__1__mixture=mixture,
        model__num_layers=1,
        checkpoint__every_steps=1,
        metrics__tensorboard=False,
        **changes,
    )
    path = folder / "run.toml"
    path.write_text(dump_toml(config))
    return path


def run_calls(argument_lists: list[list[str]]) -> list[Ended]:
    """Call the trainer once per list, one after another; see `tests.distributed`."""
    from lclm.train.__main__ import main

    ended = []
    for arguments in argument_lists:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            code = main(arguments)
        ended.append(Ended(code, said.getvalue()))
    return ended


def steps_of(folder: Path) -> list[str]:
    """Names in a folder of checkpoints, without `latest`."""
    return sorted(path.name for path in folder.iterdir() if path.name != "latest")


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, by a reader that takes no NaN."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]
