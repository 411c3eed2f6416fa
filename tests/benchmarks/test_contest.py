"""Contests: who is let in, who is named instead, and how the rest is timed."""

import pytest
import torch
from kernels_gpu import contest
from kernels_gpu.contest import AbsentError, DeviceLostError, Expected, Peer, Problem, Run
from kernels_gpu.shapes import Work


def a_problem(limit=1e-3):
    """Doubling x: results are out = 2x and dx = 2 dout, truth known for the first row only."""
    x = torch.randn(4, 8, requires_grad=True)
    dout = torch.randn(4, 8)
    return Problem(
        op="double",
        model="none",
        tokens=4,
        row="",
        inputs=[x],
        douts=[dout],
        work={"fwd": Work(1e6, "byte"), "bwd": Work(2e6, "byte")},
        limit=limit,
        expected=[
            Expected("out", 2 * x.detach()[0].double(), lambda results: results[0][0]),
            Expected("dx", 2 * dout[0].double(), lambda results: results[1][0]),
        ],
    )


def double(problem):
    return contest.autograd_run(lambda x: 2 * x, problem)


def hold(peers, measure=contest.cpu_measure):
    announced = []
    return contest.hold_contest(a_problem(), peers, measure, announced.append), announced


def test_relative_error_works_in_pieces_and_knows_nan(monkeypatch):
    exact, off = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    monkeypatch.setattr(contest, "PIECE", 4)
    whole = (off.norm() / exact.norm()).item()
    assert contest.relative_error(exact + off, exact) == pytest.approx(whole)
    assert contest.relative_error(exact[:3], exact) == float("inf")
    off[6, 4] = float("nan")
    assert not contest.relative_error(off, exact) <= 1e9


def test_contestants_take_turns_and_the_first_round_does_not_count(monkeypatch):
    monkeypatch.setattr(contest, "ROUNDS_S", 0.0)
    clock = iter(range(1000))

    def measure(call):
        return float(next(clock)), call()

    outcome, announced = hold([Peer("ours", double), Peer("peer", double)], measure)
    rounds = contest.MIN_ROUNDS
    assert announced == ["ours", "peer"] + ["ours", "peer"] * (rounds + 1)
    # Two calls each per round; the first round took the times 0 to 3.
    assert outcome.times_ms["ours"]["fwd"] == [4.0 * turn for turn in range(1, rounds + 1)]
    assert outcome.times_ms["peer"]["bwd"] == [4.0 * turn + 3 for turn in range(1, rounds + 1)]
    assert rounds < contest.MAX_ROUNDS and not outcome.absent and not outcome.errors


def test_ours_wrong_ends_the_contest_and_says_what_differs():
    wrong = Peer("ours", lambda problem: contest.autograd_run(lambda x: 2.01 * x, problem))
    outcome, announced = hold([wrong, Peer("peer", double)])
    assert len(outcome.errors) == 2 and "ours: out is off by 5" in outcome.errors[0]
    assert "dx" in outcome.errors[1]
    assert outcome.times_ms == {} and announced == ["ours"]


def test_peers_that_fail_or_are_wrong_are_named_and_not_timed():
    def absent(problem):
        raise AbsentError("knows no documents")

    def missing(problem):
        import no_such_package_anywhere  # noqa: F401

    def differs_beyond_the_truth(problem):
        def run(x):
            return torch.cat([2 * x[:3], 3 * x[3:]])

        return contest.autograd_run(run, problem)

    peers = {
        "absent": absent,
        "missing": missing,
        "wrong": lambda problem: contest.autograd_run(lambda x: x, problem),
        "nan": lambda problem: contest.autograd_run(lambda x: x * float("nan"), problem),
        "differs": differs_beyond_the_truth,
        "one result": lambda problem: Run({"fwd": lambda: [2 * problem.inputs[0].detach()]}),
        "floor": lambda problem: Run({"fwd": lambda: [torch.zeros(1)]}),
    }
    outcome, _ = hold([Peer("ours", double), *(Peer(*item) for item in peers.items())])
    assert set(outcome.times_ms) == {"ours", "floor"}
    assert outcome.absent["absent"] == "knows no documents"
    assert "no_such_package_anywhere" in outcome.absent["missing"]
    assert "out is off by 5.0e-01" in outcome.absent["wrong"]
    assert "out is off by nan" in outcome.absent["nan"]
    assert outcome.absent["differs"].startswith("result 0 differs from ours")
    assert "list index out of range" in outcome.absent["one result"]


def test_a_peer_that_fails_while_timed_is_named(monkeypatch):
    monkeypatch.setattr(contest, "ROUNDS_S", 0.0)
    calls = []

    def make(problem):
        run = double(problem)

        def forward():
            calls.append(1)
            if len(calls) > 2:
                raise RuntimeError("at 52:12:\n  x = y\nno memory")
            return run.phases["fwd"]()

        return Run({"fwd": forward, "bwd": run.phases["bwd"]})

    outcome, _ = hold([Peer("ours", double), Peer("peer", make)])
    assert outcome.absent == {"peer": "failed when timed: RuntimeError: at 52:12: ... no memory"}
    assert set(outcome.times_ms) == {"ours"} and len(outcome.times_ms["ours"]["fwd"]) > 1


def test_contestants_do_not_see_what_others_did_to_the_inputs():
    def spoil(problem):
        run = double(problem)

        def forward():
            outs = run.phases["fwd"]()
            with torch.no_grad():
                for x in spoiled:
                    x.zero_()
            return outs

        spoiled = problem.fresh_inputs()
        return Run({"fwd": forward, "bwd": run.phases["bwd"]})

    outcome, _ = hold([Peer("ours", double), Peer("spoils", spoil), Peer("peer", double)])
    assert set(outcome.times_ms) == {"ours", "spoils", "peer"}


def test_a_lost_gpu_ends_the_process_not_the_peer(monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        hold([Peer("ours", double)])


def test_a_failure_of_ours_while_timed_is_an_error(monkeypatch):
    monkeypatch.setattr(contest, "ROUNDS_S", 0.0)

    def measure(call):
        raise RuntimeError("launch failed")

    outcome, _ = hold([Peer("ours", double)], measure)
    assert outcome.errors == ["ours: failed when timed: RuntimeError: launch failed"]
    assert outcome.times_ms == {}


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
