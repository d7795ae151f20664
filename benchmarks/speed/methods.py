"""Every method, and every step, against TSV-Merge: computing, processor time and memory.

`python -m benchmarks.speed.methods` merges synthetic fine-tunes of a ViT-B/32 by each of them in
turn, and writes a table to `benchmarks/speed/results/methods.md`. Memory is what a merge takes
beside the libraries, as a share of what its plan says.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.speed import merges, synthetic
from benchmarks.speed.merges import Conditions
from benchmarks.speed.processes import Run
from benchmarks.speed.synthetic import Zoo

RESULTS = Path(__file__).parent / "results"
TSV = "tsv"
OPTIONS: dict[str, tuple[str, ...]] = {
    TSV: (),
    "low-rank": ("--method", "low-rank"),
    "orthogonal": ("--method", "orthogonal"),
    "task-arithmetic": ("--method", "task-arithmetic"),
    "average": ("--method", "average"),
    "ties": ("--method", "ties"),
    "consensus": ("--method", "consensus"),
    "iso-c": ("--method", "iso-c"),
    "iso-cts": ("--method", "iso-cts"),
    "dc": ("--method", "dc"),
    "wudi": ("--method", "wudi"),
    "wudi, swudi": ("--method", "wudi", "--wudi-filter", "swudi"),
    "wudi, tact": ("--method", "wudi", "--wudi-filter", "tact"),
    "tsv, calibrated": ("--calibrate",),
    "tsv, LARV": ("--layer-scale", "larv"),
    "tsv, LiNeS": ("--layer-scale", "lines"),
}


def command(zoo: Zoo, options: Sequence[str], out: Path) -> list[object]:
    """Command of a merge by some method."""
    return [*merges.our_command(zoo.base, zoo.tasks, out, "cpu"), *options]


def ratios(runs: Sequence[Run], others: Sequence[Run], what: str) -> list[float]:
    """Seconds of each run over those of another that ran in the same round.

    Args:
        runs: runs of a method.
        others: runs of the method it is compared with.
        what: `whole`, without the start of the interpreter, or `cpu`.
    """

    def of(run: Run) -> float:
        return run.cpu if what == "cpu" else run.seconds["whole"]

    return [of(run) / of(other) for run, other in zip(runs, others, strict=True)]


def memory(runs: Sequence[Run], interpreter: int) -> float:
    """Largest share of the planned memory that a merge took."""
    return max((run.peak_bytes - interpreter) / (run.estimate_bytes or 1) for run in runs)


def markdown(found: Mapping[str, Mapping[str, list[float]]], about: str) -> str:
    """Report as a table."""
    lines = [
        "# Methods beside TSV-Merge",
        about,
        "| | time | processor time | memory, MB | memory of the plan |",
        "|---|---:|---:|---:|---:|",
    ]

    def cell(values: Sequence[float]) -> str:
        return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"

    for name, row in found.items():
        (peak,), (plan,) = row["peak"], row["plan"]
        cells = [name, cell(row["time"]), cell(row["cpu"]), f"{peak / 1e6:.0f}", f"{plan:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:]) + "\n"


def main() -> None:
    """Make checkpoints, run, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=3, help="of the towers")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each")
    parser.add_argument("--cache", type=Path, default=synthetic.CACHE, help="for checkpoints")
    chosen = parser.parse_args()
    zoo = synthetic.checkpoints("ViT-B/32", chosen.tasks, chosen.layers, folder=chosen.cache)
    conditions = Conditions(rounds=chosen.rounds)
    commands = {name: partial(command, zoo, options) for name, options in OPTIONS.items()}
    interpreter = merges.interpreter_bytes("cpu")
    runs = merges.in_turn(commands, conditions, zoo.files())
    found = {
        name: {
            "time": ratios(own, runs[TSV], "whole"),
            "cpu": ratios(own, runs[TSV], "cpu"),
            "peak": [max(run.peak_bytes for run in own) - interpreter],
            "plan": [memory(own, interpreter)],
            "seconds": [run.seconds["whole"] for run in own],
        }
        for name, own in runs.items()
    }
    about = (
        f"`python -m benchmarks.speed.methods`: {chosen.tasks} synthetic fine-tunes of a ViT-B/32"
        f" with {chosen.layers} layers, {chosen.rounds} runs of each in turn. Times as ratios to"
        " those of TSV-Merge in the same round: median (least–most); with reading and writing,"
        " without the start of the interpreter. Memory beside the libraries."
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1) + "\n"
    (RESULTS / "methods.json").write_text(text, encoding="utf-8")
    (RESULTS / "methods.md").write_text(markdown(found, about), encoding="utf-8")


if __name__ == "__main__":
    main()
