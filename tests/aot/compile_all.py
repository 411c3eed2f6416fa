"""Compile every Triton kernel as the trainer launches it, without a GPU, and count what it uses.

    python tests/aot/compile_all.py                        print the table of all operators
    python tests/aot/compile_all.py rope adamw             of some
    python tests/aot/compile_all.py rope --architecture 90  for one GPU: 90 Hopper, 80 Ampere
    python tests/aot/compile_all.py rope --write-budget    and make it the budget of this Triton
    python tests/aot/compile_all.py rope --json FILE       and write it for a program to read

Run by test_compile.py in a process of its own: a process that has Triton's interpreter cannot
compile. Exit code 0 if everything compiled, 1 if something did not, 2 for bad usage.
"""

import argparse
import importlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import triton
import triton.backends.nvidia
from compile_case import CompileCase
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
FOLDER = Path(__file__).parent
BUDGETS = FOLDER / f"budget_triton_{triton.__version__}"
ARCHITECTURES = (90, 80)
COLUMNS = ("registers", "spill_bytes", "shared_bytes", "tensor_core", "tma", "serialized")


def operators() -> list[str]:
    """Operators that have Triton kernels."""
    return sorted(path.stem for path in FOLDER.glob("cases/*.py"))


def cases_of(operator: str) -> list[CompileCase]:
    """The cases of one operator."""
    cases = importlib.import_module(f"cases.{operator}").compile_cases()
    counts = Counter(case.name for case in cases)
    assert max(counts.values()) == 1, [name for name, count in counts.items() if count > 1]
    return cases


def compile_case(case: CompileCase, architecture: int) -> dict[str, int]:
    """Compile one case and count what its machine code uses, by the names in COLUMNS."""
    names = case.kernel.arg_names
    assert set(names) == set(case.signature) | set(case.constexprs), case.name
    signature = {n: "constexpr" if n in case.constexprs else case.signature[n] for n in names}
    is_aligned = {
        n: n not in case.unaligned and (kind.startswith("*") or kind in ("i32", "i64"))
        for n, kind in signature.items()
    }
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in case.constexprs.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in names if is_aligned[n]},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options=dict(case.options)
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        usage = _run("cuobjdump", "-res-usage", cubin)
        opcodes = _count_opcodes(_run("nvdisasm", "-c", cubin))
        serialized = 0
        if "wgmma" in compiled.asm["ptx"]:
            # C7510 to C7515: ptxas waits after each wgmma where it should run them together
            log = _run("ptxas", "-v", f"--gpu-name=sm_{architecture}a", ptx, "-o", cubin)
            serialized = len(re.findall(r"C75\d\d", log))
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spill_bytes": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "shared_bytes": compiled.metadata.shared,
        "tensor_core": opcodes["HGMMA"] + opcodes["HMMA"],
        "tma": sum(count for name, count in opcodes.items() if name.startswith("UTMA")),
        "serialized": serialized,
    }


def _run(tool: str, *arguments: object) -> str:
    finished = subprocess.run(
        [TOOLS / tool, *map(str, arguments)], check=True, capture_output=True, text=True
    )
    return finished.stdout + finished.stderr


def _count_opcodes(listing: str) -> Counter[str]:
    """Machine instructions by name, without their suffixes."""
    return Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z0-9]+)", listing, re.M))


def _compile_numbered(job: tuple[str, int, int]) -> tuple[str, dict[str, int] | str]:
    operator, number, architecture = job
    case = cases_of(operator)[number]
    key = f"{case.name} sm_{architecture}"
    try:
        return key, compile_case(case, architecture)
    except Exception as error:  # reported with the others: one case must not hide the rest
        return key, f"{type(error).__name__}: {error}"


def compile_operators(
    names: list[str], architectures: list[int], num_processes: int = 2
) -> Iterator[tuple[str, dict[str, dict[str, int] | str]]]:
    """(operator, usage by "case name sm_NN", or what went wrong) of one after another."""
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        for operator in names:
            jobs = [
                (operator, number, architecture)
                for number, case in enumerate(cases_of(operator))
                for architecture in case.architectures
                if architecture in architectures
            ]
            yield operator, dict(pool.imap(_compile_numbered, jobs, chunksize=2))


def write_budget(operator: str, usage: dict[str, dict[str, int]]) -> None:
    BUDGETS.mkdir(exist_ok=True)
    lines = ["\t".join(["case", *COLUMNS])]
    lines += ["\t".join([name, *(str(row[c]) for c in COLUMNS)]) for name, row in usage.items()]
    (BUDGETS / f"{operator}.tsv").write_text("\n".join(lines) + "\n", encoding="ascii")


def format_table(usage: dict[str, dict[str, int] | str]) -> str:
    width = max(map(len, usage), default=0)
    lines = [f"{'Triton ' + triton.__version__:{width}}  " + "  ".join(COLUMNS)]
    for name, row in usage.items():
        numbers = row if isinstance(row, str) else "  ".join(f"{row[c]:>{len(c)}}" for c in COLUMNS)
        lines.append(f"{name:{width}}  {numbers}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("operators", nargs="*", help=f"of {', '.join(operators())}; default all")
    parser.add_argument("--architecture", type=int, choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--write-budget", action="store_true", help="replace the budget files")
    arguments = parser.parse_args()
    if unknown := set(arguments.operators) - set(operators()):
        parser.error(f"no operator {', '.join(sorted(unknown))}; one of {', '.join(operators())}")
    if arguments.write_budget and arguments.architecture:
        parser.error("--write-budget writes all architectures; leave --architecture out")
    architectures = [arguments.architecture] if arguments.architecture else list(ARCHITECTURES)
    result, num_failed = {}, 0
    for operator, usage in compile_operators(arguments.operators or operators(), architectures):
        print(format_table(usage), flush=True)
        failed = sum(isinstance(row, str) for row in usage.values())
        if arguments.write_budget and not failed:
            write_budget(operator, usage)
        result[operator] = usage
        num_failed += failed
    if arguments.json:
        arguments.json.write_text(json.dumps(result))
    if num_failed:
        print(f"{num_failed} cases did not compile", file=sys.stderr)
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
