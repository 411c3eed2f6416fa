"""House rules that a machine can check: who imports whom, and what a source file may hold.

The import rules are those of the README's file map. Everything is read from the syntax tree, so
an import inside a function or under TYPE_CHECKING counts as well.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 100
CODE_FOLDERS = ("kernels", "lclm", "tools", "benchmarks", "examples", "tests")
TEXT_SUFFIXES = {".py", ".sh", ".toml", ".md", ".cpp", ".h", ".txt", ".yaml", ".in", ".cfg"}
NOT_OURS_AT_THE_TOP = {".git", "build", "dist", "runs", "data"}
NOT_OURS_ANYWHERE = {"__pycache__", "node_modules"}

# Megatron-core may be imported here only: when it changes, these places change.
MEGATRON_PLACES = (
    "lclm/cpu.py",
    "lclm/mesh.py",
    "lclm/model/",
    "lclm/optim.py",
    "lclm/checkpoint/store.py",
    "lclm/train/step.py",
)
# Parts that must be usable and testable without one another.
INDEPENDENT_PARTS = ("lclm.data", "lclm.context", "lclm.model")
# (package or module, what it never imports, modules in it that may)
WALLS = (
    ("lclm/train", "lclm.prepare", ()),
    ("lclm/data", "lclm.prepare", ()),
    ("lclm/context/plan", "torch", ()),
    ("lclm/prepare", "torch", ()),
)


def python_files(*folders: str) -> list[Path]:
    """Every Python file below the folders, in path order."""
    found = [p for folder in folders for p in (ROOT / folder).rglob("*.py")]
    return sorted(p for p in found if is_ours(p))


def is_ours(path: Path) -> bool:
    """Whether a path is of the repository, not something built, installed or written by a run."""
    parts = path.relative_to(ROOT).parts
    return not (
        parts[0] in NOT_OURS_AT_THE_TOP
        or NOT_OURS_ANYWHERE.intersection(parts)
        or any(part.endswith(".egg-info") or part.startswith(".venv") for part in parts)
    )


def text_files() -> list[Path]:
    """Every text file of the repository that people write (LICENSE is quoted, so left out)."""
    return sorted(
        path
        for path in ROOT.rglob("*")
        if is_ours(path) and path.suffix in TEXT_SUFFIXES and path.is_file()
    )


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import; for `from a import b` both a and a.b."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    if package[:1] == ("kernels",):
        package = ("lclm_kernels", *package[1:])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield node.lineno, module
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def violations(paths: list[Path], *forbidden: str) -> list[str]:
    """`file:line imports module` for each import of a forbidden package."""
    return sorted(
        {
            f"{name_of(path)}:{line} imports {package}"
            for path in paths
            for line, module in imported_modules(path)
            for package in forbidden
            if is_inside(module, package)
        }
    )


def test_the_walk_sees_the_product():
    names = [name_of(path) for path in python_files("kernels", "lclm")]
    assert {"lclm/config.py", "lclm/data/indexed.py"} <= set(names)
    assert any(name.startswith("kernels/") for name in names)


def test_import_walk_finds_every_form(tmp_path, monkeypatch):
    source = "import a.b\ndef f():\n    from ..c import d\nfrom . import e\n"
    file = tmp_path / "lclm" / "data" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text(source)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    found = {module for _, module in imported_modules(file)}
    assert found == {"a.b", "lclm.c", "lclm.c.d", "lclm.data", "lclm.data.e"}
    assert violations([file], "lclm.c") == ["lclm/data/x.py:3 imports lclm.c"]


def test_kernels_know_neither_lclm_nor_megatron():
    paths = python_files("kernels")
    assert violations(paths, "lclm", "megatron", "transformers") == []


@pytest.mark.parametrize("name", ["lclm/config.py", "lclm/config_file.py", "lclm/log.py"])
def test_config_and_log_need_only_pydantic(name):
    allowed = set(sys.stdlib_module_names) | {"pydantic", "pydantic_core"}
    bad = [
        f"{name}:{line} imports {module}"
        for line, module in imported_modules(ROOT / name)
        if module.split(".")[0] not in allowed
        and not is_inside(module, "lclm.log")
        and not is_inside(module, "lclm.config")
    ]
    assert [entry for entry in bad if not entry.endswith("imports lclm")] == []


@pytest.mark.parametrize("part", INDEPENDENT_PARTS)
def test_data_context_and_model_do_not_import_one_another(part):
    others = [other for other in INDEPENDENT_PARTS if other != part]
    assert violations(python_files(part.replace(".", "/")), *others) == []


def test_megatron_appears_in_few_places():
    paths = [p for p in python_files("lclm", "tools") if not name_of(p).startswith(MEGATRON_PLACES)]
    assert violations(paths, "megatron") == []


def test_every_place_for_megatron_is_needed():
    idle = [
        place
        for place in MEGATRON_PLACES
        if not violations(
            [p for p in python_files("lclm") if name_of(p).startswith(place)], "megatron"
        )
    ]
    assert idle == []


@pytest.mark.parametrize(("folder", "forbidden", "allowed"), WALLS)
def test_walls_between_rooms(folder, forbidden, allowed):
    paths = python_files(folder)
    assert paths
    assert violations([p for p in paths if name_of(p) not in allowed], forbidden) == []
    needless = [name for name in allowed if not violations([ROOT / name], forbidden)]
    assert needless == []


def test_only_conversion_knows_hugging_face_folders():
    paths = [p for p in python_files("lclm") if not name_of(p).startswith("lclm/hf/")]
    assert violations(paths, "lclm.hf") == []


@pytest.mark.parametrize(
    ("name", "ours"), [("lclm/files.py", ()), ("lclm/command_line.py", ("lclm.log",))]
)
def test_modules_of_the_standard_library_alone(name, ours):
    bad = [
        f"{name}:{line} imports {module}"
        for line, module in imported_modules(ROOT / name)
        if module.split(".")[0] not in sys.stdlib_module_names
        and not any(is_inside(module, own) for own in ours)
    ]
    assert bad == []


def test_nothing_needs_transformers_to_train_or_convert():
    assert violations(python_files("lclm", "tools"), "transformers") == []


def test_the_product_does_not_import_its_users():
    paths = python_files("kernels", "lclm")
    assert violations(paths, "tools", "examples", "benchmarks", "tests") == []


def test_kernels_are_imported_under_their_installed_name():
    assert violations(python_files(*CODE_FOLDERS), "kernels") == []


def test_files_are_ascii():
    bad = []
    for path in text_files():
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            if not line.isascii():
                bad.append(f"{name_of(path)}:{number}")
    assert bad == []


def test_files_read_in_one_sitting():
    lengths = {name_of(p): len(p.read_text().splitlines()) for p in python_files(*CODE_FOLDERS)}
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_functions_fit_on_a_screen():
    bad = {}
    for path in python_files(*CODE_FOLDERS):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    bad[f"{name_of(path)}:{node.lineno} {node.name}"] = length
    assert bad == {}


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Public functions of a module and public methods of its public classes.

    Methods of autograd Functions are left out: torch fixes their signature. So are Triton's
    kernels: their types belong to the launch.
    """
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            if not any(ast.unparse(item).startswith("triton.jit") for item in node.decorator_list):
                yield node
        elif isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base) for base in node.bases]
            if node.name.startswith("_") or any("Function" in base for base in bases):
                continue
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield inner


def test_public_functions_are_typed():
    bad = []
    for path in python_files("kernels", "lclm", "tools"):
        for node in public_functions(ast.parse(path.read_text())):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            untyped = [a.arg for a in arguments if a.annotation is None]
            untyped = [name for name in untyped if name not in ("self", "cls")]
            if untyped or node.returns is None:
                bad.append(f"{name_of(path)}:{node.lineno} {node.name} {untyped}")
    assert bad == []


def test_no_module_is_empty():
    """A package marker may be empty; any other module says something."""
    bad = [
        name_of(path)
        for path in python_files("kernels", "lclm", "tools")
        if path.name != "__init__.py" and not ast.parse(path.read_text()).body[1:]
    ]
    assert bad == []


def test_the_library_does_not_print():
    bad = [
        f"{name_of(path)}:{node.lineno}"
        for path in python_files("kernels", "lclm")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert bad == []


def test_nothing_is_left_for_later():
    """No notes to finish later, no test switched off, no exception caught blindly."""
    marks = "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X"])
    pattern = re.compile(
        rf"\b({marks})\b|pytest\.(mark\.)?(skip|xfail)|NotImplementedError|except\s*:"
    )
    bad = [
        f"{name_of(path)}:{number}"
        for path in python_files(*CODE_FOLDERS)
        if path != Path(__file__).resolve()
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if pattern.search(line)
    ]
    assert bad == []


def test_the_architecture_page_names_every_module():
    rows = [line.split("|") for line in (ROOT / "docs/architecture.md").read_text().splitlines()]
    said = {
        row[1].strip(" `"): set(re.findall(r"`(\w+)`", row[2])) for row in rows if len(row) == 4
    }
    for path in python_files("lclm"):
        package = ".".join(path.relative_to(ROOT / "lclm").parts[:-1])
        if package and not path.stem.startswith("__"):
            assert path.stem in said[package], f"docs/architecture.md does not name {name_of(path)}"
