"""Write the quickstart's report: one HTML page with its pictures inside, and the PNGs beside it.

Every sentence with a number in it is made from the numbers of this run. Where a curve is flat, or
the extension bought nothing, the page says so.
"""

import base64
import html
import json
import sys
from pathlib import Path
from typing import Any

from figures import (
    GUESS,
    MODELS,
    draw_context,
    draw_layout,
    draw_loss,
    draw_recall,
    stage_spans,
    wilson,
)

from lclm.command_line import make_parser
from lclm.config import Config
from lclm.config_file import load_config
from lclm.files import replace_text

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p.lead { color: #555; margin-top: .3rem; } img { max-width: 100%; }
table { border-collapse: collapse; font-size: .92rem; } td, th { padding: .25rem .9rem .25rem 0;
       text-align: right; border-bottom: 1px solid #ddd; } td:first-child, th:first-child
       { text-align: left; }
pre { background: #f5f5f2; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
b.given { color: #888; font-weight: normal; }
ul.findings { background: #eef3f8; padding: .8rem 1rem .8rem 2rem; }
.pair { display: flex; flex-wrap: wrap; gap: 1rem; } .pair > div { flex: 1 1 24rem; }
"""


def describe_training(steps: list[dict[str, Any]]) -> str:
    """How far the loss fell, or that it did not."""
    tenth = max(1, len(steps) // 10)
    first = sum(record["loss"] for record in steps[:tenth]) / tenth
    last = sum(record["loss"] for record in steps[-tenth:]) / tenth
    seconds = sum(record["seconds"] for record in steps)
    what = (
        f"fell from {first:.2f} to {last:.2f}"
        if first - last > 0.1
        else (f"is flat: {first:.2f} at the start, {last:.2f} at the end")
    )
    return (
        f"The loss {what} nats per token (mean of the first and the last {tenth} steps) over "
        f"{steps[-1]['tokens']:,} tokens in {seconds:.0f} s, {steps[-1]['tokens'] / seconds:,.0f} "
        "tokens per second. It jumps where a stage begins, because rows and their domains change."
    )


def describe_context(evaluation: dict[str, Any]) -> list[str]:
    """What the longest context is worth before and after, in sentences."""
    longest = str(evaluation["lengths"][-1])
    shortest = str(evaluation["lengths"][0])
    sentences = []
    for name in MODELS:
        context = evaluation[name]["context"]
        gain = context["gain"][longest]
        value, error = gain["mean"], 2 * gain["standard_error"]
        if value > error:
            verdict = f"lowers the loss by {value:.3f}"
        elif value < -error:
            verdict = f"raises the loss by {-value:.3f}: the model is confused by it"
        else:
            verdict = f"changes the loss by {-value:+.3f}, which is nothing: the curve is flat"
        sentences.append(
            f"{name.capitalize()} the extension, {int(longest):,} instead of {int(shortest):,} "
            f"tokens of text {verdict} (+-{error:.3f}, two standard errors over "
            f"{context['num_windows']} windows)."
        )
    saved = [evaluation[name]["context"]["loss"][longest] for name in MODELS]
    sentences.append(
        f"At {int(longest):,} tokens the loss is {saved[0]:.2f} before and {saved[1]:.2f} after."
    )
    return sentences


def describe_recall(evaluation: dict[str, Any]) -> list[str]:
    """At which lengths recall works before and after, in sentences."""
    sentences = []
    for name in MODELS:
        recall = evaluation[name]["recall"]
        places: dict[str, list[str]] = {
            f"is better than a guess ({GUESS:.1%})": [],
            "is no better than a guess": [],
        }
        better, worse = places.values()
        for length, count in recall.items():
            works = wilson(count["right"], count["asked"])[0] > GUESS
            share = count["right"] / count["asked"]
            (better if works else worse).append(f"{int(length):,} ({share:.0%})")
        found = [f"{what} at {', '.join(at)} tokens" for what, at in places.items() if at]
        sentences.append(f"{name.capitalize()} the extension, recall {'; '.join(found)}.")
    return sentences


def table(header: list[str], rows: list[list[str]]) -> str:
    """An HTML table."""
    lines = [
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
        for tag, cells in [("th", header), *(("td", row) for row in rows)]
    ]
    return "<table>" + "".join(lines) + "</table>"


def stage_table(steps: list[dict[str, Any]], config: Config) -> str:
    """One line per stage: what it was and where its loss ended."""
    rows = []
    for name, length, base, _, last_token in stage_spans(steps):
        own = [record for record in steps if record["stage"] == name]
        stage = next(stage for stage in config.stage if stage.name == name)
        domains = {}
        for entry in stage.mixture:
            domain = Path(entry.prefix).name
            domains[domain] = domains.get(domain, 0) + sum(entry.share_ends) / 2
        tail = own[-max(1, len(own) // 10) :]
        rows.append(
            [
                name,
                f"{length:,}",
                f"{base:,.0f}",
                str(len(own)),
                f"{last_token / 1e6:.2f} M",
                f"{sum(r['tokens_per_second'] for r in own) / len(own):,.0f}",
                f"{sum(r['loss'] for r in tail) / len(tail):.2f}",
                ", ".join(f"{domain} {share:.0%}" for domain, share in domains.items()),
            ]
        )
    header = ["stage", "row length", "RoPE base", "steps", "tokens so far", "tokens/s", "last loss"]
    return table([*header, "mixture"], rows)


def numbers_table(evaluation: dict[str, Any]) -> str:
    """Loss by context and recall by length, before and after."""
    rows = []
    for length in evaluation["before"]["context"]["loss"]:
        losses = [f"{evaluation[name]['context']['loss'][length]:.3f}" for name in MODELS]
        rows.append([f"loss given {int(length):,} tokens", *losses])
    for length in evaluation["before"]["recall"]:
        counts = [evaluation[name]["recall"][length] for name in MODELS]
        shares = [f"{count['right']} of {count['asked']}" for count in counts]
        rows.append([f"recall at {int(length):,} tokens", *shares])
    return table(["", "before", "after"], rows)


def sample(evaluation: dict[str, Any], name: str) -> str:
    """A prompt in gray and what the extended model wrote after it."""
    written = evaluation["after"][f"sample_{name}"]
    prompt, text = html.escape(written["prompt"]), html.escape(written["text"])
    return f"<pre><b class='given'>{prompt}</b>{text}</pre>"


def image(path: Path) -> str:
    """The picture inside the page."""
    text = base64.b64encode(path.read_bytes()).decode("ascii")
    return f"<img alt='{path.stem}' src='data:image/png;base64,{text}'>"


def build_page(
    steps: list[dict[str, Any]], config: Config, evaluation: dict[str, Any], folder: Path
) -> str:
    """Draw every picture into `folder` and return the page."""
    draw_loss(steps, folder / "loss.png")
    draw_layout(config, folder / "layout.png")
    draw_context(evaluation, folder / "context.png")
    draw_recall(evaluation, folder / "recall.png")
    after = evaluation["after"]
    findings = [*describe_recall(evaluation), *describe_context(evaluation)]
    lengths = evaluation["lengths"]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>lclm quickstart</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>
<h1>From {lengths[0]:,} to {lengths[-1]:,} tokens on a CPU</h1>
<p class="lead">A Llama of {after["num_parameters"]:,} parameters, trained by lclm on
{steps[-1]["tokens"]:,} tokens of this Python's own library, two processes sharing every row.</p>
<ul class="findings">{"".join(f"<li>{html.escape(text)}</li>" for text in findings)}</ul>
<h2>Training</h2>
<p>{html.escape(describe_training(steps))}</p>
{image(folder / "loss.png")}
{stage_table(steps, config)}
<h2>What ran where</h2>
<p>Real rows of the last stage. Colors are documents: attention and positions stay within one.
Each row is cut into pieces that the two processes hold (<code>{config.parallel.cp_layout}</code>
layout); each computes its own tokens and receives the keys and values of the other.</p>
{image(folder / "layout.png")}
<h2>What the extension bought</h2>
<p>"Before" is the model at the end of the first stage, "after" the final one; both as transformers
loads them from the exported folders. Left: the loss on the last {after["context"]["num_targets"]}
tokens of {after["context"]["num_windows"]} windows of held-out code, always the same tokens, given
more and more of the text before them (bars: two standard errors of the difference to the shortest).
Right: a card of eight lines at the start of a document, asked again at its end with prose between
(bars: 95 % intervals, as if answers were independent). Dashed: a guess among eight words; less than
that means that the model no longer knows it is asked.</p>
<div class="pair"><div>{image(folder / "context.png")}</div>
<div>{image(folder / "recall.png")}</div></div>
{numbers_table(evaluation)}
<h2>Greedy samples of the final model</h2>
<p>Given code (gray), then a card and its first question. A model of this size after minutes of
training writes the shape of code, not its sense.</p>
{sample(evaluation, "code")}{sample(evaluation, "recall")}
</body></html>
"""


def main() -> int:
    parser = make_parser(__doc__, "")
    parser.add_argument("--run", type=Path, required=True, help="run folder of lclm.train")
    parser.add_argument("--evaluation", type=Path, required=True, help="made by evaluate.py")
    parser.add_argument("--output", type=Path, required=True, help="HTML file; PNGs go beside it")
    arguments = parser.parse_args()
    lines = (arguments.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    config = load_config(arguments.run / "config.resolved.toml")
    evaluation = json.loads(arguments.evaluation.read_text(encoding="utf-8"))
    page = build_page(steps, config, evaluation, arguments.output.parent)
    replace_text(arguments.output, page.encode("ascii", "xmlcharrefreplace").decode("ascii"))
    for text in [*describe_recall(evaluation), *describe_context(evaluation)]:
        print(f"  {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
