"""Shapes and ranks of weights, which headers tell: imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a weight seen as a matrix: a convolution has one row an output channel.

    Example:
        >>> matrix_shape((768, 3, 32, 32))
        (768, 3072)
    """
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def rank_at(fraction: float, shape: Sequence[int]) -> int:
    """⌊fraction · k⌋ of a weight (d_out, d_in), at least 1.

    Example:
        >>> rank_at(0.29, (100, 300)), rank_at(0.001, (100, 300))
        (29, 1)
    """
    return max(1, int(fraction * min(shape) + 1e-9))


def default_rank(shape: Sequence[int], tasks: int) -> int:
    """Rank kept of each task, r = max(1, ⌊k/T⌋) (section 4.1).

    Example:
        >>> default_rank((768, 3072), tasks=8)
        96
    """
    return max(1, min(shape) // tasks)
