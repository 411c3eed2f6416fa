"""Documents packed into a row train exactly as they would alone."""

import numpy as np
import pytest

from tests import tolerances
from tests.distributed import run_distributed
from tests.train.tiny import VOCAB_SIZE, build_alone

DOC_LENGTHS = [1, 20, 31, 2, 10]


def packed_and_separate(document_mask: bool) -> dict[str, tuple[float, dict[str, np.ndarray]]]:
    """Loss sum and gradients of one packed row, and of its documents each in a row of its own."""
    from lclm.data.stage_rows import Row

    model, build = build_alone()
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, sum(DOC_LENGTHS))
    pieces = np.split(tokens, np.cumsum(DOC_LENGTHS)[:-1])
    rows = {
        "packed": [Row(tokens, np.array(DOC_LENGTHS), "a", document_mask=document_mask)],
        "separate": [Row(piece, np.array([len(piece)]), "a") for piece in pieces],
    }
    results = {}
    for name, parts in rows.items():
        model.zero_grad()
        total = 0.0
        for part in parts:
            batch = build(part)
            loss = model(batch.tokens_BT, batch.labels_T, batch.row)
            loss.backward()
            total += loss.item()
        grads = {key: weight.grad.numpy().copy() for key, weight in model.named_parameters()}
        results[name] = (total, grads)
    return results


def test_packed_equals_separate() -> None:
    results = run_distributed(packed_and_separate, 1, True)[0]
    (packed, packed_grads), (separate, separate_grads) = results["packed"], results["separate"]
    assert packed == pytest.approx(separate, rel=tolerances.PACKED_REL)
    for name, grad in packed_grads.items():
        error = np.linalg.norm(grad - separate_grads[name]) / np.linalg.norm(separate_grads[name])
        assert error < tolerances.PACKED_REL, name


def test_without_the_mask_packing_matters() -> None:
    results = run_distributed(packed_and_separate, 1, False)[0]
    assert results["packed"][0] != pytest.approx(results["separate"][0], rel=1e-3)
