"""The form that the reports of all verbs share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from html import escape
from pathlib import Path
from typing import Any, ClassVar

from hf_tsv.reports.drawing import Picture, attempted
from hf_tsv.system.folders import whole_folder
from hf_tsv.system.text import human_bytes, one_line, shortened

FACTS = {
    "method": "{}", "kind": "{}", "model_class": "{}", "total": "interference {:.4g}",
    "accuracy": "accuracy {:.1%}", "full": "accuracy {:.1%}", "ratio": "{:.1%} of the checkpoint",
}  # fmt: skip
"""Fields that a line has, and how it says them."""

FEW = 4
"""Most entries of a list or dictionary that are shown; of a longer one the number is."""

SCHEMA_VERSION = 1
"""Version of the fields of all reports, counted up when one is renamed or changes its meaning."""


@dataclass(frozen=True, repr=False)
class Report:
    """Dataclass of what a verb did or found, short where Python or a notebook shows it."""

    HEAT: ClassVar[bool] = False
    """Whether the numbers of the table are coloured by their size."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.headline())})"

    def headline(self) -> Iterator[str]:
        """Say what it is about, where the result is, and the facts that fit into one line."""
        known = vars(self)
        of = known.get("source") or known.get("factors") or {}
        about = repr(of.get("ref") or known.get("ref") or known.get("folder"))
        if several := known.get("inputs", known.get("tasks")):
            about = f"{len(several)} task{'s' * (len(several) != 1)}"
        output, url = known.get("output"), known.get("url") or known.get("repo_id")
        yield f"{about} → {Path(output).name if output else url!r}" if output or url else about
        yield from ["dry run"] if known.get("dry_run") else []
        yield from (form.format(known[n]) for n, form in FACTS.items() if known.get(n) is not None)
        treated = known.get("weights", {}) if "method" in known else {}
        yield from (f"{n} {name}" for name, n in treated.items() if n and name != "copied")
        size = known.get("factors_bytes") or known.get("output_bytes") or known.get("bytes")
        yield from [human_bytes(size)] if size else []
        yield from [f"{known['seconds']:.1f} s"] if "seconds" in known else []

    def rows(self) -> list[tuple[str, str]]:
        """Name and short text of every field that has a value."""
        said = ((own.name, getattr(self, own.name)) for own in fields(self))
        return [(name, _text(name, value)) for name, value in said if value not in (None, [], {})]

    def table(self) -> list[list[str | float]]:
        """Results in rows, below a row of heads; none by default."""
        return []

    def __str__(self) -> str:
        lines = [repr(self), *(f"  {name}: {value}" for name, value in self.rows())]
        return "\n".join(lines + ["  " + "  ".join(map(_cell, row)) for row in self.table()])

    def _repr_html_(self) -> str:
        """Summary for a notebook; text from elsewhere is escaped."""
        head, *body = self.table() or [[]]
        numbers = [value for row in body for value in row if isinstance(value, float) and value]
        low, high = min(numbers, default=0.0), max(numbers, default=0.0)

        def cell(value: str | float) -> str:
            style = ""
            if self.HEAT and isinstance(value, float):
                share = max(0.0, value - low) / (high - low) if high > low else 0.0
                style = f' style="background: rgba(230, 120, 30, {0.05 + 0.75 * share:.2f})"'
            return f"<td{style}>{escape(_cell(value))}</td>"

        heads = "".join(f"<th>{escape(_cell(value))}</th>" for value in head)
        lines = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in body)
        results = f"<table><tr>{heads}</tr>{lines}</table>" if body else ""
        rows = "".join(f"<tr><th>{escape(n)}</th>{cell(value)}</tr>" for n, value in self.rows())
        all_of_it = f"<details><summary>all fields</summary><table>{rows}</table></details>"
        return f"<p><code>{escape(repr(self))}</code></p>{results}{all_of_it}"

    def to_dict(self) -> dict[str, Any]:
        """Object that `--json` prints."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    def write(self, folder: Path, file: str, draw: Callable[[], Sequence[Picture]]) -> None:
        """Write report and pictures into a folder that appears only when complete."""
        drawn = attempted(draw) or []
        with whole_folder(folder) as staging:
            text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
            (staging / file).write_text(text, encoding="utf-8")
            for picture in drawn:
                (staging / picture.file).write_bytes(picture.png)


def _cell(value: str | float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else one_line(value)


def _text(name: str, value: Any) -> str:
    """Value of a field in a few words."""
    if isinstance(value, dict) and value.keys() >= {"ref", "revision"}:
        revision = f"@{value['revision'][:8]}" if value["revision"] else ""
        return one_line(f"{value['ref']}{revision}")
    if isinstance(value, dict | list) and len(value) > FEW:
        return f"{len(value)} entries"
    if isinstance(value, dict):
        return ", ".join(f"{one_line(str(key))}: {_text(name, value[key])}" for key in value)
    if isinstance(value, list):
        return ", ".join(_text(name, item) for item in value)
    if type(value) is int and name.endswith("bytes"):
        return human_bytes(value)
    return _cell(value) if isinstance(value, str | float) else shortened(value)
