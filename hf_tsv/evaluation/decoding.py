"""Values of an image column as RGB images of 8 bits a channel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

TOPS = {"I": (255, 65535), "F": (1, 255, 65535)}
"""Levels that may be white in images of 32-bit numbers: it is the least that none exceeds."""


def read(value: Any, folder: Path | None) -> Image:
    """Read an image as RGB: from an image, the bytes of its file, or its path.

    As in `datasets` a mapping holds `bytes`, `path` or both. A path is read within the folder, that
    of a local dataset, and nowhere without one. A `ValueError` says what an image lacks.
    """
    if isinstance(value, bytes):
        value = {"bytes": value}
    elif isinstance(value, str):
        value = {"path": value}
    if isinstance(value, Mapping):
        value = _opened(value.get("bytes"), value.get("path"), folder)
    if value is None:
        raise ValueError("it is missing")
    return as_rgb(value)


def _opened(content: bytes | None, path: str | None, folder: Path | None) -> Image | None:
    """Image in the bytes or at the path, turned as its EXIF says; None if there is neither."""
    import datasets

    if content is None and path is None:
        return None
    if content is None and path is not None:
        path = str(_within(folder, path))
    found: Image = datasets.Image().decode_example({"bytes": content, "path": path})
    return found


def _within(folder: Path | None, path: str) -> Path:
    """The path of a file in a folder; files elsewhere are not the dataset's to show."""
    there = None if folder is None else (folder / path).resolve()
    if folder is None or there is None or not there.is_relative_to(folder.resolve()):
        where = "the dataset" if folder is None else folder
        raise ValueError(f"it is the path {path!r}, which is not in {where}")
    return there


def as_rgb(image: Image) -> Image:
    """Convert an image to RGB as Pillow does, without clipping levels of more than 8 bits.

    Of 16 bits the upper 8 are used, as Pillow does of colours. Transparency is dropped, as the
    pipelines of transformers do.
    """
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image) >> 8)
    if image.mode in TOPS:
        return _grey(_of_8_bits(np.asarray(image), TOPS[image.mode]))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, and no warning of Pillow's
    if image.mode == "La":
        image = image.convert("LA")
    return image.convert("RGB")


def _of_8_bits(values: np.ndarray, tops: tuple[int, ...]) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    white = next((top for top in tops if 0 <= low <= high <= top), None)
    if white is None:
        raise ValueError(
            f"its values reach from {low:g} to {high:g}, and what is white among them is not known"
        )
    return values // 256 if white > 255 else np.rint(values * (255 / white))


def _grey(levels: np.ndarray) -> Image:
    import PIL.Image

    return PIL.Image.fromarray(levels.astype(np.uint8)).convert("RGB")
