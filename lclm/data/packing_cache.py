"""Packings of stages kept as memory-mapped files, keyed by a hash of all they follow from.

    <folder>/<key>/NAME.npy    one array each
    <folder>/<key>/facts.json  the small numbers
    <folder>/<key>.lock        held by the process that makes them

A packing is made by the first process that asks, beside, and gets its name in one step; the others
wait and map the same pages.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lclm.files import make_once, replace_folder

FACTS = "facts.json"

Packing = tuple[Mapping[str, np.ndarray], dict[str, Any]]  # arrays by name, facts for JSON


def hash_packing(inputs: object) -> str:
    """Key of a packing: SHA-256 of its inputs as JSON, 32 hex digits."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]


def load_or_make(folder: Path | None, key: str, make: Callable[[], Packing]) -> Packing:
    """The packing of this key, made by `make` where it is not there yet.

    Args:
        folder: of the cache; None: nothing is kept.
        key: from `hash_packing`.
        make: gives the arrays, names being file names, and facts; what it raises goes on.

    Raises:
        ValueError: a kept packing is damaged.
    """
    if folder is None:
        return make()
    target = folder / key
    make_once(target, lambda: _write(target, *make()))
    try:
        facts = json.loads((target / FACTS).read_text(encoding="utf-8"))
        arrays = {
            name: _map(target / f"{name}.npy", size) for name, size in facts["arrays"].items()
        }
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{target}: is damaged ({error}); delete it to pack again") from error
    return arrays, facts["facts"]


def _map(path: Path, size: int) -> np.ndarray:
    array = np.load(path, mmap_mode="r")
    if len(array) != size:
        raise ValueError(f"{path.name} has {len(array)} items instead of {size}")
    return array.view(np.ndarray)


def _write(target: Path, arrays: Mapping[str, np.ndarray], facts: dict[str, Any]) -> None:
    with replace_folder(target) as folder:
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
        sizes = {name: len(array) for name, array in arrays.items()}
        text = json.dumps({"arrays": sizes, "facts": facts})
        (folder / FACTS).write_text(text, encoding="utf-8")
