"""The quickstart's own script, end to end, at its reduced size; and the words of its report."""

import importlib
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lclm.config_file import load_config

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.timeout(900)  # about a minute on two idle cores
LENGTHS = [64, 256, 1024]  # of QUICKSTART_SIZE=tiny


@pytest.fixture
def quickstart_module(monkeypatch):
    """Loads a module of examples/quickstart, which are scripts, not a package."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "quickstart"))
    return importlib.import_module


def run_quickstart(folder, **environment):
    variables = {
        **os.environ,
        "QUICKSTART_DIR": str(folder),
        "QUICKSTART_SIZE": "tiny",
        "QUICKSTART_PYTHON": sys.executable,
        **environment,
    }
    return subprocess.run(
        ["bash", str(ROOT / "examples" / "quickstart.sh")],
        env=variables,
        capture_output=True,
        text=True,
        timeout=800,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder and console text of one whole reduced run."""
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    done = run_quickstart(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done.stdout


@pytest.mark.slow
def test_three_stages_are_trained_on_two_processes(finished):
    folder, _ = finished
    lines = (folder / "train" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert [record["stage"] for record in steps] == ["short"] * 4 + ["medium"] * 4 + ["long"] * 4
    assert [record["seq_length"] for record in steps[::4]] == LENGTHS
    bases = [record["rope_base"] for record in steps[::4]]
    assert bases == sorted(bases) and len(set(bases)) == 3
    assert steps[-1]["tokens"] == 12 * 1024
    # a new model knows nothing: ln(vocabulary); twelve steps later it knows something
    assert steps[0]["loss"] == pytest.approx(math.log(1024), rel=0.05)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    config = load_config(folder / "train" / "config.resolved.toml")
    assert config.parallel.cp == 2


@pytest.mark.slow
def test_transformers_loads_the_exported_model(finished):
    folder, _ = finished
    named_hf = [path.name for path in folder.rglob("*") if path.is_dir() and "hf" in path.name]
    assert named_hf == ["hf"]
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    assert model.config.max_position_embeddings == LENGTHS[-1]
    before = AutoModelForCausalLM.from_pretrained(folder / "before_extension")
    assert before.config.max_position_embeddings == LENGTHS[0]
    ids = tokenizer("def f(x):\n    return x\n", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == "def f(x):\n    return x\n"
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert loss < math.log(1024)


@pytest.mark.slow
def test_report_holds_its_pictures_and_the_run_s_numbers(finished):
    folder, console = finished
    page = (folder / "report.html").read_text()
    assert page.isascii()
    assert page.count("src='data:image/png;base64,") == 4
    assert "http" not in page.replace("http-equiv", "").split("<h2>Greedy")[0]
    for name in ("loss", "layout", "context", "recall"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    evaluation = json.loads((folder / "evaluation.json").read_text())
    for name in ("before", "after"):
        assert list(evaluation[name]["context"]["loss"]) == [str(length) for length in LENGTHS]
        assert {c["asked"] for c in evaluation[name]["recall"].values()} == {96}
    assert f"{evaluation['after']['num_parameters']:,}" in page
    assert "Before the extension, recall" in page and "Before the extension, recall" in console


@pytest.mark.slow
def test_a_second_run_reuses_everything(finished):
    folder, first = finished
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    done = run_quickstart(folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done before") == first.count(" s\n") == 13
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == written


def test_unknown_size_is_refused(tmp_path):
    done = run_quickstart(tmp_path / "out", QUICKSTART_SIZE="huge")
    assert done.returncode == 2
    assert "QUICKSTART_SIZE=huge; use full or tiny" in done.stderr
    assert not (tmp_path / "out").exists()


def test_recall_answers_stand_only_in_the_card(quickstart_module):
    make_corpus = quickstart_module("make_corpus")
    values = [word for words in make_corpus.FIELDS.values() for word in words.split()]
    assert len(values) == len(set(values)) == 64
    rng = random.Random(3)
    card, questions = make_corpus.make_card(rng)
    assert sorted(card.splitlines()[1:]) == sorted(questions.splitlines()[1:])
    assert card.splitlines()[1:] != questions.splitlines()[1:]
    prose = ["word " * 2000]
    text = make_corpus.recall_text(1000, prose, rng)["text"]
    # longer than asked for, so that a piece of exactly 1,000 tokens can be cut from its front
    assert len(text) > 1000 * make_corpus.CHARACTERS_PER_TOKEN
    assert text.count("Asked\n") == 2


def evaluation_with(gain, error, right):
    context = {"num_windows": 16, "loss": {"64": 5.0, "1024": 5.0 - gain}}
    context["gain"] = {"1024": {"mean": gain, "standard_error": error}}
    recall = {"1024": {"right": right, "asked": 96}}
    one = {"context": context, "recall": recall}
    return {"lengths": [64, 1024], "before": one, "after": one}


@pytest.mark.parametrize(
    "gain, words",
    [
        (0.2, "lowers the loss by 0.200"),
        (-0.2, "raises the loss by 0.200"),
        (0.01, "changes the loss by -0.010, which is nothing: the curve is flat"),
    ],
)
def test_report_says_what_the_context_is_worth(quickstart_module, gain, words):
    report = quickstart_module("report")
    sentences = report.describe_context(evaluation_with(gain, 0.03, 12))
    assert words in sentences[1]


@pytest.mark.parametrize(
    "right, words",
    [(12, "is no better than a guess at 1,024 (12%)"), (60, "is better than a guess (12.5%)")],
)
def test_report_says_where_recall_works(quickstart_module, right, words):
    report = quickstart_module("report")
    assert words in report.describe_recall(evaluation_with(0.1, 0.03, right))[1]


def test_report_calls_a_flat_loss_flat(quickstart_module):
    report = quickstart_module("report")
    flat = [{"loss": 6.0, "tokens": 10 * n, "seconds": 1.0} for n in range(1, 21)]
    assert "is flat: 6.00" in report.describe_training(flat)
    falling = [{**record, "loss": 6.0 - 0.1 * n} for n, record in enumerate(flat)]
    assert "fell from 5.95 to 4.15" in report.describe_training(falling)


def test_wilson_interval(quickstart_module):
    figures = quickstart_module("figures")
    low, high = figures.wilson(12, 96)
    # the textbook formula by hand: (0.125 + 0.02001 +- 1.96 sqrt(0.001139 + 0.000104)) / 1.04002
    assert low == pytest.approx(0.0730, abs=2e-4)
    assert high == pytest.approx(0.2059, abs=2e-4)
