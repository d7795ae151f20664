"""Scores of runs over seeds, and how tables show them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.accuracy.runs import Seed

Found = dict[str, Any]


def _scores(run: Found, tasks: Sequence[str], accuracies: dict[str, float]) -> tuple[float, float]:
    """Mean accuracy, and mean share of the fine-tunes' own (eq. 9), in per cent."""
    own = run["references"]["fine-tuned"]
    return (
        100 * statistics.mean(accuracies[task] for task in tasks),
        100 * statistics.mean(accuracies[task] / own[task] for task in tasks),
    )


def row(kept: Sequence[Found], seeds: Sequence[Seed], count: int, name: str) -> Found:
    """Scores of one kind of run, one number per seed."""
    tasks = seeds[0].tasks[:count]
    found = []
    for run in kept:
        if name in ("base", "fine-tuned"):
            found.append(_scores(run, tasks, run["references"][name]))
        else:
            found.append(_scores(run, tasks, run[f"{name}-{count}"]["accuracies"]))
    found_row: Found = {"accuracy": [a for a, _ in found], "normalised": [n for _, n in found]}
    if all("alpha" in run.get(f"{name}-{count}", {}) for run in kept):
        found_row["alpha"] = [run[f"{name}-{count}"]["alpha"] for run in kept]
    return found_row


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Format the mean, and the standard deviation over the seeds.

    Example:
        >>> spread([80.0, 82.0])
        '81.0 ± 1.4'
    """
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def differences(low: Found, high: Found) -> str:
    """Points of normalised accuracy by which one row is above another, and in how many seeds.

    Example:
        >>> differences({"normalised": [70.0, 71.0]}, {"normalised": [71.0, 70.5]})
        '+0.2 ± 1.1 (1 of 2)'
    """
    pairs = zip(low["normalised"], high["normalised"], strict=True)
    apart = [b - a for a, b in pairs]
    mean = f"{statistics.mean(apart):+.1f}"
    spread_of = f" ± {statistics.stdev(apart):.1f}" if len(apart) > 1 else ""
    return f"{mean}{spread_of} ({sum(one > 0 for one in apart)} of {len(apart)})"
