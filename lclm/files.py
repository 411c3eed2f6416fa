"""Files: what reads and writes them safely, whatever they hold. Standard library only.

What is written lies beside its place, as `<name>.tmp-<process>`, until it is complete, and gets its
name in one step: readers see it either as it was or whole. What several processes want is made by
one of them, under a lock, while the others wait.
"""

import fcntl
import glob
import importlib
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def _beside(path: Path) -> Path:
    """Where a file or folder is written before it gets its name."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


@contextmanager
def replace_files(*targets: Path) -> Iterator[list[Path]]:
    """Yield a temporary name for each target; the files get their names when the block succeeds.

    They get them in the order given. On an exception they are removed and the targets stay as they
    were. Nothing is forced to the disk: see `replace_text` for what must survive a power cut.
    """
    written = [_beside(target) for target in targets]
    try:
        yield written
        for temporary, target in zip(written, targets):
            os.replace(temporary, target)
    finally:
        for temporary in written:
            temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a UTF-8 file that readers see as it was or whole, also after a power cut."""
    with replace_files(path) as (temporary,), temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replace_folder(target: Path, is_ours: Callable[[str], bool] | None = None) -> Iterator[Path]:
    """Yield an empty folder that becomes `target`, or whose content does, on success.

    Where there is no `target` the folder lies beside it and takes its name; missing parents are
    made. A target that is there and empty stays the folder that it is, since it may be a mount
    point: the new folder lies in it and its content moves up, in the order in which it was written.
    One that holds something is replaced as by `move_folder`, or, with `is_ours`, also stays, and
    of its content only what is named so, or as something new, is replaced.

    On an exception all is as it was.
    """
    target = target.resolve()
    is_kept = target.is_dir() and (is_ours is not None or not any(target.iterdir()))
    temporary = _beside(target / target.name if is_kept else target)
    if temporary.exists():  # left by a killed process that had this process's number
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if is_kept:
            _move_content(temporary, target, is_ours or (lambda name: False))
        else:
            move_folder(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_left(target: Path) -> None:
    """Remove what killed processes left of a `replace_folder(target)`, beside it or in it.

    Processes are looked for on this machine, so this is for targets that no two machines write.
    """
    target = target.resolve()
    for folder in (target.parent, target):
        for path in folder.glob(f"{glob.escape(target.name)}.tmp-*"):
            number = path.name.rpartition("-")[2]
            if path.is_dir() and number.isdigit() and not _is_other_process(int(number)):
                shutil.rmtree(path)


def _is_other_process(number: int) -> bool:
    """Whether another process of that number runs; what has this one's was left by one before."""
    if number == os.getpid():
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def _move_content(source: Path, target: Path, is_ours: Callable[[str], bool]) -> None:
    """Move the content of `source`, a folder in `target`, up; what it replaces is deleted last."""
    old = target / f"{target.name}.old-{os.getpid()}"
    new = sorted(source.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    names = {path.name for path in new}
    left = f"{target.name}.old-"  # by a process that was killed at this
    replaced = [
        path
        for path in target.iterdir()
        if path != source
        and (path.name in names or is_ours(path.name) or path.name.startswith(left))
    ]
    moves = [(path, old / path.name) for path in replaced]
    moves += [(path, target / path.name) for path in new]
    if replaced:
        old.mkdir()
    done: list[tuple[Path, Path]] = []
    try:
        for move in moves:
            os.rename(*move)
            done.append(move)
    except OSError:
        for start, end in reversed(done):
            os.rename(end, start)
        if replaced:
            old.rmdir()
        raise
    if replaced:
        shutil.rmtree(old)
    source.rmdir()


def move_folder(source: Path, target: Path) -> None:
    """Give the folder `source` the name `target`, on the same file system.

    An existing target is moved aside by one rename, replaced by a second and deleted last; between
    the two renames, microseconds apart, there is no `target`, and its old content is in
    `<target>.old-<process>`.
    """
    if not target.exists() or not any(target.iterdir()):
        os.rename(source, target)  # POSIX: replaces an empty folder
        return
    old = target.with_name(f"{target.name}.old-{os.getpid()}")
    os.rename(target, old)
    try:
        os.rename(source, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old)


def refuse_overwriting(
    outputs: Iterable[Path], inputs: Iterable[Path], *, reads_folders: bool = False
) -> None:
    """Raise ValueError where what would be written is an input, or holds one.

    Files are told by device and inode, folders by their real path: links and other spellings of a
    path do not matter. An input that does not exist is passed over.

    Args:
        outputs: files and folders; they need not exist.
        inputs: files and folders that are read.
        reads_folders: every file of an input folder is input, so nothing may be written there.
    """
    outputs = list(outputs)
    by_id = {_file_id(path.stat()): path for path in outputs if path.exists()}
    around = {parent: path for path in outputs for parent in path.resolve().parents}
    has_folders = any(path.is_dir() for path in by_id.values())
    for path in inputs:
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        taken, what = by_id.get(_file_id(status)), "is"
        if taken is None and has_folders:
            above = (_file_id(parent.stat()) for parent in path.resolve().parents)
            taken, what = next(filter(None, map(by_id.get, above)), None), "holds"
        if taken is None and reads_folders and stat.S_ISDIR(status.st_mode):
            taken, what = around.get(path.resolve()), "lies in"
        if taken is not None:
            raise ValueError(
                f"output {taken}: {what} the input {path}, which would be lost, or mixed with what "
                "is written; give another output"
            )


def _file_id(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def lock_file(path: Path, wait: bool = True) -> BinaryIO:
    """Open `path` for appending and lock it until it is closed; it stays, with what it holds.

    Raises:
        BlockingIOError: `wait` is false and another process holds it.
    """
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        file.close()
        raise
    return file


def make_once(target: Path, make: Callable[[], None]) -> None:
    """Let `make` make `target` unless it is there; other processes wait on `<target>.lock`.

    `make` gives the target its name in one step; what it raises goes on, and the next who asks
    tries again.
    """
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(target.with_name(f"{target.name}.lock")):
        if not target.exists():
            make()


def zstd_decompressor(path: Path) -> Any:
    """A decompressor for a .zst file, of long windows too (`zstd --long=31`)."""
    zstandard = import_optional("zstandard", "zstandard", path)
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def import_optional(module: str, package: str, path: Path) -> Any:
    """An optional package that a file needs; ValueError with the remedy where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"input {path}: reading {path.suffix} files needs the package {package}, which is not "
            f"installed ({error}); run: pip install {package}"
        ) from error
