"""The exported folder gives, in transformers, the trainer's own logits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lclm.context.plan.rates import LINKS
from tests import tolerances
from tests.checkpoint.samples import checkpoint_info
from tests.distributed import run_distributed
from tests.train.tiny import VOCAB_SIZE, tiny_config

ROOT = Path(__file__).parents[2]
SEQ_LENGTH = 48
ROPE_BASE = 5e4
LLAMA3_SCALING = {
    "type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_length": 32,
}


def load_and_run(folder: Path, tokens: np.ndarray, changes: dict[str, Any]) -> np.ndarray:
    """This tp rank's logits `[T, V / tp]` of the weights in a checkpoint folder."""
    from lclm.data.stage_rows import Row
    from lclm.mesh import build_mesh

    config = tiny_config("unused", **changes)
    mesh = build_mesh(config)
    from lclm.checkpoint import store
    from lclm.checkpoint.folder import resolve_step_folder
    from lclm.model.build import build_model
    from lclm.train.context_setup import build_context
    from lclm.train.micro_batch import MicroBatchBuilder

    model = build_model(config, mesh)
    info = store.load(resolve_step_folder(folder), config.model, mesh, model, None)
    context = build_context(config, mesh, LINKS["nvlink"], [])
    batch = MicroBatchBuilder(config, mesh, context, info.rope_base)(
        Row(tokens, np.array([SEQ_LENGTH]), "a")
    )
    with torch.no_grad():
        logits = model(batch.tokens_BT, batch.labels_T, batch.row, return_logits=True)
    return logits.numpy()


def save_and_run(folder: Path, tokens: np.ndarray, changes: dict[str, Any]) -> np.ndarray:
    """Save random weights as a checkpoint; this tp rank's logits `[T, V / tp]`."""
    from lclm.data.stage_rows import Row
    from lclm.mesh import build_mesh

    config = tiny_config("unused", **changes)
    mesh = build_mesh(config)
    from lclm.checkpoint import store
    from lclm.checkpoint.folder import dtype_name
    from lclm.model.build import build_model, init_weights
    from lclm.train.context_setup import build_context
    from lclm.train.micro_batch import MicroBatchBuilder
    from lclm.train.step import Engine

    model = build_model(config, mesh)
    init_weights(model, config, mesh)
    engine = Engine(config, mesh, model, ["a"])
    context = build_context(config, mesh, LINKS["nvlink"], [])
    batch = MicroBatchBuilder(config, mesh, context, ROPE_BASE)(
        Row(tokens, np.array([SEQ_LENGTH]), "a")
    )
    info = checkpoint_info(
        model=config.model.recorded_fields(),
        rope_base=ROPE_BASE,
        seq_length=SEQ_LENGTH,
        dtype=dtype_name(mesh.dtype),
    )
    store.save(folder, info, mesh, model, engine.optimizer, None)
    with torch.no_grad():
        logits = model(batch.tokens_BT, batch.labels_T, batch.row, return_logits=True)
    return logits.float().numpy()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {}),
        (2, {"parallel__tp": 2, "model__rope_scaling": {"type": "linear", "factor": 4.0}}),
        (1, {"model__tie_embeddings": True, "model__rope_scaling": LLAMA3_SCALING}),
        (1, {"model__rope_scaling": {"type": "yarn", "factor": 4.0, "original_length": 32}}),
    ],
    ids=["plain", "tp2, linear scaling", "tied, llama3 scaling", "yarn scaling"],
)
def test_transformers_gives_the_trainers_logits(
    tmp_path: Path, ranks: int, changes: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    tokens = np.random.default_rng(3).integers(0, VOCAB_SIZE, SEQ_LENGTH)
    shards = run_distributed(save_and_run, ranks, tmp_path / "checkpoints", tokens, changes)
    command = [sys.executable, str(ROOT / "tools" / "convert_to_hf.py")]
    command += ["--checkpoint", str(tmp_path / "checkpoints"), "--output", str(tmp_path / "hf")]
    subprocess.run(command, check=True, cwd=ROOT, timeout=120)
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)[None]).logits[0].numpy()
    ours = np.concatenate(shards, axis=1)
    assert np.abs(ours).max() > 1
    assert np.abs(ours - theirs).max() <= tolerances.HF_LOGITS_ABS


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "changes"), [(1, {}), (2, {"parallel__tp": 2})])
def test_the_trainer_gives_transformers_logits(
    tmp_path: Path, ranks: int, changes: dict[str, Any]
) -> None:
    """The other way: a model that transformers wrote, imported."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = tiny_config("unused").model
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.ffn_hidden_size,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_attention_heads,
            num_key_value_heads=sizes.num_kv_heads,
            rms_norm_eps=sizes.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
            initializer_range=0.2,
            tie_word_embeddings=False,
        )
    ).float()
    theirs.save_pretrained(tmp_path / "theirs")
    command = [sys.executable, str(ROOT / "tools" / "convert_from_hf.py")]
    command += ["--hf-model", str(tmp_path / "theirs"), "--output", str(tmp_path / "ours")]
    subprocess.run(command, check=True, cwd=ROOT, timeout=120)
    tokens = np.random.default_rng(3).integers(0, VOCAB_SIZE, SEQ_LENGTH)
    shards = run_distributed(load_and_run, ranks, tmp_path / "ours", tokens, changes)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(tokens)[None]).logits[0].numpy()
    assert np.abs(wanted).max() > 1
    assert np.abs(np.concatenate(shards, axis=1) - wanted).max() <= tolerances.HF_LOGITS_ABS
