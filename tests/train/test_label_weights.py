"""Weights of targets reach the loss and its gradients; padding changes neither."""

import numpy as np
import pytest

from tests import tolerances
from tests.distributed import run_distributed
from tests.train.tiny import VOCAB_SIZE, build_alone

LENGTHS = np.array([20, 30, 14])
PROMPT_WEIGHT = 0.25


def losses_by_weights() -> dict[str, tuple[float, int, np.ndarray]]:
    """Loss sum, labels and one gradient, with several weights of the same row's targets."""
    from lclm.data.stage_rows import Row

    model, build = build_alone()
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCAB_SIZE, 64)
    target = (rng.random(64) < 0.4).astype(np.float32)
    weights = {
        "none": None,
        "all": np.ones(64, np.float32),
        "target": target,
        "prompt": 1 - target,
        "both": np.where(target == 1, 1, PROMPT_WEIGHT).astype(np.float32),
    }
    rows = {name: Row(tokens, LENGTHS, "a", weight) for name, weight in weights.items()}
    # the last piece as padding: no labels, and no part in anything
    padded, keep = tokens.copy(), np.ones(64, np.float32)
    padded[50:] = 0
    keep[50:] = 0
    rows["padded"] = Row(padded, LENGTHS, "a", keep)
    rows["without"] = Row(tokens[:50], LENGTHS[:2], "a")
    results = {}
    for name, row in rows.items():
        model.zero_grad()
        batch = build(row)
        loss = model(
            batch.tokens_BT, batch.labels_T, batch.row, label_weights_T=batch.label_weights_T
        )
        loss.backward()
        grad = model.decoder.final_layernorm.weight.grad.numpy().copy()
        results[name] = (loss.item(), batch.num_labels, grad)
    return results


def test_weights_and_padding() -> None:
    found = run_distributed(losses_by_weights, 1)[0]

    def same(name: str, parts: dict[str, float]) -> None:
        loss = sum(scale * found[part][0] for part, scale in parts.items())
        grad = sum(scale * found[part][2] for part, scale in parts.items())
        assert found[name][0] == pytest.approx(loss, rel=tolerances.PACKED_REL)
        error = np.linalg.norm(found[name][2] - grad) / np.linalg.norm(grad)
        assert error < tolerances.PACKED_REL

    same("all", {"none": 1})
    same("none", {"target": 1, "prompt": 1})
    same("both", {"target": 1, "prompt": PROMPT_WEIGHT})
    same("padded", {"without": 1})
    labels = {name: result[1] for name, result in found.items()}
    assert labels["none"] == labels["all"] == labels["both"] == 64 - 3
    assert labels["target"] + labels["prompt"] == 64 - 3 and labels["target"] > 5
    assert labels["padded"] == labels["without"] == 50 - 2
