"""Folders of a checkpoint: where the newest step is, what `lclm.json` says, atomic replacement.

    CKPT_DIR/latest               name of the newest step folder, one line
    CKPT_DIR/step_00000012/       torch_dist files, `lclm.json`, and perhaps `tokenizer/`

Standard library only, so that any tool can look at a checkpoint without torch.
"""

from __future__ import annotations  # the types of fields are compared as text

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lclm.files import replace_folder, replace_text

INFO_NAME = "lclm.json"
LATEST_NAME = "latest"
TOKENIZER_FOLDER = "tokenizer"
MODEL_PREFIX = "model."  # of the weights' keys
FORMAT_VERSION = 1
DTYPES = ("float32", "bfloat16")

# What JSON must hold for each annotation of CheckpointInfo (a whole number may stand for a float).
_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "dict[str, Any]": (dict,),
}


class CheckpointError(ValueError):
    """A folder that cannot be used as asked. The message names path, value, rule and remedy."""


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What `lclm.json` says about one step folder."""

    format: int
    """Version of this file's fields: 1."""
    step: int
    """Optimizer steps done over all stages."""
    stage: int
    """Number of the stage that this checkpoint is in, from 0."""
    stage_step: int
    """Optimizer steps done in that stage."""
    tokens: int
    """Input tokens seen over all stages."""
    model: dict[str, Any]
    """The fields of `[model]` without `init_from`."""
    rope_base: float
    """Base of the rotary frequencies in use."""
    seq_length: int
    """Tokens of a row; the exported model's longest context."""
    dtype: str
    """`float32` or `bfloat16`: type of the weights."""
    has_optimizer: bool
    """Whether optimizer state lies beside the weights."""
    ledger: dict[str, Any]
    """Tokens used of each domain and what else the data needs to go on."""
    versions: dict[str, Any]
    """Versions of the libraries that wrote the checkpoint."""

    @classmethod
    def from_json(cls, tree: Any, where: str) -> CheckpointInfo:
        """Check a decoded `lclm.json`; `where` names the file in messages.

        Raises:
            CheckpointError: for a missing, unknown or ill-typed field, or another format.
        """
        if not isinstance(tree, dict):
            raise CheckpointError(f"{where}: must hold one JSON object, not {type(tree).__name__}")
        if tree.get("format") != FORMAT_VERSION:
            raise CheckpointError(
                f"{where}: format = {tree.get('format')!r}, but this version reads format "
                f"{FORMAT_VERSION}; use the version of lclm that wrote the checkpoint"
            )
        known = {field.name: str(field.type) for field in fields(cls)}
        missing = sorted(known.keys() - tree.keys())
        unknown = sorted(tree.keys() - known.keys())
        if missing or unknown:
            raise CheckpointError(
                f"{where}: missing fields {missing}, unknown fields {unknown}; the file must hold "
                f"exactly {sorted(known)}; write the checkpoint again"
            )
        for name, annotation in known.items():
            _check_type(where, name, tree[name], annotation)
        for name in ("step", "stage", "stage_step", "tokens"):
            if tree[name] < 0:
                raise CheckpointError(f"{where}: {name} = {tree[name]} must not be negative")
        for name, least in (("seq_length", 1), ("rope_base", 1.0)):
            if not tree[name] >= least:
                raise CheckpointError(f"{where}: {name} = {tree[name]} must be at least {least}")
        if tree["dtype"] not in DTYPES:
            raise CheckpointError(f"{where}: dtype = {tree['dtype']!r} must be one of {DTYPES}")
        return cls(**{**tree, "rope_base": float(tree["rope_base"])})


def _check_type(where: str, name: str, value: Any, annotation: str) -> None:
    allowed = _JSON_TYPES[annotation]
    is_right = isinstance(value, allowed) and (annotation == "bool" or not isinstance(value, bool))
    if not is_right:
        raise CheckpointError(
            f"{where}: {name} = {value!r} is {type(value).__name__}, must be {annotation}"
        )


def step_folder_name(step: int) -> str:
    """`step_00000012` for step 12."""
    return f"step_{step:08d}"


def resolve_step_folder(path: str | Path) -> Path:
    """The step folder that CKPT_DIR stands for: itself, or the one that its `latest` names.

    Raises:
        CheckpointError: if there is no such folder or it is not a checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path}: no such folder; give a checkpoint folder")
    if (path / INFO_NAME).is_file():
        return path
    latest = path / LATEST_NAME
    if not latest.is_file():
        raise CheckpointError(
            f"checkpoint {path}: holds neither {INFO_NAME} (a step folder) nor {LATEST_NAME} "
            "(a folder of steps); give one of these"
        )
    name = latest.read_text(encoding="utf-8").strip()
    if not name or name in (".", "..") or Path(name).name != name:
        raise CheckpointError(
            f"{latest}: holds {name!r}, must hold the name of a folder beside it; "
            "write the name of the step folder to use"
        )
    step_folder = path / name
    if not (step_folder / INFO_NAME).is_file():
        raise CheckpointError(
            f"{latest}: names '{name}', but {step_folder / INFO_NAME} does not exist; "
            "write the name of a complete step folder there, or give that folder itself"
        )
    return step_folder


def read_info(step_folder: str | Path) -> CheckpointInfo:
    """Read and check `lclm.json` of a step folder.

    Raises:
        CheckpointError: if it is absent, not JSON, or does not follow the format.
    """
    path = Path(step_folder) / INFO_NAME
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"checkpoint {step_folder}: {INFO_NAME} is absent; give a complete step folder"
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{path}: is not JSON: {error}; write the checkpoint again"
        ) from error
    return CheckpointInfo.from_json(tree, str(path))


def write_info(step_folder: str | Path, info: CheckpointInfo) -> None:
    """Write `lclm.json` atomically. Raises CheckpointError where `info` breaks the format."""
    path = Path(step_folder) / INFO_NAME
    tree = asdict(info)
    CheckpointInfo.from_json(tree, str(path))
    replace_text(path, json.dumps(tree, indent=2) + "\n")


def write_latest(checkpoint_dir: str | Path, step_folder: str) -> None:
    """Point CKPT_DIR/latest to the step folder of that name, atomically.

    Raises:
        CheckpointError: if the step folder is not complete.
    """
    checkpoint_dir = Path(checkpoint_dir)
    if not (checkpoint_dir / step_folder / INFO_NAME).is_file():
        raise CheckpointError(
            f"{checkpoint_dir / LATEST_NAME}: cannot name '{step_folder}', which holds no "
            f"{INFO_NAME}; finish that folder first"
        )
    replace_text(checkpoint_dir / LATEST_NAME, step_folder + "\n")


@contextmanager
def new_folder(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its name when the block succeeds.

    All else as `lclm.files.replace_folder`.

    Raises:
        CheckpointError: if target is a file, or holds something and `overwrite` is false.
    """
    target = Path(target).resolve()
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"output {target}: is a file; give the name of a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise CheckpointError(
            f"output {target}: exists and is not empty; give another folder, or --overwrite to "
            "replace it"
        )
    with replace_folder(target) as staging:
        yield staging


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file. Raises CheckpointError if it is absent or something else."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; give a complete folder") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON: {error}; copy the file again") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: must hold one JSON object, not {type(tree).__name__}")
    return tree
