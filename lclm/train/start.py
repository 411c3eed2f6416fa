"""What a run starts from. Rejects what cannot be run before anything is computed or written."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lclm.checkpoint.data_files import read_metadata
from lclm.checkpoint.folder import (
    LATEST_NAME,
    CheckpointError,
    CheckpointInfo,
    check_architecture,
    find_newest,
    list_steps,
    read_info,
    resolve_step_folder,
)
from lclm.checkpoint.tokenizer_files import read_travelling
from lclm.config import Config, ConfigError, RopeScaling
from lclm.data.indexed import IndexedReader, check_same_tokenizer, tokenizer_difference
from lclm.data.remote import fetch_prefix
from lclm.data.tokenizer import Tokenizer, load_tokenizer
from lclm.train.changes import check_changes, describe_data
from lclm.train.stages import find_position

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where weights and tokenizer come from."""

    tokenizer: Path | None
    """Tokenizer file or folder that the configuration names."""
    checkpoint: Path | None
    """Step folder to resume from."""
    weights: Path | None
    """Step folder from which only the weights are taken, if nothing is resumed."""
    data: dict[str, Any]
    """`changes.describe_data` of every prefix."""
    files: dict[str, bytes]
    """What travels in checkpoints, as `read_travelling` gives it."""
    context_limit: int
    """Longest context of the weights that the run starts from, in tokens; 0: there are none."""


def find_start(config: Config) -> Start:
    """Find what the run starts from and check that it fits the configuration.

    Raises:
        ConfigError: the vocabulary of the tokenizer or of a data file exceeds the model's.
        CheckpointError: a checkpoint is required but missing or damaged, of another architecture,
            of a run whose stages had other lengths, or trained on other rows (see `changes`).
        ValueError: a data file or the tokenizer cannot be read, or data files were written with
            different tokenizers.
    """
    tokenizer = _load_tokenizer(config)
    data = _check_data(config, tokenizer)
    checkpoint = _find_checkpoint(config)
    weights = None
    if checkpoint is not None:
        if not (checkpoint.parent / LATEST_NAME).is_file():
            logger.warning(
                "checkpoints %s: %s is missing; of its steps %s the newest whole one is %s",
                checkpoint.parent,
                LATEST_NAME,
                list(list_steps(checkpoint.parent)),
                checkpoint.name,
            )
        info = read_info(checkpoint)
        _check_position(config, checkpoint, info)
        check_changes(config, data, checkpoint, info)
    elif config.model.init_from:
        weights = resolve_step_folder(config.model.init_from)
        _compare_rope(config, read_info(weights))
    for folder in filter(None, (checkpoint, weights)):
        check_architecture(folder, read_info(folder), config.model)
    travels = Path(config.data.tokenizer) if tokenizer is not None else None
    origin = checkpoint or weights
    if origin is not None:
        read_metadata(origin)
    limit = 0 if origin is None else read_info(origin).context_limit
    return Start(travels, checkpoint, weights, data, read_travelling(travels, origin), limit)


def check_unchanged(config: Config, start: Start) -> None:
    """Raise ConfigError if another run wrote a checkpoint since `find_start`, before the lock."""
    if _find_checkpoint(config) != start.checkpoint:
        raise ConfigError(
            f"run.dir({config.run.dir}): another run wrote a checkpoint there meanwhile; start "
            "again to go on from it"
        )


def _load_tokenizer(config: Config) -> Tokenizer | None:
    if not config.data.tokenizer:
        return None
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"data.tokenizer({config.data.tokenizer}) has {tokenizer.vocab_size} tokens, more than "
            f"model.vocab_size({config.model.vocab_size}); raise model.vocab_size"
        )
    return tokenizer


def _check_data(config: Config, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Every file fits the model's vocabulary, and those of all stages come from one tokenizer.

    Returns `describe_data` of each prefix.
    """
    readers = [IndexedReader(fetch_prefix(prefix)) for prefix in config.prefixes]
    for reader in readers:
        size = reader.metadata.get("vocab_size", 0)
        if size > config.model.vocab_size:
            raise ConfigError(
                f"mixture: {reader.prefix} was written with a vocabulary of {size} tokens, more "
                f"than model.vocab_size({config.model.vocab_size}); raise model.vocab_size or "
                "preprocess with the model's tokenizer"
            )
        there = reader.metadata.get("tokenizer", {})
        difference = "" if tokenizer is None else tokenizer_difference(there, tokenizer.describe())
        if difference:
            logger.warning(
                "mixture: %s was written with another tokenizer than data.tokenizer(%s): %s",
                reader.prefix,
                config.data.tokenizer,
                difference,
            )
    check_same_tokenizer(readers, "mixture")
    return {prefix: describe_data(r) for prefix, r in zip(config.prefixes, readers, strict=True)}


def _find_checkpoint(config: Config) -> Path | None:
    folder = Path(config.run.dir) / "checkpoints"
    if config.checkpoint.resume == "never":
        return None
    found = find_newest(folder)
    if found is None and config.checkpoint.resume == "required":
        raise CheckpointError(
            f"checkpoint.resume = 'required': {folder} has no checkpoint; "
            "use 'auto' to start a new run"
        )
    return found


def _compare_rope(config: Config, info: CheckpointInfo) -> None:
    """Say where the rotary embedding is not the one that the weights were trained with."""
    where = f"model.init_from({config.model.init_from})"
    here, there = config.model.rope_scaling, info.model.get("rope_scaling")
    if here != (there and RopeScaling.model_validate(there)):
        logger.warning(
            "%s was trained with rope_scaling %s, but model.rope_scaling is %s: copy it, unless "
            "the change is meant",
            where,
            there,
            here and here.model_dump(),
        )
    if info.rope_base != config.stage[0].rope_base:
        logger.warning(
            "%s was trained with rope_base %g, but stage.0.rope_base is %g: right where a longer "
            "context is trained",
            where,
            info.rope_base,
            config.stage[0].rope_base,
        )


def _check_position(config: Config, folder: Path, info: CheckpointInfo) -> None:
    if not info.has_optimizer:
        raise CheckpointError(
            f"checkpoint {folder}: holds weights only and cannot be resumed; start from it with "
            "model.init_from, in another run.dir"
        )
    here = find_position(config, info.step)
    if (here.stage, here.stage_step, here.tokens) != (info.stage, info.stage_step, info.tokens):
        raise CheckpointError(
            f"checkpoint {folder}: step {info.step} is step {info.stage_step} of stage "
            f"{info.stage} after {info.tokens} tokens there, but step {here.stage_step} of "
            f"stage {here.stage} after {here.tokens} tokens in this configuration; give the "
            "stages their old tokens and tokens_per_step, or start with model.init_from"
        )
