"""Image-caption pairs the base model is pretrained on: clean drawings, loosely captioned."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from . import rendering as r
from .rendering import Floats, Ints, uniform
from .tasks import (
    COLOURS,
    COUNTS,
    LETTERS,
    ORIENTATIONS,
    PALETTE,
    PLACES,
    SHAPES,
    TEXTURES,
    cell_grid,
    centred_grid,
    dot_masks,
)

GLYPHS = LETTERS + "0123456789"
CHUNK = 200
FRAMES = ("{}", "a picture of {}", "this is a photo of {}.", "a drawing of {}", "there is {}")


def scenes(n: int, seed: int) -> tuple[NDArray[np.uint8], list[str]]:
    """n pairs: uint8 (n, 32, 32, 3) and captions that name some of what is to be seen."""
    rng = np.random.default_rng([seed, 0x5CE2E])
    kinds = (_glyphs, _shapes, _glyphs, _things, _dots, _stripes, _textures)
    images, captions = [], []
    for start in range(0, n, CHUNK):
        kind = kinds[start // CHUNK % len(kinds)]
        size = min(CHUNK, n - start)
        masks, colours, texts = kind(rng, size)
        dull = uniform(rng, 0, 0.3, size, 1) + uniform(rng, 0, 0.15, size, 3)
        paints = PALETTE[colours] + uniform(rng, -0.1, 0.1, size, 3)
        images.append(r.to_uint8(rng, r.paint(r.plain(dull), masks, paints), 0.03))
        frames = rng.integers(len(FRAMES), size=size)
        captions += [FRAMES[f].format(text) for f, text in zip(frames, texts, strict=True)]
    return np.concatenate(images), captions


Part = tuple[Floats, Ints, list[str]]


def _colour(rng: np.random.Generator, n: int) -> tuple[Ints, Iterator[str]]:
    """Colour indices (n,), and the word for each, which some captions leave out."""
    which = rng.integers(len(PALETTE), size=n)
    said = rng.random(n) < 0.6
    words = tuple(COLOURS)
    return which, (words[w] + " " if s else "" for w, s in zip(which, said, strict=True))


def _shapes(rng: np.random.Generator, n: int) -> Part:
    what = rng.integers(len(SHAPES), size=n)
    u, v = centred_grid(rng, n, (0.6, 0.9), 0.1, 0.15)
    colour, words = _colour(rng, n)
    captions = [f"{w}{SHAPES[k]}" for k, w in zip(what, words, strict=True)]
    return r.field_masks(r.SHAPES, what, u, v), colour, captions


def _glyphs(rng: np.random.Generator, n: int) -> Part:
    what = rng.integers(len(GLYPHS), size=n)
    u, v = centred_grid(rng, n, (0.8, 1.0), 0.08, 0.1)
    colour, words = _colour(rng, n)
    names = ["digit" if g.isdigit() else "letter" for g in GLYPHS]
    captions = [f"{w}{names[k]} {GLYPHS[k]}" for k, w in zip(what, words, strict=True)]
    return r.glyph_masks(GLYPHS, what, u, v), colour, captions


def _things(rng: np.random.Generator, n: int) -> Part:
    what, where = rng.integers(len(SHAPES), size=n), rng.integers(len(PLACES), size=n)
    u, v = cell_grid(rng, where, uniform(rng, 0.25, 0.4, n), jitter=0.08, tilt=0.15)
    colour, words = _colour(rng, n)
    captions = [f"{w}thing in the {PLACES[k]}" for k, w in zip(where, words, strict=True)]
    return r.field_masks(r.SHAPES, what, u, v), colour, captions


def _dots(rng: np.random.Generator, n: int) -> Part:
    counts = rng.integers(1, len(COUNTS) + 1, size=n)
    colour, words = _colour(rng, n)
    captions = [f"{COUNTS[c - 1]} {w}dots" for c, w in zip(counts, words, strict=True)]
    return dot_masks(rng, counts, (0.2, 0.24)), colour, captions


def _stripes(rng: np.random.Generator, n: int) -> Part:
    which = rng.integers(len(ORIENTATIONS), size=n)
    angle = which.astype(np.float32) * np.float32(np.pi / len(ORIENTATIONS))
    mask = r.stripes(angle, uniform(rng, 5, 8, n), uniform(rng, 0, 2 * np.pi, n))
    colour, words = _colour(rng, n)
    captions = [f"{w}{ORIENTATIONS[k]} stripes" for k, w in zip(which, words, strict=True)]
    return mask, colour, captions


def _textures(rng: np.random.Generator, n: int) -> Part:
    which = rng.integers(len(TEXTURES), size=n)
    x, y = uniform(rng, -0.5, 0.5, n), uniform(rng, -0.5, 0.5, n)
    u, v = r.object_grid(x, y, uniform(rng, 0.4, 0.6, n), uniform(rng, -0.1, 0.1, n))
    colour, words = _colour(rng, n)
    captions = [f"{w}{TEXTURES[k]} texture" for k, w in zip(which, words, strict=True)]
    return r.field_masks(r.TEXTURES, which, u, v), colour, captions
