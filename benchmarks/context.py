"""Judge plans of context parallelism on ragged rows: balance, traffic, planning time.

    OMP_NUM_THREADS=1 python -m benchmarks.context [--rows 20] [--quick]

Rows are drawn from MagiAttention's published histogram of document lengths and from a mix like
ProLong's. Strategies are side by side on the same rows. Columns: attention area, max over mean of
the ranks (mean and worst of the rows); keys received as a share of a full ring's, worst rank and
mean rank, and the least the worst rank could have with equal tokens; predicted milliseconds of a
Llama-3-8B layer's attention as a ring, forward and backward, on H100s joined by NVLink, and in
InfiniBand nodes of eight; planning time in milliseconds of CPU time, least of several runs, mean
and worst of the rows. plan_row goes for even area; "fastest" is plan_row with the rates of the
link, each link its own. The modes are what parallel.cp_comm = "auto" chooses from, on both links.

Prints tables and appends one JSON object to benchmarks/results/context_plan.jsonl. That plans are
right is tested in tests/context.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks.timing import HISTOGRAM, RESULTS, append_record, describe_machine
from lclm.context.plan import cost, layouts
from lclm.context.plan.layouts import RowPlan
from lclm.context.plan.lengths import LengthHistogram, read_histogram
from lclm.context.plan.rates import LINKS, published
from lclm_kernels.native.ops import load_native

K = 1024
# (row length, longest document, chunk): the settings to reach, then those over all cp sizes
SETTINGS = ((64 * K, 16 * K, 128), (512 * K, 256 * K, 512))
SCALING = ((64 * K, 16 * K, 128), (256 * K, 128 * K, 256), (1024 * K, 256 * K, 1024))
CP_SIZES = (2, 4, 8, 16, 32, 64)

Strategy = Callable[[np.ndarray, int, int], RowPlan]


def costs_of(cp_size: int) -> dict[str, cost.CostModel]:
    """A layer's attention by link."""
    return {link: cost.CostModel(published(link, cp_size), is_recomputed=True) for link in LINKS}


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
    "contiguous": lambda lengths, cp_size, chunk: layouts.contiguous_plan(lengths, cp_size),
    "zigzag": lambda lengths, cp_size, chunk: layouts.zigzag_plan(lengths, cp_size),
    "longest first": longest_first,
    "balanced": layouts.balanced_plan,
    "mixed": layouts.mixed_plan,
    "plan_row": layouts.plan_row,
}


def prolong_rows(histogram: LengthHistogram, row_length: int, count: int) -> list[np.ndarray]:
    """Rows as of ProLong's second stage: one piece, eight, or short documents."""
    rng = np.random.default_rng(0)

    def draw() -> np.ndarray:
        kind = rng.choice(3, p=[0.2, 0.4, 0.4])
        if kind < 2:
            pieces = 8 if kind else 1
            return np.full(pieces, row_length // pieces)
        return histogram.draw_row(rng, row_length, row_length // 8)

    return [draw() for _ in range(count)]


def draw_rows(
    histogram: LengthHistogram, row_length: int, longest: int, count: int
) -> list[np.ndarray]:
    """The same rows for every strategy."""
    rng = np.random.default_rng([0, row_length, longest])
    return [histogram.draw_row(rng, row_length, longest) for _ in range(count)]


def least_milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """CPU time of the fastest of several runs."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return 1e3 * min(times)


def judge(
    strategy: Strategy, rows: list[np.ndarray], cp_size: int, chunk: int, repeats: int
) -> dict[str, Any]:
    """Quality and planning time of one strategy over the rows."""
    figures: dict[str, list[Any]] = defaultdict(list)
    costs = costs_of(cp_size)
    for lengths in rows:
        plan = strategy(lengths, cp_size, chunk)
        predictions = [cost.predict(plan, model) for model in costs.values()]
        share = cost.traffic_share(plan)
        figures["area"].append(predictions[0].area_imbalance)
        figures["worst_share"].append(share.max())
        figures["mean_share"].append(share.mean())
        figures["least_worst_share"].append(cost.least_worst_share(plan))
        figures["layer"].append([1e3 * prediction.seconds for prediction in predictions])
        call = partial(strategy, lengths, cp_size, chunk)
        figures["plan_ms"].append(least_milliseconds(call, repeats))
    means = {name: np.mean(values, axis=0).tolist() for name, values in figures.items()}
    return {
        "area_mean": means.pop("area"),
        "area_worst": float(np.max(figures["area"])),
        "layer_ms": dict(zip(costs, means.pop("layer"))),
        "plan_ms_worst": float(np.max(figures["plan_ms"])),
        **means,
    }


def print_table(title: str, lines: list[dict[str, Any]]) -> None:
    """One line per strategy and cp size."""
    print(f"\n{title}")
    print(
        f"{'cp':>4} {'strategy':<22} {'area':>6} {'worst':>6}   {'share':>6} {'mean':>6} "
        f"{'least':>6}   {'NVLink ms':>9} {'IB ms':>9}   {'plan ms':>8} {'worst':>8}"
    )
    for line in lines:
        times = " ".join(f"{ms:9.3f}" for ms in line["layer_ms"].values())
        if "area_mean" not in line:
            print(f"{line['cp']:>4} {line['strategy']:<59}{times}")
            continue
        print(
            f"{line['cp']:>4} {line['strategy']:<22} {line['area_mean']:6.3f} "
            f"{line['area_worst']:6.3f}   {line['worst_share']:6.3f} {line['mean_share']:6.3f} "
            f"{line['least_worst_share']:6.3f}   {times}   {line['plan_ms']:8.2f} "
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
        fastest = {}
        for link, model in costs_of(cp_size).items():
            plans = [layouts.plan_row(row, cp_size, chunk, model) for row in rows]
            seconds = np.mean([cost.predict(plan, model).seconds for plan in plans])
            fastest[link] = 1e3 * float(seconds)
        lines.append({"cp": cp_size, "strategy": "fastest", "layer_ms": fastest})
        lines += compare_modes(rows, cp_size)
    print_table(title, lines)
    return {"title": title, "rows": len(rows), "lines": lines}


def compare_modes(rows: list[np.ndarray], cp_size: int) -> list[dict[str, Any]]:
    """One line per communication mode: its best layout, and the links on which it is chosen."""
    by_link = {
        link: layouts.compare_comms("auto", rows, cp_size, model)
        for link, model in costs_of(cp_size).items()
    }
    lines = []
    for comm in next(iter(by_link.values())):
        times = {link: 1e3 * found[comm] for link, found in by_link.items()}
        chosen = [link for link, found in by_link.items() if comm == cost.choose_fastest(found)]
        name = " ".join([f"mode {comm}", *chosen])
        lines.append({"cp": cp_size, "strategy": name, "layer_ms": times})
    return lines


def run(histogram: LengthHistogram, count: int, quick: bool) -> list[dict[str, Any]]:
    """All tables."""
    tables = []
    with_twin = dict(STRATEGIES)
    if load_native() is not None:
        with_twin["balanced, NumPy"] = partial(layouts.balanced_plan, implementation="reference")
    for row_length, longest, chunk in SETTINGS:
        rows = draw_rows(histogram, row_length, longest, count)
        title = f"{row_length // K}K rows, documents up to {longest // K}K, chunks of {chunk}"
        tables.append(compare(title, rows, [(8, chunk), (32, chunk)], with_twin, 2))
    if quick:
        return tables
    plain = {name: STRATEGIES[name] for name in STRATEGIES if name != "longest first"}
    for row_length, longest, chunk in SCALING:
        grid = [(cp_size, chunk) for cp_size in CP_SIZES]
        rows = draw_rows(histogram, row_length, longest, count)
        title = f"cp sizes, {row_length // K}K rows, documents up to {longest // K}K"
        tables.append(compare(title, rows, grid, plain))
        rows = prolong_rows(histogram, row_length, count)
        title = (
            f"cp sizes, ProLong-like {row_length // K}K rows: 20 % one piece, 40 % eight, 40 % "
            "short documents"
        )
        tables.append(compare(title, rows, grid, plain))
    return tables


def main() -> int:
    """Judge, print, append."""
    parser = argparse.ArgumentParser(description="Judge plans of context parallelism.")
    parser.add_argument("--rows", type=int, default=20, help="rows per table (default 20)")
    parser.add_argument("--quick", action="store_true", help="only the four settings to reach")
    arguments = parser.parse_args()
    histogram = read_histogram(HISTOGRAM)
    machine = describe_machine() | {"native": load_native() is not None}
    tables = run(histogram, arguments.rows, arguments.quick)
    append_record(RESULTS / "context_plan.jsonl", {"machine": machine, "tables": tables})
    print(f"\nappended to {RESULTS / 'context_plan.jsonl'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
