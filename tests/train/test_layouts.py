"""The law of the project: loss and gradients do not depend on the layout.

Every layout trains the same four steps on the same ragged rows and is held against one process.
"""

from __future__ import annotations

import pytest

from tests import tolerances
from tests.distributed import run_distributed
from tests.train.layout_worker import train_layouts

NUM_STEPS = 4

TWO_RANKS = {
    "dp2": {},
    "dp2 in order": {"in_order": True},
    "tp2": {"parallel__tp": 2},
    "cp2": {"parallel__cp": 2},
    "cp2 gather": {"parallel__cp": 2, "parallel__cp_comm": "gather"},
    "cp2 zigzag": {"parallel__cp": 2, "parallel__cp_layout": "zigzag"},
    "cp2 contiguous": {"parallel__cp": 2, "parallel__cp_layout": "contiguous"},
    "pp2": {"parallel__pp": 2},
    "cp2 gather recompute": {
        "parallel__cp": 2,
        "parallel__cp_comm": "gather",
        "train__recompute": "full",
    },
    "pp2 tied": {"parallel__pp": 2, "model__tie_embeddings": True},
    "cp2 ring": {"parallel__cp": 2, "parallel__cp_comm": "ring"},
    "cp2 ring recompute": {
        "parallel__cp": 2,
        "parallel__cp_comm": "ring",
        "parallel__cp_layout": "contiguous",
        "train__recompute": "full",
    },
    "cp2 ulysses": {"parallel__cp": 2, "parallel__cp_comm": "ulysses"},
    # One rank holds only documents of one token: it has no label and another has them all.
    "cp2 ring half labelled": {
        "parallel__cp": 2,
        "parallel__cp_comm": "ring",
        "parallel__cp_layout": "contiguous",
    },
    "cp2 ulysses half labelled": {
        "parallel__cp": 2,
        "parallel__cp_comm": "ulysses",
        "parallel__cp_layout": "contiguous",
    },
    "cp2 ulysses recompute": {
        "parallel__cp": 2,
        "parallel__cp_comm": "ulysses",
        "train__recompute": "full",
    },
}
FOUR_RANKS = {
    "tp2 cp2 gather": {"parallel__tp": 2, "parallel__cp": 2, "parallel__cp_comm": "gather"},
    "pp2 cp2": {"parallel__pp": 2, "parallel__cp": 2},
    "dp2 cp2 gather": {"parallel__cp": 2, "parallel__cp_comm": "gather"},
    "tp2 pp2": {"parallel__tp": 2, "parallel__pp": 2},
    "tp2 pp2 tied": {"parallel__tp": 2, "parallel__pp": 2, "model__tie_embeddings": True},
    "cp4": {"parallel__cp": 4},
    "cp4 gather": {"parallel__cp": 4, "parallel__cp_comm": "gather"},
    "tp2 cp2 ring": {"parallel__tp": 2, "parallel__cp": 2, "parallel__cp_comm": "ring"},
    "tp2 cp2 ulysses": {"parallel__tp": 2, "parallel__cp": 2, "parallel__cp_comm": "ulysses"},
    "pp2 cp2 ring recompute": {
        "parallel__pp": 2,
        "parallel__cp": 2,
        "parallel__cp_comm": "ring",
        "train__recompute": "full",
    },
    "cp4 ring": {"parallel__cp": 4, "parallel__cp_comm": "ring"},
    "cp4 ulysses ring recompute": {
        "parallel__cp": 4,
        "parallel__cp_comm": "ulysses_ring",
        "parallel__cp_ulysses": 2,
        "train__recompute": "full",
    },
    "cp4 zigzag": {"parallel__cp": 4, "parallel__cp_layout": "zigzag"},
}
FOUR_RANKS_MORE = {
    "pp2 cp2 ulysses": {"parallel__pp": 2, "parallel__cp": 2, "parallel__cp_comm": "ulysses"},
    "dp2 cp2 ring": {"parallel__cp": 2, "parallel__cp_comm": "ring"},
    "cp4 ulysses": {"parallel__cp": 4, "parallel__cp_comm": "ulysses"},
}
EIGHT_RANKS = {
    "tp2 cp4 ring": {"parallel__tp": 2, "parallel__cp": 4, "parallel__cp_comm": "ring"},
    "pp2 cp4 ring": {"parallel__pp": 2, "parallel__cp": 4, "parallel__cp_comm": "ring"},
    "dp2 cp4 ulysses": {"parallel__cp": 4, "parallel__cp_comm": "ulysses"},
    "dp2 cp4 ulysses ring": {
        "parallel__cp": 4,
        "parallel__cp_comm": "ulysses_ring",
        "parallel__cp_ulysses": 2,
    },
    "tp2 cp4 ulysses ring recompute": {
        "parallel__tp": 2,
        "parallel__cp": 4,
        "parallel__cp_comm": "ulysses_ring",
        "parallel__cp_ulysses": 2,
        "train__recompute": "full",
    },
    "tp2 pp2 cp2 ring recompute": {
        "parallel__tp": 2,
        "parallel__pp": 2,
        "parallel__cp": 2,
        "parallel__cp_comm": "ring",
        "train__recompute": "full",
    },
}
ONE_RANK = {
    "half labelled": {},
    "plain": {},
    "tied": {"model__tie_embeddings": True},
    "no mask": {"stage__0__document_mask": False},
}


@pytest.fixture(scope="module")
def one_process() -> dict[str, list[tuple[float, float]]]:
    """Loss and gradient norm of each step in one process."""
    return run_distributed(train_layouts, 1, NUM_STEPS, ONE_RANK)[0]


def _compare(
    layouts: dict[str, dict], found: dict[str, list[tuple[float, float]]], expected: dict
) -> None:
    for name in layouts:
        want = expected[next((n for n in expected if name.endswith(n)), "plain")]
        for step, (got, wanted) in enumerate(zip(found[name], want, strict=True)):
            assert got == pytest.approx(wanted, rel=tolerances.LAYOUT_REL), f"{name} step {step}"


def test_the_mask_and_tying_matter(one_process: dict) -> None:
    """What is compared is sensitive: other models give other numbers."""
    assert one_process["plain"][0] != pytest.approx(one_process["tied"][0], rel=1e-3)
    assert one_process["plain"][0] != pytest.approx(one_process["no mask"][0], rel=1e-3)
    losses = [loss for loss, _ in one_process["plain"]]
    assert losses[-1] < losses[0]


def test_two_ranks(one_process: dict) -> None:
    for found in run_distributed(train_layouts, 2, NUM_STEPS, TWO_RANKS, timeout=240):
        _compare(TWO_RANKS, found, one_process)
        for dealt, in_order in zip(found["dp2"], found["dp2 in order"], strict=True):
            assert dealt == pytest.approx(in_order, rel=tolerances.DEALT_REL)


@pytest.mark.slow
def test_four_ranks(one_process: dict) -> None:
    for found in run_distributed(train_layouts, 4, NUM_STEPS, FOUR_RANKS, timeout=280):
        _compare(FOUR_RANKS, found, one_process)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("world_size", "layouts"), [(4, FOUR_RANKS_MORE), (8, EIGHT_RANKS)], ids=["four", "eight"]
)
def test_more_layouts(one_process: dict, world_size: int, layouts: dict[str, dict]) -> None:
    for found in run_distributed(train_layouts, world_size, NUM_STEPS, layouts, timeout=800):
        _compare(layouts, found, one_process)
