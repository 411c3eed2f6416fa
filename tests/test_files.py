"""Writing beside and renaming; making once under a lock."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lclm.files import (
    lock_file,
    make_once,
    move_folder,
    refuse_overwriting,
    remove_left,
    replace_files,
    replace_folder,
    replace_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_needs_the_standard_library_only():
    code = "import sys, lclm.files; print({'numpy', 'torch', 'pydantic'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_text_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    replace_text(path, "old\n")
    replace_text(path, "new\n")
    assert path.read_text() == "new\n" and names(tmp_path) == ["a.json"]


def test_a_failing_write_leaves_the_old_files(tmp_path):
    targets = [tmp_path / name for name in ("a.bin", "a.idx")]
    for target in targets:
        target.write_bytes(b"old")

    def write() -> None:
        with replace_files(*targets) as written:
            written[0].write_bytes(b"new")
            assert names(tmp_path) == ["a.bin", f"a.bin.tmp-{os.getpid()}", "a.idx"]
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write()
    assert [target.read_bytes() for target in targets] == [b"old", b"old"]
    assert names(tmp_path) == ["a.bin", "a.idx"]


def test_files_get_their_names_in_order(tmp_path, monkeypatch):
    targets = [tmp_path / name for name in ("z", "a", "m")]
    given, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (given.append(Path(b)), replace(a, b)))
    with replace_files(*targets) as written:
        for path in written:
            path.write_bytes(b"x")
    assert given == targets


def test_a_rename_that_fails_leaves_no_temporary(tmp_path):
    with pytest.raises(FileNotFoundError), replace_files(tmp_path / "a", tmp_path / "b") as written:
        written[1].write_bytes(b"x")  # the first was forgotten
    assert names(tmp_path) == []


def test_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "deep" / "folder"
    for content in ("old", "new"):
        with replace_folder(target) as folder:
            (folder / content).write_text(content)
        assert names(target) == [content]

    def interrupt() -> None:
        with replace_folder(target) as folder:
            (folder / "newer").write_text("newer")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert names(target) == ["new"] and names(target.parent) == ["folder"]


def test_an_empty_folder_stays_the_folder_that_it_is(tmp_path, monkeypatch):
    """It may be a mount point, which nothing can take the place of."""
    target = tmp_path / "folder"
    target.mkdir()
    number, rename, order = target.stat().st_ino, os.rename, []

    def rename_within(source, end):
        if target in (Path(source), Path(end)):
            raise OSError(16, "Device or resource busy")
        order.append(Path(end).name)
        rename(source, end)

    monkeypatch.setattr(os, "rename", rename_within)
    with replace_folder(target) as folder:
        assert folder.parent == target  # on its file system
        for count, name in enumerate("zam"):
            (folder / name).write_text(name)
            os.utime(folder / name, (count, count))
    assert (names(target), order) == (["a", "m", "z"], ["z", "a", "m"])
    assert target.stat().st_ino == number and names(tmp_path) == ["folder"]


def test_only_what_is_ours_is_replaced(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    for name in ("mine", "ours-1", "ours-2", "same"):
        (target / name).write_text("old")
    (target / "folder.old-999999999").mkdir()  # of a process killed between two renames
    number = target.stat().st_ino

    def write(failure: type[BaseException] | None) -> None:
        with replace_folder(target, lambda name: name.startswith("ours")) as folder:
            for name in ("ours-2", "same"):
                (folder / name).write_text("new")
            if failure is not None:
                raise failure

    before = names(target)
    with pytest.raises(KeyboardInterrupt):
        write(KeyboardInterrupt)
    assert names(target) == before and (target / "same").read_text() == "old"
    write(None)
    assert {p.name: p.read_text() for p in target.iterdir()} == {
        "mine": "old",
        "ours-2": "new",
        "same": "new",
    }
    assert target.stat().st_ino == number


def test_what_was_there_comes_back_where_a_rename_fails(tmp_path, monkeypatch):
    target, rename = tmp_path / "folder", os.rename
    target.mkdir()
    for name in ("a", "b"):
        (target / name).write_text("old")

    def fail_at_last(source, end):
        if Path(end) == target / "b" and Path(source).read_text() == "new":
            raise OSError(28, "No space left on device")
        rename(source, end)

    monkeypatch.setattr(os, "rename", fail_at_last)

    def write() -> None:
        with replace_folder(target, lambda name: True) as folder:
            for count, name in enumerate("ab"):
                (folder / name).write_text("new")
                os.utime(folder / name, (count, count))

    with pytest.raises(OSError, match="No space"):
        write()
    assert {p.name: p.read_text() for p in target.iterdir()} == {"a": "old", "b": "old"}


def test_what_dead_processes_left_is_removed_and_what_others_write_stays(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = [f"folder.tmp-{dead.pid}", f"folder.tmp-{os.getpid()}"]
    kept = [f"folder.tmp-{os.getppid()}", "folder.tmp-x", f"other.tmp-{dead.pid}"]
    for name in left + kept:
        (tmp_path / name).mkdir()
    (target / left[0]).mkdir()
    remove_left(target)
    assert names(target) == []
    assert names(tmp_path) == sorted(["folder", *kept])


def test_folder_left_by_a_killed_process_is_not_taken(tmp_path):
    left = tmp_path / f"folder.tmp-{os.getpid()}"
    left.mkdir()
    (left / "half").write_text("half")
    with replace_folder(tmp_path / "folder") as folder:
        assert names(folder) == []
    assert names(tmp_path) == ["folder"]


def test_folder_comes_back_where_the_second_rename_fails(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(FileNotFoundError):
        move_folder(tmp_path / "missing", target)
    assert names(target) == ["old"] and names(tmp_path) == ["folder"]


def test_lock_is_held_until_closed(tmp_path):
    with lock_file(tmp_path / "lock"), pytest.raises(BlockingIOError):
        lock_file(tmp_path / "lock", wait=False)
    lock_file(tmp_path / "lock", wait=False).close()


def make_slowly(target: Path, log: Path, barrier) -> None:
    def make() -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.2)
        with replace_folder(target) as folder:
            (folder / "content").write_text("x")

    barrier.wait()
    make_once(target, make)
    assert names(target) == ["content"]


def test_of_several_processes_one_makes(tmp_path):
    context = multiprocessing.get_context("fork")
    target, log, barrier = tmp_path / "cache" / "key", tmp_path / "log", context.Barrier(4)
    started = [context.Process(target=make_slowly, args=(target, log, barrier)) for _ in range(4)]
    for process in started:
        process.start()
    for process in started:
        process.join(30)
    assert [process.exitcode for process in started] == [0] * 4
    assert len(log.read_text().splitlines()) == 1


def test_what_failed_is_made_by_the_next(tmp_path):
    target = tmp_path / "key"

    def fail() -> None:
        raise ValueError("no rows")

    with pytest.raises(ValueError, match="no rows"):
        make_once(target, fail)
    make_once(target, target.mkdir)
    make_once(target, fail)  # it is there


def test_an_output_that_is_an_input_is_refused(tmp_path):
    source, folder = tmp_path / "a.json", tmp_path / "in"
    source.write_text("x")
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "b.json").write_text("x")
    (tmp_path / "link.json").symlink_to(source)
    (tmp_path / "linked").symlink_to(folder)
    new = tmp_path / "new.json"
    for outputs, inputs, message in (
        ([new, source], [source], "a.json: is the input"),
        ([folder / ".." / "a.json"], [source], "is the input"),
        ([source], [tmp_path / "link.json"], "is the input .*link.json"),
        ([tmp_path / "link.json"], [source], "is the input"),
        ([folder], [folder], "is the input"),
        ([tmp_path / "linked"], [folder], "is the input"),
        ([folder], [folder / "deep" / "b.json"], "in: holds the input"),
        ([tmp_path / "linked"], [folder / "deep"], "linked: holds the input"),
    ):
        with pytest.raises(ValueError, match=message):
            refuse_overwriting(outputs, inputs)
    for outputs, inputs in (
        ([new], [source, folder]),
        ([folder / "c.json", folder / "new"], [folder, folder / "deep" / "b.json"]),
        ([source], [tmp_path / "missing", folder]),
    ):
        refuse_overwriting(outputs, inputs)
    for output in (folder / "c.json", tmp_path / "linked" / "deep" / "c.json"):
        with pytest.raises(ValueError, match=r"c.json: lies in the input .*in"):
            refuse_overwriting([output], [folder], reads_folders=True)


def test_a_link_to_a_file_in_an_output_folder_is_an_input_there(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.json").write_text("x")
    (tmp_path / "link.json").symlink_to("out/a.json")
    with pytest.raises(ValueError, match=r"out: holds the input .*link\.json"):
        refuse_overwriting([tmp_path / "out"], [tmp_path / "link.json"])
