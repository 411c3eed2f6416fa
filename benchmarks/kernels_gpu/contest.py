"""Contests: one problem, our operator and its peers, checked against the truth, timed in turns."""

import gc
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

# How the names of this package's contestants begin, and of those that are no peers but compute a
# part of the work, to be compared with.
OURS, FLOOR = "ours", "floor"
MIN_ROUNDS, MAX_ROUNDS = 3, 20
ROUNDS_S = 4.0  # rounds are added until they take this long together
PIECE = 1 << 27  # elements that are widened at a time
# A contestant may differ from ours by the roundings of both.
BETWEEN_CONTESTANTS = 2.0

Tensors = list[torch.Tensor]
Announce = Callable[[str], None]
Measure = Callable[[Callable[[], Tensors]], tuple[float, Tensors]]


class AbsentError(Exception):
    """A peer that cannot take part in this problem; the text says why."""


class DeviceLostError(Exception):
    """The GPU answers no more in this process: it must end and a new one go on."""


@dataclass(frozen=True)
class Work:
    """What a phase must do at the least: `unit` is "flop" or "byte"."""

    amount: float
    unit: str


@dataclass(frozen=True)
class Expected:
    """The truth of (a part of) one result, fp32 or fp64."""

    name: str
    value: torch.Tensor
    pick: Callable[[Tensors], torch.Tensor]


@dataclass(kw_only=True)
class Problem:
    """One operator at one shape. Results are the outputs, then the inputs' gradients."""

    op: str
    model: str
    tokens: int
    row: str  # "one document", "ragged", or "" where documents do not matter
    inputs: Tensors
    douts: Tensors  # gradients of the outputs
    work: dict[str, Work]  # of each phase, in order
    limit: float  # largest relative error (Frobenius norm)
    expected: list[Expected] = field(default_factory=list)
    note: str = ""

    def fresh_inputs(self) -> Tensors:
        """Copies of the inputs, so that no contestant sees what another one did to them."""
        return [
            x.detach().clone().requires_grad_() if x.requires_grad else x.clone()
            for x in self.inputs
        ]


def _nothing() -> None:
    """No preparation."""


@dataclass(frozen=True)
class Run:
    """A contestant on a problem: phases that are called and timed in order.

    Together the phases return the problem's results, or what `unpack` makes them from. `setup` runs
    before each round. Neither is timed.
    """

    phases: dict[str, Callable[[], Tensors]]
    setup: Callable[[], None] = _nothing
    unpack: Callable[[torch.Tensor], Tensors] | None = None  # of each result


@dataclass(frozen=True)
class Peer:
    """`make` imports and builds a contestant; any exception it raises is named in the table."""

    name: str
    make: Callable[[Any], Run]

    @property
    def is_ours(self) -> bool:
        """Whether a wrong result of it ends the contest."""
        return self.name.startswith(OURS)

    @property
    def is_checked(self) -> bool:
        """Whether its results must be right."""
        return not self.name.startswith(FLOOR)


@dataclass
class Outcome:
    """What came of a contest: milliseconds by contestant and phase, or why not."""

    times_ms: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)  # what of ours is wrong


def autograd_run(
    function: Callable[..., Any], problem: Problem, inputs: Tensors | None = None
) -> Run:
    """Forward and backward of a function of the problem's inputs that returns tensors."""
    inputs = problem.fresh_inputs() if inputs is None else inputs
    wanted = [x for x in inputs if x.requires_grad]
    douts = [dout.clone() for dout in problem.douts]  # some peers write into them
    kept: Tensors = []

    def forward() -> Tensors:
        outs = function(*inputs)
        kept[:] = [outs] if isinstance(outs, torch.Tensor) else outs
        return [out.detach() for out in kept]

    def backward() -> Tensors:
        grads = torch.autograd.grad(kept, wanted, douts)
        kept.clear()
        return list(grads)

    return Run({"fwd": forward, "bwd": backward})


def whole_run(function: Callable[..., torch.Tensor], problem: Problem) -> Run:
    """Forward and backward as one phase, "step": for what makes gradients in its forward."""
    parts = autograd_run(function, problem)
    forward, backward = parts.phases.values()
    return Run({"step": lambda: [*forward(), *backward()]})


def run_once(run: Run) -> Tensors:
    """All results of one round."""
    run.setup()
    results = [tensor for phase in run.phases.values() for tensor in phase()]
    if run.unpack is None:
        return results
    return [part for tensor in results for part in run.unpack(tensor)]


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error of the Frobenius norm; infinite where the shapes differ."""
    if actual.shape != exact.shape:
        return float("inf")
    wide = torch.promote_types(exact.dtype, torch.float32)
    off = torch.zeros((), dtype=torch.float64, device=exact.device)
    whole = torch.zeros_like(off)
    pieces = (x.detach().reshape(-1).split(PIECE) for x in (actual, exact))
    for actual_piece, exact_piece in zip(*pieces):
        exact_piece = exact_piece.to(wide)
        off += (actual_piece.to(wide) - exact_piece).norm().double().square()
        whole += exact_piece.norm().double().square()
    return (off / whole).sqrt().item()


def errors_of(results: Tensors, problem: Problem) -> list[str]:
    """Which results differ from the truth by more than the problem's limit."""
    errors = []
    for expected in problem.expected:
        error = relative_error(expected.pick(results), expected.value)
        if not error <= problem.limit:
            errors.append(f"{expected.name} is off by {error:.1e}, allowed {problem.limit:.0e}")
    return errors


def differences(results: Tensors, ours: Tensors, limit: float) -> list[str]:
    """Which results of a peer differ from ours, over all elements."""
    if len(results) != len(ours):
        return [f"returns {len(results)} results, not {len(ours)}"]
    errors = [relative_error(result, our) for result, our in zip(results, ours)]
    return [
        f"result {i} differs from ours by {error:.1e}"
        for i, error in enumerate(errors)
        if not error <= BETWEEN_CONTESTANTS * limit
    ]


def describe(error: BaseException) -> str:
    """Type, first and last line of an exception: compilers put the place first, the reason last."""
    lines = [line.strip()[:120] for line in str(error).splitlines() if line.strip()]
    text = " ... ".join(dict.fromkeys(lines[:1] + lines[-1:]))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_device() -> None:
    """Raise DeviceLostError if an earlier launch broke this process's GPU context."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise DeviceLostError(describe(error)) from error


def hold_contest(
    problem: Problem, peers: Sequence[Peer], measure: Measure, announce: Announce
) -> Outcome:
    """Check every contestant, then time those that are right, in turns.

    Args:
        peers: ours first. If it fails or is wrong, nothing is timed.
        announce: called with a contestant's name before anything of it runs.

    Raises:
        DeviceLostError: a contestant broke the GPU context.
    """
    outcome = Outcome()
    runs: dict[str, Run] = {}
    ours: Tensors = []
    for peer in peers:
        announce(peer.name)
        run, results, wrong = _admit(peer, problem, ours)
        _check_device()
        if run is not None:
            runs[peer.name] = run
            ours = ours or results
        elif peer.is_ours:
            outcome.errors = [f"{peer.name}: {reason}" for reason in wrong]
            return outcome
        else:
            outcome.absent[peer.name] = "; ".join(wrong)
            torch.cuda.empty_cache()
        del run, results
    ours.clear()
    _free()
    _time_in_turns(runs, outcome, measure, announce)
    return outcome


def _admit(peer: Peer, problem: Problem, ours: Tensors) -> tuple[Run | None, Tensors, list[str]]:
    """A contestant's run and results, or why it is not let in."""
    try:
        run = peer.make(problem)
        results = run_once(run)
        wrong = errors_of(results, problem) if peer.is_checked else []
        if peer.is_checked and ours and not wrong:
            wrong = differences(results, ours, problem.limit)
    except AbsentError as error:
        wrong = [str(error)]
    except Exception as error:  # peers fail in their own ways: each is named, none ends the run
        wrong = [describe(error)]
        if peer.is_ours:
            traceback.print_exc()
    return (None, [], wrong) if wrong else (run, results, [])


def _time_in_turns(
    runs: dict[str, Run], outcome: Outcome, measure: Measure, announce: Announce
) -> None:
    """One round unmeasured, then rounds of every contestant until ROUNDS_S have passed."""
    times: dict[str, dict[str, list[float]]] = {
        name: {phase: [] for phase in run.phases} for name, run in runs.items()
    }
    start = 0.0
    for turn in range(MAX_ROUNDS + 1):
        for name in list(runs):
            announce(name)
            try:
                spent = _time_round(runs[name], measure)
            except Exception as error:  # as above
                _check_device()
                reason = f"failed when timed: {describe(error)}"
                if name.startswith(OURS):
                    outcome.errors.append(f"{name}: {reason}")
                    traceback.print_exc()
                else:
                    outcome.absent[name] = reason
                del runs[name], times[name]
                _free()
                continue
            for phase, milliseconds in spent.items():
                if turn:
                    times[name][phase].append(milliseconds)
        if turn == 0:
            start = time.monotonic()
        elif turn >= MIN_ROUNDS and time.monotonic() - start > ROUNDS_S:
            break
    outcome.times_ms = times


def _time_round(run: Run, measure: Measure) -> dict[str, float]:
    run.setup()
    spent = {}
    for phase, call in run.phases.items():
        spent[phase], results = measure(call)
        del results
    return spent


def cpu_measure(call: Callable[[], Tensors]) -> tuple[float, Tensors]:
    """CPU milliseconds of the process."""
    start = time.process_time()
    results = call()
    return 1e3 * (time.process_time() - start), results


def cuda_measure(device: torch.device, flush_bytes: int) -> Measure:
    """Milliseconds on the GPU between two events.

    Before each call as many bytes as `flush_bytes` are overwritten: that empties the L2 cache, and
    keeps the GPU busy while the host prepares the launches, which is then not measured.
    """
    flush = torch.empty(flush_bytes, dtype=torch.int8, device=device)

    def measure(call: Callable[[], Tensors]) -> tuple[float, Tensors]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        results = call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end), results

    return measure
