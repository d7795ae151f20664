"""Images of every mode and form as RGB of 8 bits."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labelled import picture
from PIL import Image

from hf_tsv.evaluation import decoding

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def stored(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(image: Image.Image) -> Any:
    return np.asarray(image).tolist()


@pytest.mark.parametrize(
    ("mode", "levels", "kind"),
    [
        ("I;16", RAMP.astype(np.uint16) * 257, "PNG"),
        ("I;16", RAMP.astype(np.uint16) * 256, "TIFF"),  # shifted, not stretched
        ("I;16B", (RAMP.astype(np.uint16) * 257).astype(">u2"), "TIFF"),
        ("I", RAMP.astype(np.int32) * 257, "TIFF"),
        ("I", RAMP.astype(np.int32), "TIFF"),
        ("F", RAMP.astype(np.float32) * 257, "TIFF"),
        ("F", RAMP.astype(np.float32), "TIFF"),
        ("F", RAMP.astype(np.float32) / 255, "TIFF"),
    ],
)
def test_more_than_8_bits_are_the_same_image_as_8_bits(mode: str, levels: Any, kind: str) -> None:
    content = stored(Image.fromarray(levels), kind)
    opened = Image.open(io.BytesIO(content))
    assert opened.mode == mode
    found = decoding.read(content, None)
    assert found.mode == "RGB"
    assert pixels(found) == pixels(Image.fromarray(RAMP).convert("RGB"))


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV"]
)
def test_other_modes_are_converted_as_by_pillow(mode: str) -> None:
    image = picture("cat", 0)
    image = image.convert("RGBA").convert(mode) if mode == "RGBa" else image.convert(mode)
    assert pixels(decoding.as_rgb(image)) == pixels(image.convert("RGB"))


def test_transparency_is_dropped_without_a_warning() -> None:
    image = picture("dog", 0).convert("P")
    content = stored(image, transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decoding.read(content, None)
    assert pixels(found) == pixels(image.convert("RGB"))


@pytest.mark.parametrize("levels", [[-1.0, 1.0], [0.0, 1e6], [0.0, np.nan], [0.0, np.inf]])
def test_numbers_of_no_known_scale_are_refused(levels: list[float]) -> None:
    image = Image.fromarray(np.array([levels], dtype=np.float32))
    with pytest.raises(ValueError, match=r"its values reach from .* to .* is not known"):
        decoding.as_rgb(image)


def test_every_form_is_the_same_image(tmp_path: Path) -> None:
    image = picture("emu", 0)
    content = stored(image)
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "1.png").write_bytes(content)
    forms = [
        image, content, {"bytes": content, "path": None}, {"bytes": content},
        {"bytes": content, "path": "/nowhere/1.png"}, "a/1.png",
        {"bytes": None, "path": "a/1.png"}, str(tmp_path / "data" / "a" / "1.png"),
    ]  # fmt: skip
    found = [pixels(decoding.read(form, tmp_path / "data")) for form in forms]
    assert found == [pixels(image)] * len(forms)


def test_a_photograph_is_turned_as_its_camera_says() -> None:
    image = picture("emu", 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    found = decoding.read({"bytes": stored(image, "PNG", exif=exif)}, None)
    assert found.size == image.size[::-1]


@pytest.mark.parametrize("path", ["../secret.png", "{}/secret.png", "link.png"])
def test_files_outside_the_dataset_are_not_read(tmp_path: Path, path: str) -> None:
    picture("cat", 0).save(tmp_path / "secret.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    for folder in (tmp_path / "data", None):
        with pytest.raises(ValueError, match=r"it is the path .*png', which is not in "):
            decoding.read(path.format(tmp_path), folder)


@pytest.mark.parametrize("nothing", [None, {"bytes": None, "path": None}, {}])
def test_a_missing_image_is_named_as_one(nothing: Any) -> None:
    with pytest.raises(ValueError, match="it is missing"):
        decoding.read(nothing, None)
