"""Files: what reads and writes them safely, whatever they hold."""

import importlib
from pathlib import Path
from typing import Any


def import_optional(module: str, package: str, path: Path) -> Any:
    """An optional package that a file needs; ValueError with the remedy where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"input {path}: reading {path.suffix} files needs the package {package}, which is not "
            f"installed ({error}); run: pip install {package}"
        ) from error
