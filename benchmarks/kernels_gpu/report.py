"""What a contest looks like on the screen and in the results file."""

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .contest import FLOOR, OURS

__all__ = ["append_record", "format_block", "format_summary", "summarize"]

_UNITS = {"flop": ("TFLOP/s", 1e12), "byte": ("TB/s", 1e12)}
_NAME_WIDTH = 26


def summarize(
    times_ms: Mapping[str, Mapping[str, list[float]]],
    work: Mapping[str, tuple[float, str]],
    ceilings: Mapping[str, float],
) -> dict[str, dict[str, dict[str, float]]]:
    """By contestant and phase: median and least milliseconds, rounds, rate, share of the ceiling.

    Args:
        times_ms: of every round.
        work: (amount, unit) of each phase.
        ceilings: most per second that was measured, by unit.
    """
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name, phases in times_ms.items():
        results[name] = {}
        for phase, times in phases.items():
            amount, unit = work[phase]
            median = statistics.median(times)
            per_second = amount / (1e-3 * median)
            results[name][phase] = {
                "ms": median,
                "least_ms": min(times),
                "rounds": len(times),
                "per_second": per_second,
                "share": per_second / ceilings[unit],
            }
    return results


def title(record: Mapping[str, Any]) -> str:
    """One line that names a problem."""
    tokens = f"{record['tokens']} tokens" if record["tokens"] else ""
    note = f"({record['note']})" if record.get("note") else ""
    words = [record["op"], record["model"], tokens, f"{record['row']} {note}".strip()]
    return ", ".join(word for word in words if word)


def format_block(record: Mapping[str, Any]) -> str:
    """The table of one problem."""
    lines = [title(record)]
    if record["errors"]:
        return "\n".join([*lines, *(f"  WRONG, not timed: {error}" for error in record["errors"])])
    head = f"  {'':<{_NAME_WIDTH}}"
    for phase, (_, unit) in record["work"].items():
        head += f"{phase + ' ms':>12}{_UNITS[unit][0]:>9}{'of peak':>9}"
    lines.append(head)
    for name, phases in record["results"].items():
        line = f"  {name:<{_NAME_WIDTH}}"
        for phase, (_, unit) in record["work"].items():
            result = phases[phase]
            per_second = result["per_second"] / _UNITS[unit][1]
            digits = 0 if unit == "flop" else 2
            line += f"{result['ms']:>12.4f}{per_second:>9.{digits}f}{result['share']:>9.1%}"
        lines.append(line)
    lines += [
        f"  {name:<{_NAME_WIDTH}}  not timed: {why}" for name, why in record["absent"].items()
    ]
    return "\n".join(lines)


def format_summary(records: Iterable[Mapping[str, Any]]) -> str:
    """A line per problem and phase: ours, and the fastest peer as a multiple of our time."""
    lines = [f"{'problem':<58}{'phase':>6}{'ours ms':>11}{'of peak':>9}  fastest peer, times ours"]
    for record in records:
        name = title({**record, "note": ""})[:57]
        if record["errors"]:
            lines.append(f"{name:<58}  WRONG")
            continue
        for phase in record["work"]:
            ours = record["results"][OURS][phase]
            peers = {
                peer: phases[phase]["ms"] / ours["ms"]
                for peer, phases in record["results"].items()
                if not peer.startswith((OURS, FLOOR))
            }
            fastest = min(peers, key=peers.__getitem__) if peers else ""
            peer = f"{fastest} {peers[fastest]:.2f}" if peers else "none"
            lines.append(f"{name:<58}{phase:>6}{ours['ms']:>11.4f}{ours['share']:>9.1%}  {peer}")
    return "\n".join(lines)


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON object as a line."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="ascii") as file:
        file.write(json.dumps(record) + "\n")
