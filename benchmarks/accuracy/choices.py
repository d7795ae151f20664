"""Report on models that route their images: accuracy, what they choose, and what it depends on."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy.comparisons import title
from benchmarks.accuracy.runs import ALONE, METHODS, Seed, stepped
from benchmarks.accuracy.scores import Found, row, spread, table

ROWS = {
    "base": "base, zero-shot",
    "tsv-default": "TSV-Merge, α = 1",
    "alone": "best merge without images",
    "images": "best merge with validation images",
    "routed-nearest": "routed, nearest task only (`--max-tasks 1`)",
    "routed": "**routed**",
    "routed-classes": "routed, with class names (`--classes`)",
    "routed-own": "each task by its own factors",
    "fine-tuned": "fine-tuned, one model a task",
}
"""Titles of the rows; those of `BEST` are the best of several runs."""

BEST = {"alone": ("tsv-default", "average", *ALONE), "images": (*METHODS, *stepped(), "ada")}
"""Merges among which the best one of each seed is taken, by its accuracy on test images."""

ROUTED = ("routed-nearest", "routed", "routed-classes")
PAIRS = 10
"""Number of pairs of tasks in the table of confusions."""


def found(kept: Sequence[Found], seeds: Sequence[Seed], counts: Sequence[int]) -> Found:
    """Summary of routing, in per cent.

    Args:
        kept: results of the runs of each seed.
        seeds: the seeds.
        counts: numbers of tasks.
    """
    ends = [str(count) for count in dict.fromkeys((min(counts), max(counts)))]
    return {
        "tasks": list(seeds[0].tasks[: max(counts)]),
        "accuracy": {str(count): _rows(kept, seeds, count) for count in counts},
        "choice": {str(count): _choices(kept, count) for count in counts},
        "confusion": {str(count): _confusion(kept, count).mean(axis=0).round(3).tolist()
                      for count in counts},
        "pairs": _pairs(_confusion(kept, max(counts)), seeds[0].tasks),
        "layers": {count: _layers([run[f"routing-layers-{count}"] for run in kept])
                   for count in ends},
        "sets": _sets([run[f"routing-sets-{min(counts)}"] for run in kept]),
    }  # fmt: skip


def _rows(kept: Sequence[Found], seeds: Sequence[Seed], count: int) -> Found:
    return {
        name: _best(kept, seeds, count, BEST[name])
        if name in BEST
        else row(kept, seeds, count, name)
        for name in ROWS
    }


def _best(kept: Sequence[Found], seeds: Sequence[Seed], count: int, names: Sequence[str]) -> Found:
    """Scores of the best run of each seed, with its name."""
    there = [name for name in names if all(f"{name}-{count}" in run for run in kept)]
    rows = {name: row(kept, seeds, count, name) for name in there}
    best = [
        max(there, key=lambda name, i=i: rows[name]["normalised"][i])  # type: ignore[misc]
        for i in range(len(seeds))
    ]
    return {
        "names": best,
        **{
            key: [rows[name][key][i] for i, name in enumerate(best)]
            for key in ("accuracy", "normalised")
        },
    }


def _choices(kept: Sequence[Found], count: int) -> Found:
    """What the default rule chooses, and the size of the folder: one number per seed."""
    runs = [run[f"routed-{count}"] for run in kept]
    return {
        "nearest": [100 * float(np.trace(run["nearest"])) / count for run in runs],
        "among": [100 * statistics.mean(run["among"]) for run in runs],
        "chosen": [run["chosen"] for run in runs],
        "sets": [run["sets"] for run in runs],
        "ratio": [100 * run["ratio"] for run in runs],
    }


def _confusion(kept: Sequence[Found], count: int) -> NDArray[np.float64]:
    """Share of the images of each task that are nearest to each, shape (seeds, tasks, tasks)."""
    return 100 * np.array([run[f"routed-{count}"]["nearest"] for run in kept])


def _pairs(confusion: NDArray[np.float64], tasks: Sequence[str]) -> list[Found]:
    """Pairs of tasks that are confused most in the mean over the seeds, with the shares of each."""
    mean = confusion.mean(axis=0)
    np.fill_diagonal(mean, 0)
    order = np.argsort(-mean, axis=None, kind="stable")[:PAIRS]
    places = zip(*np.unravel_index(order, mean.shape), strict=True)
    return [
        {"images": tasks[i], "nearest": tasks[j], "shares": confusion[:, i, j].round(3).tolist()}
        for i, j in places
    ]


def _layers(runs: Sequence[Found]) -> Found:
    return {
        name: {key: [100 * run[name][key] for run in runs] for key in ("nearest", "three")}
        for name in runs[0]
    }


def _sets(runs: Sequence[Sequence[Found]]) -> list[Found]:
    return [
        {
            **{key: settings[0][key] for key in ("temperature", "threshold", "max_tasks")},
            "normalised": [100 * one["normalised"] for one in settings],
            "chosen": [one["chosen"] for one in settings],
        }
        for settings in zip(*runs, strict=True)
    ]


# Tables


def sections(content: Found) -> list[str]:
    """Sections of the report, in Markdown."""
    counts = list(content["accuracy"])
    head = ["", *(f"{count} tasks" for count in counts)]
    seeds = [f"seed {seed}" for seed in content["seeds"]]
    return [
        "## Accuracy",
        "Normalised accuracy on test images in per cent (mean share of each fine-tune's own, eq."
        " 9); accuracy in brackets. The best merges are those with the highest accuracy on the"
        " test images of each seed, which favours them.",
        table(head, ([ROWS[name], *_cells(content, name)] for name in ROWS)),
        "The best merges, by seed:",
        table(["", *seeds], _names(content)),
        "## Above the best merge",
        "Points of normalised accuracy above it, mean ± standard deviation; then the least of the"
        " seeds.",
        table(head, _above(content)),
        "## The choice",
        "Of test images, by the default rule; and the folder's size in per cent of that of as many"
        " checkpoints.",
        table(head, _chosen(content)),
        f"## Confusion among {counts[-1]} tasks",
        "Test images whose nearest task is another one, in per cent of the images of their task,"
        " mean over the seeds; the numbers in the picture are the images whose own task is the"
        " nearest.",
        f"![Share of the images of each task that are nearest to another]({PICTURE})",
        f"The {PAIRS} pairs most confused:",
        table(
            ["images of", "nearest to", "mean", *seeds],
            ([p["images"], p["nearest"], *_shares(p["shares"])] for p in content["pairs"]),
        ),
        "## Layers and tokens",
        "Validation images whose own task is the nearest one, in per cent; in brackets among the"
        " nearest three. The default is the class token of the base model's tower, at the queries,"
        " fc1 and fc2 of the upper two thirds of the blocks. Each row differs from it in one thing;"
        " single layers are those of the default, and the last fc1 is at three quarters of the"
        " depth.",
        table(["", *(f"{count} tasks" for count in content["layers"])], _by_layers(content)),
        "## Sets of tasks",
        f"Normalised accuracy on validation images, {counts[0]} tasks; in brackets the mean number"
        " of tasks of an image. The temperature is that per layer; the default is 3, 0.15, 0.25.",
        table(["tasks at most", "threshold", "temperature", *seeds, "mean"], _by_sets(content)),
    ]


def _cells(content: Found, name: str) -> list[str]:
    rows = [rows[name] for rows in content["accuracy"].values()]
    return [f"{spread(r['normalised'])} ({statistics.mean(r['accuracy']):.1f})" for r in rows]


def _names(content: Found) -> list[list[str]]:
    """Rows of the best merges of each seed, with their normalised accuracy."""
    rows = []
    for count, found_rows in content["accuracy"].items():
        for kind, said in (("alone", "α = 1"), ("images", "with images")):
            best = zip(found_rows[kind]["names"], found_rows[kind]["normalised"], strict=True)
            cells = [f"{_title(name)} {value:.1f}" for name, value in best]
            rows.append([f"{count} tasks, {said}", *cells])
    return rows


def _title(name: str) -> str:
    return "coefficients learned" if name == "ada" else title(name).strip("*")


def _above(content: Found) -> list[list[str]]:
    """Rows of differences between routed models and the best merges."""
    rows = []
    for name in ROUTED:
        for kind in BEST:
            cells = []
            for found_rows in content["accuracy"].values():
                pairs = [found_rows[key]["normalised"] for key in (kind, name)]
                apart = [high - low for low, high in zip(*pairs, strict=True)]
                cells.append(f"{spread(apart)}; {min(apart):+.1f}")
            rows.append([f"{ROWS[name]} − {ROWS[kind]}", *cells])
    return rows


def _chosen(content: Found) -> list[list[str]]:
    titles = {
        "nearest": ("the own task is the nearest, %", 1),
        "among": ("the own task is among the chosen, %", 1),
        "chosen": ("tasks of an image", 2),
        "sets": ("distinct sets of tasks", 0),
        "ratio": ("bytes, % of the checkpoints", 1),
    }
    return [
        [said, *(spread(choice[key], digits) for choice in content["choice"].values())]
        for key, (said, digits) in titles.items()
    ]


def _shares(values: Sequence[float]) -> list[str]:
    """Mean over the seeds, and the share of each."""
    return [f"{value:.1f}" for value in (statistics.mean(values), *values)]


def _by_layers(content: Found) -> list[list[str]]:
    columns = list(content["layers"].values())
    return [
        [name, *(f"{spread(c[name]['nearest'])} ({spread(c[name]['three'])})" for c in columns)]
        for name in columns[0]
    ]


def _by_sets(content: Found) -> list[list[str]]:
    """Rows by most tasks, threshold and temperature; one for the nearest task alone."""
    rows = []
    keys = ("max_tasks", "threshold", "temperature")
    for one in sorted(content["sets"], key=lambda one: [one[key] for key in keys]):
        said = [f"{one[key]:g}" for key in keys]
        if said[0] == "1":
            if rows:
                continue  # the nearest task, whatever the numbers are
            said = ["1", "any", "any"]
        pairs = zip(one["normalised"], one["chosen"], strict=True)
        cells = [f"{value:.1f} ({chosen:.2f})" for value, chosen in pairs]
        rows.append([*said, *cells, f"{statistics.mean(one['normalised']):.1f}"])
    return rows


# Picture

PICTURE = "routing-confusion.svg"


def picture(content: Found, file: Path) -> None:
    """Draw which tasks images are nearest to, with the shares of the right ones in numbers."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from hf_tsv.reports import drawing

    shares = np.array(list(content["confusion"].values())[-1])
    right = np.diag(shares).copy()
    np.fill_diagonal(shares, np.nan)
    with mpl.rc_context({"svg.hashsalt": "hf-tsv", "font.size": 9}):
        figure = Figure((8, 6.4), layout="constrained")
        axes = figure.subplots()
        names = content["tasks"]
        drawing.name_rows_and_columns(axes, names, 8, rotation=45, ha="right")
        top = float(np.nanmax(shares))
        drawing.heat_map(axes, shares, lambda value: f"{value:.0f}", top=top, format="{x:.0f} %")
        for i, value in enumerate(right):
            axes.text(i, i, f"{value:.0f}", ha="center", va="center", fontsize=7.5)
        axes.set(xlabel="nearest task", ylabel="images of")
        figure.savefig(file, metadata={"Date": None})
