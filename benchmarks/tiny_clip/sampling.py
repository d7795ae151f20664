"""What every task is made of: its samples and prompts, and colours, backgrounds and places."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import rendering as r
from .rendering import Floats, Ints, uniform

Split: TypeAlias = Literal["train", "validation", "test"]
Draw: TypeAlias = Callable[[np.random.Generator, Ints, Split], NDArray[np.uint8]]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
COLOURS = {
    "red": (0.85, 0.15, 0.15),
    "green": (0.15, 0.65, 0.2),
    "blue": (0.2, 0.3, 0.9),
    "yellow": (0.9, 0.85, 0.2),
    "purple": (0.55, 0.2, 0.7),
    "orange": (0.95, 0.55, 0.15),
    "cyan": (0.5, 0.9, 0.85),
    "pink": (0.95, 0.6, 0.75),
}
PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)


@dataclass(frozen=True)
class Samples:
    """images: uint8 (n, 32, 32, 3); labels: int64 (n,)."""

    images: NDArray[np.uint8]
    labels: Ints


@dataclass(frozen=True)
class Task:
    """A labelled data set that can be drawn from, and one text prompt per class."""

    name: str
    prompts: tuple[str, ...]
    draw: Draw

    def samples(self, split: Split, n: int, seed: int) -> Samples:
        """n images of one split; the random streams of splits, tasks and seeds are independent."""
        entropy = [seed, zlib.crc32(self.name.encode()), SPLITS.index(split)]
        rng = np.random.default_rng(entropy)
        labels = rng.integers(len(self.prompts), size=n)
        return Samples(self.draw(rng, labels, split), labels)


def prompts(template: str, words: Sequence[str]) -> tuple[str, ...]:
    """One prompt a word."""
    return tuple(template.format(word) for word in words)


def random_colours(rng: np.random.Generator, n: int, jitter: float) -> Floats:
    """Colours (n, 3) of the palette, each channel moved by up to `jitter`."""
    return PALETTE[rng.integers(len(PALETTE), size=n)] + uniform(rng, -jitter, jitter, n, 3)


def cluttered(rng: np.random.Generator, n: int, strength: float) -> Floats:
    """Dull backgrounds (n, 32, 32, 3): a grey tone with coloured blotches of the given strength."""
    tone = uniform(rng, 0.0, 0.45, n, 3) * 0.3 + uniform(rng, 0.0, 0.45, n, 1) * 0.7
    canvas = r.plain(tone)
    for cells in (3, 8):
        blobs = r.blotches(rng, n, cells) * strength
        canvas = r.paint(canvas, blobs, uniform(rng, 0, 1, n, 3))
    return canvas


def centred_grid(
    rng: np.random.Generator, n: int, size: tuple[float, float], shift: float, tilt: float
) -> tuple[Floats, Floats]:
    """Frames (u, v) of objects of random size near the middle, off by `shift`, turned by `tilt`."""
    x, y = uniform(rng, -shift, shift, n), uniform(rng, -shift, shift, n)
    return r.object_grid(x, y, uniform(rng, *size, n), uniform(rng, -tilt, tilt, n))
