"""A tiny model and ragged rows for tests that train in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lclm.config import Config
from lclm.context.plan.rates import LINKS

if TYPE_CHECKING:
    from lclm.model.llama import LlamaModel
    from lclm.train.micro_batch import MicroBatchBuilder

ROW_LENGTH = 64
ROWS_PER_STEP = 4
VOCAB_SIZE = 96


def tiny_config(run_dir: Path | str, **changes: Any) -> Config:
    """Two stages of a model with 4 layers, 4 query heads and 2 kv heads, in fp32 on the CPU.

    `changes` are dotted fields written with double underscores: `parallel__tp=2`.
    """
    stage = {
        "seq_length": ROW_LENGTH,
        "rope_base": 1e4,
        "tokens": 4 * ROWS_PER_STEP * ROW_LENGTH,
        "tokens_per_step": ROWS_PER_STEP * ROW_LENGTH,
        "lr": 2e-3,
        "min_lr": 2e-4,
        "warmup_fraction": 0.25,
        "mixture": [{"prefix": "a", "packing": "concat", "share": 1.0}],
    }
    tree: dict[str, Any] = {
        "run": {"dir": str(run_dir)},
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "vocab_size": VOCAB_SIZE,
            "init_std": 0.2,
        },
        "train": {"dtype": "fp32", "loss_chunk_tokens": 24},
        # AdamW's first steps divide a gradient by its own size: with the usual eps of 1e-8 the
        # rounding noise of gradients near zero would become whole steps.
        "optimizer": {"eps": 1e-5},
        "stage": [{"name": "first", **stage}, {"name": "second", **stage}],
    }
    for name, value in changes.items():
        *parents, last = name.split("__")
        node: Any = tree
        for parent in parents:
            node = node[int(parent)] if parent.isdigit() else node.setdefault(parent, {})
        node[last] = value
    return Config.model_validate(tree)


def build_alone() -> tuple[LlamaModel, MicroBatchBuilder]:
    """The tiny model on this process alone, and what builds its micro-batches."""
    from lclm.mesh import build_mesh

    config = tiny_config("unused")
    mesh = build_mesh(config)
    from lclm.model.build import build_model, init_weights
    from lclm.train.context_setup import build_context
    from lclm.train.micro_batch import MicroBatchBuilder

    model = build_model(config, mesh)
    init_weights(model, config, mesh)
    context = build_context(config, mesh, LINKS["nvlink"], [])
    return model, MicroBatchBuilder(config, mesh, context, 1e4)


def ragged_row(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int64 `[T]` and document lengths of a row: 1 to 5 ragged documents, by its number."""
    random = np.random.default_rng(number)
    tokens = random.integers(0, VOCAB_SIZE, ROW_LENGTH)
    cuts = np.sort(random.choice(np.arange(1, ROW_LENGTH), size=number % 5, replace=False))
    return tokens, np.diff(np.concatenate([[0], cuts, [ROW_LENGTH]]))


def half_labelled_row(number: int) -> tuple[np.ndarray, np.ndarray]:
    """As `ragged_row`; the first half are documents of one token, which have no labels."""
    tokens, _ = ragged_row(number)
    half = ROW_LENGTH // 2
    return tokens, np.array([1] * half + [half])
