"""Vectorised drawing on batches of small RGB images.

Canvases are float32 in [0, 1], shape (n, 32, 32, 3); masks are (n, 32, 32); values are (n,).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Field = Callable[[Floats, Floats], Floats]

SIDE = 32
PLANE_SIDE = 48


def uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> Floats:
    """Uniform float32 numbers in [low, high)."""
    return rng.uniform(low, high, shape).astype(np.float32)


def pixel_grid() -> tuple[Floats, Floats]:
    """Centres of the pixels as (x, y), each (1, 32, 32), the image spanning [-1, 1]."""
    axis = ((np.arange(SIDE) + 0.5) * 2 / SIDE - 1).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    return x[None], y[None]


def object_grid(x0: Floats, y0: Floats, size: Floats, angle: Floats) -> tuple[Floats, Floats]:
    """Pixel coordinates (u, v), each (n, 32, 32), in the frame of objects that span [-1, 1]."""
    x, y = pixel_grid()
    dx, dy = x - x0[:, None, None], y - y0[:, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    scale = size[:, None, None]
    return (cos * dx + sin * dy) / scale, (cos * dy - sin * dx) / scale


def _cross(u: Floats, v: Floats) -> Floats:
    a, b = np.abs(u), np.abs(v)
    return np.maximum(np.minimum(0.95 - a, 0.3 - b), np.minimum(0.95 - b, 0.3 - a))


#: Signed "insideness" of each shape in its own frame: positive inside, about 1 at the centre.
SHAPES: dict[str, Field] = {
    "circle": lambda u, v: 0.9 - np.hypot(u, v),
    "square": lambda u, v: 0.8 - np.maximum(np.abs(u), np.abs(v)),
    "triangle": lambda u, v: np.minimum(0.7 - v, 0.45 * (v + 0.95) - 0.8 * np.abs(u)),
    "cross": _cross,
    "ring": lambda u, v: 0.22 - np.abs(np.hypot(u, v) - 0.7),
    "crescent": lambda u, v: np.minimum(0.95 - np.hypot(u, v), np.hypot(u - 0.5, v) - 0.75),
}


def field_masks(fields: dict[str, Field], which: Ints, u: Floats, v: Floats) -> Floats:
    """Soft masks (n, 32, 32) of the which[i]-th field on the grid (u[i], v[i])."""
    inside = np.empty_like(u)
    for index, field in enumerate(fields.values()):
        rows = which == index
        inside[rows] = field(u[rows], v[rows])
    return np.clip(0.5 + 6 * inside, 0, 1)


def _cell(g: Floats) -> Floats:
    """Distance to the middle of the unit cell, in [0, 0.5]."""
    return np.abs(g - np.floor(g) - 0.5)


#: Textures as functions of coordinates in units of their period: positive is foreground.
TEXTURES: dict[str, Field] = {
    "checkered": lambda u, v: np.sin(np.pi * u) * np.sin(np.pi * v),
    "grid": lambda u, v: np.maximum(_cell(u), _cell(v)) - 0.36,
    "dotted": lambda u, v: 0.3 - np.hypot(_cell(u), _cell(v)),
    "wavy": lambda u, v: np.sin(2 * np.pi * (v + 0.25 * np.sin(np.pi * u))),
    "ringed": lambda u, v: np.sin(2 * np.pi * np.hypot(u, v)),
    "radial": lambda u, v: np.sin(7 * np.arctan2(v, u)),
}


@lru_cache
def _glyph_atlas(characters: str) -> Floats:
    """PIL's own font, one character per plane: (len(characters), 48, 48)."""
    font = ImageFont.load_default(size=PLANE_SIDE)
    planes = []
    for character in characters:
        image = Image.new("L", (PLANE_SIDE, PLANE_SIDE))
        middle = PLANE_SIDE / 2
        ImageDraw.Draw(image).text((middle, middle), character, fill=255, font=font, anchor="mm")
        planes.append(np.asarray(image, dtype=np.float32) / 255)
    return np.stack(planes)


def plane_masks(planes: Floats, which: Ints, u: Floats, v: Floats) -> Floats:
    """planes[which[i]] (48, 48), or (48, 48, c), seen on the grid (u[i], v[i]); 0 outside."""
    column, row = ((g + 1) * PLANE_SIDE / 2 for g in (u, v))
    inside = (np.abs(u) < 1) & (np.abs(v) < 1)
    last = PLANE_SIDE - 1
    rows, columns = (np.clip(g, 0, last).astype(np.intp) for g in (row, column))
    seen = planes[which[:, None, None], rows, columns]
    return seen * inside.reshape(inside.shape + (1,) * (seen.ndim - inside.ndim))


def glyph_masks(characters: str, which: Ints, u: Floats, v: Floats) -> Floats:
    """Masks (n, 32, 32) of characters[which[i]] drawn on the grid (u[i], v[i])."""
    return plane_masks(_glyph_atlas(characters), which, u, v)


def stripes(angle: Floats, period: Floats, phase: Floats) -> Floats:
    """Sine gratings (n, 32, 32) in [0, 1] along `angle` (radians), `period` in pixels."""
    x, y = pixel_grid()
    across = y * np.cos(angle)[:, None, None] - x * np.sin(angle)[:, None, None]
    turns = across * SIDE / 2 / period[:, None, None]
    return 0.5 + 0.5 * np.sin(2 * np.pi * turns + phase[:, None, None])


def blotches(rng: np.random.Generator, n: int, cells: int) -> Floats:
    """Smooth random fields (n, 32, 32) in [0, 1], with about `cells` blobs a side."""
    coarse = uniform(rng, 0, 1, n, cells + 1, cells + 1)
    at = np.linspace(0, cells, SIDE, endpoint=False, dtype=np.float32)
    low, part = at.astype(np.intp), at % 1
    rows = coarse[:, low] * (1 - part)[:, None] + coarse[:, low + 1] * part[:, None]
    return rows[:, :, low] * (1 - part) + rows[:, :, low + 1] * part


def plain(colours: Floats) -> Floats:
    """Canvases (n, 32, 32, 3) of one colour (n, 3) each."""
    return np.broadcast_to(colours[:, None, None], (len(colours), SIDE, SIDE, 3)).copy()


def paint(canvas: Floats, mask: Floats, colours: Floats) -> Floats:
    """Lay `colours` (n, 3) over the canvas where the mask is 1."""
    cover = mask[..., None]
    return canvas * (1 - cover) + colours[:, None, None] * cover


def to_uint8(rng: np.random.Generator, canvas: Floats, noise: float) -> NDArray[np.uint8]:
    """Add Gaussian pixel noise of that standard deviation and quantise."""
    grain = rng.standard_normal(canvas.shape, dtype=np.float32) * noise
    return (np.clip(canvas + grain, 0, 1) * 255).astype(np.uint8)
