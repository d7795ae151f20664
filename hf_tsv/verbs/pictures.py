"""Plots of evaluation results: bars, a radar chart, confusion matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_tsv.checkpoints.formats.heads import file_stems
from hf_tsv.reports.drawing import (
    COLOURS,
    HEAT,
    NUMBERED,
    TEXT,
    Picture,
    frame_axes,
    new_figure,
    plain_name,
    short_names,
    to_png,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


NAMED = 50
"""Most classes of a confusion matrix that shows their names."""
LARGE = 20
"""Most classes whose names are written large."""

Results = Mapping[str, Mapping[str, Any]]


def of_evaluation(tasks: Results) -> list[Picture]:
    """Plots of an evaluation.

    Args:
        tasks (`Mapping[str, Mapping]`): results by task, see [`EvaluateReport`].
    """
    stems = file_stems(list(tasks))
    pictures = [_accuracy(tasks)]
    if len(tasks) > 2:
        pictures.append(_radar(tasks))
    pictures += [
        _confusion(f"confusion-{stem}.png", name, found)
        for stem, (name, found) in zip(stems, tasks.items(), strict=True)
    ]
    return pictures


def of_sweep(report: Mapping[str, Any]) -> Picture:
    """Plot of accuracy against the share of singular values kept, per task and on average.

    Args:
        report (`Mapping`): see [`SweepReport`].
    """
    figure = new_figure(3.6)
    axes = figure.subplots()
    shares = report["fractions"]
    for found in report["tasks"].values():
        axes.plot(shares, found["accuracies"], color=TEXT, alpha=0.3, linewidth=0.8)
    axes.plot(shares, report["mean"], color=COLOURS[0], linewidth=2, marker="o", markersize=4,
              label="low rank, mean of the tasks")  # fmt: skip
    axes.axhline(report["full"], color=COLOURS[1], linewidth=1.4, label="fine-tunes, mean")
    axes.set_xscale("log")
    axes.set_xticks(shares, [f"{share:.3g}" for share in shares])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("share of the singular values kept")
    axes.set_ylabel("top-1 accuracy")
    frame_axes(axes)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend(frameon=False, labelcolor=TEXT, fontsize=9, loc="lower right")
    low, high = (f"{report['mean'][i]:.1%} with {shares[i]:.3g}" for i in (0, -1))
    alt = f"From {low} of the singular values to {high}; the fine-tunes have {report['full']:.1%}."
    return Picture("sweep.png", "Accuracy by rank", alt, to_png(figure))


def _own(found: Mapping[str, Any]) -> float | None:
    """Accuracy of the task's own fine-tune, or None if unknown."""
    accuracy: float | None = found.get("reference", {}).get("accuracy")
    return accuracy


def _accuracy(tasks: Results) -> Picture:
    """Plot of one bar per task, and one for its fine-tune."""
    known = {i: own for i, found in enumerate(tasks.values()) if (own := _own(found)) is not None}
    figure = new_figure(1.1 + (0.5 if known else 0.34) * len(tasks))
    axes = figure.subplots()
    thickness = 0.38 if known else 0.7
    shift = 0.2 if known else 0.0
    values = [found["accuracy"] for found in tasks.values()]
    places = np.arange(len(tasks))
    _bars(axes, places - shift, values, thickness, COLOURS[0], "this model")
    if known:
        _bars(axes, np.array([*known]) + shift, [*known.values()], thickness, COLOURS[1],
              "fine-tune of the task")  # fmt: skip
    axes.set_yticks(places, short_names(list(tasks)), fontsize=9, parse_math=False)
    axes.set_ylim(len(tasks) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.set_xlabel("top-1 accuracy")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color=TEXT, alpha=0.25, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    if known:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False,
                      labelcolor=TEXT, fontsize=9, handlelength=1.0)  # fmt: skip
    best, worst = (plain_name(pick(tasks, key=lambda n: tasks[n]["accuracy"]))
                   for pick in (max, min))  # fmt: skip
    alt = f"Highest for {best} ({max(values):.1%}), lowest for {worst} ({min(values):.1%})."
    return Picture("accuracy.png", "Accuracy", alt, to_png(figure))


def _bars(
    axes: Axes, places: Any, values: Sequence[float], thickness: float, colour: str, label: str
) -> None:
    bars = axes.barh(places, values, thickness, color=colour, label=label)
    texts = axes.bar_label(bars, [f"{value:.1%}" for value in values], padding=3, fontsize=8)
    for text in texts:
        text.set_color(TEXT)


def _radar(tasks: Results) -> Picture:
    """Plot of one axis per task: accuracy, divided by the fine-tunes' own where all are known."""
    normalised = all("normalised" in found for found in tasks.values())
    what = "normalised" if normalised else "accuracy"
    values = [found[what] for found in tasks.values()]
    angles = [2 * math.pi * i / len(tasks) for i in range(len(tasks))]
    figure = new_figure(6.4)
    axes: Any = figure.add_subplot(projection="polar")
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    if normalised:
        turn = np.linspace(0, 2 * math.pi, 200)
        axes.plot(turn, np.ones_like(turn), color=COLOURS[1], linewidth=1.4, label="fine-tunes")
    axes.plot([*angles, angles[0]], [*values, values[0]], color=COLOURS[0], linewidth=1.8,
              marker="o", markersize=4, label="this model")  # fmt: skip
    axes.fill(angles, values, color=COLOURS[0], alpha=0.15)
    axes.set_ylim(0, max(1.05, *values))
    axes.set_yticks([0.25, 0.5, 0.75, 1.0])
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_xticks(angles, short_names(list(tasks)), fontsize=9, parse_math=False)
    for label, angle in zip(axes.get_xticklabels(), angles, strict=True):
        side = math.sin(angle)
        label.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0
                                      else "right")  # fmt: skip
    axes.grid(color=TEXT, alpha=0.3, linewidth=0.7)
    axes.tick_params(axis="y", labelsize=8)
    title = "Accuracy, share of the fine-tunes' own" if normalised else "Accuracy"
    figure.suptitle(title, fontsize=11, color=TEXT)
    if normalised:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False,
                      labelcolor=TEXT, fontsize=9)  # fmt: skip
    alt = f"{title}: {min(values):.1%} to {max(values):.1%} over {len(tasks)} tasks."
    return Picture("radar.png", title, alt, to_png(figure))


def _confusion(file: str, name: str, found: Mapping[str, Any]) -> Picture:
    """Plot of the shares of every class that are classified as every other one."""
    counts = np.asarray(found["confusion"], dtype=float)
    size = len(counts)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)
    figure = new_figure(4.2 if size <= NUMBERED else 6.8)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap=HEAT, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    if size <= NAMED:
        names = short_names(found["classes"])
        font = 9 if size <= NUMBERED else 7.5 if size <= LARGE else 5.5
        turned = {"rotation": 90} if size > LARGE else {"rotation": 45, "ha": "right"}
        axes.set_xticks(range(size), names, fontsize=font, parse_math=False, **turned)
        axes.set_yticks(range(size), names, fontsize=font, parse_math=False)
        axes.tick_params(length=0)
    if size <= NUMBERED:
        for i, j in np.ndindex(size, size):
            colour = "black" if shares[i, j] > 0.6 else "white"
            if totals[i, 0]:
                axes.text(j, i, f"{shares[i, j]:.0%}", ha="center", va="center", fontsize=8.5,
                          color=colour)  # fmt: skip
    axes.set(xlabel="taken for", ylabel="class" if size <= NAMED else "class, by number")
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, format="{x:.0%}")
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=TEXT, labelsize=8)
    title = f"{short_names([name])[0]}: share of each class"
    axes.set_title(title, fontsize=11, color=TEXT, parse_math=False)
    alt = f"Confusion of {plain_name(name)}: {found['accuracy']:.1%} lie on the diagonal."
    return Picture(file, f"Confusion of {plain_name(name)}", alt, to_png(figure))
