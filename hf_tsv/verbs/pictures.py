"""Plots of evaluation results: bars, a radar chart, confusion matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_tsv.checkpoints.formats.heads import file_stems
from hf_tsv.reports import drawing as kit
from hf_tsv.reports.drawing import COLOURS, TEXT, Picture
from hf_tsv.system.text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED = 50  # most classes of a confusion matrix that shows their names
LARGE = 20  # most classes whose names are written large

Results = Mapping[str, Mapping[str, Any]]


def of_evaluation(tasks: Results) -> list[Picture]:
    """Plots of an evaluation, from its results by task, see [`EvaluateReport`]."""
    of_all = [_accuracy(tasks), *([_radar(tasks)] if len(tasks) > 2 else [])]
    return of_all + [
        _confusion(f"confusion-{stem}.png", name, found)
        for stem, (name, found) in zip(file_stems(list(tasks)), tasks.items(), strict=True)
    ]


def of_sweep(report: Mapping[str, Any]) -> Picture:
    """Plot of accuracy over the share of singular values kept; see [`SweepReport`]."""
    figure = kit.new_figure(3.6)
    axes = figure.subplots()
    shares = report["fractions"]
    for found in report["tasks"].values():
        label = "one task each" if found is next(iter(report["tasks"].values())) else None
        axes.plot(shares, found["accuracies"], color=TEXT, alpha=0.5, linewidth=0.8, label=label)
    axes.plot(shares, report["mean"], color=COLOURS[0], linewidth=2, marker="o", markersize=4,
              label="low rank, mean of the tasks")  # fmt: skip
    axes.axhline(report["full"], color=COLOURS[1], linewidth=1.4, label="fine-tunes, mean")
    axes.set(xscale="log", xlabel="share of the singular values kept", ylabel="top-1 accuracy")
    axes.set_xticks(shares, [f"{share:.3g}" for share in shares])
    axes.set_xticks([], minor=True)
    kit.frame_axes(axes)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend(frameon=False, labelcolor=TEXT, fontsize=9, loc="lower right")
    low, high = (f"{report['mean'][i]:.1%} with {shares[i]:.3g}" for i in (0, -1))
    alt = f"From {low} of the singular values to {high}; the fine-tunes have {report['full']:.1%}."
    return Picture("sweep.png", "Accuracy by rank", alt, kit.to_png(figure))


def _accuracy(tasks: Results) -> Picture:
    """Plot of one bar per task, and one for its fine-tune."""
    own = {i: found.get("reference") for i, found in enumerate(tasks.values())}
    known = {i: reference["accuracy"] for i, reference in own.items() if reference is not None}
    row, thickness, shift = (0.5, 0.38, 0.2) if known else (0.34, 0.7, 0.0)
    figure = kit.new_figure(1.1 + row * len(tasks))
    axes = figure.subplots()
    values = [found["accuracy"] for found in tasks.values()]
    places = np.arange(len(tasks))
    _bars(axes, places - shift, values, thickness, COLOURS[0], "this model")
    if known:
        _bars(axes, np.array([*known]) + shift, [*known.values()], thickness, COLOURS[1],
              "fine-tune of the task")  # fmt: skip
    axes.set_yticks(places, kit.short_names(list(tasks)), fontsize=9, parse_math=False)
    axes.set(ylim=(len(tasks) - 0.4, -0.6), xlim=(0, 1), xlabel="top-1 accuracy")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color=TEXT, alpha=0.25, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    if known:
        kit.legend_outside(figure, axes, "upper", handlelength=1.0)
    best, worst = (one_line(pick(tasks, key=lambda n: tasks[n]["accuracy"]))
                   for pick in (max, min))  # fmt: skip
    alt = f"Highest for {best} ({max(values):.1%}), lowest for {worst} ({min(values):.1%})."
    return Picture("accuracy.png", "Accuracy", alt, kit.to_png(figure))


def _bars(
    axes: Axes, places: Any, values: Sequence[float], thickness: float, colour: str, label: str
) -> None:
    bars = axes.barh(places, values, thickness, color=colour, label=label)
    texts = [f"{value:.1%}" for value in values]
    axes.bar_label(bars, texts, padding=3, fontsize=8, color=TEXT)


def _radar(tasks: Results) -> Picture:
    """Plot of one axis per task: accuracy, divided by the fine-tunes' own where all are known."""
    normalised = all("normalised" in found for found in tasks.values())
    what = "normalised" if normalised else "accuracy"
    values = [found[what] for found in tasks.values()]
    angles = [2 * math.pi * i / len(tasks) for i in range(len(tasks))]
    figure = kit.new_figure(6.4)
    axes: Any = figure.add_subplot(projection="polar")
    axes.set(theta_offset=math.pi / 2, theta_direction=-1)
    if normalised:
        turn = np.linspace(0, 2 * math.pi, 200)
        axes.plot(turn, np.ones_like(turn), color=COLOURS[1], linewidth=1.4, label="fine-tunes")
    axes.plot([*angles, angles[0]], [*values, values[0]], color=COLOURS[0], linewidth=1.8,
              marker="o", markersize=4, label="this model")  # fmt: skip
    axes.fill(angles, values, color=COLOURS[0], alpha=0.15)
    axes.set(ylim=(0, max(1.05, *values)), yticks=[0.25, 0.5, 0.75, 1.0])
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_xticks(angles, kit.short_names(list(tasks)), fontsize=9, parse_math=False)
    for label, angle in zip(axes.get_xticklabels(), angles, strict=True):
        side = math.sin(angle)
        label.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0
                                      else "right")  # fmt: skip
    axes.grid(color=TEXT, alpha=0.3, linewidth=0.7)
    axes.tick_params(axis="y", labelsize=8)
    title = "Accuracy, share of the fine-tunes' own" if normalised else "Accuracy"
    figure.suptitle(title, fontsize=11, color=TEXT)
    if normalised:
        kit.legend_outside(figure, axes, "lower")
    alt = f"{title}: {min(values):.1%} to {max(values):.1%} over {len(tasks)} tasks."
    return Picture("radar.png", title, alt, kit.to_png(figure))


def _confusion(file: str, name: str, found: Mapping[str, Any]) -> Picture:
    """Plot of the shares of every class that are classified as every other one."""
    counts = np.asarray(found["confusion"], dtype=float)
    size = len(counts)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)
    figure = kit.new_figure(4.2 if size <= kit.NUMBERED else 6.8)
    axes = figure.subplots()
    if size <= NAMED:
        names = kit.short_names(found["classes"])
        font = 9 if size <= kit.NUMBERED else 7.5 if size <= LARGE else 5.5
        turned = {"rotation": 90} if size > LARGE else {"rotation": 45, "ha": "right"}
        kit.name_rows_and_columns(axes, names, font, **turned)
    kit.heat_map(axes, shares, "{:.0%}".format, format="{x:.0%}")
    axes.set(xlabel="predicted", ylabel="true class" if size <= NAMED else "true class, by number")
    title = f"{kit.short_names([name])[0]}: share of each class"
    axes.set_title(title, fontsize=11, color=TEXT, parse_math=False)
    alt = f"Confusion of {one_line(name)}: {found['accuracy']:.1%} are on the diagonal."
    return Picture(file, f"Confusion of {one_line(name)}", alt, kit.to_png(figure))
