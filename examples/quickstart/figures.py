"""The four pictures of the quickstart's report, each from numbers that the run left behind."""

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from lclm.config import Config
from lclm.context.plan.layouts import build_row_plan
from lclm.context.plan.rates import RATES_NAME, read_machine
from lclm.data.stage_rows import Row, StageRows
from lclm.train.context_setup import choose_comm
from lclm.train.stages import attention_cost, plan_stages, spread_rows

COLORS = ["#3366aa", "#dd7733", "#449966", "#aa4477", "#777777", "#bbaa33", "#55aacc", "#884422"]
MODELS = {"before": "#bbbbbb", "after": "#3366aa"}  # the extension
GUESS = 1 / 8  # values per field of a recall card, see make_corpus.py
PROCESSES = 2  # context-parallel ranks that examples/quickstart.sh starts

plt.rcParams.update(
    {
        "figure.dpi": 110,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
    }
)


def wilson(right: int, asked: int) -> tuple[float, float]:
    """95 % interval of a share (E. B. Wilson, JASA 22, 1927)."""
    z = 1.96
    share = right / asked
    middle = share + z * z / (2 * asked)
    half = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    scale = 1 + z * z / asked
    return (middle - half) / scale, (middle + half) / scale


def smooth(values: list[float], width: int) -> np.ndarray:
    """Mean of each value and up to `width - 1` before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(0, last - width)
    return (sums[last] - sums[first]) / (last - first)


def stage_spans(steps: list[dict[str, Any]]) -> list[tuple[str, int, float, float, float]]:
    """(name, row length, RoPE base, first and last token of it) for each stage, in order."""
    spans: list[tuple[str, int, float, float, float]] = []
    before = 0.0
    for record in steps:
        if not spans or spans[-1][0] != record["stage"]:
            label = (record["stage"], record["seq_length"], record["rope_base"])
            spans.append((*label, before, record["tokens"]))
        else:
            spans[-1] = (*spans[-1][:4], record["tokens"])
        before = record["tokens"]
    return spans


def draw_loss(steps: list[dict[str, Any]], path: Path) -> None:
    """Training loss over tokens, all rows and per domain, with the borders of the stages."""
    figure, (all_rows, domains) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    tokens = [record["tokens"] / 1e6 for record in steps]
    losses = [record["loss"] for record in steps]
    width = max(1, len(steps) // 40)
    all_rows.plot(tokens, losses, color=COLORS[0], alpha=0.25, linewidth=0.8)
    all_rows.plot(tokens, smooth(losses, width), color=COLORS[0])
    all_rows.set_title("all rows (thin: single steps)")
    names = sorted({name for record in steps for name in record["domain_loss"]})
    for number, name in enumerate(names):
        own = [
            (r["tokens"] / 1e6, r["domain_loss"][name]) for r in steps if name in r["domain_loss"]
        ]
        domains.plot(
            [at for at, _ in own],
            smooth([loss for _, loss in own], max(1, len(own) // 20)),
            color=COLORS[number % len(COLORS)],
            label=name,
        )
    domains.set_title("per domain")
    domains.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1.0, 0.86), ncols=2)
    for axes in (all_rows, domains):
        draw_stage_borders(axes, steps)
        axes.set_xlabel("million tokens trained on")
    all_rows.set_ylabel("loss (nats per token)")
    save(figure, path)


def draw_stage_borders(axes: Axes, steps: list[dict[str, Any]]) -> None:
    """A line where a stage begins; its name, row length in tokens and RoPE base at the top."""
    for name, length, base, first, last in stage_spans(steps):
        if first > 0:
            axes.axvline(first / 1e6, color="#999999", linewidth=0.8, linestyle="--")
        label = f"{name}\n{length:,}\nbase {base:.2g}"
        axes.text(
            (first + last) / 2e6,
            0.98,
            label,
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="top",
            fontsize=7,
            color="#555555",
        )


def choose_rows(stage_rows: StageRows) -> list[Row]:
    """Rows of a stage that differ in kind: the fewest, about eight, the most documents."""
    rows = [stage_rows.row(number) for number in range(min(len(stage_rows), 40))]
    rows.sort(key=lambda row: len(row.doc_lengths))
    few = min(rows, key=lambda row: abs(len(row.doc_lengths) - 8))
    chosen = [rows[0], few, rows[-1]]
    return list({len(row.doc_lengths): row for row in chosen}.values())


def draw_layout(config: Config, path: Path) -> None:
    """Which rank held which tokens of real rows of the last stage."""
    rows, layout = plan_stages(config)[-1], config.parallel.cp_layout
    machine = read_machine(Path(config.run.dir) / RATES_NAME)
    cost = attention_cost(config, 4, machine)
    comm = choose_comm(config, cost, [rows.attention_lengths(n) for n in spread_rows(len(rows))])
    chosen = choose_rows(rows)
    figure, panels = plt.subplots(
        len(chosen), 1, figsize=(11, 1.5 * len(chosen) + 0.6), squeeze=False
    )
    for axes, row in zip(panels[:, 0], chosen):
        plan = build_row_plan(layout, row.attention_lengths, PROCESSES, None, cost, comm)
        start = 0
        for number, length in enumerate(row.doc_lengths.tolist()):
            axes.barh(
                1, length, left=start, color=COLORS[number % 8], edgecolor="white", alpha=0.75
            )
            start += length
        for rank in range(PROCESSES):
            for first, last in plan.chunks[rank]:
                axes.barh(0, last - first, left=first, color=["#222222", "#cccccc"][rank % 2])
                axes.text(
                    (first + last) / 2,
                    0,
                    f"rank {rank}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=["white", "black"][rank % 2],
                )
        total = plan.areas.sum()
        shares = ", ".join(f"{plan.areas[rank].sum() / total:.0%}" for rank in range(PROCESSES))
        num_documents = len(row.doc_lengths)
        axes.set_title(
            f"{row.domain}: {num_documents} document{'s' if num_documents > 1 else ''}; "
            f"share of the attention work: {shares}",
            fontsize=9,
            loc="left",
        )
        axes.set_yticks([0, 1], ["held by", "documents"])
        axes.set_xlim(0, plan.row_length)
        axes.grid(visible=False)
    panels[-1, 0].set_xlabel("token of the row")
    save(figure, path)


def draw_context(evaluation: dict[str, Any], path: Path) -> None:
    """Loss on the same target tokens over the length of the text given."""
    figure, axes = plt.subplots(figsize=(5.4, 3.8))
    for name, color in MODELS.items():
        context = evaluation[name]["context"]
        lengths = [int(length) for length in context["loss"]]
        errors = [0.0] + [2 * gain["standard_error"] for gain in context["gain"].values()]
        axes.errorbar(
            lengths,
            list(context["loss"].values()),
            yerr=errors,
            color=color,
            marker="o",
            capsize=3,
            label=f"{name} the extension",
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(evaluation["lengths"], [f"{length:,}" for length in evaluation["lengths"]])
    axes.set_xlabel("tokens of text, targets included")
    axes.set_ylabel("loss on the same targets (nats)")
    axes.legend()
    save(figure, path)


def draw_recall(evaluation: dict[str, Any], path: Path) -> None:
    """Share of right answers at each length with its 95 % interval."""
    figure, axes = plt.subplots(figsize=(5.4, 3.8))
    lengths = list(evaluation["after"]["recall"])
    places = np.arange(len(lengths))
    for shift, (name, color) in zip((-0.2, 0.2), MODELS.items()):
        counts = [evaluation[name]["recall"][length] for length in lengths]
        shares = np.array([count["right"] / count["asked"] for count in counts])
        bounds = np.array([wilson(count["right"], count["asked"]) for count in counts])
        axes.bar(
            places + shift,
            shares,
            width=0.38,
            color=color,
            yerr=np.abs(bounds.T - shares),
            error_kw={"linewidth": 0.8, "capsize": 2},
            label=f"{name} the extension",
        )
    axes.axhline(GUESS, color="#aa4477", linestyle="--", linewidth=1, label="a guess")
    axes.set_xticks(places, [f"{int(length):,}" for length in lengths])
    axes.set_xlabel("tokens of the document")
    axes.set_ylabel("answers right")
    axes.set_ylim(0, 1.05)
    axes.legend(fontsize=8)
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    """Write a picture and forget the figure."""
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
