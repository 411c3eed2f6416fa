"""What benchmarks share: the machine, files of results, processor time, and memory."""

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
HISTOGRAM = ROOT / "benchmarks" / "data" / "doc_lengths_magi.csv"
SAMPLE_SECONDS = 0.2


def cpu_name() -> str:
    """The processor's model."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe_machine() -> dict[str, Any]:
    """What a reader needs to judge times."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append a JSON object as a line, with the date and the command that was typed."""
    about = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="ascii") as file:
        file.write(json.dumps(about | record) + "\n")


def record_rows(kind: str, rows: list[dict[str, Any]]) -> None:
    """Print rows of figures and append each to results/data.jsonl."""
    machine = describe_machine()
    for row in rows:
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
        print("  ".join(f"{name}={value}" for name, value in shown.items()), flush=True)
        append_record(RESULTS / "data.jsonl", {"benchmark": kind, **row, "machine": machine})


def run_measured(
    command: list[str], watch_memory: bool = False, **options: Any
) -> dict[str, float]:
    """Run a command to its end.

    Args:
        command: whose failure ends this program.
        watch_memory: also sum the memory of all its processes, several times a second.
        options: for `subprocess.Popen`.

    Returns:
        cpu_seconds, of the process and all its children; wall_seconds; with watch_memory peak_gb,
        the largest sum of proportional set sizes (memory shared by processes counted once).
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)
    peak, ended = [0.0], threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peak, ended), daemon=True)
    if watch_memory:
        watcher.start()
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    ended.set()
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{errors[-2000:]}")
    result = {
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "wall_seconds": time.perf_counter() - start,
    }
    return result | ({"peak_gb": peak[0]} if watch_memory else {})


def _watch(root: int, peak: list[float], ended: threading.Event) -> None:
    while not ended.wait(SAMPLE_SECONDS):
        peak[0] = max(peak[0], sum(map(_proportional_gb, _family(root))))


def _family(root: int) -> list[int]:
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # "pid (name) state parent ...", and a name may hold anything
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rpartition(")")[2].split()[1]
            )
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
    family = [root]
    for member in family:
        family += [pid for pid, parent in parents.items() if parent == member]
    return family


def _proportional_gb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e9
