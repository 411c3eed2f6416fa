"""Starts the workers, one for every operator and peer, and keeps what they answer.

A peer may crash its process, hang it, or break its GPU context: that costs its own cases alone, and
each of them is recorded with the reason.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.timing import ROOT, append_record

from .contest import OURS
from .operators import list_cases
from .peers import PEERS, why_missing
from .report import format_case, format_summary, summarize, title

WORKER = (sys.executable, "-m", "benchmarks.kernels.worker")
INPUTS = "inputs"  # what is at work before any contestant


class Worker:
    """A process for one operator and peer (see `worker.py`): it starts at once, and waits to go."""

    def __init__(self, arguments: Iterable[str], command: Iterable[str] = WORKER) -> None:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.ending = ""  # how it ended, "" if well
        self.is_late = False
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 it outlives this
        self._process = subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            text=True,
            start_new_session=True,  # so that compilers it started end with it
        )

    def answers(self, limit_s: float) -> Iterator[dict[str, Any]]:
        """Let it go, and yield its answers as they come, for so many seconds at the most."""
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = threading.Timer(limit_s, self._stop_late)
        timer.daemon = True  # a run that is told to stop does not wait for it
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it is gone, as its exit code will say
                print(file=self._process.stdin, flush=True)
            for line in self._process.stdout:
                if line.endswith("\n"):  # else it ended in the middle of one
                    yield json.loads(line)
            code = self._process.wait()
        finally:
            timer.cancel()
            self.stop()
        if self.is_late:
            self.ending = f"not done after {limit_s:.0f} s"
        elif code:
            how = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
            self.ending = f"{how}; {self._last_words()}"

    def _stop_late(self) -> None:
        self.is_late = True
        self.stop()

    def stop(self) -> None:
        """End its whole process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return lines[-1][:200] if lines else "nothing on standard error"


class Run:
    """Prints and records what workers answer.

    Args:
        size, device: see `worker.py`.
        results: the file that gets a line per operator, shape and peer; None to write none.
        max_run_s: no worker runs later than this, in seconds from now.
        max_peer_s: for each worker.
    """

    def __init__(
        self, size: str, device: str, results: Path | None, max_run_s: float, max_peer_s: float
    ) -> None:
        self.size, self.device, self.results = size, device, results
        self.deadline, self.max_peer_s = time.monotonic() + max_run_s, max_peer_s
        self.machine: dict[str, Any] = {}
        self.records: list[dict[str, Any]] = []
        self.complaints: list[str] = []  # what makes the run fail

    def serve(self, op: str, peer: str, worker: Worker) -> None:
        """Take a worker's answers; cases it ends before are recorded with the reason."""
        time_left = self.deadline - time.monotonic()
        if time_left <= 0:
            worker.stop()
            self.leave_out(op, peer, "not begun, the run's time is up (choose with --op, --peer)")
            return
        print(f"\n{op} beside {peer}", flush=True)
        left, at_work = list_cases(op, self.size), ""
        for answer in worker.answers(min(self.max_peer_s, time_left)):
            if "machine" in answer:
                self._note_machine(answer["machine"])
            elif "running" in answer:
                at_work = answer["running"]
            else:
                self._note_case(op, peer, asdict(left.pop(0)), answer)
        if not left:
            return
        was_cut = worker.is_late and time_left < self.max_peer_s
        blamed = peer if was_cut else at_work or INPUTS
        first, *others = map(asdict, left)
        reason = worker.ending or "ended without an answer"
        self._note_case(op, peer, first, {"failed": {blamed: reason}})
        for case in others:
            self._note_case(op, peer, case, {"failed": {peer: "not begun, as the one before"}})

    def leave_out(self, op: str, peer: str, reason: str) -> None:
        """Record that a peer is timed on no case of an operator."""
        print(f"{op} beside {peer}: not timed: {reason}", flush=True)
        self._append({"op": op, "peer": peer, "failed": {peer: reason}, "results": {}})

    def _note_machine(self, machine: dict[str, Any]) -> None:
        ceilings = machine["ceilings"]
        if not self.machine:
            print(f"  {machine['device']}, {machine['dtype']}, {machine['versions']}")
        print(
            f"  peaks measured now: matrix product {ceilings['flop'] / 1e12:.3g} TFLOP/s, "
            f"copy {ceilings['byte'] / 1e12:.3g} TB/s"
        )
        self.machine = machine

    def _note_case(self, op: str, peer: str, case: dict[str, Any], answer: dict[str, Any]) -> None:
        times, work = answer.get("times_ms", {}), answer.get("work", {})
        record = {**case, "peer": peer, "note": answer.get("note", ""), "work": work}
        record |= {"failed": answer["failed"], "results": {}}
        if OURS in times:
            record["results"] = summarize(times, work, self.machine["ceilings"])
        print(format_case(record), flush=True)
        self.complaints += [
            f"{title(record)}: {name}: {reason}"
            for name, reason in record["failed"].items()
            if name.startswith((OURS, INPUTS))
        ]
        self._append(record)

    def _append(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.results is not None:
            append_record(self.results, {**self.machine, **record})


def list_jobs(ops: Iterable[str], peers: Iterable[str] | None) -> Iterator[tuple[str, Any]]:
    """(operator, peer): every operator's first peer, then every one's second, and so on."""
    columns = [[(op, peer) for peer in PEERS[op][1:]] for op in ops]
    for rank in range(max(map(len, columns))):
        for op, peer in (job for column in columns for job in column[rank : rank + 1]):
            if peers is None or peer.name in peers:
                yield op, peer


def run_all(run: Run, ops: Iterable[str], peers: Iterable[str] | None = None) -> int:
    """Time the operators beside the peers (None: all); the exit code."""
    jobs = []
    for op, peer in list_jobs(ops, peers):
        if reason := why_missing(peer):
            run.leave_out(op, peer.name, reason)
        else:
            jobs.append((op, peer.name))
    waiting = [Worker([*job, run.size, run.device]) for job in jobs[:1]]
    try:
        for job, following in zip(jobs, [*jobs[1:], None]):
            worker = waiting[0]
            # The next one imports PyTorch while this one works.
            if following:
                waiting.append(Worker([*following, run.size, run.device]))
            run.serve(*job, worker)
            waiting.pop(0)
    finally:
        for worker in waiting:
            worker.stop()
    print(f"\n{format_summary(run.records)}")
    for complaint in run.complaints:
        print(f"error: {complaint}", file=sys.stderr)
    return 1 if run.complaints else 0
