"""Cost of a report on interference, as a part of the merge and alone."""

from __future__ import annotations

from typing import Any

from benchmarks.speed import merges
from benchmarks.speed.machine import Rates
from benchmarks.speed.merges import OURS, Conditions, MergeRow
from benchmarks.speed.synthetic import Zoo

REPORT, INTERFERENCE = "merge --report", "interference"


def compare(zoo: Zoo, conditions: Conditions, rates: Rates, interpreter: int) -> MergeRow:
    """Measure a merge, the same merge with its report, and the report alone, in turn."""
    device = conditions.device

    def merge(out: Any, *options: str) -> list[Any]:
        return [*merges.our_command(zoo.base, zoo.tasks, out, device), *options]

    def interference(out: Any) -> list[Any]:
        where = ("-o", out, "--base-model", zoo.base, "--device", device)
        return ["hf_tsv", "interference", *zoo.tasks, *where, "--json", "--quiet"]

    commands: dict[str, merges.Command] = {
        OURS: merge,
        REPORT: lambda out: merge(out, "--report"),
        INTERFERENCE: interference,
    }
    runs = merges.in_turn(commands, conditions, zoo.files())
    return merges.row(zoo, conditions, rates, interpreter, runs)
