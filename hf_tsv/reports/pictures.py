"""Plots of reports by matplotlib (the extra `plots`), legible on white and on black."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_tsv.checkpoints.layout import block_and_kind, kind_order
from hf_tsv.checkpoints.names import COMPRESSION
from hf_tsv.reports import drawing as kit
from hf_tsv.reports.drawing import COLOURS, TEXT, Picture, number_text
from hf_tsv.system.text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from hf_tsv.reports.interference import InterferenceReport

TOWERS = {"vision": COLOURS[0], "text": COLOURS[2]}


@dataclass(frozen=True)
class Layer:
    """Weight in a plot over depth: a bar for a kind, such as `mlp.fc1`, in a block: `vision 3`."""

    block: str
    kind: str
    value: float

    @property
    def tower(self) -> str:
        return self.block.split()[0]


def of_interference(report: InterferenceReport) -> list[Picture]:
    """Plots of a report on interference."""
    pairs, blocks = kit.new_figure(6.3), kit.new_figure(3.4)
    _pairs(pairs.subplots(), report)
    _blocks(blocks.subplots(), report)
    sti = layers_of({name: weight["sti"] for name, weight in report.weights.items()})
    # The largest rank used of any task; updates of lower rank use less.
    ranks = layers_of({name: max(weight["ranks"]) for name, weight in report.weights.items()})
    drawn = [
        ("pairs.png", "Pairwise interference", _pairs_alt(report), kit.to_png(pairs)),
        ("blocks.png", "Interference by block", _blocks_alt(report), kit.to_png(blocks)),
        ("layers.png", "Interference by layer", _layers_alt(sti), _depth_png(sti, "STI")),
        ("spectrum.png", "Spectrum and retained energy", _spectra_alt(report), _spectra(report)),
        ("ranks.png", "Rank kept per layer", _ranks_alt(report), _depth_png(ranks, "rank kept")),
    ]
    return [Picture(*entry) for entry in drawn]


def of_merge(report: InterferenceReport) -> Picture:
    """Plot for the card of a merge: pairs of tasks beside blocks."""
    figure = kit.new_figure(4.4)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _pairs(left, report)
    _blocks(right, report)
    alt = f"{_pairs_alt(report)} {_blocks_alt(report)}"
    return Picture("interference.png", "Task interference", alt, kit.to_png(figure))


def of_compression(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], ranks: Mapping[str, int]
) -> Picture:
    """Plot for the card of a compressed task: energy over rank, and the ranks kept.

    The curves are, by kind of layer, shares of k and shares of the squared norm in that many
    triplets; `ranks` has those of the weights stored as factors, at least one.
    """
    layers = layers_of(ranks)
    rows = len(_by_tower(layers))
    figure = kit.new_figure(2.8 + 2.3 * rows)
    parts: Any = figure.subfigures(2, 1, height_ratios=(2.5, 2.3 * rows))
    axes = parts[0].subplots()
    kinds = _over_depth(parts[1], layers, "rank kept")  # its legend serves both plots
    for kind in kinds:
        axes.plot(*curves[kind], color=_colour(kind, kinds), linewidth=1.6)
    axes.set(xlabel="triplets, share of min(shape)", ylabel="energy kept", ylim=(0, 1.03))
    axes.set_title("Energy in the leading triplets, by kind of layer", fontsize=11, color=TEXT)
    kit.percent_text(axes)
    alt = "Energy in the leading triplets by kind of layer, and the rank kept per layer"
    return Picture(COMPRESSION, "What is kept", alt, kit.to_png(figure))


# Content


def _pairs(axes: Axes, report: InterferenceReport) -> None:
    """Draw a heat map of all pairs of tasks."""
    pairs = np.asarray(report.pairs)
    count = len(pairs)
    shown = np.where(np.eye(count, dtype=bool), np.nan, pairs)
    off = pairs[~np.eye(count, dtype=bool)]
    top, low = float(off.max()) or 1.0, float(off.min())
    low = low if low < 0.999 * top else 0.0  # two tasks, or all pairs alike
    size = 9 if count <= kit.NUMBERED else 7
    kit.name_rows_and_columns(axes, _labels(report), size, rotation=45, ha="right")
    kit.heat_map(axes, shown, lambda value: number_text(value, top), low=low, top=top)
    axes.set_title("Pairwise interference (STI)", fontsize=11, color=TEXT)


def _pairs_alt(report: InterferenceReport) -> str:
    (a, b), (c, d) = report.extremes()
    names = [one_line(task["name"]) for task in report.tasks]
    if (a, b) == (c, d):
        return f"{names[a]} and {names[b]}: {number_text(report.pairs[a][b])}."
    return (
        f"{names[a]} and {names[b]} interfere most ({number_text(report.pairs[a][b])}),"
        f" {names[c]} and {names[d]} least ({number_text(report.pairs[c][d])})."
    )


def _blocks(axes: Axes, report: InterferenceReport) -> None:
    """Draw the interference of every block, before and after orthogonalisation."""
    blocks = sorted(report.blocks, key=_depth)
    towers = list(dict.fromkeys(block.split()[0] for block in blocks))
    several = len({*towers} - {"other"}) > 1
    for tower in towers:
        places = [i for i, block in enumerate(blocks) if block.split()[0] == tower]
        before = [report.blocks[blocks[i]]["sti"] for i in places]
        said = "before" if tower == towers[0] else None
        if several and tower != "other":
            said = f"{tower} before"
        axes.bar(places, before, color=TOWERS.get(tower, TEXT), width=0.75, label=said)
    if _orthogonal(report):
        axes.plot(
            range(len(blocks)), [report.blocks[block]["sti_after"] for block in blocks], "D",
            markersize=4, color=COLOURS[1], clip_on=False,
            label=f"after orthogonalisation: {number_text(report.total_after)} in all",
        )  # fmt: skip
    step = max(1, -(-len(blocks) // 13))
    ticks = [i for i, block in enumerate(blocks) if _depth(block)[1] % step == 0]
    if step > 1 and blocks[-1] == "other" and len(blocks) - 2 in ticks:
        ticks.remove(len(blocks) - 2)  # its label would touch the last one
    axes.set_xticks(ticks, [_tick(blocks[i], several) for i in ticks])
    axes.set(xlabel="block", ylabel="STI")
    axes.set_title("STI by block", fontsize=11, color=TEXT)
    highest = max((block["sti"] for block in report.blocks.values()), default=0.0)
    axes.set_ylim(0, (1.4 if several else 1.25) * (highest or 1.0))  # room for the legend
    axes.legend(frameon=False, labelcolor=TEXT, fontsize=8.5, loc="upper right", borderaxespad=0)
    kit.frame_axes(axes)


def _orthogonal(report: InterferenceReport) -> bool:
    return report.total_after < report.total


def _blocks_alt(report: InterferenceReport) -> str:
    worst = max(report.blocks, key=lambda block: report.blocks[block]["sti"])
    after = f", and {number_text(report.total_after)} after orthogonalisation"
    return (
        f"Interference is largest in block {worst} ({number_text(report.blocks[worst]['sti'])});"
        f" in all it is {number_text(report.total)}{after if _orthogonal(report) else ''}."
    )


def _layers_alt(layers: Sequence[Layer]) -> str:
    drawn = chain.from_iterable(_by_tower(layers).values())
    worst = max(drawn, key=lambda layer: layer.value)
    return f"Most in {one_line(worst.kind)} of block {worst.block}: {number_text(worst.value)}."


def _ranks_alt(report: InterferenceReport) -> str:
    ranks = [rank for weight in report.weights.values() for rank in weight["ranks"] if rank]
    return f"Of every task {min(ranks)} to {max(ranks)} triplets of a weight are used."


def _spectra(report: InterferenceReport) -> bytes:
    """Plot of singular values and energy over rank, one line per task."""
    figure = kit.new_figure(3.7)
    left, right = figure.subplots(1, 2)
    share = np.asarray(report.spectra["rank_share"])
    for axes, key in ((left, "singular_values"), (right, "energy")):
        lines = np.asarray(report.spectra[key])
        for line, (colour, name, width) in zip(lines, _task_lines(report), strict=True):
            known = line > 0 if key == "singular_values" else np.ones_like(line, dtype=bool)
            axes.plot(share[known], line[known], color=colour, linewidth=width, label=name)
        axes.set_xlabel("triplets, share of min(shape)")
    left.set(yscale="log", ylabel="σ over the largest", ylim=(1e-4, 1.5), xlim=(0, 1))
    right.set(ylabel="energy kept", ylim=(0, 1.03), xlim=(0, 1))
    kit.frame_axes(left)
    kit.percent_text(right)
    left.xaxis.set_major_formatter("{x:.0%}")
    kept = median(w["rank"] / min(w["shape"]) for w in report.weights.values())
    right.axvline(kept, color=TEXT, linewidth=1, linestyle=":")
    right.text(kept, 0.03, " kept" if kept < 0.8 else "kept ", color=TEXT, fontsize=9,
               ha="left" if kept < 0.8 else "right")  # fmt: skip
    left.set_title("Spectrum of the updates", fontsize=11, color=TEXT)
    right.set_title("Energy in the leading triplets", fontsize=11, color=TEXT)
    kit.literal(right.legend(frameon=False, labelcolor=TEXT, fontsize=8.5, loc="lower right"))
    return kit.to_png(figure)


def _spectra_alt(report: InterferenceReport) -> str:
    energies = [task["energy"] for task in report.tasks]
    return (
        f"The triplets used hold {min(energies):.0%} to {max(energies):.0%} of the energy of the"
        " updates."
    )


def _task_lines(report: InterferenceReport) -> list[tuple[str, str | None, float]]:
    """Colour, name and width of each task's line; among many, only the extremes have names."""
    names = _labels(report)
    if len(names) <= kit.NAMED:
        return [(colour, name, 1.6) for colour, name in zip(COLOURS, names, strict=False)]
    spread = [task["effective_rank"] for task in report.tasks]
    lines: list[tuple[str, str | None, float]] = [(COLOURS[4], None, 0.9) for _ in names]
    for pick, colour in ((np.argmax, COLOURS[0]), (np.argmin, COLOURS[1])):
        place = int(pick(spread))
        lines[place] = (colour, f"{names[place]}: effective rank {spread[place]:.0f}", 2.0)
    return lines


# Weights over depth


def layers_of(values: Mapping[str, float]) -> list[Layer]:
    """Weights in the order a model computes them, with their values, by name."""
    return sorted(
        (Layer(*block_and_kind(name), value) for name, value in values.items()),
        key=lambda layer: (*_depth(layer.block), kind_order(layer.kind)),
    )


def _depth_png(layers: Sequence[Layer], what: str) -> bytes:
    figure = kit.new_figure(0.9 + 2.5 * max(1, len(_by_tower(layers))))
    _over_depth(figure, layers, what)
    return kit.to_png(figure)


def _over_depth(figure: Any, layers: Sequence[Layer], what: str) -> list[str]:
    """Draw a bar per weight by depth, a row per tower, a colour per kind; return the kinds."""
    towers = _by_tower(layers)
    kinds = sorted({layer.kind for part in towers.values() for layer in part}, key=kind_order)
    rows = figure.subplots(max(1, len(towers)), 1, squeeze=False)[:, 0]
    for axes, (tower, part) in zip(rows, towers.items(), strict=False):
        for kind in kinds:
            places = [i for i, layer in enumerate(part) if layer.kind == kind]
            heights = [part[i].value for i in places]
            axes.bar(places, heights, width=0.8, color=_colour(kind, kinds), label=one_line(kind))
        starts = [i for i, layer in enumerate(part) if not i or part[i - 1].block != layer.block]
        names = [part[i].block.split()[-1] for i in starts]
        step = max(1, -(-len(starts) // 24))
        axes.set_xticks(starts[::step], names[::step], fontsize=8)
        axes.set_xlabel(f"block of the {tower} tower" if tower != "other" else "weight")
        axes.set_ylabel(what)
        axes.margins(x=0.01)
        kit.frame_axes(axes)
    if kinds:
        kit.legend_outside(figure, rows[0], "upper", min(6, len(kinds)), handlelength=1.0)
    return kinds


def _by_tower(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Weights of each tower; those outside of blocks only if there are no others."""
    towers: dict[str, list[Layer]] = {}
    for layer in layers:
        towers.setdefault(layer.tower, []).append(layer)
    if len(towers) > 1:
        towers.pop("other", None)
    return towers


def _depth(block: str) -> tuple[int, int]:
    """Sort key of blocks: vision tower first, then text, then weights in no block."""
    tower, _, number = block.partition(" ")
    return {"vision": 0, "text": 1}.get(tower, 2), int(number or 0)


def _colour(kind: str, kinds: Sequence[str]) -> str:
    return COLOURS[list(kinds).index(kind) % len(COLOURS)]


def _tick(block: str, several: bool) -> str:
    tower, _, number = block.partition(" ")
    return f"{tower[0]}{number}" if several and number else number or tower


def _labels(report: InterferenceReport) -> list[str]:
    return kit.short_names([task["name"] for task in report.tasks])
