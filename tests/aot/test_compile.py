"""Every kernel, as every launch compiles it, for Hopper and Ampere, held to a budget.

The budget of a Triton version is checked in: tests/aot/budget_triton_<version>.tsv, written by
`python tests/aot/compile_all.py --write-budget`. A change that makes a kernel spill, or lose its
tensor-core or TMA instructions, fails here, on any machine.
"""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

FOLDER = Path(__file__).resolve().parent
KERNELS = Path(importlib.util.find_spec("lclm_kernels").submodule_search_locations[0])
BUDGET = FOLDER / f"budget_triton_{triton.__version__}.tsv"
TIMEOUT_S = 280
MAX_SHARED_BYTES = {"sm_90": 232_448, "sm_80": 166_912}  # of one program


def read_budget(path: Path) -> dict[str, dict[str, int]]:
    """Limits by case: the columns stand in the file's first line."""
    title, *lines = path.read_text(encoding="ascii").splitlines()
    columns = [word.strip() for word in title.rpartition("case, ")[2].split(",")]
    rows = [line.split("\t") for line in lines]
    return {name: dict(zip(columns, map(int, numbers))) for name, *numbers in rows}


@pytest.fixture(scope="session")
def usage(tmp_path_factory):
    """What every case uses, compiled in a process that has no interpreter."""
    report = tmp_path_factory.mktemp("aot") / "usage.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, str(FOLDER / "compile_all.py"), "--json", str(report)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    print(finished.stdout)
    assert report.exists(), finished.stdout + finished.stderr
    return json.loads(report.read_text())


@pytest.fixture(scope="session")
def budget():
    assert BUDGET.exists(), (
        f"{BUDGET} is not there: run `python tests/aot/compile_all.py --write-budget` with this "
        "Triton, read the table, and check the file in"
    )
    return read_budget(BUDGET)


def jit_kernels(path: Path) -> set[str]:
    """Names of the kernels that a launch can start: decorated with triton.jit, ending _kernel."""
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
        if any(ast.unparse(item).startswith("triton.jit") for item in node.decorator_list)
    }


def test_every_kernel_has_cases():
    missing = {}
    for folder in {path.parent for path in KERNELS.glob("*/*.py")}:
        kernels = set().union(*(jit_kernels(path) for path in folder.glob("*.py")))
        cases = folder / "compile_cases.py"
        text = cases.read_text(encoding="utf-8") if cases.exists() else ""
        named = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
        if kernels - named:
            missing[folder.name] = kernels - named
    assert not missing


@pytest.mark.timeout(TIMEOUT_S + 20)
def test_everything_compiles(usage):
    assert {name: row for name, row in usage.items() if isinstance(row, str)} == {}


def test_the_budget_names_the_cases(usage, budget):
    assert set(usage) == set(budget), "run compile_all.py --write-budget and read the difference"


def test_within_the_budget(usage, budget):
    over = {
        f"{name}: {column}": f"{row[column]}, allowed {budget[name][column]}"
        for name, row in usage.items()
        for column in ("registers", "spill_bytes", "shared_bytes", "serialized")
        if row[column] > budget[name][column]
    }
    assert not over


def test_tensor_cores_and_tma_stay_in_use(usage, budget):
    lost = {
        f"{name}: {column}"
        for name, row in usage.items()
        for column in ("tensor_core", "tma")
        if budget[name][column] and not row[column]
    }
    assert not lost


def test_programs_fit_a_multiprocessor(usage):
    too_large = {
        name: row["shared_bytes"]
        for name, row in usage.items()
        if row["shared_bytes"] > MAX_SHARED_BYTES[name.rpartition(" ")[2]]
    }
    assert not too_large
