"""tools/plan_context.py: tables and picture from a histogram and from a run's own data."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from lclm.context.plan.rates import LINKS, Rate
from lclm.data.indexed import IndexedWriter

ROOT = Path(__file__).parents[2]
HISTOGRAM = ROOT / "benchmarks" / "data" / "doc_lengths_magi.csv"
CONFIG = """
[run]
dir = "run"
[model]
num_layers = 1
hidden_size = 64
ffn_hidden_size = 64
num_attention_heads = 4
num_kv_heads = 2
vocab_size = 512
[parallel]
cp = 4
[[stage]]
name = "ragged"
seq_length = 1024
rope_base = 1e4
tokens = 4096
tokens_per_step = 1024
optimizer_state = "fresh"
lr = 1e-3
[[stage.mixture]]
prefix = "PREFIX"
packing = "concat"
share = 1.0
"""


@pytest.fixture
def tool() -> ModuleType:
    path = ROOT / "tools" / "plan_context.py"
    spec = importlib.util.spec_from_file_location("plan_context", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(tmp_path: Path) -> Path:
    prefix = tmp_path / "docs"
    with IndexedWriter(str(prefix), vocab_size=512) as writer:
        for length in np.random.default_rng(0).integers(1, 600, 40).tolist():
            writer.add_document(np.ones(length, dtype=np.int64))
    path = tmp_path / "run.toml"
    path.write_text(CONFIG.replace("PREFIX", str(prefix)), encoding="utf-8")
    return path


def lines_of(text: str, strategy: str) -> list[list[float]]:
    found = [line.split()[1:] for line in text.splitlines() if line.startswith(strategy)]
    return [[float(cell) for cell in cells] for cells in found]


def test_tables_from_a_histogram(tool, capsys) -> None:
    wishes = ["--row-length", "16384", "--cp", "2,8", "--rows", "3"]
    assert tool.main(["--histogram", str(HISTOGRAM), *wishes]) == 0
    out = capsys.readouterr().out
    assert "documents up to 4096; cp 2" in out and "cp 8, chunks of 128" in out
    for strategy in ("balanced", "contiguous", "zigzag", "chosen"):
        assert len(lines_of(out, strategy)) == 2
    area, worst, *_ = lines_of(out, "balanced")[1]
    assert 1 <= area <= worst < lines_of(out, "contiguous")[1][0]


def test_tables_from_a_config(tool, config, capsys) -> None:
    assert tool.main(["--config", str(config)]) == 0
    assert "stage ragged, rows of 1024; cp 4, chunks of 128" in capsys.readouterr().out
    assert tool.main(["--config", str(config), "--cp", "2", "stage.0.document_mask=false"]) == 0
    area, worst, share, *_ = lines_of(capsys.readouterr().out, "zigzag")[0]
    assert (area, worst, share) == (1.0, 1.0, 1.0)  # one document: all keys travel, work is even


def test_modes_are_compared_on_published_or_measured_rates(tool, tmp_path, capsys) -> None:
    wishes = ["--histogram", str(HISTOGRAM), "--row-length", "65536", "--rows", "2", "--cp", "8,16"]
    slow = dataclasses.replace(LINKS["nvlink"], message=Rate(1.0, 1e9), overlap=0.0)
    rates = tmp_path / "context_rates.json"
    rates.write_text(json.dumps({"made_for": {}, "machine": slow.dump()}))
    chosen = {}
    for source in (["--link", "infiniband"], ["--rates", str(rates)]):
        assert tool.main([*wishes, *source]) == 0
        out = capsys.readouterr().out
        chosen[source[0]] = re.findall(r"layer ms by communication mode: .*?(\S+) [0-9.]+\*", out)
    # eight ranks are one node, sixteen are two; a message of a second is worse than any all-to-all
    assert chosen == {"--link": ["ring", "ulysses_ring(8)"], "--rates": ["ulysses", "ulysses"]}
    rates.write_text("{}")
    assert tool.main([*wishes, "--rates", str(rates)]) == 2
    assert "holds no rates of a training run" in capsys.readouterr().err


def test_picture_is_written_whole(tool, tmp_path, capsys) -> None:
    png = tmp_path / "plan.png"
    wishes = ["--row-length", "4096", "--cp", "4", "--rows", "1", "--png", str(png)]
    assert tool.main(["--histogram", str(HISTOGRAM), *wishes]) == 0
    assert png.read_bytes().startswith(b"\x89PNG") and f"wrote {png}" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["plan.png"]


@pytest.mark.parametrize(
    ("wishes", "match"),
    [
        (["--histogram", "absent.csv"], "absent.csv is not a file"),
        (["--config", "absent.toml"], "absent.toml is not a file"),
        (["--histogram", str(HISTOGRAM), "--rows", "0"], "--rows is 0"),
        (["--histogram", str(HISTOGRAM), "--cp", "7"], "row of 65536 tokens"),
        (["--histogram", str(HISTOGRAM), "--cp", "8", "--chunk", "100"], "multiple of cp_size"),
        (["--histogram", str(HISTOGRAM), "--row-length", "0"], "row_length=0"),
    ],
)
def test_bad_input_ends_with_two(tool, capsys, wishes: list[str], match: str) -> None:
    assert tool.main(wishes) == 2
    assert match in capsys.readouterr().err


def test_overrides_without_a_config_are_refused(tool, capsys) -> None:
    assert tool.main(["a=1", "--histogram", str(HISTOGRAM)]) == 2
    assert "a=1: overrides belong to --config" in capsys.readouterr().err


def test_runs_as_a_script(tmp_path) -> None:
    tool = [sys.executable, "tools/plan_context.py"]
    told = subprocess.run([*tool, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0 and "examples:" in told.stdout
    png = tmp_path / "none" / "plan.png"
    bad = [*tool, "--histogram", str(HISTOGRAM), "--rows", "1", "--cp", "2", "--png", str(png)]
    told = subprocess.run(bad, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 2 and "Traceback" not in told.stderr and "error:" in told.stderr
