"""What an installation holds: both packages, and the native library where it can be built.

Builds wheels with pip in its own build environment, as `pip install .` does.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "LICENSE")
LIBRARY = "lclm_kernels/native/liblclm_native.so"


def build_wheel(source, folder):
    """(names in the wheel, file name, what pip printed)."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(folder), "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist(), wheel.name, done.stdout + done.stderr


@pytest.fixture
def source(tmp_path):
    """A copy of what is installed, without anything built."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    for name in ("lclm", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


@pytest.mark.slow
def test_wheel_holds_both_packages(source, tmp_path):
    names, wheel, _ = build_wheel(source, tmp_path / "wheels")
    for folder, package in (("lclm", "lclm"), ("kernels", "lclm_kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{package}/{path.relative_to(ROOT / folder).as_posix()}" in names
    # never importable as `kernels`: Hugging Face publishes a package of that name
    assert not [name for name in names if name.startswith("kernels/")]
    assert wheel.startswith("lclm-") and "-py3-none-" in wheel
    can_build = shutil.which("cmake") is not None and shutil.which("c++") is not None
    assert (LIBRARY in names) == can_build


@pytest.mark.slow
def test_native_code_that_does_not_compile_fails_no_install(source, tmp_path):
    (source / "kernels" / "native" / "pack.cpp").write_text("this is not C++\n")
    names, _, printed = build_wheel(source, tmp_path / "wheels")
    assert "lclm/config.py" in names and LIBRARY not in names
    assert printed.count("warning: lclm: the native library was not built (") == 1
