"""Accuracy kept by compressed tasks: the demo's tiny CLIPs, compressed to several sizes.

`python -m benchmarks.compression` trains them if `make demo` has not, prints a table, draws a plot,
and fails if the rank of the paper, r = k/T, keeps less than 99 % of the accuracy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.prepared import bars, quiet_libraries, trained

SHARES = (2, 5, 10, 20, 50)
PLAIN = "float32"
SMALL = "bfloat16, conv too"
PAPER = "r = k/T"
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    PLAIN: {},
    SMALL: {"dtype": "bfloat16", "compress_conv": True},
}
REQUIRED = 99.0


@dataclass(frozen=True)
class Point:
    """Mean results of all tasks at one size.

    Args:
        variant: way of storing the tasks.
        rule: rule for the ranks.
        kept_bytes: mean share of a checkpoint's bytes, in per cent; None if it is not feasible.
        accuracy: mean over the tasks, in per cent.
        kept_accuracy: mean share of each fine-tune's own accuracy, in per cent.
        update_error: mean relative error of the update.
    """

    variant: str
    rule: str
    kept_bytes: float | None = None
    accuracy: float = 0.0
    kept_accuracy: float = 0.0
    update_error: float = 0.0


def accuracies(folder: Path, vision: Callable[[str], Any], seed: int) -> list[float]:
    """Test accuracy, in per cent, of every task's vision tower beside the base's text tower."""
    from benchmarks.tiny_clip.evaluation import accuracy, load_model
    from benchmarks.tiny_clip.first_tasks import FIRST_TASKS

    model, processor = load_model(folder / "base")
    return [
        accuracy(model, vision(task.name), processor, task, "test", seed) for task in FIRST_TASKS
    ]


def measure(
    folder: Path, fine_tuned: Sequence[float], seed: int, progress: Progress
) -> list[Point]:
    """Compress every task to every size, load it, and measure it on its test images.

    Args:
        folder: folder with the base model and the fine-tunes.
        fine_tuned: accuracy of every fine-tune, in per cent.
        seed: seed of the images.
        progress: progress bars to add to.
    """
    bar = progress.add_task("Compressing and measuring", total=len(VARIANTS) * (len(SHARES) + 1))
    points = []
    for variant, options in VARIANTS.items():
        for rule in [*({"budget": f"{share}%"} for share in SHARES), _paper(len(fine_tuned))]:
            points.append(_point(folder, variant, {**options, **rule}, fine_tuned, seed))
            progress.advance(bar)
    return points


def _paper(tasks: int) -> dict[str, float]:
    return {"rank_fraction": 1 / tasks}


def _point(
    folder: Path, variant: str, options: Mapping[str, Any], fine_tuned: Sequence[float], seed: int
) -> Point:
    import hf_tsv
    from benchmarks.tiny_clip.checkpoints import quietly

    rule = options.get("budget", PAPER)
    reports = []

    def vision(name: str) -> Any:
        factors = hf_tsv.compress(folder / name, base_model=folder / "base", **options)
        reports.append(factors.report)
        return quietly(
            lambda: hf_tsv.load_model(factors.pinned.ref, kind="image-feature-extraction")
        )

    try:
        found = accuracies(folder, vision, seed)
    except hf_tsv.RecipeError:  # the tensors stored whole exceed the budget
        return Point(variant, rule)
    kept = [100 * a / b for a, b in zip(found, fine_tuned, strict=True)]
    return Point(
        variant,
        rule,
        100 * sum(report.ratio for report in reports) / len(reports),
        sum(found) / len(found),
        sum(kept) / len(kept),
        sum(report.update_error for report in reports) / len(reports),
    )


def table(points: Sequence[Point]) -> Table:
    """Table of the points."""
    result = Table(
        title="Bytes and accuracy kept by compressed tasks (mean, %)",
        caption="– : what is stored whole takes more than that",
    )
    for name in ("stored as", "rule"):
        result.add_column(name)
    for name in ("bytes", "accuracy", "kept", "update error"):
        result.add_column(name, justify="right")
    for point in points:
        if point.rule == f"{SHARES[0]}%" and point is not points[0]:
            result.add_section()
        if point.kept_bytes is None:
            result.add_row(point.variant, point.rule, "–", "–", "–", "–")
            continue
        figures = (point.kept_bytes, point.accuracy, point.kept_accuracy)
        cells = [f"{figure:.1f}" for figure in figures]
        result.add_row(point.variant, point.rule, *cells, f"{100 * point.update_error:.1f}")
    return result


def plot(points: Sequence[Point], file: Path) -> None:
    """Plot accuracy kept over bytes kept, one line per variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for variant, colour in zip(VARIANTS, ("#1f5fa8", "#c2571a"), strict=True):
        line = [p for p in points if p.variant == variant and p.kept_bytes is not None]
        by_size = sorted((p for p in line if p.rule != PAPER), key=lambda p: p.kept_bytes or 0)
        axes.plot(
            [p.kept_bytes for p in by_size], [p.kept_accuracy for p in by_size],
            marker="o", color=colour, label=variant,
        )  # fmt: skip
        for p in line:
            if p.rule == PAPER:
                axes.plot(p.kept_bytes, p.kept_accuracy, "*", color=colour, markersize=13)
    axes.plot([], [], "*", color="grey", markersize=11, label="r = k/T, the same rank share")
    axes.axhline(100, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xticks(SHARES, [f"{share} %" for share in SHARES], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("bytes of the factors, share of the fine-tuned checkpoint")
    axes.set_ylabel("accuracy kept (%)")
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def kept_at_the_rank_of_the_paper(points: Sequence[Point]) -> float:
    """Accuracy kept in float32 at r = k/T, in per cent."""
    return next(p.kept_accuracy for p in points if (p.variant, p.rule) == (PLAIN, PAPER))


def main() -> None:
    """Train what is missing, measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0, help="of all data and training")
    parser.add_argument("--plot", type=Path, help="where to draw [default: in .demo/]")
    arguments = parser.parse_args()
    quiet_libraries()

    from benchmarks.tiny_clip.evaluation import load_vision

    with bars() as progress:
        folder = trained(arguments.seed, progress)
        fine_tuned = accuracies(folder, lambda name: load_vision(folder / name), arguments.seed)
        points = measure(folder, fine_tuned, arguments.seed, progress)
    Console().print(table(points))
    file = arguments.plot or folder / "compression.svg"
    plot(points, file)
    print(f"The plot is in {file}")
    kept = kept_at_the_rank_of_the_paper(points)
    if kept < REQUIRED:
        sys.exit(f"r = k/T keeps {kept:.2f} % of the accuracy, less than {REQUIRED} %.")


if __name__ == "__main__":
    main()
