"""Eight small image-classification tasks: seven rendered, one of real data (scikit-learn's digits).

Images vary in place, size, tilt, clutter, contrast and noise.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from . import rendering as r
from .rendering import Floats, Ints, uniform
from .sampling import (
    COLOURS,
    PALETTE,
    SPLITS,
    Split,
    Task,
    centred_grid,
    cluttered,
    prompts,
    random_colours,
)

LETTERS = "ABCEHKOT"
SHAPES = tuple(r.SHAPES)
TEXTURES = tuple(r.TEXTURES)
PLACES = tuple(
    f"{row} {column}"
    for row in ("top", "middle", "bottom")
    for column in ("left", "centre", "right")
)
ORIENTATIONS = (
    "horizontal",
    "shallow falling",
    "falling",
    "steep falling",
    "vertical",
    "steep rising",
    "rising",
    "shallow rising",
)
COUNTS = ("one", "two", "three", "four", "five", "six")


def _letters(rng: np.random.Generator, labels: Ints, split: Split) -> NDArray[np.uint8]:
    """Tilted letters on clutter."""
    n = len(labels)
    u, v = centred_grid(rng, n, (0.7, 1.0), 0.1, 0.7)
    canvas = r.paint(
        cluttered(rng, n, 0.35), r.glyph_masks(LETTERS, labels, u, v), random_colours(rng, n, 0.15)
    )
    return r.to_uint8(rng, canvas, 0.04)


@lru_cache
def digit_pools() -> dict[Split, tuple[Floats, Ints]]:
    data, target = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(data))
    images = (data[order] / 16).astype(np.float32).reshape(-1, 8, 8)
    cuts = {"train": slice(0, 897), "validation": slice(897, 1197), "test": slice(1197, None)}
    return {split: (images[cuts[split]], target[order][cuts[split]]) for split in SPLITS}


def _digits(rng: np.random.Generator, labels: Ints, split: Split) -> NDArray[np.uint8]:
    images, target = digit_pools()[split]
    picks = np.empty(len(labels), dtype=np.int64)
    for digit in range(10):
        rows = labels == digit
        picks[rows] = np.resize(rng.permutation(np.flatnonzero(target == digit)), rows.sum())
    mask = images[picks].repeat(4, axis=1).repeat(4, axis=2)
    n = len(labels)
    return r.to_uint8(rng, r.paint(cluttered(rng, n, 0.2), mask, uniform(rng, 0.6, 1, n, 3)), 0.05)


def _shapes(rng: np.random.Generator, labels: Ints, split: Split) -> NDArray[np.uint8]:
    """Faint shapes, much tilted, on clutter."""
    n = len(labels)
    u, v = centred_grid(rng, n, (0.5, 0.9), 0.12, 0.8)
    mask = r.field_masks(r.SHAPES, labels, u, v) * uniform(rng, 0.5, 1, n)[:, None, None]
    return r.to_uint8(
        rng, r.paint(cluttered(rng, n, 0.35), mask, random_colours(rng, n, 0.2)), 0.04
    )


def _colours(rng: np.random.Generator, labels: Ints, split: Split) -> NDArray[np.uint8]:
    """Things in coloured light, among bits of other colours."""
    n = len(labels)
    canvas = cluttered(rng, n, 0.2)
    for paints, size, shift in (
        (random_colours(rng, n, 0.1), 0.3, 0.7),
        (PALETTE[labels], 0.7, 0.1),
    ):
        u, v = centred_grid(rng, n, (0.8 * size, 1.2 * size), shift, np.pi)
        mask = r.field_masks(r.SHAPES, rng.integers(len(SHAPES), size=n), u, v)
        canvas = r.paint(canvas, mask, paints)
    light = uniform(rng, 0.5, 1.0, n, 1) * uniform(rng, 0.75, 1.25, n, 3)
    return r.to_uint8(rng, canvas * light[:, None, None], 0.08)


def _orientation(rng: np.random.Generator, labels: Ints, split: Split) -> NDArray[np.uint8]:
    """Fine, faint gratings."""
    n = len(labels)
    step = np.pi / len(ORIENTATIONS)
    angle = labels.astype(np.float32) * step + uniform(rng, -0.2, 0.2, n) * step
    wave = r.stripes(angle, uniform(rng, 4, 7, n), uniform(rng, 0, 2 * np.pi, n))
    mask = wave * uniform(rng, 0.5, 0.9, n)[:, None, None]
    grey = r.plain(uniform(rng, 0.2, 0.8, n, 1).repeat(3, axis=1))
    return r.to_uint8(rng, r.paint(grey, mask, uniform(rng, 0, 1, n, 3)), 0.05)


def _textures(rng: np.random.Generator, labels: Ints, split: Split) -> NDArray[np.uint8]:
    """Textures in two random colours, turned any way."""
    n = len(labels)
    period, angle = uniform(rng, 0.3, 0.6, n), uniform(rng, -0.5, 0.5, n)
    u, v = r.object_grid(uniform(rng, -1, 1, n), uniform(rng, -1, 1, n), period, angle)
    mask = r.field_masks(r.TEXTURES, labels, u, v)
    paper = r.plain(uniform(rng, 0.55, 1, n, 3))
    return r.to_uint8(rng, r.paint(paper, mask, uniform(rng, 0, 0.4, n, 3)), 0.06)


def _counting(rng: np.random.Generator, labels: Ints, split: Split) -> NDArray[np.uint8]:
    """Dots of any size and strength on clutter."""
    n = len(labels)
    mask = dot_masks(rng, labels + 1, (0.16, 0.26)) * uniform(rng, 0.6, 1, n)[:, None, None]
    return r.to_uint8(rng, r.paint(cluttered(rng, n, 0.3), mask, uniform(rng, 0.5, 1, n, 3)), 0.05)


def _position(rng: np.random.Generator, labels: Ints, split: Split) -> NDArray[np.uint8]:
    """Small letters on stripes."""
    n = len(labels)
    wave = r.stripes(
        uniform(rng, 0, np.pi, n), uniform(rng, 5, 12, n), uniform(rng, 0, 2 * np.pi, n)
    )
    ground = r.paint(r.plain(uniform(rng, 0, 0.5, n, 3)), wave * 0.6, uniform(rng, 0, 0.6, n, 3))
    u, v = cell_grid(rng, labels, uniform(rng, 0.3, 0.4, n), jitter=0.1, tilt=0.5)
    mask = r.glyph_masks(LETTERS, rng.integers(len(LETTERS), size=n), u, v)
    return r.to_uint8(rng, r.paint(ground, mask, uniform(rng, 0.7, 1, n, 3)), 0.05)


def dot_masks(rng: np.random.Generator, counts: Ints, size: tuple[float, float]) -> Floats:
    """counts[i] disjoint dots in each image, in jittered cells of a 3 x 3 grid: (n, 32, 32)."""
    n = len(counts)
    cells = rng.permuted(np.tile(np.arange(9), (n, 1)), axis=1)
    total = np.zeros((n, r.SIDE, r.SIDE), dtype=np.float32)
    for place in range(counts.max()):
        x, y = (
            (cell - 1) * 0.64 + uniform(rng, -0.08, 0.08, n)
            for cell in (cells[:, place] % 3, cells[:, place] // 3)
        )
        u, v = r.object_grid(x, y, uniform(rng, *size, n), np.zeros(n, dtype=np.float32))
        dot = np.clip(0.5 + 3 * (1 - np.hypot(u, v)), 0, 1)
        total += dot * (place < counts)[:, None, None]
    return total


def cell_grid(
    rng: np.random.Generator, cells: Ints, size: Floats, jitter: float, tilt: float
) -> tuple[Floats, Floats]:
    """Frames (u, v) of objects in cell cells[i] of a 3 x 3 grid (the order of PLACES)."""
    n = len(cells)
    x, y = (
        (c - 1) * (1 - size) + uniform(rng, -jitter, jitter, n) for c in (cells % 3, cells // 3)
    )
    return r.object_grid(x, y, size, uniform(rng, -tilt, tilt, n))


FIRST_TASKS: tuple[Task, ...] = (
    Task("letters", prompts("letter {}", LETTERS), _letters),
    Task("digits", prompts("digit {}", "0123456789"), _digits),
    Task("shapes", SHAPES, _shapes),
    Task("colours", prompts("{} thing", tuple(COLOURS)), _colours),
    Task("orientation", prompts("{} stripes", ORIENTATIONS), _orientation),
    Task("textures", prompts("{} texture", TEXTURES), _textures),
    Task("counting", prompts("{} dots", COUNTS), _counting),
    Task("position", prompts("thing in the {}", PLACES), _position),
)
