"""Tables and pictures of the accuracy benchmark, over all seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.accuracy.runs import METHODS, VARIANTS, Seed, all_runs

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
    "tsv-default": "**TSV-Merge**, α = 1",
    "tsv": "TSV-Merge, α chosen",
    "ada": "TSV-Merge, coefficients learned (`ada`)",
    "fine-tuned": "fine-tuned, one model a task",
}
SETTINGS = {
    "procrustes": "TSV-Merge by SVDs (`--precision exact`)",
    "whitening": "TSV-Merge by whitening",
    "fused": "TSV-Merge, attention stacked (`--qkv fused`)",
    "task-arithmetic-1": "task arithmetic",
    "low-rank-1": "low rank only",
    "orthogonal-1": "orthogonal only",
    "orthogonal-fused": "orthogonal only, attention stacked",
}

ORDER = (
    ("average", "task-arithmetic"),
    ("task-arithmetic", "consensus"),
    ("task-arithmetic", "orthogonal"),
    ("low-rank", "orthogonal"),
    ("orthogonal", "tsv"),
    ("consensus", "tsv"),
)
"""Pairs of methods of which the paper finds the second one at least as good."""

Found = dict[str, Any]


def summary(seeds: Sequence[Seed], counts: Sequence[int]) -> Found:
    """Summary of everything that was measured, as one object; accuracies in per cent.

    Args:
        seeds: seeds whose runs are all finished.
        counts: numbers of tasks merged.
    """
    from benchmarks.tiny_clip.training import twenty_tasks

    kept = [{name: seed.kept(name, _missing) for name in all_runs(seed, counts)} for seed in seeds]
    recipe = asdict(twenty_tasks(0))
    del recipe["seed"]
    return {
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "seeds": [seed.number for seed in seeds],
        "recipe": recipe,
        "methods": {str(count): _methods(kept, seeds, count) for count in counts},
        "variants": {
            str(count): {name: _row(kept, seeds, count, name) for name in VARIANTS}
            for count in counts
        },
        "ranks": {str(count): _ranks(kept, seeds, count) for count in counts},
        "alphas": {str(count): _alphas(kept, count) for count in counts},
        "compression": {
            str(count): {
                name: _row(kept, seeds, count, name) | {"share": _shares(kept, count, name)}
                for name in ("factors", "tall-mask")
            }
            for count in counts
        },
        "sweep": {
            "fractions": kept[0]["sweep"]["fractions"],
            "mean": [
                100 * statistics.mean(column)
                for column in zip(*(run["sweep"]["mean"] for run in kept), strict=True)
            ],
            "full": 100 * statistics.mean(run["sweep"]["full"] for run in kept),
            "stored": kept[0]["sweep"]["stored"],
        },
    }


def _missing() -> Any:
    raise SystemExit("Not everything has been run.")


def _scores(run: Found, tasks: Sequence[str], accuracies: dict[str, float]) -> tuple[float, float]:
    """Mean accuracy, and mean share of the fine-tunes' own (eq. 9), in per cent."""
    own = run["references"]["fine-tuned"]
    return (
        100 * statistics.mean(accuracies[task] for task in tasks),
        100 * statistics.mean(accuracies[task] / own[task] for task in tasks),
    )


def _row(kept: Sequence[Found], seeds: Sequence[Seed], count: int, name: str) -> Found:
    """Scores of one kind of run, one number per seed."""
    tasks = seeds[0].tasks[:count]
    found = []
    for run in kept:
        if name in ("base", "fine-tuned"):
            found.append(_scores(run, tasks, run["references"][name]))
        else:
            found.append(_scores(run, tasks, run[f"{name}-{count}"]["accuracies"]))
    row: Found = {"accuracy": [a for a, _ in found], "normalised": [n for _, n in found]}
    if name in METHODS:
        row["alpha"] = [run[f"{name}-{count}"]["alpha"] for run in kept]
    return row


def _methods(kept: Sequence[Found], seeds: Sequence[Seed], count: int) -> Found:
    return {name: _row(kept, seeds, count, name) for name in ROWS}


def _ranks(kept: Sequence[Found], seeds: Sequence[Seed], count: int) -> Found:
    names = [n for n in kept[0] if n.startswith("rank-") and n.endswith(f"-{count}")]
    shares = {name: name.split("-")[1] for name in names}
    rows = {share: _row(kept, seeds, count, f"rank-{share}") for share in shares.values()}
    return rows | {"k/T": _row(kept, seeds, count, "tsv-default")}


def _alphas(kept: Sequence[Found], count: int) -> Found:
    """Mean accuracy on validation images at each α."""
    curves = {}
    for name in METHODS:
        runs = [run[f"{name}-{count}"] for run in kept]
        columns = zip(*(run["validation"] for run in runs), strict=True)
        curves[name] = {
            "alphas": runs[0]["alphas"],
            "accuracy": [100 * statistics.mean(column) for column in columns],
        }
    return curves


def _shares(kept: Sequence[Found], count: int, name: str) -> list[float]:
    """Bytes of all tasks, base included, over the bytes of their checkpoints."""
    return [
        run[f"{name}-{count}"]["bytes"] / run[f"factors-{count}"]["checkpoint_bytes"]
        for run in kept
    ]


def write(found: Found, folder: Path = FOLDER) -> None:
    """Write JSON, Markdown and pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    (folder / "accuracy.json").write_text(text, encoding="utf-8")
    (folder / "accuracy.md").write_text(markdown(found), encoding="utf-8")
    pictures(found, folder)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Format the mean, and the standard deviation over the seeds.

    Example:
        >>> spread([80.0, 82.0])
        '81.0 ± 1.4'
    """
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def main_table(found: Found) -> str:
    """Table of methods by number of tasks: normalised accuracy, absolute in brackets."""
    counts = list(found["methods"])

    def cells(name: str) -> list[str]:
        rows = [found["methods"][count][name] for count in counts]
        return [f"{spread(r['normalised'])} ({statistics.mean(r['accuracy']):.1f})" for r in rows]

    head = ["", *(f"{count} tasks" for count in counts)]
    return _table(head, ([title, *cells(name)] for name, title in ROWS.items()))


def _claims(found: Found) -> list[list[str]]:
    """Rows that compare two methods, with the difference and the seeds where it is not negative."""
    rows = []
    for low, high in ORDER:
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
    counts = list(found["methods"])
    head = ["", *(f"{count} tasks" for count in counts)]
    recipe = ", ".join(f"{key} {value}" for key, value in found["recipe"].items())
    versions = ", ".join(f"{name} {value}" for name, value in found["versions"].items())

    def by_count(rows: Callable[[str], Found], what: str = "normalised") -> list[str]:
        return [spread(rows(count)[what], 2) for count in counts]

    def alphas(name: str) -> list[str]:
        return [
            ", ".join(f"{a:g}" for a in found["methods"][count][name]["alpha"]) for count in counts
        ]

    ranks = list(dict.fromkeys(share for count in counts for share in found["ranks"][count]))
    parts = [
        "# Accuracy of merged and compressed models",
        f"`python -m benchmarks.accuracy`, {found['date']}; seeds"
        f" {', '.join(map(str, found['seeds']))}; {versions}.",
        "Tiny CLIPs, trained from scratch on rendered images and on scikit-learn's (training:"
        f" {recipe}). 500 test images a task that were not trained on; α is chosen on 100"
        " validation images a task, coefficients are learned on 500 without their labels. Mean ±"
        " standard deviation over the seeds. These are not the models of the paper, and its numbers"
        " are not to be compared with these: only the order of methods is.",
        "## Methods",
        "Normalised accuracy in per cent (mean share of each fine-tune's own, eq. 9); accuracy in"
        " brackets.",
        main_table(found),
        "α chosen, by seed:",
        _table(head, ([ROWS[name], *alphas(name)] for name in METHODS)),
        "## The order of the paper",
        "How much better the second is, in points of normalised accuracy; in brackets in how many"
        " seeds it is no worse.",
        _table(head, _claims(found)),
        "## α",
        "![Accuracy on validation images by α](alphas.svg)",
        "## Rank",
        "TSV-Merge, α = 1, with fewer singular vectors of each task than k/T: normalised accuracy.",
        _table(
            ["share of k", *head[1:]],
            (
                [
                    share,
                    *(
                        spread(found["ranks"][c][share]["normalised"])
                        if share in found["ranks"][c]
                        else ""
                        for c in counts
                    ),
                ]
                for share in ranks
            ),
        ),
        "## α = 1",
        "Solvers, stacked attention projections, and the paper's ablation without a choice of α:"
        " normalised accuracy.",
        _table(
            head,
            (
                [SETTINGS[name], *by_count(lambda count, n=name: found["variants"][count][n])]  # type: ignore[misc]
                for name in VARIANTS
            ),
        ),
        "## Compression",
        "Each task on its own, of factors of rank k/T and of TALL-masks: normalised accuracy; and"
        " bytes of all tasks, base model included, in per cent of their vision towers.",
        _table(
            head,
            (
                [
                    f"{title}, {what}",
                    *(
                        spread([scale * x for x in found["compression"][count][name][key]], digits)
                        for count in counts
                    ),
                ]
                for name, title in (("factors", "TSV-Compress"), ("tall-mask", "TALL-masks"))
                for what, key, scale, digits in (
                    ("accuracy", "normalised", 1, 2),
                    ("bytes", "share", 100, 1),
                )
            ),
        ),
        "All 20 tasks, by share of the singular values kept (accuracy in per cent, mean over tasks"
        " and seeds):",
        _table(
            ["", *(f"{share:g}" for share in found["sweep"]["fractions"]), "fine-tunes"],
            [
                [
                    "accuracy",
                    *(f"{value:.1f}" for value in found["sweep"]["mean"]),
                    f"{found['sweep']['full']:.1f}",
                ],
                [
                    "numbers stored of an update",
                    *(f"{100 * share:.0f} %" for share in found["sweep"]["stored"]),
                    "100 %",
                ],
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def pictures(found: Found, folder: Path) -> None:
    """Plot the accuracy by α of every method."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    colours = ("#4878cf", "#d65f5f", "#6acc65", "#b47cc7", "#c4ad66", "#77bedb", "#8c613c", "#333")
    with mpl.rc_context({"svg.hashsalt": "hf-tsv", "font.size": 9}):
        figure = Figure((9, 3.4), layout="constrained")
        for axes, (count, curves) in zip(
            figure.subplots(1, len(found["alphas"]), sharey=True), found["alphas"].items(),
            strict=True,
        ):  # fmt: skip
            for colour, (name, curve) in zip(colours, curves.items(), strict=True):
                axes.plot(curve["alphas"], curve["accuracy"], color=colour, label=name)
            axes.set_title(f"{count} tasks", fontsize=10)
            axes.set_xlabel("α")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)
        figure.axes[0].set_ylabel("accuracy on validation images (%)")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=8, frameon=False)
        figure.savefig(folder / "alphas.svg", metadata={"Date": None})
