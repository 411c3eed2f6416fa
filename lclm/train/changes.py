"""What a checkpoint records of its run's data and settings, and what has changed since.

What decides the rows must be as it was: a run that goes on with other data, another seed or other
shares repeats documents, or trains on those that were held out, and no loss shows it.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lclm.checkpoint.folder import CheckpointError, CheckpointInfo
from lclm.config import Config, StageConfig
from lclm.data.indexed import IndexedReader
from lclm.data.retry import RetryingFile
from lclm.optim import learning_rate

logger = logging.getLogger(__name__)

NUM_SAMPLES, SAMPLE_BYTES = 64, 1 << 16  # of a file's content; a smaller file is hashed whole
ROW_FIELDS = ("seq_length", "tokens_per_step", "mixture")  # of a stage
# Not of the run itself: where it lies, how far it goes, what it keeps.
UNCOMPARED = ("run.", "checkpoint.", "metrics.", "train.max_steps", "model.init_from",
              "data.allow_changed")  # fmt: skip


def describe_data(reader: IndexedReader) -> dict[str, Any]:
    """What tells the data of a prefix from any other, for JSON.

    The lengths of all documents are hashed; of the tokens, and of their weights where there are
    any, `NUM_SAMPLES` pieces spread over the file.
    """
    endings = [".bin", *([".weights"] if reader.has_weights else [])]
    content = hashlib.sha256(json.dumps(reader.metadata.get("weight_values")).encode())
    for ending in endings:
        for piece in _sample(Path(reader.prefix + ending)):
            content.update(piece)
    return {
        "documents": len(reader),
        "tokens": reader.num_tokens,
        "dtype": reader.dtype.name,
        "lengths": hashlib.sha256(reader.lengths.tobytes()).hexdigest()[:16],
        "content": content.hexdigest()[:16],
        "tokenizer": reader.metadata.get("tokenizer", {}).get("sha256"),
        "is_chat": bool(reader.metadata.get("is_chat")),
    }


def _sample(path: Path) -> Iterator[bytes]:
    size, file = path.stat().st_size, RetryingFile(path)
    if size <= NUM_SAMPLES * SAMPLE_BYTES:
        yield file.read(0, size)
        return
    for number in range(NUM_SAMPLES):
        yield file.read((size - SAMPLE_BYTES) * number // (NUM_SAMPLES - 1), SAMPLE_BYTES)


def record_settings(config: Config) -> dict[str, Any]:
    """The whole configuration, for JSON."""
    tree: dict[str, Any] = config.model_dump(mode="json")
    return tree


def check_changes(config: Config, data: dict[str, Any], folder: Path, info: CheckpointInfo) -> None:
    """Compare a run with the checkpoint that it goes on from; log what may change and has.

    Args:
        config: of this run.
        data: `describe_data` of each of its prefixes.
        folder: step folder of the checkpoint.
        info: its record.

    Raises:
        CheckpointError: what decides the rows has changed, and `data.allow_changed` is not set.
    """
    if not info.config:
        logger.info("%s holds no record of its data and settings: they are not compared", folder)
        return
    begun = range(info.stage + (info.stage_step > 0))
    old, new = _flatten(info.config), _flatten(record_settings(config))
    refused = []
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) == new.get(name) or name.startswith(UNCOMPARED):
            continue
        change = f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
        if _decides_rows(name, begun):
            refused.append(change)
        else:
            logger.info("changed: %s", change)
    refused += _compare_data(config, data, info, begun)
    if refused and not config.data.allow_changed:
        raise CheckpointError(
            f"checkpoint {folder}: this run would not read the rows that it was trained on: "
            f"{'; '.join(refused)}; change it back, start anew with model.init_from in another "
            "run.dir, or set data.allow_changed=true if it is meant"
        )
    for change in refused:
        logger.warning("changed, as data.allow_changed says: %s", change)
    _log_schedule(config, info)


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names of all values that are set; lists of numbers are values."""
    found: dict[str, Any] = {}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        is_tree = isinstance(value, dict) or (value and isinstance(value, list)
                                              and isinstance(value[0], dict))  # fmt: skip
        if is_tree:
            found.update(_flatten(value, f"{prefix}{key}."))
        elif value is not None:
            found[f"{prefix}{key}"] = value
    return found


def _decides_rows(name: str, begun: range) -> bool:
    """Whether a setting decides rows that were read; a prefix is compared by its content."""
    section, *rest = name.split(".")
    if section != "stage":
        return name in ("seed", "data.held_out_fraction")
    return int(rest[0]) in begun and rest[1] in ROW_FIELDS and rest[-1] != "prefix"


def _compare_data(
    config: Config, data: dict[str, Any], info: CheckpointInfo, begun: range
) -> list[str]:
    """What differs in the files of each part of the mixtures of stages that were begun."""
    changes = {}
    for number in begun:
        before = info.config["stage"][number]["mixture"]
        for old, entry in zip(before, config.stage[number].mixture):
            there, here = info.data[old["prefix"]], data[entry.prefix]
            for name in dict.fromkeys([*there, *here]):
                if there.get(name) != here.get(name):
                    change = f"{entry.prefix}: {name}: {there.get(name)!r} -> {here.get(name)!r}"
                    changes[change] = True
    return list(changes)


def _log_schedule(config: Config, info: CheckpointInfo) -> None:
    """Say how the learning rate goes on where the present stage's schedule has changed."""
    if info.stage_step == 0:
        return
    stage = config.stage[info.stage]
    tree = info.config["stage"][info.stage]
    before = StageConfig.model_validate({n: tree[n] for n in StageConfig.model_fields if n in tree})
    if before.num_rows != stage.num_rows:
        logger.info(
            "changed: stage %d has %d rows instead of %d, so they are dealt anew: some that were "
            "trained on may come again",
            info.stage,
            stage.num_rows,
            before.num_rows,
        )
    last = learning_rate(before, info.stage_step - 1)
    is_over = info.stage_step == stage.num_steps
    if not is_over and learning_rate(stage, info.stage_step - 1) != last:
        logger.info(
            "changed: the learning rate does not go on where it was: %.3e at step %d of stage %d, "
            "%.3e at the next",
            last,
            info.stage_step,
            info.stage,
            learning_rate(stage, info.stage_step),
        )
