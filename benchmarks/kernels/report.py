"""What is made of the times: medians, quotients, rates, and their lines on the screen."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from .contest import FLOOR, OURS

UNITS = {"flop": ("GFLOP/s", 1e9), "byte": ("GB/s", 1e9)}


def summarize(
    times_ms: Mapping[str, Mapping[str, list[float]]],
    work: Mapping[str, tuple[float, str]],
    ceilings: Mapping[str, float],
) -> dict[str, dict[str, dict[str, float]]]:
    """By contestant and phase: medians, rates, and the median of quotients to ours by round.

    Args:
        times_ms: of every round; ours is among the contestants.
        work: (amount, unit) of each phase.
        ceilings: most per second that was measured, by unit.
    """
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name, phases in times_ms.items():
        results[name] = {}
        for phase, times in phases.items():
            amount, unit = work[phase]
            median = statistics.median(times)
            per_second = amount / (1e-3 * max(median, 1e-6))
            pairs = zip(times, times_ms[OURS][phase], strict=True)
            results[name][phase] = {
                "ms": median,
                "least_ms": min(times),
                "rounds": len(times),
                "times_ours": statistics.median(time / max(ours, 1e-6) for time, ours in pairs),
                "per_second": per_second,
                "share": per_second / ceilings[unit],
            }
    return results


def title(record: Mapping[str, Any]) -> str:
    """What names a case."""
    tokens = f"{record['tokens']} tokens" if record["tokens"] else ""
    return ", ".join(filter(None, [record["op"], record["model"], tokens, record["row"]]))


def format_case(record: Mapping[str, Any]) -> str:
    """A line per phase: ours, then the others' times in ours; who was not timed, and why."""
    note = f" ({record['note']})" if record["note"] else ""
    lines = [f"  {title(record)}{note}"]
    for phase, (_, unit) in record["work"].items() if record["results"] else ():
        ours = record["results"][OURS][phase]
        name, scale = UNITS[unit]
        line = (
            f"    {phase:<5}{OURS} {ours['ms']:.4f} ms, {ours['per_second'] / scale:.4g} {name}, "
        )
        line += f"{ours['share']:.1%} of peak"
        for other, phases in record["results"].items():
            if other != OURS and phase in phases:
                line += f"; {other} {phases[phase]['times_ours']:.2f} x"
        lines.append(line)
    lines += [f"    not timed: {name}: {reason}" for name, reason in record["failed"].items()]
    return "\n".join(lines)


def format_summary(records: Iterable[Mapping[str, Any]]) -> str:
    """A line per case and phase: ours in the middle of its processes, and the fastest peer."""
    ours: dict[tuple[str, str], list[dict[str, float]]] = {}
    peers: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for record in records:
        for name, phases in record["results"].items():
            for phase, result in phases.items():
                key = (title(record), phase)
                if name == OURS:
                    ours.setdefault(key, []).append(result)
                elif not name.startswith((OURS, FLOOR)):
                    peers.setdefault(key, []).append((result["times_ours"], name))
    lines = [f"{'case':<62}{'phase':>6}{'ours ms':>11}{'of peak':>9}  fastest peer, times ours"]
    for key, results in ours.items():
        middle, share = (statistics.median(x[name] for x in results) for name in ("ms", "share"))
        times, name = min(peers.get(key, [(0.0, "")]))
        peer = f"{name} {times:.2f}" if name else "none was timed"
        lines.append(f"{key[0]:<62}{key[1]:>6}{middle:>11.4f}{share:>9.1%}  {peer}")
    return "\n".join(lines)
