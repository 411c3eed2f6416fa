"""The whole run on a GPU: operators one after another, tables as they come, a line per problem."""

import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import report, supervisor
from .shapes import Spec, list_specs

__all__ = ["run"]

# No problem is begun later than this, so that a run ends within ten minutes whatever compiles.
MAX_RUN_S = 450.0


class _Run:
    """Collects what the workers answer."""

    def __init__(self, results: Path, command: str) -> None:
        self.results, self.command = results, command
        self.machine: dict[str, Any] = {}
        self.records: list[dict[str, Any]] = []
        self.complaints: list[str] = []  # what makes the run fail

    def handle(self, specs: list[Spec], event: dict[str, Any]) -> None:
        """Print and keep one event of the worker that serves these specs."""
        if event["event"] == "machine":
            self._note_machine({key: value for key, value in event.items() if key != "event"})
        elif event["event"] == "result":
            self._note_result(specs[event["problem"]], event)
        elif event["event"] == "done":
            left = [report.title({**specs[n].to_json()}) for n in event["left_out"]]
            for problem in left:
                print(f"not begun, time is up (choose with --op): {problem}")
            for error in event.get("errors", []):
                print(f"error: {specs[0].op}: {error}", file=sys.stderr)
                self.complaints.append(f"{specs[0].op}: {error}")

    def _note_machine(self, machine: dict[str, Any]) -> None:
        if not self.machine:
            print(f"{machine['gpu']}, {machine['dtype']}, {machine['versions']}")
        ceilings = machine["ceilings"]
        print(
            f"\npeaks measured now: matrix product {ceilings['flop'] / 1e12:.0f} TFLOP/s, "
            f"copy {ceilings['byte'] / 1e12:.2f} TB/s"
        )
        self.machine = machine

    def _note_result(self, spec: Spec, event: dict[str, Any]) -> None:
        record = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": self.command,
            **self.machine,
            **spec.to_json(),
            "note": event.get("note", ""),
            "work": event.get("work", {}),
            "absent": event.get("absent", {}),
            "errors": event["errors"],
            "results": {},
        }
        if not event["errors"]:
            record["results"] = report.summarize(
                event["times_ms"], event["work"], self.machine["ceilings"]
            )
        print(f"\n{report.format_block(record)}", flush=True)
        report.append_record(self.results, record)
        self.records.append(record)
        self.complaints += [f"{report.title(record)}: {error}" for error in event["errors"]]


def run(ops: Sequence[str], size: str, device: str, results: Path, command: str) -> int:
    """Time the operators.

    Args:
        ops: of `shapes.OPS`.
        size: see `shapes.list_specs`.
        device: "cuda", or "cpu" to try the program.
        results: file that gets a line per problem.
        command: what was typed, for the record.

    Returns:
        The exit code: 1 if a result of ours was wrong or could not be had.
    """
    state = _Run(results, command)
    deadline = time.time() + MAX_RUN_S
    for op in ops:
        specs = list_specs(op, size)
        request = {
            "op": op,
            "size": size,
            "device": device,
            "excluded": {},
            "skipped": [],
            "deadline": deadline,
        }
        supervisor.run_operator(request, lambda event, s=specs: state.handle(s, event))
    print(f"\n{report.format_summary(state.records)}\n\nappended to {results}")
    for complaint in state.complaints:
        print(f"error: {complaint}", file=sys.stderr)
    return 1 if state.complaints else 0
