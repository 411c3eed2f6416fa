"""Folders of a checkpoint: where the newest step is, what `lclm.json` says, atomic replacement.

    CKPT_DIR/latest               name of the step folder to go on from, one line
    CKPT_DIR/step_00000012/       torch_dist files, `lclm.json`, and perhaps `tokenizer/` and
                                  `hf_source.json`

No torch here, so that any tool can look at a checkpoint.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lclm.config import ModelConfig
from lclm.config_file import explain
from lclm.files import remove_left, replace_folder, replace_text

INFO_NAME = "lclm.json"
LATEST_NAME = "latest"
TOKENIZER_FOLDER = "tokenizer"
MODEL_PREFIX = "model."  # of the weights' keys
FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A folder that cannot be used as asked. The message names path, value, rule and remedy."""


class CheckpointInfo(BaseModel):
    """What `lclm.json` says about one step folder."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: int
    """Version of this file's fields: 1."""
    step: int = Field(ge=0)
    """Optimizer steps done over all stages."""
    stage: int = Field(ge=0)
    """Number of the stage that this checkpoint is in, from 0."""
    stage_step: int = Field(ge=0)
    """Optimizer steps done in that stage."""
    tokens: int = Field(ge=0)
    """Input tokens seen over all stages."""
    model: dict[str, Any]
    """The fields of `[model]` without `init_from`."""
    rope_base: float = Field(ge=1)
    """Base of the rotary frequencies in use."""
    seq_length: int = Field(ge=1)
    """Tokens of a row."""
    max_context: int = Field(default=0, ge=0)
    """Longest context that the weights are made for, in tokens: the larger of the limit of the
    model that the run starts from and its longest stage so far. 0, in older files: seq_length."""
    dtype: str = Field(pattern="^(float32|bfloat16|float16)$")
    """Type of the weights; of several, one that holds all."""
    has_optimizer: bool
    """Whether optimizer state lies beside the weights."""
    ledger: dict[str, Any]
    """Tokens drawn from each prefix since the start of the run."""
    versions: dict[str, Any]
    """Versions of the libraries that wrote the checkpoint."""
    data: dict[str, Any] = {}
    """What tells the data of each prefix from any other; absent where nothing was trained."""
    config: dict[str, Any] = {}
    """The configuration of the run; absent where nothing was trained."""

    @property
    def context_limit(self) -> int:
        """Tokens of the longest context that an export promises."""
        return max(self.max_context, self.seq_length)


def dtype_name(dtype: object) -> str:
    """`float32`, `bfloat16` or `float16`, as `lclm.json` and `config.json` write a torch type."""
    return str(dtype).removeprefix("torch.")


def step_folder_name(step: int) -> str:
    """`step_00000012` for step 12."""
    return f"step_{step:08d}"


def list_steps(checkpoint_dir: Path) -> dict[int, Path]:
    """The step folders by their steps, rising; folders of any other name are not ours."""
    folders = sorted(path for path in checkpoint_dir.glob("step_*") if path.is_dir())
    matches = ((re.fullmatch(r"step_(\d{8})", path.name), path) for path in folders)
    return {int(match[1]): path for match, path in matches if match}


def is_whole(step_folder: Path) -> bool:
    """Whether all that a save writes last is there."""
    return all((step_folder / name).is_file() for name in (INFO_NAME, ".metadata", "metadata.json"))


def find_newest(checkpoint_dir: Path) -> Path | None:
    """The step folder to go on from: what `latest` names, else the newest whole one.

    None where there is no step at all.

    Raises:
        CheckpointError: `latest` names no complete step folder, or is missing and no step is whole.
    """
    if (checkpoint_dir / LATEST_NAME).is_file():
        return resolve_step_folder(checkpoint_dir)
    steps = list_steps(checkpoint_dir)
    whole = [folder for folder in steps.values() if is_whole(folder)]
    if steps and not whole:
        raise CheckpointError(
            f"checkpoints {checkpoint_dir}: {LATEST_NAME} is missing and none of the steps "
            f"{list(steps)} is whole; copy one again, or give another run.dir"
        )
    return whole[-1] if whole else None


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
    if not latest.is_file() and (path / "config.json").is_file():
        raise CheckpointError(
            f"checkpoint {path}: is a Hugging Face folder; import it with "
            "tools/convert_from_hf.py and give what that writes"
        )
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
    tree = read_json(path)
    if tree.get("format") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format = {tree.get('format')!r}, but this version reads format "
            f"{FORMAT_VERSION}; use the version of lclm that wrote the checkpoint"
        )
    try:
        return CheckpointInfo.model_validate(tree)
    except ValidationError as error:
        problems = explain(error, CheckpointInfo)
        raise CheckpointError(f"{path}: {problems}; write the checkpoint again") from error


def check_architecture(folder: Path, info: CheckpointInfo, config_model: ModelConfig) -> None:
    """Refuse a checkpoint whose sizes are not those of the configuration."""
    there, here = dict(info.model), config_model.recorded_fields()
    for fields in (there, here):
        fields["head_dim"] = ModelConfig.model_validate(fields).head_size
    different = [
        f"{name} is {there.get(name)!r} there and {value!r} here"
        for name, value in here.items()
        if name not in ("init_std", "rope_scaling") and there.get(name) != value
    ]
    if different:
        raise CheckpointError(
            f"checkpoint {folder}: is of another architecture: {'; '.join(different)}; "
            "change [model] or give another checkpoint"
        )


def complete_model(tree: dict[str, Any]) -> None:
    """Put the sizes that `[model]` leaves out into a configuration, from its `init_from`.

    Nothing is put where every field without a default is there: then `[model]` is meant as it is.

    Args:
        tree: the configuration as it was read, not checked yet.

    Raises:
        CheckpointError: `init_from` is no checkpoint.
    """
    model = tree.get("model")
    needed = {name for name, field in ModelConfig.model_fields.items() if field.is_required()}
    if isinstance(model, dict) and model.get("init_from") and needed - model.keys():
        tree["model"] = read_info(resolve_step_folder(str(model["init_from"]))).model | model


def write_info(step_folder: str | Path, info: CheckpointInfo) -> None:
    """Write `lclm.json` atomically."""
    replace_text(Path(step_folder) / INFO_NAME, json.dumps(info.model_dump(), indent=2) + "\n")


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
def new_folder(
    target: str | Path, overwrite: bool = False, is_ours: Callable[[str], bool] | None = None
) -> Iterator[Path]:
    """Yield an empty folder that becomes `target`, or whose content does, if the block succeeds.

    All else as `lclm.files.replace_folder`: with `is_ours`, overwriting removes only what is named
    so, or as something new.

    Raises:
        CheckpointError: if target is a file, or holds something and `overwrite` is false.
    """
    target = Path(target).resolve()
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"output {target}: is a file; give the name of a folder")
    remove_left(target)
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise CheckpointError(
            f"output {target}: exists and is not empty; give another folder, or --overwrite to "
            "replace what was written there"
        )
    with replace_folder(target, is_ours) as staging:
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
