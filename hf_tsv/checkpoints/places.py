"""Places of local folders by what they hold, as what others may read names them without a path."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants

from hf_tsv.checkpoints.reference import PinnedCheckpoint

FOLDERS = Path(constants.HF_HOME) / "hf-tsv" / "folders"
"""One small file for each fingerprint, with the path of its folder on this machine."""


def note(fingerprint: str | None, pinned: PinnedCheckpoint) -> None:
    """Remember where a local folder is; a machine that cannot is only less comfortable."""
    if fingerprint is not None and pinned.is_local:
        with suppress(OSError, ValueError):
            FOLDERS.mkdir(parents=True, exist_ok=True)
            path = str(Path(pinned.ref).expanduser().absolute())
            (FOLDERS / fingerprint).write_text(path, encoding="utf-8")


def noted(fingerprint: str | None) -> str:
    """Path of the folder that had this fingerprint, which may be gone; empty if none is known."""
    if fingerprint is not None and re.fullmatch("[0-9a-f]{64}", fingerprint):
        with suppress(OSError, ValueError):
            return (FOLDERS / fingerprint).read_text(encoding="utf-8")
    return ""
