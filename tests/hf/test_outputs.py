"""Where the converters write, and what their command lines say."""

import importlib.util
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lclm.checkpoint.folder import CheckpointError, resolve_step_folder
from lclm.hf.convert import convert_to_hf
from tests.checkpoint.samples import (
    save_hf,
    write_tokenizer,
)
from tests.hf.folders import (
    assert_same_tensors,
    export_hf,
    import_hf,
    load_folder,
)

ROOT = Path(__file__).resolve().parents[2]


def test_outputs_are_kept_safe(tmp_path, hf_folder, checkpoint):
    for convert, source in ((import_hf, hf_folder), (export_hf, checkpoint)):
        output = tmp_path / f"out-{convert.__name__}"
        output.mkdir()
        (output / "mine").write_text("x")
        with pytest.raises(CheckpointError, match="exists and is not empty"):
            convert(source, output)
        assert (output / "mine").read_text() == "x"
        convert(source, output, overwrite=True)
        assert (output / "mine").read_text() == "x"
        for bad in (source, source.parent):
            with pytest.raises(ValueError, match=r"(is|holds) the input"):
                convert(source, bad, overwrite=True)


def test_overwriting_leaves_nothing_of_the_old_export(tmp_path, hf_folder, checkpoint):
    again = tmp_path / "again"
    write_tokenizer(checkpoint / "step_00000000" / "tokenizer")
    export_hf(checkpoint, again, max_shard_bytes=20_000)
    (again / "README.md").write_text("mine")
    (again / "tokenizer.model").write_text("x")  # would be read beside the new tokenizer.json
    export_hf(checkpoint, again, overwrite=True)
    export_hf(checkpoint, tmp_path / "new")
    names = {path.name for path in again.iterdir()}
    assert names == {path.name for path in (tmp_path / "new").iterdir()} | {"README.md"}
    assert (again / "README.md").read_text() == "mine"


def test_overwriting_an_import_leaves_other_steps(tmp_path, hf_folder, checkpoint):
    (checkpoint / "step_00000012").mkdir()
    (checkpoint / "latest").write_text("step_00000012\n")
    import_hf(hf_folder, checkpoint, overwrite=True)
    assert resolve_step_folder(checkpoint).name == "step_00000000"
    assert (checkpoint / "step_00000012").is_dir()


def test_a_folder_that_is_there_stays_the_same_folder(tmp_path, hf_folder, checkpoint):
    for convert, source in ((import_hf, hf_folder), (export_hf, checkpoint)):
        output = tmp_path / f"out-{convert.__name__}"
        output.mkdir()
        number = output.stat().st_ino
        for overwrite in (False, True):
            convert(source, output, overwrite=overwrite)
            assert output.stat().st_ino == number and len(list(output.iterdir())) > 1


def test_what_a_killed_conversion_left_is_removed(tmp_path, hf_folder, checkpoint):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for convert, source in ((import_hf, hf_folder), (export_hf, checkpoint)):
        output = tmp_path / f"out-{convert.__name__}"
        for folder in (tmp_path, output):  # beside a folder that was not there, in one that was
            (folder / f"{output.name}.tmp-{dead.pid}" / "half").mkdir(parents=True)
        convert(source, output)
        assert not list(tmp_path.glob("**/*.tmp-*")) and any(output.iterdir())


def test_failed_export_leaves_the_old_output(tmp_path, hf_folder, checkpoint):
    export_hf(checkpoint, tmp_path / "again")
    before = load_folder(tmp_path / "again")
    data = sorted((checkpoint / "step_00000000").glob("*.distcp"))[3]
    data.write_bytes(b"\0" * data.stat().st_size)  # right size, wrong content: found while writing
    with pytest.raises(CheckpointError, match=r"distcp: the data of '.*' cannot be read"):
        export_hf(checkpoint, tmp_path / "again", overwrite=True)
    assert_same_tensors(load_folder(tmp_path / "again"), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "ckpt", "hf"]


def test_a_step_deleted_during_its_export_is_named(tmp_path, checkpoint):
    step_folder = checkpoint / "step_00000000"

    def delete(line: str) -> None:
        if line.startswith("shard 1 "):
            shutil.rmtree(step_folder)

    with pytest.raises(CheckpointError, match=r"step_00000000: was deleted while it was exported"):
        convert_to_hf(checkpoint, tmp_path / "again", max_shard_bytes=20_000, report=delete)
    assert not (tmp_path / "again").exists()


def test_another_missing_file_is_not_called_a_deleted_step(tmp_path, checkpoint):
    def delete(line: str) -> None:
        shutil.rmtree(next(tmp_path.glob("again.tmp-*")))

    with pytest.raises(FileNotFoundError):
        convert_to_hf(checkpoint, tmp_path / "again", max_shard_bytes=20_000, report=delete)


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tools_convert_and_report(tmp_path, hf_folder, capsys):
    to_ours, to_hf = load_tool("convert_from_hf"), load_tool("convert_to_hf")
    checkpoint, again = tmp_path / "ckpt", tmp_path / "again"
    assert to_ours.main(["--hf-model", str(hf_folder), "--output", str(checkpoint)]) == 0
    wishes = ["--dtype", "fp32", "--max-shard-size", "0.02MB"]
    assert to_hf.main(["--checkpoint", str(checkpoint), "--output", str(again), *wishes]) == 0
    assert_same_tensors(load_folder(again), load_folder(hf_folder))
    out = capsys.readouterr().out
    assert "shard 1 of 1: model.safetensors converted" in out and f"wrote {again}" in out
    assert "model-00002-of-" in out


def test_tools_fail_with_two_and_say_why(tmp_path, hf_folder, capsys):
    to_ours, to_hf = load_tool("convert_from_hf"), load_tool("convert_to_hf")
    output = str(tmp_path / "out")
    assert to_ours.main(["--hf-model", str(tmp_path / "absent"), "--output", output]) == 2
    assert "convert_from_hf: error:" in capsys.readouterr().err
    assert to_hf.main(["--checkpoint", str(hf_folder), "--output", output]) == 2
    assert "convert_to_hf: error:" in capsys.readouterr().err
    for arguments in ([], ["--checkpoint", "x", "--output", "y", "--max-shard-size", "0"]):
        with pytest.raises(SystemExit) as caught:
            to_hf.main(arguments)
        assert caught.value.code == 2
    assert not Path(output).exists()


@pytest.mark.parametrize("name", ["convert_from_hf", "convert_to_hf"])
def test_tools_run_as_scripts(tmp_path, name):
    tool = [sys.executable, f"tools/{name}.py"]
    told = subprocess.run([*tool, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0 and "example" in told.stdout
    source = "--hf-model" if name == "convert_from_hf" else "--checkpoint"
    bad = [*tool, source, str(tmp_path), "--output", str(tmp_path / "out")]
    told = subprocess.run(bad, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 2 and "Traceback" not in told.stderr and "error:" in told.stderr


@pytest.mark.parametrize("name", ["convert_from_hf", "convert_to_hf"])
def test_a_full_disk_is_one_line(tmp_path, name):
    save_hf(tmp_path / "hf", intermediate_size=4000)
    import_hf(tmp_path / "hf", tmp_path / "ckpt")
    sources = {"convert_from_hf": ["--hf-model", "hf"], "convert_to_hf": ["--checkpoint", "ckpt"]}
    option, source = sources[name]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    done = subprocess.run(
        [
            sys.executable,
            f"tools/{name}.py",
            option,
            tmp_path / source,
            "--output",
            tmp_path / "out",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )
    lines = [line for line in done.stderr.splitlines() if "Warn" not in line and "warn" not in line]
    assert (done.returncode, len(lines)) == (1, 1), done.stderr
    assert "File too large; nothing was written: see that the disk has room" in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "hf"]
