"""What goes wrong between context ranks is said, by all who notice, and names the rank."""

from __future__ import annotations

import re

import pytest

from lclm.context.plan.rates import load_machine
from tests import distributed
from tests.context import failure_worker
from tests.distributed import DistributedError, run_distributed

# One document on three ranks: rank 1 sees keys of rank 0 (step 1), rank 2 those of 1 and 0. What a
# step brings is on its way before the attention of the step before; rank 0 only sends.
FORWARD_ORDER = [
    ["keys out", "keys out", "attend"],
    ["keys in", "keys out", "attend", "attend"],
    ["keys in", "attend", "keys in", "attend", "attend"],
]
# Rates are measured in about one second of an idle machine; ten where others compute too.
MEASURING_SECONDS = 10.0
# Gradients leave while the next step is attended to.
BACKWARD_ORDER = [
    ["keys out", "attend", "keys out", "gradients in", "gradients in"],
    ["keys in", "keys out", "attend", "attend", "gradients in", "gradients out"],
    ["keys in", "attend", "keys in", "attend", "gradients out", "attend", "gradients out"],
]


def test_three_ranks_disagree_loudly_and_exchange_under_attention() -> None:
    results = run_distributed(failure_worker.three_ranks, 3)
    for rank, (texts, (first, back), _) in enumerate(results):
        others = "[0, 2]" if rank == 1 else "[1]"
        for text in texts:
            assert f"row plan: rank {rank} and rank(s) {others} of its context group" in text
        assert first == FORWARD_ORDER[rank]
        assert back == BACKWARD_ORDER[rank]
    machines = [machine for _, _, (machine, _) in results]
    assert machines == [machines[0]] * 3
    assert load_machine(machines[0]).near_ranks == 3
    assert max(seconds for _, _, (_, seconds) in results) < MEASURING_SECONDS


def test_transfers_fly_alone_and_refuse_misuse() -> None:
    for rank, (early, refusals, layers) in enumerate(run_distributed(failure_worker.two_ranks, 2)):
        assert early == (True, 1.0 - rank)
        states = ["new", "new", "committed", "committed", "received", "finished"]
        assert [re.search(r"is (\w+) and cannot", text)[1] for text in refusals] == states
        assert "layer 3 is recomputed, but its first forward" in layers[0]
        assert "layer 3 ran twice without gradients" in layers[1]
        assert layers[2] == layers[0]


def check_loss(monkeypatch: pytest.MonkeyPatch, lost: int, how: str, mode: str) -> None:
    # Survivors wait for a word of the lost rank before they speak.
    monkeypatch.setattr(distributed, "_GRACE_S", 20.0)
    with pytest.raises(DistributedError) as caught:
        run_distributed(failure_worker.lose_rank, 3, lost, how, mode, timeout=90)
    parts = re.split(r"^rank (\d): ", str(caught.value), flags=re.MULTILINE)
    texts = dict(zip(map(int, parts[1::2]), parts[2::2], strict=True))
    for rank in {0, 1, 2} - {lost}:
        assert "ExchangeError" in texts[rank]
        assert f": rank {lost} is lost; rank {rank} was waiting for" in texts[rank]


@pytest.mark.slow
def test_a_dead_rank_is_named_also_by_those_who_did_not_talk_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_loss(monkeypatch, 0, "dies", "ring")


@pytest.mark.long
@pytest.mark.parametrize(
    ("lost", "how", "mode"), [(2, "stops", "ring"), (1, "stops", "ulysses"), (2, "dies", "ulysses")]
)
def test_a_lost_rank_is_named(
    monkeypatch: pytest.MonkeyPatch, lost: int, how: str, mode: str
) -> None:
    check_loss(monkeypatch, lost, how, mode)
