"""Judge plans of context parallelism on ragged rows: balance, traffic, planning time.

    OMP_NUM_THREADS=1 python benchmarks/context.py [--rows 20] [--quick]

Rows are drawn from MagiAttention's published histogram of document lengths and from a mix like
ProLong's. Strategies are side by side on the same rows. Columns: attention area, max over mean of
the ranks (mean and worst of the rows); keys received as a share of a full ring's, worst rank and
mean rank, and the least the worst rank could have with equal tokens; planning time in milliseconds
of the clock, least of several runs, mean and worst of the rows. Prints tables and appends one JSON
object to benchmarks/results/context_plan.jsonl. Plans are checked first; if one is wrong nothing is
timed and the exit code is 1.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lclm.context.cost import CostModel, least_worst_share, predict, traffic_share
from lclm.context.lengths import LengthHistogram, read_histogram
from lclm.context.plan import RowPlan, balanced_plan, contiguous_plan, plan_row, zigzag_plan
from lclm_kernels.native.context_plan import assign_chunks
from lclm_kernels.native.ops import load_native

FOLDER = Path(__file__).resolve().parent
HISTOGRAM = FOLDER / "data" / "doc_lengths_magi.csv"
RESULTS = FOLDER / "results" / "context_plan.jsonl"
K = 1024
# (row length, longest document, chunk): the settings to reach, then those between and above
SETTINGS = ((64 * K, 16 * K, 128), (512 * K, 256 * K, 512))
SCALING = ((64 * K, 16 * K, 128), (256 * K, 128 * K, 256), (1024 * K, 256 * K, 1024))

Strategy = Callable[[np.ndarray, int, int], RowPlan]


def longest_first(lengths: np.ndarray, cp_size: int, chunk: int) -> RowPlan:
    """The plain remedy: chunks by falling area, each to the rank with least area and room."""
    starts = np.cumsum(lengths) - lengths
    places = np.arange(lengths.sum()) - np.repeat(starts, lengths) + 1
    area = places.reshape(-1, chunk).sum(axis=1)
    room, load = np.full(cp_size, len(area) // cp_size), np.zeros(cp_size)
    spans: list[list[tuple[int, int]]] = [[] for _ in range(cp_size)]
    for number in np.argsort(-area, kind="stable").tolist():
        rank = int(np.argmin(np.where(room > 0, load, np.inf)))
        room[rank] -= 1
        load[rank] += area[number]
        spans[rank].append((number * chunk, (number + 1) * chunk))
    return RowPlan(lengths, cp_size, tuple(tuple(sorted(mine)) for mine in spans))


STRATEGIES: dict[str, Strategy] = {
    "contiguous": lambda lengths, cp_size, chunk: contiguous_plan(lengths, cp_size),
    "zigzag": lambda lengths, cp_size, chunk: zigzag_plan(lengths, cp_size),
    "longest first": longest_first,
    "balanced": balanced_plan,
    "plan_row": plan_row,
}


def prolong_row(histogram: LengthHistogram, rng: np.random.Generator) -> np.ndarray:
    """A 512K row of ProLong's second stage: one piece, eight of 64K, or short documents."""
    kind = rng.choice(3, p=[0.2, 0.4, 0.4])
    if kind == 0:
        return np.array([512 * K])
    if kind == 1:
        return np.full(8, 64 * K)
    return histogram.draw_row(rng, 512 * K, 64 * K)


def draw_rows(
    histogram: LengthHistogram, row_length: int, longest: int, count: int
) -> list[np.ndarray]:
    """The same rows for every strategy."""
    rng = np.random.default_rng([0, row_length, longest])
    return [histogram.draw_row(rng, row_length, longest) for _ in range(count)]


def least_milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """Clock time of the fastest of several runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def judge(
    strategy: Strategy, rows: list[np.ndarray], cp_size: int, chunk: int, repeats: int
) -> dict[str, float]:
    """Quality and planning time of one strategy over the rows."""
    balance, worst, mean, least, layer, planning = [], [], [], [], [], []
    for lengths in rows:
        plan = strategy(lengths, cp_size, chunk)
        prediction, share = predict(plan, CostModel()), traffic_share(plan)
        balance.append(prediction.area_imbalance)
        worst.append(share.max())
        mean.append(share.mean())
        least.append(least_worst_share(plan))
        layer.append(1e3 * prediction.seconds)
        planning.append(least_milliseconds(partial(strategy, lengths, cp_size, chunk), repeats))
    return {
        "area_mean": float(np.mean(balance)),
        "area_worst": float(np.max(balance)),
        "worst_share": float(np.mean(worst)),
        "mean_share": float(np.mean(mean)),
        "least_worst_share": float(np.mean(least)),
        "layer_ms": float(np.mean(layer)),
        "plan_ms": float(np.mean(planning)),
        "plan_ms_worst": float(np.max(planning)),
    }


def print_table(title: str, lines: list[dict[str, Any]]) -> None:
    """One line per strategy and cp size."""
    print(f"\n{title}")
    print(
        f"{'cp':>4} {'strategy':<22} {'area':>6} {'worst':>6}   {'share':>6} {'mean':>6} "
        f"{'least':>6}   {'layer ms':>9}   {'plan ms':>8} {'worst':>8}"
    )
    for line in lines:
        print(
            f"{line['cp']:>4} {line['strategy']:<22} {line['area_mean']:6.3f} "
            f"{line['area_worst']:6.3f}   {line['worst_share']:6.3f} {line['mean_share']:6.3f} "
            f"{line['least_worst_share']:6.3f}   {line['layer_ms']:9.3f}   {line['plan_ms']:8.2f} "
            f"{line['plan_ms_worst']:8.2f}"
        )


def compare(
    title: str,
    rows: list[np.ndarray],
    grid: list[tuple[int, int]],
    strategies: dict[str, Strategy],
    repeats: int = 5,
) -> dict[str, Any]:
    """Judge strategies side by side over (cp size, chunk) pairs, print, return the table."""
    lines = []
    for cp_size, chunk in grid:
        for name, strategy in strategies.items():
            if name == "zigzag" and rows[0].sum() % (2 * cp_size):
                continue
            figures = judge(strategy, rows, cp_size, chunk, repeats)
            lines.append({"cp": cp_size, "chunk": chunk, "strategy": name, **figures})
    print_table(title, lines)
    return {"title": title, "rows": len(rows), "lines": lines}


def find_errors(histogram: LengthHistogram) -> list[str]:
    """Plans of a small row against definitions, token by token, and C++ against NumPy."""
    errors = []
    rng = np.random.default_rng(1)
    for cp_size in (3, 8):
        lengths = histogram.draw_row(rng, 384 * cp_size, 300)
        doc, place = np.repeat(np.arange(len(lengths)), lengths), np.arange(384 * cp_size)
        visible = (doc[:, None] == doc) & (place <= place[:, None])
        for name, strategy in STRATEGIES.items():
            plan = strategy(lengths, cp_size, 16)
            for rank in range(cp_size):
                mine = plan.positions(rank)
                seen = visible[mine].any(axis=0)
                seen[mine] = False
                if plan.area(rank) != visible[mine].sum():
                    errors.append(f"{name}: area of rank {rank} of {cp_size}")
                if plan.received[rank].sum() != seen.sum():
                    errors.append(f"{name}: keys received by rank {rank} of {cp_size}")
    if load_native() is not None:
        for row_length, longest, chunk in SETTINGS:
            for lengths in draw_rows(histogram, row_length, longest, 2):
                plans = [assign_chunks(lengths, 8, chunk, x) for x in ("native", "reference")]
                if (plans[0] != plans[1]).any():
                    errors.append(f"C++ and NumPy differ on a row of {row_length}")
    return errors


def describe_machine() -> dict[str, Any]:
    """What a reader needs to judge the times."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "native": load_native() is not None,
    }


def run(histogram: LengthHistogram, count: int, quick: bool) -> list[dict[str, Any]]:
    """All tables."""
    tables = []
    with_twin = dict(STRATEGIES)
    if load_native() is not None:
        with_twin["balanced, NumPy"] = lambda lengths, cp_size, chunk: balanced_plan(
            lengths, cp_size, chunk, "reference"
        )
    for row_length, longest, chunk in SETTINGS:
        rows = draw_rows(histogram, row_length, longest, count)
        title = f"{row_length // K}K rows, documents up to {longest // K}K, chunks of {chunk}"
        tables.append(compare(title, rows, [(8, chunk), (32, chunk)], with_twin, 2))
    if quick:
        return tables
    plain = {name: STRATEGIES[name] for name in ("zigzag", "balanced", "plan_row")}
    for row_length, longest, chunk in SCALING:
        rows = draw_rows(histogram, row_length, longest, count)
        title = f"cp sizes, {row_length // K}K rows, documents up to {longest // K}K"
        grid = [(cp_size, chunk) for cp_size in (2, 4, 8, 16, 32, 64)]
        tables.append(compare(title, rows, grid, plain))
    rng = np.random.default_rng(0)
    rows = [prolong_row(histogram, rng) for _ in range(count)]
    title = "ProLong-like 512K rows: 20 % one piece, 40 % eight of 64K, 40 % short documents"
    tables.append(compare(title, rows, [(8, 512), (32, 512)], STRATEGIES))
    return tables


def main() -> int:
    """Check, judge, print, append."""
    parser = argparse.ArgumentParser(description="Judge plans of context parallelism.")
    parser.add_argument("--rows", type=int, default=20, help="rows per table (default 20)")
    parser.add_argument("--quick", action="store_true", help="only the four settings to reach")
    arguments = parser.parse_args()
    histogram = read_histogram(HISTOGRAM)
    errors = find_errors(histogram)
    if errors:
        print(f"error: wrong plans, nothing timed: {'; '.join(errors)}", file=sys.stderr)
        return 1
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "tables": run(histogram, arguments.rows, arguments.quick),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="ascii") as file:
        file.write(json.dumps(record) + "\n")
    print(f"\nappended to {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
