"""Every test marked `triton`, in Triton's interpreter on the CPU.

The interpreter must be chosen before Triton is imported, and a process that has it cannot compile,
so the tests run in a process of their own: once, with one result here per file of tests.
"""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from lclm_kernels.backend import IS_INTERPRETED

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).resolve().parent
TIMEOUT_S = 900  # a minute or two on an idle machine
FILES = sorted(
    path.stem
    for path in FOLDER.glob("test_*.py")
    if path != Path(__file__).resolve()
    and re.search(r"import .*each_implementation", text := path.read_text(encoding="utf-8"))
    and '"triton"' in text
)


@pytest.fixture(scope="session")
def interpreted(tmp_path_factory):
    """(results by file name: [(test, what went wrong or "")], output of the run)."""
    assert not IS_INTERPRETED, "run without TRITON_INTERPRET; this file sets it for its own process"
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "triton", f"--junit-xml={report}"]
    finished = subprocess.run(
        [*command, str(FOLDER)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=FOLDER.parent.parent,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    output = finished.stdout + finished.stderr
    assert report.exists(), output
    results = {}
    for case in ElementTree.parse(report).iter("testcase"):
        problems = [child.text or child.tag for child in case]
        stem = case.get("classname").rpartition(".")[2]
        results.setdefault(stem, []).append((case.get("name"), "\n".join(problems)))
    return results, output


@pytest.mark.timeout(TIMEOUT_S + 20)
def test_no_file_is_left_out(interpreted):
    results, output = interpreted
    assert sorted(results) == FILES and "test_bf16_interpreter" in FILES, output


@pytest.mark.timeout(TIMEOUT_S + 20)
@pytest.mark.parametrize("name", FILES)
def test_interpreted(name, interpreted):
    results, output = interpreted
    assert name in results, f"no test of {name} ran:\n{output}"
    failed = {test: problem for test, problem in results[name] if problem}
    assert not failed, "\n\n".join(f"{test}:\n{problem}" for test, problem in failed.items())
