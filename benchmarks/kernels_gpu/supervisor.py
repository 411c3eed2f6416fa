"""Runs an operator's contests in worker processes, and goes on where a peer ends one.

A peer may crash a process, hang it, or break its GPU context. Then the worker is replaced: the peer
that was at work is left out of the operator's other contests, with the reason. If it was ours, that
problem is given up and counts as wrong.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from .contest import OURS

__all__ = ["WORKER", "run_operator"]

WORKER = (sys.executable, "-m", "kernels_gpu.worker")
MAX_SILENCE_S = 150.0  # longest wait for one peer to compile and run once
EXIT_S = 30.0  # for a worker that has answered all to end
MAX_WORKERS = 12
LOG_LINES = 40  # of a worker's standard error that are shown if something was wrong
_FOLDER = Path(__file__).resolve().parent.parent

Handle = Callable[[dict[str, Any]], None]


def run_operator(
    request: dict[str, Any],
    handle: Handle,
    command: tuple[str, ...] = WORKER,
    max_silence_s: float = MAX_SILENCE_S,
) -> None:
    """Serve a request for one operator (see `worker.py`), with as many workers as it takes.

    Args:
        handle: gets every "machine" and "result" event, and one "done" with `left_out` at the end.
    """
    excluded, skipped = dict(request["excluded"]), list(request["skipped"])
    for _ in range(MAX_WORKERS):
        watch = _Watch(handle, skipped)
        current = {**request, "excluded": excluded, "skipped": skipped}
        ending, log = _run_worker(current, watch, command, max_silence_s)
        if watch.has_errors or not watch.is_done:
            print(log, file=sys.stderr)
        if watch.is_done:
            return
        reason = watch.reason or ending
        if watch.peer and not watch.peer.startswith(OURS):
            excluded[watch.peer] = f"ended the process: {reason}"
        elif watch.problem is None:
            handle({"event": "done", "left_out": [], "errors": [f"no worker starts: {reason}"]})
            return
        elif watch.problem not in skipped:
            skipped.append(watch.problem)
            errors = [f"{watch.peer or 'making the problem'}: {reason}"]
            handle({"event": "result", "problem": watch.problem, "errors": errors})
    errors = [f"gave up after {MAX_WORKERS} worker processes"]
    handle({"event": "done", "left_out": [], "errors": errors})


class _Watch:
    """Hands on a worker's events, and knows what was at work when they stopped."""

    def __init__(self, handle: Handle, finished: list[int]) -> None:
        self.handle, self.finished = handle, finished
        self.problem: int | None = None
        self.peer = ""
        self.reason = ""
        self.is_done = False
        self.has_errors = False

    def __call__(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "trying":
            self.problem, self.peer = event["problem"], event["peer"]
            return
        if kind == "lost":
            self.reason = event["reason"]
            return
        if kind == "result":
            self.finished.append(event["problem"])
            self.has_errors = self.has_errors or bool(event["errors"])
            self.peer = ""
        self.is_done = kind == "done"
        self.handle(event)


def _run_worker(
    request: dict[str, Any], handle: Handle, command: tuple[str, ...], max_silence_s: float
) -> tuple[str, str]:
    """Run one worker to its end: how it ended, and the end of what it wrote to standard error."""
    paths = [str(_FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
            start_new_session=True,  # so that compilers it started end with it
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it is gone, as its exit code will say
                process.stdin.write(json.dumps(request))
                process.stdin.close()
            if _forward(process.stdout, handle, max_silence_s):
                ending = _describe_exit(process.wait(timeout=EXIT_S))
            else:
                ending = f"no answer for {max_silence_s:.0f} s"
        except subprocess.TimeoutExpired:
            ending = "answers no more and does not end"
        finally:
            _end(process)
        log.seek(0)
        lines = [line.rstrip() for line in log if line.strip()][-LOG_LINES:]
    last = lines[-1][:200] if lines else "nothing on standard error"
    return f"{ending}; {last}", "\n".join(lines)


def _forward(stream: IO[str], handle: Handle, max_silence_s: float) -> bool:
    """Hand on events until the last one; False if there was none for too long."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=max_silence_s)
        except queue.Empty:
            return False
        if line is None or not line.endswith("\n"):  # ended, perhaps in the middle of a line
            return True
        event = json.loads(line)
        handle(event)
        if event["event"] in ("done", "lost"):  # children of the worker may keep the stream open
            return True


def _end(process: subprocess.Popen) -> None:
    """End the worker's whole process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    return f"signal {signal.Signals(-code).name}"
