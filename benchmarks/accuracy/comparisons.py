"""Tables of what is better than TSV-Merge, and by how much: without images, and with steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.accuracy.runs import ALONE, METHODS, STEPS, Seed, stepped
from benchmarks.accuracy.scores import Found, differences, row, spread, table

NAMES = {
    "tsv": "TSV-Merge",
    "wudi": "WUDI",
    "dc": "DC-Merge",
    "iso-c": "Iso-C",
    "iso-cts": "Iso-CTS",
    "task-arithmetic": "task arithmetic",
    "ties": "TIES",
    "consensus": "consensus",
    "low-rank": "low rank only",
    "orthogonal": "orthogonal only",
    "swudi": "filter SWUDI",
    "tact": "filter TACT",
    "lines": "LiNeS",
    "larv": "LARV",
    "calibrated": "calibrated",
}


def found(kept: Sequence[Found], seeds: Sequence[Seed], counts: Sequence[int]) -> Found:
    """Rows of all runs that were made with every seed, by number of tasks.

    Args:
        kept: results of the runs of each seed.
        seeds: the seeds.
        counts: numbers of tasks merged.
    """
    names = {
        "alone": ["tsv-default", "average", *ALONE],
        "chosen": list(METHODS),
        "stepped": list(stepped()),
    }
    return {
        str(count): {
            kind: {
                name: row(kept, seeds, count, name)
                for name in every
                if all(f"{name}-{count}" in run for run in kept)
            }
            for kind, every in names.items()
        }
        for count in counts
    }


def title(name: str) -> str:
    """Name of a run for people.

    Example:
        >>> title("wudi-tact-1"), title("tsv+larv"), title("tsv-default")
        ('WUDI, filter TACT', 'TSV-Merge + LARV', '**TSV-Merge**')
    """
    if name == "average":
        return "weight averaging"
    if name == "tsv-default":
        return "**TSV-Merge**"
    first, plus, step = name.partition("+")
    if plus:
        return f"{NAMES[first]} + {NAMES[step]}"
    method = next(m for m in sorted(NAMES, key=len, reverse=True) if name.startswith(m))
    rest = [
        NAMES[part]
        for part in name.removeprefix(method).strip("-").split("-")
        if part not in ("", "1")
    ]
    return ", ".join([NAMES[method], *rest])


def sections(content: Found) -> list[str]:
    """Sections of the report, in Markdown."""
    counts = list(content)
    head = ["", *(f"{count} tasks" for count in counts)]

    def rows(kind: str, against: str) -> list[list[str]]:
        names = dict.fromkeys(name for count in counts for name in content[count][kind])
        return [[title(name), *(_cell(content[c], kind, name, against) for c in counts)]
                for name in names]  # fmt: skip

    parts = [
        "## Without images: α = 1",
        "Normalised accuracy; then how many points above TSV-Merge, and in how many seeds.",
        table(head, rows("alone", "tsv-default")),
        "## With α chosen: compared with TSV-Merge",
        "Each method with its own α; points above TSV-Merge with its own.",
        table(head, rows("chosen", "tsv")),
    ]
    if any(content[count]["stepped"] for count in counts):
        parts += [
            "## With α chosen: steps",
            "Layers scaled by depth (LiNeS) or by task and layer (LARV), and singular values"
            " calibrated; points above the same method without the step.",
            table(head, rows("stepped", "")),
        ]
    return parts


def _cell(rows: Found, kind: str, name: str, against: str) -> str:
    """Normalised accuracy of a row, and how far above another it is."""
    found: Any = rows[kind].get(name)
    if found is None:
        return ""
    other = rows["chosen"].get(name.partition("+")[0]) if not against else rows[kind].get(against)
    cell = spread(found["normalised"])
    return cell if other in (None, found) else f"{cell}; {differences(other, found)}"


assert set(STEPS) <= set(NAMES)
