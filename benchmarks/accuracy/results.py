"""Tables and pictures of the accuracy benchmark, over all seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.accuracy import choices, comparisons, details
from benchmarks.accuracy.runs import METHODS, Seed
from benchmarks.accuracy.scores import Found, row, spread, table
from benchmarks.accuracy.suites import SUITES, Suite

FOLDER = Path(__file__).parent / "results"
ROWS = {
    "base": "base, zero-shot",
    "average": "weight averaging",
    "task-arithmetic": "task arithmetic",
    "ties": "TIES",
    "consensus": "consensus task arithmetic",
    "low-rank": "low rank only",
    "orthogonal": "orthogonal only",
    "iso-c": "Iso-C",
    "iso-cts": "Iso-CTS",
    "dc": "DC-Merge",
    "wudi": "WUDI (SWUDI-A)",
    "tsv-default": "**TSV-Merge**, α = 1",
    "tsv": "TSV-Merge, α chosen",
    "ada": "TSV-Merge, coefficients learned (`ada`)",
    "fine-tuned": "fine-tuned, one model a task",
}


OWN: dict[str, Any] = {"details": details, "routing": choices}
"""Modules with the reports of suites that have one of their own."""

ORDER = (
    ("average", "task-arithmetic"),
    ("task-arithmetic", "consensus"),
    ("task-arithmetic", "orthogonal"),
    ("low-rank", "orthogonal"),
    ("orthogonal", "tsv"),
    ("consensus", "tsv"),
)
"""Pairs of methods of which the paper finds the second one at least as good."""


COLOURS = {
    "task-arithmetic": "#4878cf", "ties": "#d65f5f", "consensus": "#6acc65",
    "low-rank": "#b47cc7", "orthogonal": "#c4ad66", "iso-c": "#77bedb", "iso-cts": "#8c613c",
    "dc": "#e377c2", "wudi": "#17becf", "tsv": "#333",
}  # fmt: skip
"""Colours of the methods in pictures."""


def summary(suite: Suite, seeds: Sequence[Seed]) -> Found:
    """Summary of everything that was measured, as one object; accuracies in per cent.

    Args:
        suite: what the models are.
        seeds: seeds whose runs are all finished.
    """
    counts = suite.counts
    kept = [
        {name: seed.kept(name, _missing) for name in suite.runs(seed, counts)} for seed in seeds
    ]
    found: Found = {
        "suite": suite.name,
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "seeds": [seed.number for seed in seeds],
        "recipe": suite.recipe(),
    }
    if suite.name in OWN:
        return found | OWN[suite.name].found(kept, seeds, counts)
    return found | {
        "methods": {str(count): _methods(kept, seeds, count) for count in counts},
        "comparisons": comparisons.found(kept, seeds, counts),
        "alphas": {str(count): _alphas(kept, count) for count in counts},
    }


def _missing() -> Any:
    raise SystemExit("Not everything has been run.")


def _methods(kept: Sequence[Found], seeds: Sequence[Seed], count: int) -> Found:
    always = ("base", "fine-tuned")
    names = [n for n in ROWS if n in always or all(f"{n}-{count}" in run for run in kept)]
    return {name: row(kept, seeds, count, name) for name in names}


def _alphas(kept: Sequence[Found], count: int) -> Found:
    """Mean accuracy on validation images at each α."""
    curves = {}
    for name in METHODS:
        runs = [run[f"{name}-{count}"] for run in kept if f"{name}-{count}" in run]
        if len(runs) < len(kept):
            continue
        columns = zip(*(run["validation"] for run in runs), strict=True)
        curves[name] = {
            "alphas": runs[0]["alphas"],
            "accuracy": [100 * statistics.mean(column) for column in columns],
        }
    return curves


def write(found: Found, folder: Path = FOLDER) -> None:
    """Write JSON, Markdown and pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    name = _file(found, "accuracy")
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown(found), encoding="utf-8")
    if "alphas" in found:
        pictures(found, folder / f"{_file(found, 'alphas')}.svg")
    if found["suite"] == "routing":
        choices.picture(found, folder / choices.PICTURE)


def _file(found: Found, kind: str) -> str:
    """Name of a file, without its ending; those of other suites than `tiny` are called so."""
    if found["suite"] == "routing":
        return "routing"
    return kind if found["suite"] == "tiny" else f"{kind}-{found['suite']}"


def main_table(found: Found) -> str:
    """Table of methods by number of tasks: normalised accuracy, absolute in brackets."""
    counts = list(found["methods"])

    def cells(name: str) -> list[str]:
        rows = [found["methods"][count][name] for count in counts]
        return [f"{spread(r['normalised'])} ({statistics.mean(r['accuracy']):.1f})" for r in rows]

    head = ["", *(f"{count} tasks" for count in counts)]
    names = [name for name in ROWS if name in found["methods"][counts[0]]]
    return table(head, ([ROWS[name], *cells(name)] for name in names))


def _claims(found: Found) -> list[list[str]]:
    """Rows that compare two methods, with the difference and the seeds where it is not negative."""
    rows = []
    for low, high in ORDER:
        if not all(low in methods and high in methods for methods in found["methods"].values()):
            continue
        cells = []
        for methods in found["methods"].values():
            pairs = zip(methods[low]["normalised"], methods[high]["normalised"], strict=True)
            apart = [b - a for a, b in pairs]
            holds = sum(difference >= 0 for difference in apart)
            cells.append(f"{spread(apart)} ({holds} of {len(apart)})")
        rows.append([f"{ROWS[low]} ≤ {ROWS[high]}", *cells])
    return rows


def markdown(found: Found) -> str:
    """Report in Markdown."""
    recipe = ", ".join(f"{key} {value}" for key, value in found["recipe"].items())
    versions = ", ".join(f"{name} {value}" for name, value in found["versions"].items())
    command = "python -m benchmarks.accuracy"
    if found["suite"] != "tiny":
        command += f" --suite {found['suite']}"
    parts = [
        "# Accuracy of merged and compressed models",
        f"`{command}`, {found['date']}; seeds {', '.join(map(str, found['seeds']))}; {versions}.",
        f"{SUITES[found['suite']].about} Training: {recipe}. 500 test images a task that were not"
        " trained on; α is chosen on 100 validation images a task, coefficients are learned on 500"
        " without their labels. Mean ± standard deviation over the seeds. These are not the models"
        " of the paper, and its numbers are not to be compared with these: only the order of"
        " methods is.",
        *(OWN[found["suite"]].sections(found) if found["suite"] in OWN else _sections(found)),
    ]
    return "\n\n".join(parts) + "\n"


def _sections(found: Found) -> list[str]:
    """Sections on methods."""
    counts = list(found["methods"])
    head = ["", *(f"{count} tasks" for count in counts)]

    def alphas(name: str) -> list[str]:
        return [
            ", ".join(f"{a:g}" for a in found["methods"][count][name]["alpha"]) for count in counts
        ]

    return [
        "## Methods",
        "Normalised accuracy in per cent (mean share of each fine-tune's own, eq. 9); accuracy in"
        " brackets.",
        main_table(found),
        "α chosen, by seed:",
        table(head, ([ROWS[n], *alphas(n)] for n in METHODS if n in found["methods"][counts[0]])),
        *comparisons.sections(found["comparisons"]),
        "## The order of the paper",
        "How much better the second is, in points of normalised accuracy; in brackets in how many"
        " seeds it is no worse.",
        table(head, _claims(found)),
        "## α",
        f"![Accuracy on validation images by α]({_file(found, 'alphas')}.svg)",
    ]


def pictures(found: Found, file: Path) -> None:
    """Plot the accuracy by α of every method."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "hf-tsv", "font.size": 9}):
        figure = Figure((9, 3.6), layout="constrained")
        for axes, (count, curves) in zip(
            figure.subplots(1, len(found["alphas"]), sharey=True, squeeze=False)[0],
            found["alphas"].items(), strict=True,
        ):  # fmt: skip
            for name, curve in curves.items():
                axes.plot(curve["alphas"], curve["accuracy"], color=COLOURS[name], label=name)
            axes.set_title(f"{count} tasks", fontsize=10)
            axes.set_xlabel("α")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)
        figure.axes[0].set_ylabel("accuracy on validation images (%)")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
        figure.savefig(file, metadata={"Date": None})
