"""The other rules in NumPy."""

from __future__ import annotations

import numpy as np
from torch import Tensor

# The rules that came after, against NumPy in float64, written from their papers


def as_numpy(deltas: list[Tensor]) -> list[np.ndarray]:
    return [delta.double().numpy() for delta in deltas]


def consensus(deltas: list[np.ndarray], scale: float = 0.4, needed: int = 2) -> np.ndarray:
    found = np.zeros(deltas[0].shape)
    for place in np.ndindex(found.shape):
        values = [delta[place] for delta in deltas]
        total = sum(values)
        active = sum(abs(value) > scale * abs(total - value) for value in values)
        found[place] = total if active >= min(needed, len(values)) else 0
    return found
