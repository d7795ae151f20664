"""Twelve further small image-classification tasks, two of them of real data.

Six make 14 tasks with the first eight, and six more make 20: glyphs, directions, drawings, faces,
flags and places of things, then times, curves, fillings, diagrams, real digits turned, and what was
done to real photos (both from scikit-learn).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_sample_images

from . import drawings
from . import rendering as r
from .first_tasks import digit_pools
from .rendering import Floats, Ints, uniform
from .sampling import SPLITS, Split, Task, centred_grid, cluttered, prompts, random_colours

SMALL_LETTERS = "aegmrtyz"
DIRECTIONS = (
    "right", "lower right", "bottom", "lower left", "left", "upper left", "top", "upper right",
)  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below", "inside", "around")
TURNS = ("upright", "left-turned", "upside-down", "right-turned")
TURNED_DIGITS = (2, 3, 4, 5, 7)
HOURS = ("one", "two", "four", "five", "seven", "eight", "ten", "eleven")
HOUR_NUMBERS = np.array([1, 2, 4, 5, 7, 8, 10, 11], dtype=np.float32)
FILLINGS = ("solid", "hollow", "striped", "dotted", "half-filled", "soft-edged")
BARS: dict[str, tuple[float, ...]] = {
    "rising": (0.2, 0.35, 0.5, 0.65, 0.8, 0.95),
    "falling": (0.95, 0.8, 0.65, 0.5, 0.35, 0.2),
    "peaking": (0.3, 0.55, 0.9, 0.9, 0.55, 0.3),
    "dipping": (0.9, 0.55, 0.25, 0.25, 0.55, 0.9),
    "level": (0.6, 0.6, 0.6, 0.6, 0.6, 0.6),
    "alternating": (0.85, 0.35, 0.85, 0.35, 0.85, 0.35),
}
EFFECTS = ("plain", "blurred", "grey", "framed", "pixelated", "grainy", "stencilled")
BLOCK = 42
"""Side of the blocks of the half-size photos that are dealt to the splits."""


def _small_letters(rng: np.random.Generator, labels: Ints, split: Split) -> NDArray[np.uint8]:
    """Tilted small letters on stripes."""
    n = len(labels)
    wave = r.stripes(
        uniform(rng, 0, np.pi, n), uniform(rng, 5, 12, n), uniform(rng, 0, 2 * np.pi, n)
    )
    ground = r.paint(r.plain(uniform(rng, 0.5, 1, n, 3)), wave * 0.4, uniform(rng, 0.3, 1, n, 3))
    u, v = centred_grid(rng, n, (0.85, 1.15), 0.1, 0.5)
    mask = r.glyph_masks(SMALL_LETTERS, labels, u, v)
    return r.to_uint8(rng, r.paint(ground, mask, uniform(rng, 0, 0.3, n, 3)), 0.04)


def _arrow(u: Floats, v: Floats) -> Floats:
    """An arrow to the right, positive inside."""
    shaft = np.minimum(0.22 - np.abs(v), np.minimum(u + 0.95, 0.1 - u))
    head = np.minimum(u + 0.05, 0.9 - u - 1.3 * np.abs(v))
    return np.maximum(shaft, head)


def _arrows(rng: np.random.Generator, labels: Ints, split: Split) -> NDArray[np.uint8]:
    """Arrows on clutter, each within a fifth of the step between two directions."""
    n = len(labels)
    step = np.float32(2 * np.pi / len(DIRECTIONS))
    angle = labels * step + uniform(rng, -0.3, 0.3, n) * step
    x, y = uniform(rng, -0.15, 0.15, n), uniform(rng, -0.15, 0.15, n)
    u, v = r.object_grid(x, y, uniform(rng, 0.55, 0.9, n), angle.astype(np.float32))
    mask = np.clip(0.5 + 6 * _arrow(u, v), 0, 1) * uniform(rng, 0.6, 1, n)[:, None, None]
    canvas = r.paint(cluttered(rng, n, 0.3), mask, random_colours(rng, n, 0.2))
    return r.to_uint8(rng, canvas, 0.05)


def _icons(rng: np.random.Generator, labels: Ints, split: Split) -> NDArray[np.uint8]:
    """Faint silhouettes on clutter, either way round."""
    n = len(labels)
    u, v = centred_grid(rng, n, (0.55, 0.9), 0.12, 0.6)
    u *= np.where(rng.random(n) < 0.5, -1, 1).astype(np.float32)[:, None, None]
    mask = r.plane_masks(drawings.planes("icons"), labels, u, v)
    mask *= uniform(rng, 0.5, 1, n)[:, None, None]
    canvas = r.paint(cluttered(rng, n, 0.35), mask, random_colours(rng, n, 0.2))
    return r.to_uint8(rng, canvas, 0.05)


def _faces(rng: np.random.Generator, labels: Ints, split: Split) -> NDArray[np.uint8]:
    """Round faces of any colour, a little tilted."""
    n = len(labels)
    u, v = centred_grid(rng, n, (0.7, 0.98), 0.08, 0.35)
    skin = r.field_masks({"disc": lambda a, b: 0.95 - np.hypot(a, b)}, labels * 0, u, v)
    ink = skin * (1 - r.plane_masks(drawings.planes("faces"), labels, u, v))
    canvas = r.paint(cluttered(rng, n, 0.3), skin, uniform(rng, 0.55, 1, n, 3))
    canvas = r.paint(
        canvas, ink * uniform(rng, 0.7, 1, n)[:, None, None], uniform(rng, 0, 0.25, n, 3)
    )
    return r.to_uint8(rng, canvas, 0.05)


def _flags(rng: np.random.Generator, labels: Ints, split: Split) -> NDArray[np.uint8]:
    """Flags in coloured light, tilted and waving."""
    n = len(labels)
    u, v = centred_grid(rng, n, (0.65, 0.95), 0.12, 0.4)
    v = v * 1.4 + uniform(rng, 0, 0.2, n)[:, None, None] * np.sin(
        4 * u + uniform(rng, 0, 6, n)[:, None, None]
    )
    cover = ((np.abs(u) < 1) & (np.abs(v) < 1))[..., None]
    canvas = np.where(cover, r.plane_masks(drawings.flags(), labels, u, v), cluttered(rng, n, 0.4))
    light = uniform(rng, 0.45, 1.0, n, 1) * uniform(rng, 0.7, 1.3, n, 3)
    return r.to_uint8(rng, canvas * light[:, None, None], 0.1)


def _relations(rng: np.random.Generator, labels: Ints, split: Split) -> NDArray[np.uint8]:
    """A circle and a square of two random colours."""
    n = len(labels)
    away = np.array([(-1, 0), (1, 0), (0, -1), (0, 1), (0, 0), (0, 0)], dtype=np.float32)[labels]
    middle = uniform(rng, -0.12, 0.12, n, 2)
    offset = away * uniform(rng, 0.38, 0.48, n, 1)
    offset += uniform(rng, -0.12, 0.12, n, 2) * (away == 0)
    nested = labels >= RELATIONS.index("inside")
    small, large = uniform(rng, 0.28, 0.38, n), uniform(rng, 0.75, 0.9, n)
    around = labels == RELATIONS.index("around")
    circle = np.where(nested & around, large, small)
    square = np.where(nested & ~around, large, uniform(rng, 0.28, 0.38, n))
    middle *= np.where(nested, 0.5, 1)[:, None].astype(np.float32)
    flat = np.zeros(n, dtype=np.float32)
    masks = []
    for shape, place, size in (("circle", 1, circle), ("square", -1, square)):
        x, y = (middle + place * offset).astype(np.float32).T
        u, v = r.object_grid(x, y, size.astype(np.float32), flat)
        masks.append(r.field_masks({shape: r.SHAPES[shape]}, labels * 0, u, v))
    inner = np.where(around[:, None, None], masks[1], masks[0])
    outer = np.where(around[:, None, None], masks[0], masks[1])
    canvas = r.paint(cluttered(rng, n, 0.25), outer, uniform(rng, 0.5, 1, n, 3))
    return r.to_uint8(rng, r.paint(canvas, inner, uniform(rng, 0, 0.45, n, 3)), 0.05)


def _turned_digits(rng: np.random.Generator, labels: Ints, split: Split) -> NDArray[np.uint8]:
    """Real handwritten digits that no quarter turn makes another, turned."""
    images, target = digit_pools()[split]
    n = len(labels)
    pool = np.flatnonzero(np.isin(target, TURNED_DIGITS))
    masks = images[np.resize(rng.permutation(pool), n)]
    for turn in range(len(TURNS)):
        masks[labels == turn] = np.rot90(masks[labels == turn], turn, axes=(1, 2))
    mask = masks.repeat(4, axis=1).repeat(4, axis=2)
    paper = r.plain(uniform(rng, 0.6, 1, n, 3))
    return r.to_uint8(rng, r.paint(paper, mask, uniform(rng, 0, 0.5, n, 3)), 0.06)


def _clocks(rng: np.random.Generator, labels: Ints, split: Split) -> NDArray[np.uint8]:
    """Round clocks: the long thin hand up, the short thick hand at the hour."""
    n = len(labels)
    u, v = centred_grid(rng, n, (0.85, 1.0), 0.05, 0.1)
    dial = np.clip(0.5 + 8 * (0.95 - np.hypot(u, v)), 0, 1)
    angle = (HOUR_NUMBERS[labels] * np.pi / 6)[:, None, None]
    along, across = u * np.sin(angle) - v * np.cos(angle), u * np.cos(angle) + v * np.sin(angle)
    short = np.minimum(0.13 - np.abs(across), np.minimum(along + 0.05, 0.6 - along))
    long = np.minimum(0.06 - np.abs(u), np.minimum(0.05 - v, v + 0.85))
    hands = np.clip(0.5 + 8 * np.maximum(short, long), 0, 1) * dial
    canvas = r.paint(cluttered(rng, n, 0.35), dial, uniform(rng, 0.5, 1, n, 3))
    ink = hands * uniform(rng, 0.6, 1, n)[:, None, None]
    return r.to_uint8(rng, r.paint(canvas, ink, uniform(rng, 0, 0.3, n, 3)), 0.05)


def _curves(rng: np.random.Generator, labels: Ints, split: Split) -> NDArray[np.uint8]:
    """Curves turned any way, on clutter."""
    n = len(labels)
    u, v = centred_grid(rng, n, (0.7, 1.0), 0.1, np.pi)
    mask = r.plane_masks(drawings.planes("curves"), labels, u, v)
    mask *= uniform(rng, 0.6, 1, n)[:, None, None]
    canvas = r.paint(cluttered(rng, n, 0.3), mask, random_colours(rng, n, 0.2))
    return r.to_uint8(rng, canvas, 0.05)


def _fillings(rng: np.random.Generator, labels: Ints, split: Split) -> NDArray[np.uint8]:
    """Circles, squares, triangles and crosses, filled in several ways."""
    n = len(labels)
    u, v = centred_grid(rng, n, (0.75, 1.0), 0.1, 0.4)
    names = ("circle", "square", "triangle", "cross")
    fields = {name: r.SHAPES[name] for name in names}
    which = rng.integers(len(names), size=n)
    whole = r.field_masks(fields, which, u, v)
    core = r.field_masks(
        {name: _smaller(field, 0.17) for name, field in fields.items()}, which, u, v
    )
    soft = np.empty_like(u)
    for i, field in enumerate(fields.values()):
        soft[which == i] = field(u[which == i], v[which == i])
    phase = uniform(rng, 0, 6, n)[:, None, None]
    lines = np.sin(14 * u + phase) > 0
    dots = (np.sin(13 * u + phase) > 0.1) & (np.sin(13 * v + phase) > 0.1)
    looks = {
        "solid": whole,
        "hollow": whole - core,
        "striped": whole - core * ~lines,
        "dotted": whole * dots,
        "half-filled": whole - core * (v < 0),
        "soft-edged": np.clip(1.6 * soft, 0, 1),
    }
    mask = np.choose(labels[:, None, None], list(looks.values())).astype(np.float32)
    mask *= uniform(rng, 0.7, 1, n)[:, None, None]
    canvas = r.paint(cluttered(rng, n, 0.2), mask, uniform(rng, 0.55, 1, n, 3))
    return r.to_uint8(rng, canvas, 0.05)


def _smaller(field: r.Field, margin: float) -> r.Field:
    return lambda u, v: field(u, v) - np.float32(margin)


def _charts(rng: np.random.Generator, labels: Ints, split: Split) -> NDArray[np.uint8]:
    """Diagrams of six bars."""
    n = len(labels)
    profiles = np.array(list(BARS.values()), dtype=np.float32)[labels]
    heights = profiles * uniform(rng, 0.75, 1, n, 1) + uniform(rng, -0.13, 0.13, n, 6)
    u, v = centred_grid(rng, n, (0.8, 0.98), 0.06, 0.12)
    place = (u + 1) * 3
    bar = np.clip(place, 0, 5).astype(np.intp)
    top = np.take_along_axis(heights, bar.reshape(n, -1), axis=1).reshape(u.shape)
    gap = uniform(rng, 0.05, 0.15, n)[:, None, None]
    inside = (np.abs(u) < 1) & (np.abs(place % 1 - 0.5) < 0.5 - gap)
    mask = (inside & (v < 0.95) & (v > 0.95 - 1.9 * top)).astype(np.float32)
    mask *= uniform(rng, 0.6, 1, n)[:, None, None]
    canvas = r.paint(r.plain(uniform(rng, 0.6, 1, n, 3)), mask, random_colours(rng, n, 0.1) * 0.7)
    return r.to_uint8(rng, canvas, 0.08)


@lru_cache
def photo_blocks() -> dict[Split, Floats]:
    """The two photos at half size, cut into blocks, the flatter half left out: (n, 42, 42, 3)."""
    blocks = []
    for photo in load_sample_images().images:
        half = photo[:426, :640].reshape(213, 2, 320, 2, 3).mean((1, 3), dtype=np.float32) / 255
        blocks += [
            half[y : y + BLOCK, x : x + BLOCK]
            for y in range(0, 213 - BLOCK + 1, BLOCK)
            for x in range(0, 320 - BLOCK + 1, BLOCK)
        ]
    detail = [float(np.abs(np.diff(block, axis=0)).mean()) for block in blocks]
    kept = np.argsort(detail)[len(blocks) // 2 :]
    order = np.random.default_rng(0).permutation(kept)
    cuts = np.split(order, [len(order) * 3 // 5, len(order) * 4 // 5])
    return {
        split: np.stack([blocks[i] for i in cut]) for split, cut in zip(SPLITS, cuts, strict=True)
    }


def _photos(rng: np.random.Generator, labels: Ints, split: Split) -> NDArray[np.uint8]:
    """Parts of real photos (scikit-learn's two), mirrored, recoloured and changed in other ways."""
    n = len(labels)
    blocks = photo_blocks()[split]
    x, y = rng.integers(BLOCK - r.SIDE + 1, size=(2, n))[:, :, None] + np.arange(r.SIDE)
    canvas = blocks[rng.integers(len(blocks), size=n)[:, None, None], y[:, :, None], x[:, None, :]]
    for axis in (1, 2):
        mirrored = rng.random(n) < 0.5
        canvas[mirrored] = np.flip(canvas[mirrored], axis)
    channels = rng.permuted(np.tile(np.arange(3), (n, 1)), axis=1)
    canvas = np.take_along_axis(canvas, channels[:, None, None], axis=3)
    grey = canvas.mean(axis=3, keepdims=True)
    middle = np.median(grey, axis=(1, 2), keepdims=True)
    edge = np.pad(canvas, ((0, 0), (3, 3), (3, 3), (0, 0)), mode="reflect")
    shifts = [(i, j) for i in range(7) for j in range(7)]
    blurred = sum(edge[:, i : i + r.SIDE, j : j + r.SIDE] for i, j in shifts) / len(shifts)
    tiles = canvas.reshape(n, 8, 4, 8, 4, 3).mean(axis=(2, 4))
    u, v = r.pixel_grid()
    frame = np.maximum(np.abs(u), np.abs(v)) > uniform(rng, 0.75, 0.9, n)[:, None, None]
    looks = {
        "plain": canvas,
        "blurred": blurred,
        "grey": grey.repeat(3, axis=3),
        "framed": np.where(frame[..., None], uniform(rng, 0, 1, n, 1, 1, 3), canvas),
        "pixelated": tiles.repeat(4, axis=1).repeat(4, axis=2),
        "grainy": canvas + rng.standard_normal(canvas.shape, dtype=np.float32) * 0.25,
        "stencilled": 0.1 + 0.8 * (grey > middle).repeat(3, axis=3),
    }
    changed = np.choose(labels[:, None, None, None], [looks[name] for name in EFFECTS])
    light = uniform(rng, 0.7, 1.1, n)[:, None, None, None]
    return r.to_uint8(rng, (changed * light).astype(np.float32), 0.03)


FURTHER_TASKS: tuple[Task, ...] = (
    Task("small-letters", prompts("small letter {}", SMALL_LETTERS), _small_letters),
    Task("arrows", prompts("arrow to the {}", DIRECTIONS), _arrows),
    Task("icons", prompts("{} icon", tuple(drawings.ICONS)), _icons),
    Task("faces", prompts("{} face", tuple(drawings.FACES)), _faces),
    Task("flags", prompts("flag of {}", tuple(drawings.FLAGS)), _flags),
    Task("relations", prompts("circle {} a square", RELATIONS), _relations),
    Task("turned-digits", prompts("{} digit", TURNS), _turned_digits),
    Task("clocks", prompts("{} o'clock", HOURS), _clocks),
    Task("curves", prompts("{} line", tuple(drawings.CURVES)), _curves),
    Task("fillings", prompts("{} figure", FILLINGS), _fillings),
    Task("charts", prompts("{} bars", tuple(BARS)), _charts),
    Task("photos", prompts("{} photo", EFFECTS), _photos),
)
