"""Limits of length that a folder's files give beside `max_position_embeddings`.

They were right for the model before it was trained on longer rows, and would cut texts or refuse
them now: vLLM takes the smallest, `truncation=True` cuts there, `generate()` raises.
"""

import json
from collections.abc import Callable
from pathlib import Path

from lclm.checkpoint.folder import read_json

# `config.json` of old folders holds settings of generation.
LIMITS = (
    ("tokenizer_config.json", "model_max_length"),
    ("generation_config.json", "max_length"),
    ("config.json", "max_length"),
)


def raise_limits(folder: Path, limit: int, report: Callable[[str], None]) -> None:
    """Raise each limit that is below `limit` tokens to it; larger and absent ones stay."""
    for name, key in LIMITS:
        path = folder / name
        tree = read_json(path) if path.is_file() else {}
        value = tree.get(key)
        if isinstance(value, int | float) and value < limit:
            tree[key] = limit
            text = json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
            path.write_text(text, encoding="utf-8")
            report(f"note: {name}: {key} was {value}, is {limit} as the model was trained for it")
