"""Sharded checkpoints through Megatron-core's dist_checkpointing: any layout writes, any reads.

A step folder is written beside its name by all ranks and renamed by rank 0 when it is whole; only
then does `latest` name it. The step folder of another layout loads as well: weights are whole
tensors cut into shards, and the distributed optimizer's state is saved fully reshardable.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from lclm.checkpoint.folder import (
    LATEST_NAME,
    MODEL_PREFIX,
    CheckpointInfo,
    check_architecture,
    list_steps,
    read_info,
    step_folder_name,
    write_info,
    write_latest,
)
from lclm.checkpoint.tokenizer_files import write_travelling
from lclm.command_line import ToolFailedError
from lclm.config import ModelConfig
from lclm.files import move_folder
from lclm.mesh import Mesh
from lclm.model.llama import LlamaModel

logger = logging.getLogger(__name__)

EXTRA_STATE = "_extra_state"


def _metadata(mesh: Mesh) -> dict[str, Any]:
    """How Megatron-core is to describe the state. See the module's docstring."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "dp_cp_group": mesh.dp_cp_group,
    }


def save(
    checkpoint_dir: Path,
    info: CheckpointInfo,
    mesh: Mesh,
    model: LlamaModel,
    optimizer: Any,
    files: dict[str, bytes] | None,
) -> Path:
    """Write the step folder of `info.step` under `checkpoint_dir` and point `latest` to it.

    Called by every rank; returns the step folder. An existing folder of that step is replaced.
    `files`: what else lies in it, as `read_travelling` gives it.

    Raises:
        ToolFailedError: on every rank; the disk is full, say. What was there is as it was.
    """
    target = checkpoint_dir / step_folder_name(info.step)
    staging = target.with_name(f"{target.name}.tmp")
    if mesh.rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    dist.barrier()
    metadata = _metadata(mesh)
    model_state = _sharded_weights(model, metadata)
    state = {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict(model_state, is_loading=False, metadata=metadata),
    }
    # The process-group object is for this process only; it cannot be written.
    content = {key: value for key, value in metadata.items() if key != "dp_cp_group"}
    try:
        dist_checkpointing.save(state, str(staging), content_metadata=content)
    except CheckpointException as error:  # of every rank, where any fails
        causes = {str(cause).split("\n")[0] for cause, _ in error.failures.values()}
        raise ToolFailedError(
            f"checkpoint {target}: cannot be written ({'; '.join(causes) or 'by another rank'}), "
            "and the ones before are as they were; see that the disk has room, and start again"
        ) from error
    dist.barrier()
    if mesh.rank == 0:
        write_info(staging, info)
        write_travelling(staging, files or {})
        move_folder(staging, target)
        write_latest(checkpoint_dir, target.name)
    dist.barrier()
    return target


def load(
    folder: Path, config_model: ModelConfig, mesh: Mesh, model: LlamaModel, optimizer: Any
) -> CheckpointInfo:
    """Load weights, and optimizer state if an optimizer is given, from a step folder.

    Args:
        folder: the step folder.
        config_model: of the configuration, to compare.
        mesh: this process's place.
        model: the (unwrapped) model to fill.
        optimizer: Megatron-core optimizer to fill, or None for weights only.

    Raises:
        CheckpointError: if there is no checkpoint, or it is of another architecture.
    """
    info = read_info(folder)
    check_architecture(folder, info, config_model)
    metadata = _metadata(mesh)
    state: dict[str, Any] = {"model": _sharded_weights(model, metadata)}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(
            state["model"], is_loading=True, metadata=metadata
        )
    loaded = dist_checkpointing.load(state, str(folder))
    weights = {name.removeprefix(MODEL_PREFIX): w for name, w in loaded["model"].items()}
    result = model.load_state_dict(weights, strict=False)
    missing = [name for name in result.missing_keys if not name.endswith(EXTRA_STATE)]
    assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
    dist.barrier()
    return info


def _sharded_weights(model: LlamaModel, metadata: dict[str, Any]) -> dict[str, Any]:
    """Weights as sharded tensors, without the (empty) objects that Transformer Engine would fill.

    A checkpoint made by `convert_from_hf.py` has none of these, and nobody needs them.
    """
    state = model.sharded_state_dict(prefix=MODEL_PREFIX, metadata=metadata)
    return {name: value for name, value in state.items() if not name.endswith(EXTRA_STATE)}


def remove_old(checkpoint_dir: Path, keep: int, step: int, protected_steps: set[int]) -> None:
    """Delete all but the newest `keep` step folders up to `step`, which was just saved.

    Those of `protected_steps` stay, and so does every later one: it is of other work.
    """
    mine = [number for number in list_steps(checkpoint_dir) if number <= step]
    for number in mine[:-keep]:
        if number not in protected_steps:
            folder = checkpoint_dir / step_folder_name(number)
            shutil.rmtree(folder)
            logger.info("removed old checkpoint %s", folder.name)


def set_aside(run_dir: Path, checkpoint_dir: Path, step: int | None, records: list[str]) -> None:
    """Move step folders after `step` (None: all) out of the way of a run that starts there.

    They are the work of a run that is not gone on with. They go, with copies of the files
    `records` of the run folder, to `abandoned-<n>` in it.
    """
    later = [p for n, p in list_steps(checkpoint_dir).items() if step is None or n > step]
    if not later:
        return
    number = 1
    while (run_dir / f"abandoned-{number}").exists():
        number += 1
    target = run_dir / f"abandoned-{number}"
    (target / checkpoint_dir.name).mkdir(parents=True)
    for name in filter(lambda name: (run_dir / name).is_file(), records):
        shutil.copyfile(run_dir / name, target / name)
    if step is None:
        (checkpoint_dir / LATEST_NAME).unlink(missing_ok=True)  # it would name nothing
    for folder in later:
        folder.rename(target / checkpoint_dir.name / folder.name)
    logger.warning(
        "this run starts at step %d, so %s of earlier work moved to %s; delete it if it is not "
        "wanted",
        step or 0,
        ", ".join(folder.name for folder in later),
        target,
    )
