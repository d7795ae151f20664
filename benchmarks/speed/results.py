"""Results in a file that grows from run to run, and as readable tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed.compressions import CHECKPOINTS, FACTORS
from benchmarks.speed.curves import draw, seconds
from benchmarks.speed.merges import OURS, PLAIN
from benchmarks.speed.reports import INTERFERENCE, REPORT

BOUND = 4
"""Bound of a merge's memory, in units of the largest weight of all checkpoints."""

PHASES = ("reading", "waiting", "computing", "writing")
FOLDER = Path(__file__).parent / "results"
Row = Mapping[str, Any]
Runs = Sequence[Row]


@dataclass(frozen=True)
class Results:
    """Results file: sections of rows, and the circumstances of each row's measurement.

    Args:
        name: name of the file, without suffix.
        content: `circumstances`, a list, and `sections`: by section and key, one row.
        folder: folder of the file.
    """

    name: str
    content: dict[str, Any]
    folder: Path = FOLDER

    def add(self, section: str, key: Sequence[object], row: Any, facts: Mapping[str, Any]) -> None:
        """Replace an older row of the same key, and save everything."""
        known = self.content["circumstances"]
        if facts not in known:
            known.append(dict(facts))
        stored = {**asdict(row), "circumstances": known.index(facts)}
        rows = self.content["sections"].setdefault(section, {})
        rows[", ".join(map(str, key))] = json.loads(json.dumps(stored))
        self.save()

    def save(self) -> None:
        """Write the file, the tables and the figures."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f"{self.name}.json.part"
        draft.write_text(json.dumps(self.content, indent=1) + "\n")
        draft.replace(self.folder / f"{self.name}.json")
        for curve in self.content["sections"].get("curves", {}).values():
            if any(curve["runs"].values()):
                draw(curve, self.folder / self.figure(curve))
        (self.folder / f"{self.name}.md").write_text(markdown(self))

    def figure(self, curve: Row) -> str:
        """File name of a curve's figure."""
        return f"{self.name}-{curve['over']}.svg"


def opened(name: str, folder: Path = FOLDER) -> Results:
    """Load the results of this name so far."""
    file = folder / f"{name}.json"
    empty: dict[str, Any] = {"circumstances": [], "sections": {}}
    return Results(name, json.loads(file.read_text()) if file.exists() else empty, folder)


def markdown(results: Results) -> str:
    """Write all sections as Markdown tables, then the circumstances."""
    sections = results.content["sections"]
    writers: dict[str, Callable[[Iterable[Row]], list[str]]] = {
        "merge": _merges,
        "alone": _alone,
        "compress": _compressions,
        "reports": _reports,
        "spectra": _spectra,
    }
    lines = ["# Speed and accuracy", ""]
    for name, write in writers.items():
        if name in sections:
            lines += [*write(sections[name].values()), ""]
    if "curves" in sections:
        lines += _curves(results)
    return "\n".join([*lines, *_circumstances(results.content["circumstances"])])


def _merges(rows: Iterable[Row]) -> list[str]:
    head = [
        "model", "tasks", "layers", "conditions", "plain", "hf-tsv", "wall ratio",
        "compute ratio", "CPU ratio", "floor", "over the floor",
    ]  # fmt: skip
    rows, times, sizes, phases = list(rows), [], [], []
    for row in rows:
        runs, ours = row["runs"], row["runs"][OURS]
        case = [row["model"], row["tasks"], row["layers"], _conditions(row)]
        others = [name for name in runs if name != OURS]
        for name in others:
            times.append(
                [
                    *case[:3],
                    case[3] + (f"; {name}" if len(others) > 1 else ""),
                    _span(_walls(runs[name]), " s"),
                    _span(_walls(ours), " s"),
                    _ratio(_walls(runs[name]), _walls(ours)),
                    _ratio(_computing(runs[name]), _computing(ours)),
                    _ratio([run["cpu"] for run in runs[name]], [run["cpu"] for run in ours]),
                    f"{row['floor']:.3g} s",
                    f"{median(_walls(ours)) / row['floor']:.1f} ×",
                ]
            )
        errors = row["errors"]
        sizes.append(
            [
                *case,
                _megabytes(max(run["peak_bytes"] for run in runs[PLAIN])),
                *_memory(row),
                f"{errors['plain']:.0e}",
                f"{errors['ours']:.0e}",
                f"{errors['apart']:.0e}",
                "yes" if errors["agree"] else "**no**",
            ]
        )
        phases.append([*case, *(_phase(ours, name) for name in PHASES)])
    sizes_head = [
        *head[:4], "peak, plain", "peak, hf-tsv", "bound", "error, plain", "error, hf-tsv",
        "files apart", "files agree with float64",
    ]  # fmt: skip
    return [
        "## Merging",
        "",
        "Whole processes, median (lowest … highest); ratios are of rounds in turn.",
        "The floor reads all files once and computes at the rate of a float64 matrix product: here"
        f" {_rates(rows)}.",
        "",
        *table(head, times),
        "",
        f"The bound is the interpreter with its libraries, and {BOUND} times the largest weight of"
        " the base and all tasks in float32.",
        "Errors are those of merged updates against float64, relative, the largest of a sample.",
        "",
        *table(sizes_head, sizes),
        "",
        "Seconds of hf-tsv by what was done, side by side; waiting is what the computation lost.",
        "",
        *table([*head[:4], *PHASES], phases),
    ]


def _phase(runs: Runs, name: str) -> str:
    return f"{median(run['seconds'][name] for run in runs):.2f} s"


def _alone(rows: Iterable[Row]) -> list[str]:
    head = [
        "model", "tasks", "layers", "conditions", "wall", *PHASES, "peak", "bound", "floor",
    ]  # fmt: skip
    lines = [
        [
            row["model"],
            row["tasks"],
            row["layers"],
            _conditions(row),
            _span(_walls(row["runs"][OURS]), " s"),
            *(_phase(row["runs"][OURS], name) for name in PHASES),
            *_memory(row),
            f"{row['floor']:.2f} s",
        ]
        for row in rows
    ]
    return ["## Whole towers, hf-tsv alone", "", *table(head, lines)]


def _compressions(rows: Iterable[Row]) -> list[str]:
    head = [
        "model", "tasks", "layers", "conditions", "plain", "hf-tsv", "wall ratio", "compute ratio",
        "factors", "merging from checkpoints", "from factors", "wall ratio", "compute ratio",
    ]  # fmt: skip
    lines = []
    for row in rows:
        theirs, ours = row["compressing"][PLAIN], row["compressing"][OURS]
        slow, fast = row["merging"][CHECKPOINTS], row["merging"][FACTORS]
        lines.append(
            [
                row["model"],
                row["tasks"],
                row["layers"],
                _conditions(row),
                _span(_walls(theirs), " s"),
                _span(_walls(ours), " s"),
                _ratio(_walls(theirs), _walls(ours)),
                _ratio(_computing(theirs), _computing(ours)),
                f"{100 * row['factors_bytes'] / row['checkpoint_bytes']:.0f} %",
                _span(_walls(slow), " s"),
                _span(_walls(fast), " s"),
                _ratio(_walls(slow), _walls(fast)),
                _ratio(_computing(slow), _computing(fast)),
            ]
        )
    return [
        "## Compressing one task, and merging from factors of all",
        "",
        "At r = k/T; the bytes of the factors are a share of the checkpoint's.",
        "",
        *table(head, lines),
    ]


def _reports(rows: Iterable[Row]) -> list[str]:
    head = [
        "model", "tasks", "layers", "conditions", "merge", "with its report", "wall ratio",
        "compute ratio", "report alone", "wall ratio", "compute ratio", "peak, with its report",
        "peak, report alone", "bound",
    ]  # fmt: skip
    lines = []
    for row in rows:
        merge, *others = (row["runs"][name] for name in (OURS, REPORT, INTERFERENCE))
        cells = [row["model"], row["tasks"], row["layers"], _conditions(row)]
        cells.append(_span(_walls(merge), " s"))
        for runs in others:
            cells += [
                _span(_walls(runs), " s"),
                _ratio(_walls(runs), _walls(merge)),
                _ratio(_computing(runs), _computing(merge)),
            ]
        cells += [_megabytes(max(run["peak_bytes"] for run in runs)) for runs in others]
        lines.append([*cells, _memory(row)[1]])
    return [
        "## A report on interference: beside the merge, and alone",
        "",
        "Ratios are to the time of the merge without a report: below 1 is less.",
        "",
        *table(head, lines),
    ]


def _spectra(rows: Iterable[Row]) -> list[str]:
    head = ["spectrum", "tasks", "triplets of a task", "error, plain", "error, hf-tsv"]
    lines = [
        [
            row["spectrum"],
            row["tasks"],
            " … ".join(map(str, sorted(set(row["ranks"])))),
            f"{row['plain']:.0e}",
            f"{row['ours']:.0e}",
        ]
        for row in rows
    ]
    return [
        "## Errors of one merged update against float64",
        "",
        "A weight of 768 × 768. Where tasks are of low rank, unchanged or equal, the answer is that"
        " without noise of storage and without null directions.",
        "",
        *table(head, lines),
    ]


def _curves(results: Results) -> list[str]:
    lines = ["## How the time grows", ""]
    for curve in results.content["sections"]["curves"].values():
        if any(curve["runs"].values()):
            lines += [f"![Time over {curve['over']}]({results.figure(curve)})", ""]
            lines += [*_curve(curve), ""]
        if curve["missing"]:
            lines += [f"Time over {curve['over']} could not be measured: {curve['missing']}", ""]
    return lines


def _curve(curve: Row) -> list[str]:
    """Table of a figure's medians, with their growth, or the speed-up by more processes."""
    lines, shared = [], curve["over"] == "processes"
    for name, by_value in curve["runs"].items():
        times = {int(v): median(map(seconds, runs)) for v, runs in by_value.items()}
        first = times[min(times)]
        lines += [
            [name, value, f"{time:.2f} s", f"{first / time if shared else time / first:.2f} ×"]
            for value, time in sorted(times.items())
        ]
    return table(["", curve["over"], "time", "faster" if shared else "growth"], lines)


def _circumstances(known: Iterable[Row]) -> list[str]:
    lines = ["## Measured on", ""]
    for facts in known:
        versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
        lines.append(
            f"- {facts['date']}: {facts['cpu']}, {facts['cpus']} cores,"
            f" {facts['memory_bytes'] / 2**30:.0f} GiB, {facts['device']}, {facts['platform']};"
            f" {versions}; `{facts['command']}`"
        )
    return [*lines, ""]


def _conditions(row: Row) -> str:
    """Spectrum of a row, and its unusual conditions."""
    chosen = row["conditions"]
    words = [word for word in ("busy", "cold") if chosen[word]]
    words += [chosen["device"]] if chosen["device"] != "cpu" else []
    return ", ".join([row["spectrum"], *words])


def _rates(rows: Sequence[Row]) -> str:
    gemm, read = (sorted(row["rates"][rate] / 1e9 for row in rows) for rate in ("gemm", "read"))
    return (
        f"{gemm[0]:,.0f} … {gemm[-1]:,.0f} Gflop/s, {read[0]:.1f} … {read[-1]:.1f} GB/s from disk"
    )


def _memory(row: Row) -> list[str]:
    peak = max(run["peak_bytes"] for run in row["runs"][OURS])
    return [_megabytes(peak), _megabytes(row["interpreter_bytes"] + BOUND * row["weights_bytes"])]


def _walls(runs: Runs) -> list[float]:
    return [run["wall"] for run in runs]


def _computing(runs: Runs) -> list[float]:
    """Seconds of computing of the runs that report them."""
    return [run["seconds"]["computing"] for run in runs if "computing" in run["seconds"]]


def _ratio(above: Sequence[float], below: Sequence[float]) -> str:
    return _span([a / b for a, b in zip(above, below, strict=False) if b], "")


def _span(numbers: Sequence[float], unit: str) -> str:
    if not numbers:
        return "–"
    middle = f"{median(numbers):.2f}{unit}"
    if len(numbers) == 1:
        return middle
    return f"{middle} ({min(numbers):.2f} … {max(numbers):.2f})"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> list[str]:
    """Write lines of cells as a Markdown table."""
    rule = ["---"] * 1 + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(map(str, line)) + " |" for line in (head, rule, *lines)]
