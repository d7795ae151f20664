"""Small drawings by PIL, one plane of (48, 48) each, to be laid on images by `plane_masks`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .rendering import PLANE_SIDE, Floats

Pen = ImageDraw.ImageDraw
Sketch = Callable[[Pen], None]
Points = NDArray[np.float64]

FINE = 4
"""Drawn so many times larger, and then shrunk, for smooth edges."""
CANVAS = FINE * PLANE_SIDE


def _at(*numbers: float) -> list[float]:
    """Coordinates x, y, x, y, … in [-1, 1] as those of the canvas."""
    return [(number + 1) * CANVAS / 2 for number in numbers]


def _width(share: float) -> int:
    return round(share * CANVAS / 2)


def _house(pen: Pen) -> None:
    pen.polygon(_at(-0.95, -0.05, 0, -0.85, 0.95, -0.05), fill=255)
    pen.rectangle(_at(-0.65, -0.05, 0.65, 0.85), fill=255)
    pen.rectangle(_at(-0.2, 0.25, 0.2, 0.85), fill=0)


def _tree(pen: Pen) -> None:
    for top, half in ((-0.95, 0.5), (-0.55, 0.65), (-0.15, 0.8)):
        pen.polygon(_at(-half, top + 0.65, 0, top, half, top + 0.65), fill=255)
    pen.rectangle(_at(-0.15, 0.4, 0.15, 0.95), fill=255)


def _car(pen: Pen) -> None:
    pen.polygon(_at(-0.55, 0, -0.35, -0.5, 0.35, -0.5, 0.6, 0), fill=255)
    pen.rectangle(_at(-0.95, 0, 0.95, 0.4), fill=255)
    for x in (-0.5, 0.5):
        pen.ellipse(_at(x - 0.3, 0.15, x + 0.3, 0.75), fill=0)
        pen.ellipse(_at(x - 0.22, 0.23, x + 0.22, 0.67), fill=255)


def _boat(pen: Pen) -> None:
    pen.polygon(_at(-0.95, 0.35, 0.95, 0.35, 0.6, 0.85, -0.6, 0.85), fill=255)
    pen.polygon(_at(0.08, -0.95, 0.08, 0.2, 0.85, 0.2), fill=255)
    pen.polygon(_at(-0.08, -0.6, -0.08, 0.2, -0.6, 0.2), fill=255)


def _fish(pen: Pen) -> None:
    pen.ellipse(_at(-0.95, -0.45, 0.5, 0.45), fill=255)
    pen.polygon(_at(0.3, 0, 0.95, -0.55, 0.95, 0.55), fill=255)
    pen.ellipse(_at(-0.7, -0.25, -0.45, 0), fill=0)


def _cup(pen: Pen) -> None:
    pen.ellipse(_at(0.1, -0.4, 0.95, 0.45), outline=255, width=_width(0.2))
    pen.polygon(_at(-0.8, -0.75, 0.5, -0.75, 0.35, 0.8, -0.65, 0.8), fill=255)


def _key(pen: Pen) -> None:
    pen.ellipse(_at(-0.95, -0.45, -0.05, 0.45), outline=255, width=_width(0.22))
    pen.line(_at(-0.1, 0, 0.95, 0), fill=255, width=_width(0.2))
    for x in (0.55, 0.85):
        pen.line(_at(x, 0, x, 0.4), fill=255, width=_width(0.18))


def _umbrella(pen: Pen) -> None:
    pen.pieslice(_at(-0.95, -0.85, 0.95, 0.85), 180, 360, fill=255)
    pen.line(_at(0, 0, 0, 0.7), fill=255, width=_width(0.16))
    pen.arc(_at(-0.45, 0.4, 0.08, 0.95), 0, 180, fill=255, width=_width(0.16))


ICONS: Mapping[str, Sketch] = {
    "house": _house,
    "tree": _tree,
    "car": _car,
    "boat": _boat,
    "fish": _fish,
    "cup": _cup,
    "key": _key,
    "umbrella": _umbrella,
}


def _stroke(points: Points) -> Sketch:
    """A thick line through points (m, 2)."""

    def draw(pen: Pen) -> None:
        ends = [tuple(_at(x, y)) for x, y in points]
        pen.line(ends, fill=255, width=_width(0.22), joint="curve")  # type: ignore[arg-type]

    return draw


def _curves() -> dict[str, Sketch]:
    t = np.linspace(0, 1, 60)
    x = 1.8 * t - 0.9
    spiral = (0.1 + 0.75 * t) * np.exp(4j * np.pi * t)
    bend = 0.85 * np.exp(1j * np.pi * t)
    loop = x + 0.7 * np.sin(2 * np.pi * t) + 1j * (0.5 - 1.2 * np.sin(np.pi * t))
    zigzag = np.array([(-0.9, 0.4), (-0.45, -0.4), (0, 0.4), (0.45, -0.4), (0.9, 0.4)])
    points = {
        "straight": np.stack([x, 0 * x], axis=1),
        "bent": np.stack([bend.real, bend.imag - 0.4], axis=1),
        "wavy": np.stack([x, 0.45 * np.sin(2 * np.pi * t)], axis=1),
        "zigzag": zigzag,
        "spiral": np.stack([spiral.real, spiral.imag], axis=1),
        "looped": np.stack([loop.real, loop.imag], axis=1),
    }
    return {name: _stroke(p) for name, p in points.items()}


CURVES: Mapping[str, Sketch] = _curves()


def _face(mouth: Sketch, eyes: Sketch) -> Sketch:
    def draw(pen: Pen) -> None:
        pen.ellipse(_at(-0.95, -0.95, 0.95, 0.95), fill=255)
        eyes(pen)
        mouth(pen)

    return draw


def _open_eyes(pen: Pen) -> None:
    for x in (-0.38, 0.38):
        pen.ellipse(_at(x - 0.17, -0.45, x + 0.17, -0.1), fill=0)


def _wink(pen: Pen) -> None:
    pen.ellipse(_at(-0.55, -0.45, -0.21, -0.1), fill=0)
    pen.line(_at(0.18, -0.27, 0.6, -0.27), fill=0, width=_width(0.14))


def _frown_eyes(pen: Pen) -> None:
    pen.line(_at(-0.65, -0.5, -0.15, -0.12), fill=0, width=_width(0.18))
    pen.line(_at(0.65, -0.5, 0.15, -0.12), fill=0, width=_width(0.18))


def _closed_eyes(pen: Pen) -> None:
    for x in (-0.38, 0.38):
        pen.line(_at(x - 0.21, -0.27, x + 0.21, -0.27), fill=0, width=_width(0.14))


def _smile(pen: Pen) -> None:
    pen.chord(_at(-0.55, -0.3, 0.55, 0.7), 15, 165, fill=0)


def _pout(pen: Pen) -> None:
    pen.arc(_at(-0.5, 0.25, 0.5, 1.1), 200, 340, fill=0, width=_width(0.17))


def _gape(pen: Pen) -> None:
    pen.ellipse(_at(-0.24, 0.1, 0.24, 0.75), fill=0)


def _flat(pen: Pen) -> None:
    pen.line(_at(-0.45, 0.42, 0.45, 0.42), fill=0, width=_width(0.16))


FACES: Mapping[str, Sketch] = {
    "happy": _face(_smile, _open_eyes),
    "sad": _face(_pout, _open_eyes),
    "surprised": _face(_gape, _open_eyes),
    "neutral": _face(_flat, _open_eyes),
    "winking": _face(_smile, _wink),
    "angry": _face(_pout, _frown_eyes),
    "sleeping": _face(_gape, _closed_eyes),
}

_WHITE, _BLACK, _RED, _GREEN = (240, 240, 240), (20, 20, 20), (205, 20, 40), (0, 140, 70)
_BLUE, _YELLOW = (0, 60, 160), (250, 205, 0)


def _bands(*colours: tuple[int, int, int], upright: bool) -> Sketch:
    def draw(pen: Pen) -> None:
        edges = np.linspace(-1, 1, len(colours) + 1)
        for low, high, colour in zip(edges, edges[1:], colours, strict=False):
            corners = (low, -1, high, 1) if upright else (-1, low, 1, high)
            pen.rectangle(_at(*corners), fill=colour)

    return draw


def _sweden(pen: Pen) -> None:
    pen.rectangle(_at(-1, -1, 1, 1), fill=_BLUE)
    pen.rectangle(_at(-0.45, -1, -0.1, 1), fill=_YELLOW)
    pen.rectangle(_at(-1, -0.2, 1, 0.2), fill=_YELLOW)


def _switzerland(pen: Pen) -> None:
    pen.rectangle(_at(-1, -1, 1, 1), fill=_RED)
    pen.rectangle(_at(-0.15, -0.7, 0.15, 0.7), fill=_WHITE)
    pen.rectangle(_at(-0.5, -0.22, 0.5, 0.22), fill=_WHITE)


def _japan(pen: Pen) -> None:
    pen.rectangle(_at(-1, -1, 1, 1), fill=_WHITE)
    pen.ellipse(_at(-0.42, -0.63, 0.42, 0.63), fill=_RED)


FLAGS: Mapping[str, Sketch] = {
    "france": _bands(_BLUE, _WHITE, _RED, upright=True),
    "italy": _bands(_GREEN, _WHITE, _RED, upright=True),
    "germany": _bands(_BLACK, _RED, _YELLOW, upright=False),
    "poland": _bands(_WHITE, _RED, upright=False),
    "ukraine": _bands(_BLUE, _YELLOW, upright=False),
    "japan": _japan,
    "sweden": _sweden,
    "switzerland": _switzerland,
}
_SETS = {"icons": ICONS, "curves": CURVES, "faces": FACES}


def _drawn(sketch: Sketch, mode: str) -> Floats:
    image = Image.new(mode, (CANVAS, CANVAS))
    sketch(ImageDraw.Draw(image))
    small = image.resize((PLANE_SIDE, PLANE_SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255


@lru_cache
def planes(name: str) -> Floats:
    """The drawings of a set (`icons`, `curves` or `faces`): (n, 48, 48), ink is 1."""
    return np.stack([_drawn(sketch, "L") for sketch in _SETS[name].values()])


@lru_cache
def flags() -> Floats:
    """All flags in colour, stretched to squares: (n, 48, 48, 3)."""
    return np.stack([_drawn(sketch, "RGB") for sketch in FLAGS.values()])
