"""Files behind URLs (s3://, gs://, hf://, https://: whatever fsspec knows), kept in a local folder.

    <cache>/s3/bucket/books.bin/<key>/books.bin    the file, or the files of a folder or prefix
    <cache>/s3/bucket/books.bin/<key>.partial/     while fetching; complete files stay
    <cache>/s3/bucket/books.bin/<key>.lock         held by the process that fetches

The key is a hash of the name, size and version (ETag, time of change) of every file: one that
changes at its source is fetched again. <cache> is $LCLM_CACHE, or ~/.cache/lclm. Nothing is ever
removed from it here; delete it to free space. URLs become local paths here, before anything else
sees them.
"""

import functools
import hashlib
import importlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from lclm.data.retry import try_again
from lclm.files import make_once, replace_files

# what different stores call the version of a file
VERSIONS = ("ETag", "etag", "blob_id", "mtime", "LastModified", "Last-Modified", "last_modified",
            "updated")  # fmt: skip
REQUIRED, OPTIONAL = (".idx", ".bin"), (".json", ".weights")  # files of a prefix
FINAL = (FileNotFoundError, PermissionError)  # trying again does not help
logger = logging.getLogger(__name__)


def is_remote(path: str) -> bool:
    """Whether it is a URL."""
    return "://" in path


def fetch_inputs(paths: Sequence[str]) -> list[Path]:
    """Local paths of files, folders and patterns such as `s3://bucket/*.jsonl`, in order.

    A path that is not a URL is returned unchanged.

    Raises:
        ValueError: there is no such file, it may not be read, or a package is missing.
        OSError: it cannot be fetched, even after retries.
    """
    found: list[Path] = []
    for path in paths:
        if not is_remote(path):
            found.append(Path(path))
            continue
        system, there = _connect(path)
        names = [there]
        if "*" in there:
            names = _ask(path, lambda: sorted(system.glob(there)))  # noqa: B023  called at once
        if not names:
            raise ValueError(f"{path}: nothing matches; check the pattern")
        found += [_fetch_one(system, system.unstrip_protocol(name), name) for name in names]
    return found


@functools.cache
def fetch_prefix(prefix: str) -> str:
    """Local prefix of an indexed prefix; one that is not a URL is returned unchanged.

    Resolved once per process, so that all reads see one version.

    Raises:
        ValueError, OSError: as `fetch_inputs`.
    """
    if not is_remote(prefix):
        return prefix
    system, there = _connect(prefix)
    stem = PurePosixPath(there).name
    files = {stem + ending: _info(system, prefix + ending, there + ending) for ending in REQUIRED}
    for ending in OPTIONAL:
        info = _find(system, prefix + ending, there + ending)
        if info is not None:
            files[stem + ending] = info
    return str(_fetch_files(system, prefix, files) / stem)


def fetch_dataset(path: str) -> str:
    """Local prefix of an indexed prefix, or local path of a folder where there is no prefix.

    Raises:
        ValueError, OSError: as `fetch_inputs`.
    """
    if not is_remote(path):
        return path
    system, there = _connect(path)
    is_prefix = _find(system, f"{path}.idx", f"{there}.idx") is not None
    return fetch_prefix(path) if is_prefix else str(_fetch_one(system, path, there))


def _connect(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it."""
    try:
        core = importlib.import_module("fsspec.core")
        system, path = core.url_to_fs(url)
    except ImportError as error:
        raise ValueError(
            f"{url}: needs a package that is not installed ({error}); run: pip install lclm[remote]"
        ) from error
    except ValueError as error:
        raise ValueError(f"{url}: cannot be opened ({error}); check the URL") from error
    return system, path


def _ask(url: str, question: Callable[[], Any]) -> Any:
    """The answer of a store, with retries on any error: each store raises its own kinds.

    Raises:
        FileNotFoundError, PermissionError: at once.
        OSError: every try failed.
    """
    return try_again(question, f"{url}: cannot be reached", Exception, FINAL)


def _find(system: Any, url: str, path: str) -> dict[str, Any] | None:
    """What the store says of a file; None where there is none. `exists` would read it over HTTP."""
    try:
        found: dict[str, Any] = _ask(url, lambda: system.info(path))
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise ValueError(f"{url}: access is denied ({error}); check your credentials") from error
    return found


def _info(system: Any, url: str, path: str) -> dict[str, Any]:
    """As `_find`, for a file that must be there."""
    found = _find(system, url, path)
    if found is None:
        raise ValueError(f"{url}: no such file; check the URL and your credentials")
    return found


def _fetch_one(system: Any, url: str, path: str) -> Path:
    """A file or a folder; HTTP has no folders, except names that end in a slash."""
    name = PurePosixPath(path).name
    if not path.endswith("/"):
        info = _info(system, url, path)
        if info["type"] != "directory":
            return _fetch_files(system, url, {name: info}) / name
    found = _ask(url, lambda: system.find(path, detail=True))
    root = path.rstrip("/") + "/"
    files = {}
    for there, info in found.items():
        if info.get("size") is None:  # listings over HTTP name files only
            info = _info(system, there, there)
        files[f"{name}/{there.removeprefix(root)}"] = info
    if not files:
        raise ValueError(f"{url}: contains no file; check the URL")
    return _fetch_files(system, url, files) / name


def _fetch_files(system: Any, url: str, files: Mapping[str, Mapping[str, Any]]) -> Path:
    """The folder with these files, fetched by one process while others wait."""
    scheme, _, rest = url.partition("://")
    place = PurePosixPath(scheme, *PurePosixPath(rest.lstrip("/")).parts)
    if any(".." in PurePosixPath(name).parts for name in (str(place), *files)):
        raise ValueError(f"{url}: must not contain '..'; remove it")
    facts = [
        [name, info["name"], info.get("size"), *(str(info.get(key)) for key in VERSIONS)]
        for name, info in sorted(files.items())
    ]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("LCLM_CACHE") or Path.home() / ".cache" / "lclm")
    target = cache / place / key

    def fetch() -> None:
        size = sum(info.get("size") or 0 for info in files.values())
        logger.info("%s: fetching %d files, %.3f GB, to %s", url, len(files), size / 1e9, target)
        start = time.perf_counter()
        for name, info in files.items():
            _fetch_file(system, url, info, Path(f"{target}.partial") / name)
        os.rename(f"{target}.partial", target)
        logger.info("%s: fetched in %.1f s", url, time.perf_counter() - start)

    make_once(target, fetch)
    return target


def _fetch_file(system: Any, url: str, info: Mapping[str, Any], path: Path) -> None:
    """Fetch one file, unless an earlier process has; it gets its name when it is complete."""
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)

    def fetch_once() -> None:
        system.get_file(info["name"], str(beside))
        if info.get("size") not in (None, beside.stat().st_size):
            raise OSError(f"{beside.stat().st_size} bytes arrived instead of {info['size']}")

    with replace_files(path) as (beside,):
        try_again(fetch_once, f"{url}: {path.name} cannot be fetched", Exception)
