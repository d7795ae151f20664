"""Trying a merged model on an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from hf_tsv.system.errors import HfTsvError
from hf_tsv.ui.commands import CommandError

LONGEST_SIDE = 20_000  # pixels


class Trial:
    """Zero-shot classification by one merged model at a time, which stays loaded."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._loaded: tuple[Path, float] | None = None
        self._classify: Any = None

    def scores(self, folder: Path, image: str, labels: Sequence[str]) -> dict[str, float]:
        """Probability of each label for an image.

        Raises:
            [`CommandError`]: the model is none that compares images with texts, or the image cannot
                be read.
        """
        from PIL import Image

        from hf_tsv.models.loading import pipeline

        try:
            with Image.open(image) as opened:
                if max(opened.size) > LONGEST_SIDE:
                    raise CommandError("The image is too large.", "Upload a smaller one.")
                picture = opened.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            raise CommandError("The image cannot be read.", "Upload a PNG or JPEG file.") from None
        with self._lock:
            known = folder, (folder / "config.json").stat().st_mtime
            try:
                if self._loaded != known:
                    self._classify = self._loaded = None
                    self._classify = pipeline(
                        "zero-shot-image-classification", folder, device="cpu", progress=False
                    )
                    self._loaded = known
                found = self._classify(picture, candidate_labels=list(labels))
            except HfTsvError as error:
                raise CommandError(error.message, error.hint or "") from None
        return {entry["label"]: entry["score"] for entry in found}

    def forget(self, folder: Path) -> None:
        """Unload the model of a folder, if it is loaded."""
        with self._lock:
            if self._loaded is not None and self._loaded[0] == folder:
                self._classify = self._loaded = None
