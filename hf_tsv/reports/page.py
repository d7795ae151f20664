"""Report on interference as one HTML file that refers to nothing outside it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from hf_tsv.checkpoints.layout import block_and_kind
from hf_tsv.reports.drawing import MISSING, Picture
from hf_tsv.reports.templates import environment, templates
from hf_tsv.system.text import one_line, printable
from hf_tsv.system.version import __version__

if TYPE_CHECKING:
    from hf_tsv.reports.interference import InterferenceReport


def interference_page(report: InterferenceReport, pictures: Sequence[Picture], command: str) -> str:
    """HTML page with all of a report: warnings, tasks, pictures, and every weight.

    The command is the one that wrote it.

    Text from repositories is escaped. A content security policy runs only the page's own script,
    which sorts tables, and loads nothing.
    """
    script = (templates() / "sortable.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        environment()
        .get_template("interference.html.jinja")
        .render(
            report=report,
            command=one_line(command),
            names=[one_line(task["name"]) for task in report.tasks],
            weights=_weights(report),
            images=[(picture, base64.b64encode(picture.png).decode()) for picture in pictures],
            missing=MISSING,
            script=Markup(script),  # noqa: S704  (a file of this package)
            script_digest=digest,
            version=__version__,
        )
    )


def _weights(report: InterferenceReport) -> list[dict[str, Any]]:
    """Rows of the table of weights, in the order of the merge."""
    rows = []
    for name, weight in report.weights.items():
        block, kind = block_and_kind(name)
        used = [rank for rank in weight["ranks"] if rank]
        pairs = [
            (value, i, j)
            for i, values in enumerate(weight["pairs"])
            for j, value in enumerate(values[:i])
            if value
        ]
        row = {**weight, "name": printable(name), "block": block, "kind": kind}
        row["share"] = weight["sti"] / report.total if report.total else 0.0
        row["used"] = (min(used), max(used)) if used else (0, 0)
        row["worst"] = max(pairs)[1:] if pairs else None
        rows.append(row)
    return rows
