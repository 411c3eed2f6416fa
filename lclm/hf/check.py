"""What is asked of weights and tokenizers in either direction."""

import math
from pathlib import Path

import torch

from lclm.checkpoint.folder import CheckpointError, dtype_name, read_json
from lclm.checkpoint.tokenizer_files import find_tokenizer, has_tokenizer, ids_by_text
from lclm.data.tokenizer import load_tokenizer
from lclm.hf.safetensors_folder import TensorSpec

_ID_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "added_tokens.json")


def convert_weight(
    weight: torch.Tensor, spec: TensorSpec, where: str, allow_non_finite: bool
) -> torch.Tensor:
    """A weight in the type that its spec asks for, and checked.

    Raises:
        CheckpointError: it holds NaN or infinite values, or values too large for the type, and
            `allow_non_finite` is false.
    """
    converted = weight.to(spec.dtype)
    if allow_non_finite or _is_finite(converted):
        return converted
    if _is_finite(weight):
        raise CheckpointError(
            f"{where}: '{spec.name}' holds values that are too large for {dtype_name(spec.dtype)}, "
            f"whose largest is {torch.finfo(spec.dtype).max:g}; give another --dtype"
        )
    raise CheckpointError(
        f"{where}: '{spec.name}' holds NaN or infinite values, and every output of such a model is "
        "NaN; take an earlier checkpoint or copy the weights again, or give --allow-non-finite"
    )


def _is_finite(weight: torch.Tensor) -> bool:
    # no temporary of the weight's size, unlike isfinite; a NaN makes both NaN
    return weight.numel() == 0 or all(math.isfinite(end) for end in weight.aminmax())


def check_vocabulary(tokenizer: Path, vocab_size: int) -> None:
    """Refuse a tokenizer, a folder or file, whose ids go beyond the model's vocabulary.

    Raises:
        CheckpointError: naming both sizes.
        ValueError: the tokenizer's file cannot be read.
    """
    num_ids = count_ids(tokenizer)
    if num_ids > vocab_size:
        raise CheckpointError(
            f"tokenizer {tokenizer}: has ids up to {num_ids - 1}, but the model's vocabulary has "
            f"{vocab_size} tokens; give the tokenizer that the model was trained with, or a model "
            f"whose embedding has {num_ids} rows"
        )


def count_ids(source: Path) -> int:
    """One more than the largest id that a tokenizer gives; 0 where there is none.

    Args:
        source: a folder, perhaps without a tokenizer, or a vocabulary file.

    Raises:
        ValueError: a `tokenizer.model` cannot be read.
    """
    if not has_tokenizer(source):
        return 0
    files = find_tokenizer(source)
    trees = {n: read_json(path) for n, path in files.items() if n in _ID_FILES}
    ids = ids_by_text(trees.get("tokenizer_config.json", {}), trees.get("tokenizer.json", {}))
    ids.update(trees.get("vocab.json", {}), **trees.get("added_tokens.json", {}))
    counts = [number + 1 for number in ids.values()]
    if "tokenizer.json" not in files and "tokenizer.model" in files:
        counts.append(load_tokenizer(files["tokenizer.model"]).vocab_size)
    return max(counts, default=0)
