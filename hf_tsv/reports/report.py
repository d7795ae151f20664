"""The form that the reports of all verbs share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_tsv.reports.drawing import Picture, attempted
from hf_tsv.system.folders import whole_folder

SCHEMA_VERSION = 1
"""Version of the fields of all reports, counted up when one is renamed or changes its meaning."""


@dataclass(frozen=True)
class Report:
    """Dataclass of what a verb did or found."""

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
