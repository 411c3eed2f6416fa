"""Learning rate and the place of a step within the stages, by hand-made numbers."""

from __future__ import annotations

from itertools import pairwise

import pytest

from lclm.optim import learning_rate
from lclm.train.stages import Position, find_position
from tests.train.tiny import tiny_config

TOKENS_PER_STEP = 256


def rates(**changes: object) -> list[float]:
    """Learning rate of every step of a stage of 10 steps."""
    fields = {
        "tokens": 10 * TOKENS_PER_STEP,
        "lr": 1.0,
        "min_lr": 0.1,
        "warmup_fraction": 0.2,
        **changes,
    }
    stage = tiny_config("unused", **{f"stage__0__{k}": v for k, v in fields.items()}).stage[0]
    return [learning_rate(stage, step) for step in range(stage.num_steps)]


def test_cosine_warms_up_and_ends_at_the_floor() -> None:
    found = rates()
    assert found[:2] == [0.5, 1.0]
    assert found[5] == pytest.approx(0.55)
    assert found[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(found[1:]))


def test_linear_and_constant() -> None:
    assert rates(schedule="linear")[2:] == pytest.approx([1 - 0.9 * n / 8 for n in range(1, 9)])
    assert rates(schedule="constant", min_lr=0.0) == [0.5] + [1.0] * 9
    assert rates(schedule="constant", min_lr=0.0, warmup_fraction=0.0) == [1.0] * 10


def test_position_at_borders() -> None:
    config = tiny_config("unused")
    assert find_position(config, 0) == Position(0, 0, 0)
    assert find_position(config, 3) == Position(0, 3, 3 * TOKENS_PER_STEP)
    assert find_position(config, 4) == Position(1, 0, 4 * TOKENS_PER_STEP)
    assert find_position(config, 8) == Position(1, 4, 8 * TOKENS_PER_STEP)
