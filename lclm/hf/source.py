"""What the Hugging Face folder that a model came from says, kept until the model is exported.

`hf_source.json` lies in a step folder and goes along with every later one. It holds the whole
`config.json`, so that keys that mean nothing to us come back as they were.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lclm.checkpoint.folder import CheckpointError, read_json
from lclm.checkpoint.tokenizer_files import HF_SOURCE_NAME, TOKEN_NAMES, TokenIds


@dataclass(frozen=True)
class HfSource:
    """The content of `hf_source.json`."""

    config: dict[str, Any]
    """`config.json`, as it was."""
    vocabulary_ids: dict[str, int | None] = field(default_factory=dict)
    """Ids of bos, eos and pad that the tokenizer's own files told."""
    dtypes: dict[str, str] = field(default_factory=dict)
    """Type of each weight that was stored as a wider one, since it became part of such a weight."""


def write_source(step_folder: Path, source: HfSource) -> None:
    """Write `hf_source.json`."""
    text = json.dumps(asdict(source), indent=2) + "\n"
    (step_folder / HF_SOURCE_NAME).write_text(text, encoding="utf-8")


def read_source(step_folder: Path) -> HfSource | None:
    """Read `hf_source.json`; None where the model comes from no Hugging Face folder.

    Raises:
        CheckpointError: it is damaged.
    """
    path = step_folder / HF_SOURCE_NAME
    if not path.is_file():
        return None
    tree = read_json(path)
    if tree.keys() != HfSource.__dataclass_fields__.keys() or not all(
        isinstance(value, dict) for value in tree.values()
    ):
        raise CheckpointError(
            f"{path}: must hold the objects {', '.join(HfSource.__dataclass_fields__)}; copy the "
            "file again, or delete it to export without what the original config.json said"
        )
    return HfSource(**tree)


def merge_ids(
    source: HfSource, generation: dict[str, Any], vocabulary: TokenIds
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ids of special tokens for `config.json` and for `generation_config.json`.

    What each file said stays, even where the tokenizer says otherwise. Only an id that the
    tokenizer tells now and did not tell at the import, since another took its place, comes before
    theirs. An id that one file does not say is that of the other, else the tokenizer's.

    Args:
        source: what the model comes from.
        generation: the content of `generation_config.json`.
        vocabulary: what the tokenizer's own files tell now.
    """
    merged: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name in TOKEN_NAMES:
        key, told = f"{name}_token_id", getattr(vocabulary, name)
        new = told if told != source.vocabulary_ids.get(name) else None
        first, second = source.config.get(key), generation.get(key)
        first, second = _keep(first, second, new), _keep(second, first, new)
        if key not in source.config and name != "pad":  # its row of an embedding gets no gradient
            first = next((value for value in (first, second, told) if value is not None), None)
        if key not in generation and second is None:
            second = first
        for tree, said, value in zip(merged, (source.config, generation), (first, second)):
            if key in said or value is not None:
                tree[key] = value
    return merged


def _keep(value: Any, other: Any, new: int | None) -> Any:
    """The ids of a file, unless a new tokenizer's id is not among them."""
    if new is None or new in _as_list(value):
        return value
    return other if new in _as_list(other) else new


def _as_list(ids: Any) -> list[Any]:
    return ids if isinstance(ids, list) else [ids]
