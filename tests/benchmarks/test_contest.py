"""Contests: who is let in, who is named instead, and how the rest is timed."""

import pytest
import torch

from benchmarks.kernels import contest
from benchmarks.kernels.contest import AbsentError, Expected, Peer, Problem, Run, Work


def a_problem():
    """Doubling x: results are out = 2x and dx = 2 dout, truth known for the first row only."""
    x = torch.randn(4, 8, requires_grad=True)
    dout = torch.randn(4, 8)
    first = torch.tensor([0])
    return Problem(
        inputs=[x],
        douts=[dout],
        work={"fwd": Work(1e6, "byte"), "bwd": Work(2e6, "byte")},
        limit=1e-3,
        expected=[
            Expected("out", 0, 2 * x.detach()[:1].double(), first),
            Expected("dx", 1, 2 * dout[:1].double(), first),
        ],
    )


def double(problem):
    return lambda x: 2 * x


def hold(*peers, measure=contest.cpu_measure):
    announced = []
    return contest.hold_contest(a_problem(), peers, measure, announced.append), announced


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(contest, "ROUNDS_S", 0.0)


OURS, TORCH = Peer("ours", double), Peer("torch", double)


def test_relative_error_works_in_pieces_and_knows_nan(monkeypatch):
    exact, off = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    monkeypatch.setattr(contest, "PIECE", 4)
    whole = (off.norm() / exact.norm()).item()
    assert contest.relative_error(exact + off, exact) == pytest.approx(whole)
    assert contest.relative_error(exact[:3], exact) == float("inf")
    off[6, 4] = float("nan")
    assert not contest.relative_error(off, exact) <= 1e9


def test_contestants_take_turns_and_the_first_round_does_not_count():
    clock = iter(range(1000))
    outcome, announced = hold(
        OURS, Peer("peer", double), measure=lambda call: (float(next(clock)), call())
    )
    rounds = contest.MIN_ROUNDS
    assert announced == ["ours", "peer"] + ["ours", "peer"] * (rounds + 1)
    # Two calls each per round; the first round took the times 0 to 3.
    assert outcome.times_ms["ours"]["fwd"] == [4.0 * turn for turn in range(1, rounds + 1)]
    assert outcome.times_ms["peer"]["bwd"] == [4.0 * turn + 3 for turn in range(1, rounds + 1)]
    assert rounds < contest.MAX_ROUNDS and not outcome.failed


def test_ours_wrong_ends_the_contest_and_says_what_differs():
    outcome, announced = hold(Peer("ours", lambda problem: lambda x: 2.01 * x), TORCH)
    assert outcome.failed["ours"].startswith("out is off by 5")
    assert "; dx is off by 5" in outcome.failed["ours"]
    assert outcome.times_ms == {} and announced == ["ours"]


def absent(problem):
    raise AbsentError("knows no documents")


def differs_beyond_the_truth(problem):
    return lambda x: torch.cat([2 * x[:3], 3 * x[3:]])


def forward_alone(is_partial, factor=2):
    def build(problem):
        x = problem.inputs[0].detach()
        return Run({"fwd": lambda: [factor * x]}, is_partial=is_partial)

    return build


@pytest.mark.parametrize(
    "peer, reason",
    [
        (Peer("peer", absent), "knows no documents"),
        (Peer("peer", double, "no_such_package:x"), "ModuleNotFoundError: No module named"),
        (Peer("peer", double, "json:no_such_name"), "AttributeError: module 'json'"),
        (Peer("peer", lambda problem: lambda x: 1 * x), "out is off by 5.0e-01, allowed 1e-03"),
        (Peer("peer", lambda problem: lambda x: x * float("nan")), "out is off by nan"),
        (Peer("peer", differs_beyond_the_truth), "result 0 differs from ours"),
        (Peer("peer", forward_alone(False)), "IndexError: list index out of range"),
        (Peer("peer", forward_alone(True, 3)), "out is off by"),
    ],
)
def test_a_peer_that_fails_or_is_wrong_is_named_and_not_timed(peer, reason):
    outcome, _ = hold(OURS, TORCH, peer)
    assert outcome.failed.keys() == {"peer"} and outcome.failed["peer"].startswith(reason)
    assert outcome.times_ms == {}
    # Beside PyTorch's own, ours is timed in any case.
    assert hold(OURS, peer)[0].times_ms.keys() == {"ours"}


def test_a_floor_is_not_checked_and_a_partial_run_is_as_far_as_it_goes():
    floor = Peer("floor", lambda problem: Run({"fwd": lambda: [torch.zeros(1)]}))
    outcome, _ = hold(OURS, TORCH, floor)
    assert outcome.times_ms.keys() == {"ours", "torch", "floor"}
    outcome, _ = hold(OURS, TORCH, Peer("partial", forward_alone(True)))
    assert outcome.times_ms["partial"].keys() == {"fwd"} and not outcome.failed


def test_a_peer_that_fails_while_timed_is_named():
    calls = []

    def build(problem):
        run = contest.autograd_run(lambda x: 2 * x, problem)

        def forward():
            calls.append(1)
            if len(calls) > 2:
                raise RuntimeError("at 52:12:\n  x = y\nno memory")
            return run.phases["fwd"]()

        return Run({"fwd": forward, "bwd": run.phases["bwd"]})

    outcome, _ = hold(OURS, TORCH, Peer("peer", build))
    assert outcome.failed == {"peer": "failed when timed: RuntimeError: at 52:12: ... no memory"}
    assert outcome.times_ms.keys() == {"ours", "torch"} and len(outcome.times_ms["ours"]["fwd"]) > 1


def test_contestants_do_not_see_what_others_did_to_the_inputs():
    def spoil(problem):
        spoiled = problem.fresh_inputs()
        run = contest.autograd_run(lambda x: 2 * x, problem, spoiled)

        def forward():
            outs = run.phases["fwd"]()
            with torch.no_grad():
                spoiled[0].zero_()
            return outs

        return Run({"fwd": forward, "bwd": run.phases["bwd"]})

    outcome, _ = hold(OURS, Peer("spoils", spoil), Peer("peer", double))
    assert outcome.times_ms.keys() == {"ours", "spoils", "peer"}


def test_a_lost_gpu_ends_the_process_not_the_peer(monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        hold(OURS)


def test_gpu_time_starts_after_the_cache_was_flushed(monkeypatch):
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("event")

        def elapsed_time(self, end):
            return 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    monkeypatch.setattr(torch.Tensor, "zero_", lambda self: order.append(f"flush {len(self)}"))
    measure = contest.cuda_measure(torch.device("cpu"), 64)
    assert measure(lambda: order.append("call") or []) == (1.5, [])
    assert order == ["flush 64", "event", "call", "event", "wait"]
