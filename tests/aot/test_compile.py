"""Every kernel, as every launch compiles it, for Hopper and Ampere, held to a budget.

The budget of a Triton version is checked in: tests/aot/budget_triton_<version>/<operator>.tsv,
written by `python tests/aot/compile_all.py <operator> --write-budget`. Hopper is compiled by
default, Ampere in `tests/run.sh long`. A change that makes a kernel spill, or lose its
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
BUDGETS = FOLDER / f"budget_triton_{triton.__version__}"
OPERATORS = sorted(path.stem for path in FOLDER.glob("cases/*.py"))
TIMEOUT_S = 900  # a minute or two on an idle machine
MAX_SHARED_BYTES = {90: 232_448, 80: 166_912}  # of one program


def read_budget(operator: str, architecture: int) -> dict[str, dict[str, int]]:
    """Limits by case."""
    path = BUDGETS / f"{operator}.tsv"
    assert path.exists(), (
        f"{path} is not there: run `python tests/aot/compile_all.py {operator} --write-budget` "
        "with this Triton, read the table, and check the file in"
    )
    title, *rows = (line.split("\t") for line in path.read_text(encoding="ascii").splitlines())
    return {
        name: dict(zip(title[1:], map(int, numbers)))
        for name, *numbers in rows
        if name.endswith(f" sm_{architecture}")
    }


def compile_operators(operators: list[str], architecture: int, report: Path) -> dict[str, dict]:
    """What every case uses, by operator, compiled in a process that has no interpreter."""
    command = [sys.executable, str(FOLDER / "compile_all.py"), *operators, "--json", str(report)]
    finished = subprocess.run(
        [*command, "--architecture", str(architecture)],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return json.loads(report.read_text())


@pytest.fixture(scope="session")
def compiled(request, tmp_path_factory):
    """(operator, architecture) -> usage, of all that this session tests, compiled in one go."""
    wanted: dict[int, list[str]] = {}
    for item in request.session.items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if {"operator", "architecture"} <= set(params):
            wanted.setdefault(params["architecture"], []).append(params["operator"])
    folder = tmp_path_factory.mktemp("aot")
    return {
        (operator, architecture): usage
        for architecture, operators in wanted.items()
        for operator, usage in compile_operators(
            operators, architecture, folder / f"{architecture}.json"
        ).items()
    }


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
        cases = FOLDER / "cases" / f"{folder.name}.py"
        text = cases.read_text(encoding="utf-8") if cases.exists() else ""
        named = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
        if kernels - named:
            missing[folder.name] = kernels - named
    assert not missing


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*/*.tsv")), ids=lambda x: x.stem)
def test_no_budget_allows_spills(path):
    title, *rows = (line.split("\t") for line in path.read_text(encoding="ascii").splitlines())
    column = title.index("spill_bytes")
    assert rows and {row[0]: row[column] for row in rows if row[column] != "0"} == {}


@pytest.mark.timeout(TIMEOUT_S + 20)
@pytest.mark.parametrize("architecture", [90, pytest.param(80, marks=pytest.mark.long)])
@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_within_the_budget(operator, architecture, compiled):
    budget = read_budget(operator, architecture)
    usage = compiled[operator, architecture]
    assert set(usage) == set(budget), "cases changed: write the budget again, read the difference"
    over = {
        f"{name}: {column}": f"{row[column]}, allowed {budget[name][column]}"
        for name, row in usage.items()
        for column in ("registers", "spill_bytes", "shared_bytes", "serialized")
        if row[column] > budget[name][column]
    }
    assert not over
    lost = [  # one that uses none any more fell back to plain arithmetic or plain loads
        f"{name}: {column}"
        for name, row in usage.items()
        for column in ("tensor_core", "tma")
        if budget[name][column] and not row[column]
    ]
    assert not lost
    assert max(row["shared_bytes"] for row in usage.values()) <= MAX_SHARED_BYTES[architecture]
