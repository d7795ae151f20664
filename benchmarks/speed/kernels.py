"""The merge of one weight against the plain algorithm, in time and in error.

`python -m benchmarks.speed.kernels` makes related tasks in the shapes of ViT-B/32 and ViT-L/14,
and computes each weight in turn by float32 SVDs throughout (the plain algorithm, all threads) and
by `hf_tsv.methods.tsv.orthogonal`. Errors are against float64 SVDs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.speed import accuracy, exact, machine, plain
from benchmarks.speed.synthetic import DEFAULT_SPECTRUM, SPECTRA, updates

SHAPES = {"ViT-B/32": [(768, 768), (3072, 768), (768, 3072)], "ViT-L/14": [(1024, 1024)]}
TASKS = (8, 20)


@dataclass(frozen=True)
class Timed:
    """Seconds of every round, and the result of the last."""

    seconds: list[float]
    result: Tensor


def deltas_of(shape: tuple[int, int], tasks: int, spectrum: str) -> list[Tensor]:
    """Updates of one weight, as read from float32 checkpoints without noise."""
    generator = torch.Generator().manual_seed(tasks)
    drawn = updates((max(shape), min(shape)), tasks, SPECTRA[spectrum], generator)
    return drawn if shape[0] >= shape[1] else [delta.mT.contiguous() for delta in drawn]


def in_turn(calls: list[Callable[[], Tensor]], rounds: int) -> list[Timed]:
    """Time calls in turn: A B A B …"""
    results: list[Tensor] = [torch.empty(0)] * len(calls)
    seconds: list[list[float]] = [[] for _ in calls]

    def call(index: int) -> None:
        results[index] = calls[index]()

    for _ in range(rounds):
        for i in range(len(calls)):
            seconds[i].append(machine.seconds(lambda: call(i)))  # noqa: B023
    return [Timed(*pair) for pair in zip(seconds, results, strict=True)]


def row(shape: tuple[int, int], tasks: int, spectrum: str, rounds: int) -> list[str]:
    """Measure one weight, and return its row of the table."""
    deltas, rank = deltas_of(shape, tasks, spectrum), plain.rank_of(shape, tasks)
    floors = [0.0] * tasks
    slow, fast = in_turn(
        [
            lambda: plain.merge(deltas, rank),
            lambda: accuracy.merged(deltas, rank, floors, "cpu").matrix,
        ],
        rounds,
    )
    expected = exact.merge(deltas, rank, floors)
    ratios = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    return [
        " × ".join(map(str, shape)),
        str(tasks),
        f"{statistics.median(slow.seconds):.2f} s",
        f"{statistics.median(fast.seconds):.2f} s",
        f"{statistics.median(ratios):.1f}",
        f"{min(ratios):.1f} … {max(ratios):.1f}",
        f"{exact.relative_error(slow.result, expected):.0e}",
        f"{exact.relative_error(fast.result, expected):.0e}",
    ]


def main() -> None:
    """Measure in turn, print ratios with their spread."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", choices=SHAPES, action="append", help="[default: all]")
    parser.add_argument("--tasks", type=int, action="append", help="[default: 8 and 20]")
    parser.add_argument("--spectrum", choices=SPECTRA, default=DEFAULT_SPECTRUM)
    chosen = parser.parse_args()
    row((64, 64), 2, chosen.spectrum, 1)  # loads libraries
    threads = torch.get_num_threads()
    table = Table(title=f"One weight, {chosen.spectrum}, CPU, {threads} threads")
    for name in ("shape", "tasks", "plain", "hf-tsv", "ratio", "lowest … highest"):
        table.add_column(name, justify="right")
    table.add_column("error, plain", justify="right")
    table.add_column("error, hf-tsv", justify="right")
    shapes = [shape for model in chosen.model or SHAPES for shape in SHAPES[model]]
    jobs = [(shape, tasks) for shape in shapes for tasks in chosen.tasks or TASKS]
    for shape, tasks in track(jobs, "Measuring", console=Console(stderr=True)):
        table.add_row(*row(shape, tasks, chosen.spectrum, chosen.rounds))
    Console().print(table)


if __name__ == "__main__":
    main()
