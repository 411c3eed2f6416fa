#!/usr/bin/env python3
"""Show how strategies of context parallelism deal rows out: balance, traffic, predicted time."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lclm.checkpoint.folder import complete_model
from lclm.command_line import make_parser, run_tool
from lclm.config_file import load_config
from lclm.context.plan.cost import (
    CostModel,
    choose_fastest,
    least_worst_share,
    predict,
    traffic_share,
)
from lclm.context.plan.layouts import (
    RowPlan,
    candidate_plans,
    compare_comms,
    default_chunk,
    plan_row,
)
from lclm.context.plan.lengths import read_histogram
from lclm.context.plan.rates import LINKS, RATES_NAME, published, read_machine
from lclm.files import refuse_overwriting, replace_files
from lclm.train.stages import attention_cost, plan_stages, spread_rows

EPILOG = """\
The rows come from the data of a configuration (--config; every stage, rows spread over it) or from
a histogram of document lengths (--histogram: CSV with the columns shortest,longest,documents).

columns: area is attention work, largest over mean of the ranks, mean and worst of the rows (1 is
perfect); share is the keys a rank receives over those of a full ring, worst rank and mean rank;
least is what the worst rank cannot go below; layer ms is the predicted time of one layer's
attention as a ring, forward and backward, on the slowest rank, exposed ms what of it is waiting.
Below: the same time for every communication mode, each with the layout that is best for it; the one
marked is what parallel.cp_comm = "auto" takes: the fastest, or the ring if that is within 5 %.
Rates are those of H100s (--link: joined by NVLink, or InfiniBand between nodes of eight) or those
that a training run measured (--rates).

examples:
  python tools/plan_context.py --histogram benchmarks/data/doc_lengths_magi.csv \\
      --row-length 524288 --longest 262144 --cp 8,32 --png plan.png
  python tools/plan_context.py --config examples/configs/prolong.toml --cp 8,16 --link infiniband
  python tools/plan_context.py --config run.toml --rates runs/x/context_rates.json

exit status: 0 done; 2 bad usage or input.
"""
RANKS_DRAWN = 64  # more rows of a picture cannot be told apart


def cp_sizes(text: str) -> list[int]:
    """Numbers of ranks with commas between them."""
    return [int(part) for part in text.split(",")]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(__doc__, EPILOG)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=Path, metavar="FILE", help="configuration of a run")
    source.add_argument("--histogram", type=Path, metavar="CSV", help="lengths of documents")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="overrides of --config, as in training"
    )
    parser.add_argument(
        "--row-length", type=int, default=65536, metavar="T", help="of --histogram (65536)"
    )
    parser.add_argument(
        "--longest", type=int, metavar="TOKENS", help="longer documents are cut (row length / 4)"
    )
    parser.add_argument(
        "--cp", type=cp_sizes, metavar="R,R", help="ranks (config: parallel.cp; else 8,32)"
    )
    parser.add_argument(
        "--chunk",
        type=int,
        metavar="TOKENS",
        help="granularity (about row length / 1024, at least 128 where it fits)",
    )
    parser.add_argument("--rows", type=int, default=20, help="rows to look at (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the rows from --histogram (0)")
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument("--link", choices=LINKS, default="nvlink", help="between H100s (nvlink)")
    rates.add_argument(
        "--rates", type=Path, metavar="JSON", help=f"{RATES_NAME} of a run folder, instead of H100s"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw who holds what: first row")
    return parser


def rows_of_histogram(options: argparse.Namespace) -> dict[str, list[np.ndarray]]:
    """Rows by title."""
    histogram, length = read_histogram(options.histogram), options.row_length
    longest = options.longest or max(1, length // 4)
    rng = np.random.default_rng(options.seed)
    title = f"{options.histogram.name}, rows of {length}, documents up to {longest}"
    return {title: [histogram.draw_row(rng, length, longest) for _ in range(options.rows)]}


def rows_of_config(options: argparse.Namespace) -> tuple[dict[str, list[np.ndarray]], CostModel]:
    """Rows of every stage by title, and the cost of the configuration's attention."""
    config = load_config(options.config, options.overrides, complete_model)
    if options.cp is None:
        options.cp = [config.parallel.cp]
    rows = {}
    for stage, planned in zip(config.stage, plan_stages(config)):
        numbers = spread_rows(len(planned), options.rows)
        lengths = [planned.attention_lengths(number) for number in numbers]
        rows[f"stage {stage.name}, rows of {stage.seq_length}"] = lengths
    is_fp32 = config.train.dtype == "fp32" or config.train.device == "cpu"
    return rows, attention_cost(config, 4 if is_fp32 else 2, LINKS["nvlink"])


def print_table(
    title: str, rows: Sequence[np.ndarray], cp_size: int, chunk: int, cost: CostModel
) -> None:
    """One line per strategy: means over the rows, and the worst area; then one of all modes."""
    figures: dict[str, list[list[float]]] = {}
    for lengths in rows:
        plans = candidate_plans(lengths, cp_size, chunk)
        plans.setdefault("mixed", plans["balanced"])  # where no document is long
        plans["chosen"] = plan_row(lengths, cp_size, chunk, cost)
        for name, plan in plans.items():
            prediction, share = predict(plan, cost), traffic_share(plan)
            figures.setdefault(name, []).append(
                [
                    prediction.area_imbalance,
                    float(share.max()),
                    float(share.mean()),
                    least_worst_share(plan),
                    1e3 * prediction.seconds,
                    1e3 * float(prediction.exposed_seconds.max()),
                ]
            )
    print(f"\n{title}; cp {cp_size}, chunks of {chunk}")
    print(
        f"{'strategy':<11} {'area':>6} {'worst':>6}  {'share':>6} {'mean':>6} {'least':>6}  "
        f"{'layer ms':>9} {'exposed ms':>10}"
    )
    for name, lines in figures.items():
        area, share, mean, least, layer, exposed = np.mean(lines, axis=0)
        worst = max(line[0] for line in lines)
        print(
            f"{name:<11} {area:6.3f} {worst:6.3f}  {share:6.3f} {mean:6.3f} {least:6.3f}  "
            f"{layer:9.3f} {exposed:10.3f}"
        )
    if cp_size > 1:
        found = compare_comms("auto", rows, cp_size, cost)
        chosen = choose_fastest(found)
        times = [
            f"{comm} {1e3 * seconds:.3f}{'*' if comm == chosen else ''}"
            for comm, seconds in found.items()
        ]
        print(f"layer ms by communication mode: {', '.join(times)}")


def load_pyplot() -> Any:
    """matplotlib's drawing functions, without a display; ValueError where it is not installed."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ModuleNotFoundError as error:
        raise ValueError("--png needs matplotlib: pip install 'lclm[report]'") from error
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def draw(plans: dict[str, RowPlan], cost: CostModel, path: Path) -> None:
    """Write a PNG: a panel per strategy with the spans of every rank, its area and traffic."""
    pyplot = load_pyplot()
    height = 1.2 + 0.16 * min(RANKS_DRAWN, next(iter(plans.values())).cp_size)
    figure, axes = pyplot.subplots(
        len(plans),
        2,
        figsize=(14, height * len(plans)),
        squeeze=False,
        width_ratios=(4, 1),
        layout="constrained",
    )
    for (spans_axis, bars_axis), (name, plan) in zip(axes, plans.items()):
        ranks = range(min(RANKS_DRAWN, plan.cp_size))
        for rank in ranks:
            bars = [(start, end - start) for start, end in plan.chunks[rank]]
            spans_axis.broken_barh(bars, (rank - 0.45, 0.9), color=f"C{rank % 10}")
        long_enough = plan.doc_lengths > plan.row_length // 256
        for start in plan.doc_starts[long_enough]:
            spans_axis.axvline(start, color="black", linewidth=0.4)
        prediction, share = predict(plan, cost), traffic_share(plan)
        spans_axis.set_title(
            f"{name}: area {prediction.area_imbalance:.3f}, worst share {share.max():.3f}, "
            f"layer {1e3 * prediction.seconds:.3f} ms",
            loc="left",
        )
        spans_axis.set(xlim=(0, plan.row_length), ylabel="rank", xlabel="position in the row")
        area = prediction.area / prediction.area.mean()
        bars_axis.barh(np.array(ranks) + 0.2, area[: len(ranks)], 0.4, label="area / mean")
        bars_axis.barh(np.array(ranks) - 0.2, share[: len(ranks)], 0.4, label="share received")
        bars_axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize="small")
        for axis in (spans_axis, bars_axis):
            axis.invert_yaxis()
    try:
        with replace_files(path) as (temporary,):
            figure.savefig(temporary, format="png", dpi=110)
    finally:
        pyplot.close(figure)


def show(options: argparse.Namespace) -> None:
    """Print every table and draw the first row of the first one.

    Raises:
        ValueError: what the configuration, the histogram, the planner or the picture refuses.
    """
    if options.rows < 1:
        raise ValueError(f"--rows is {options.rows}; look at one row at least")
    if options.png is not None:
        read = (options.config, options.histogram, options.rates)
        refuse_overwriting([options.png], filter(None, read))
        load_pyplot()  # what is missing is said before the work, not after it
    measured = read_machine(options.rates) if options.rates else None
    if options.config is not None:
        rows_by_title, cost = rows_of_config(options)
    elif options.overrides:
        raise ValueError(f"{' '.join(options.overrides)}: overrides belong to --config")
    else:
        rows_by_title, cost = rows_of_histogram(options), CostModel()
    picture: tuple[dict[str, RowPlan], CostModel] | None = None
    for title, rows in rows_by_title.items():
        for cp_size in options.cp or [8, 32]:
            chunk = options.chunk or default_chunk(int(rows[0].sum()), cp_size)
            cost = replace(cost, machine=measured or published(options.link, cp_size))
            print_table(title, rows, cp_size, chunk, cost)
            picture = picture or (candidate_plans(rows[0], cp_size, chunk), cost)
    if options.png is not None and picture is not None:
        draw(*picture, options.png)
        print(f"\nwrote {options.png}")


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    options = build_parser().parse_intermixed_args(arguments)
    return run_tool("plan_context", show, options, has_log=False, os_error_status=2)


if __name__ == "__main__":
    sys.exit(main())
