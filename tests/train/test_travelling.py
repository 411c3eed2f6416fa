"""What lies beside the weights goes through real runs, from a Hugging Face folder to one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lclm.checkpoint.folder import read_info, resolve_step_folder
from lclm.config_file import dump_toml
from tests.checkpoint.samples import edit_json, save_hf, write_tokenizer
from tests.train.sample_data import write_domain
from tests.train.tiny import ROW_LENGTH, VOCAB_SIZE, tiny_config

ROOT = Path(__file__).parents[2]


def call(*command: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_ids_tokenizer_and_limits_go_through_runs(tmp_path: Path) -> None:
    """Import, a run of two stages, one of short rows that starts from it and resumes; export."""
    folder = tmp_path / "hf"
    save_hf(
        folder,
        vocab_size=VOCAB_SIZE,
        intermediate_size=64,
        num_hidden_layers=4,
        rms_norm_eps=1e-5,
        max_position_embeddings=32,
        dtype=torch.float16,
    )
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save_file(weights, folder / "model.safetensors")
    write_tokenizer(folder)
    edit_json(folder / "config.json", eos_token_id=[2, 7], pad_token_id=5, odd_key="x")
    edit_json(folder / "generation_config.json", eos_token_id=[2, 7, 9], max_length=32)
    edit_json(folder / "tokenizer_config.json", model_max_length=32)
    call("tools/convert_from_hf.py", "--hf-model", folder, "--output", tmp_path / "ckpt")
    prefix = write_domain(tmp_path / "a", num_docs=60, max_length=90, seed=1)
    mixture = [{"prefix": prefix, "packing": "concat", "share": 1.0}]
    config = tiny_config(tmp_path / "run", stage__0__mixture=mixture, stage__1__mixture=mixture)
    (tmp_path / "run.toml").write_text(dump_toml(config))
    train = ["-m", "lclm.train", tmp_path / "run.toml"]
    call(*train, f"model.init_from={tmp_path / 'ckpt'}", "stage.1.seq_length=32")
    short = [f"model.init_from={tmp_path / 'run' / 'checkpoints'}", f"run.dir={tmp_path / 'sft'}"]
    short += ["stage.0.seq_length=32", "stage.1.seq_length=32", "checkpoint.keep=1"]
    for steps in (1, 2):  # the second resumes, and deletes what it resumed from
        call(*train, *short, "checkpoint.every_steps=1", f"train.max_steps={steps}")
    info = read_info(resolve_step_folder(tmp_path / "sft" / "checkpoints"))
    assert (info.step, info.seq_length, info.max_context) == (2, 32, ROW_LENGTH)
    checkpoints = tmp_path / "sft" / "checkpoints"
    call("tools/convert_to_hf.py", "--checkpoint", checkpoints, "--output", tmp_path / "again")

    def read(name: str) -> dict[str, object]:
        return json.loads((tmp_path / "again" / name).read_text())

    config_json = read("config.json")
    assert config_json["max_position_embeddings"] == ROW_LENGTH
    assert (config_json["eos_token_id"], config_json["pad_token_id"]) == ([2, 7], 5)
    assert config_json["odd_key"] == "x"
    generation = read("generation_config.json")
    assert (generation["eos_token_id"], generation["max_length"]) == ([2, 7, 9], ROW_LENGTH)
    assert read("tokenizer_config.json")["model_max_length"] == ROW_LENGTH
    tokenizer = (tmp_path / "again" / "tokenizer.json").read_bytes()
    assert tokenizer == (folder / "tokenizer.json").read_bytes()
