"""A contest: one problem, ours and others, checked against the truth, then timed in turns."""

import gc
import importlib
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
ROUNDS_S = 1.0  # rounds are added until they take this long together
PIECE = 1 << 27  # elements that are widened at a time
# A contestant may differ from ours by the roundings of both.
BETWEEN_CONTESTANTS = 2.0

Tensors = list[torch.Tensor]
Announce = Callable[[str], None]
Measure = Callable[[Callable[[], Tensors]], tuple[float, Tensors]]


class AbsentError(Exception):
    """A contestant that cannot take part in this problem; the text says why."""


@dataclass(frozen=True)
class Work:
    """What a phase must do at the least: `unit` is "flop" or "byte"."""

    amount: float
    unit: str


@dataclass(frozen=True)
class Expected:
    """The truth of one result, fp32 or fp64; with `tokens` of these rows of it."""

    name: str
    result: int
    value: torch.Tensor
    tokens: torch.Tensor | None = None

    def pick(self, results: Tensors) -> torch.Tensor:
        """What is compared with the truth."""
        picked = results[self.result]
        return picked if self.tokens is None else picked[self.tokens]


@dataclass(kw_only=True)
class Problem:
    """One operator at one shape. Results are the outputs, then the inputs' gradients."""

    inputs: Tensors
    douts: Tensors  # gradients of the outputs
    work: dict[str, Work]  # by phase: "fwd" and "bwd", or both as one "step"
    limit: float  # largest relative error (Frobenius norm)
    expected: list[Expected] = field(default_factory=list)
    formula: Callable[..., Any] | None = None  # outputs of the inputs, in plain PyTorch
    constants: dict[str, Any] = field(default_factory=dict)  # what else contestants read
    note: str = ""

    def fresh_inputs(self) -> Tensors:
        """Copies of the inputs, so that no contestant sees what another one did to them."""
        return [
            x.detach().clone().requires_grad_() if x.requires_grad else x.clone()
            for x in self.inputs
        ]


@dataclass(frozen=True)
class Run:
    """A contestant on a problem: phases that are called and timed in order.

    Together the phases return the problem's results, or what `unpack` makes them from. `setup` runs
    before each round. Neither is timed. A partial run returns the first of the results alone.
    """

    phases: dict[str, Callable[[], Tensors]]
    setup: Callable[[], None] | None = None
    unpack: Callable[[torch.Tensor], Tensors] | None = None  # of each result
    is_partial: bool = False

    def prepare(self) -> None:
        """What each round begins with."""
        if self.setup is not None:
            self.setup()

    def once(self) -> Tensors:
        """All results of one round."""
        self.prepare()
        results = [tensor for phase in self.phases.values() for tensor in phase()]
        if self.unpack is None:
            return results
        return [part for tensor in results for part in self.unpack(tensor)]


@dataclass(frozen=True)
class Peer:
    """A contestant.

    Args:
        build: makes of a problem, and of the symbol if there is one, a function of the problem's
            inputs or a Run.
        symbol: "module:name" of what is imported, in the process that is started for it alone.
    """

    name: str
    build: Callable[..., Callable[..., Any] | Run]
    symbol: str = ""

    def start(self, problem: Problem) -> Run:
        """Import and build it; raises whatever its package does."""
        module, _, name = self.symbol.partition(":")
        imported = [getattr(importlib.import_module(module), name)] if module else []
        built = self.build(problem, *imported)
        return built if isinstance(built, Run) else autograd_run(built, problem)


@dataclass
class Outcome:
    """Milliseconds by contestant, phase and round, and why a contestant was not timed."""

    times_ms: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


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

    if "step" in problem.work:
        return Run({"step": lambda: [*forward(), *backward()]})
    return Run({"fwd": forward, "bwd": backward})


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


def find_errors(
    results: Tensors, problem: Problem, ours: Tensors, is_partial: bool = False
) -> list[str]:
    """Which results differ from the truth, or over all elements from ours (empty: not compared).

    With is_partial there may be fewer of them than ours.
    """
    errors = []
    for expected in problem.expected:
        if is_partial and expected.result >= len(results):
            continue
        error = relative_error(expected.pick(results), expected.value)
        if not error <= problem.limit:
            errors.append(f"{expected.name} is off by {error:.1e}, allowed {problem.limit:.0e}")
    if errors or not ours:
        return errors
    if len(results) != len(ours) and not is_partial:
        return [f"returns {len(results)} results, not {len(ours)}"]
    differences = [relative_error(result, our) for result, our in zip(results, ours)]
    return [
        f"result {number} differs from ours by {difference:.1e}"
        for number, difference in enumerate(differences)
        if not difference <= BETWEEN_CONTESTANTS * problem.limit
    ]


def describe(error: BaseException) -> str:
    """Type, first and last line of an exception: compilers put the place first, the reason last."""
    if isinstance(error, AbsentError):
        return str(error)
    lines = [line.strip()[:120] for line in str(error).splitlines() if line.strip()]
    text = " ... ".join(dict.fromkeys(lines[:1] + lines[-1:]))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _settle() -> None:
    """Give memory back; raises if a contestant broke the GPU context, which ends the process."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def hold_contest(
    problem: Problem, contestants: Sequence[Peer], measure: Measure, announce: Announce
) -> Outcome:
    """Check every contestant, then time those that are right, in turns.

    Args:
        contestants: ours, then PyTorch's own, then the peer whose contest this is (which may be
            PyTorch's own). If ours or that peer is wrong, nothing is timed: except PyTorch's own,
            beside which ours is timed in any case.
        announce: called with a contestant's name before anything of it runs.
    """
    outcome = Outcome()
    runs: dict[str, Run] = {}
    ours: Tensors = []
    for peer in contestants:
        announce(peer.name)
        run, results, reason = _admit(peer, problem, ours)
        _settle()
        if run is not None:
            runs[peer.name] = run
            ours = ours or results
            continue
        outcome.failed[peer.name] = reason
        if peer is contestants[0] or peer in contestants[2:]:
            return outcome
    ours, results = [], []
    _settle()
    _time_in_turns(runs, outcome, measure, announce)
    return outcome


def _admit(peer: Peer, problem: Problem, ours: Tensors) -> tuple[Run | None, Tensors, str]:
    """A contestant's run and results, or why it is not let in."""
    try:
        run = peer.start(problem)
        results = run.once()
        if peer.name.startswith(FLOOR):
            return run, results, ""
        errors = find_errors(results, problem, ours, run.is_partial)
    except Exception as error:  # peers fail in their own ways: each is named, none ends the run
        if not isinstance(error, AbsentError):
            traceback.print_exc()
        errors = [describe(error)]
    return (None, [], "; ".join(errors)) if errors else (run, results, "")


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
                runs[name].prepare()
                spent = {phase: measure(call)[0] for phase, call in runs[name].phases.items()}
            except Exception as error:  # as above
                traceback.print_exc()
                outcome.failed[name] = f"failed when timed: {describe(error)}"
                del runs[name], times[name]
                _settle()
                continue
            for phase, milliseconds in spent.items():
                if turn:
                    times[name][phase].append(milliseconds)
        if turn == 0:
            start = time.monotonic()
        elif turn >= MIN_ROUNDS and time.monotonic() - start > ROUNDS_S:
            break
    outcome.times_ms = times


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
