"""Grids of floating-point types: numbers that lie on one, and what rounding to it leaves."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROWS = 64
"""Rows that are compared at a time, so that no copy of a whole matrix is made."""

ENTRIES = 32768
"""Most entries of a weight that tell whether it was rounded; fewer than `FEWEST` tell nothing."""

FEWEST = 1024

UNCHANGED = 0.25
"""Share of entries without a change from which on W0 was not rounded: that would change them. Of
float16 numbers an eighth is on the grid of bfloat16 already.
"""


def on_grid(weight: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether every entry of a weight is a number of a coarser type."""
    rows = weight.reshape(1) if weight.dim() == 0 else weight
    parts = torch.split(rows, ROWS)
    return all(torch.equal(part, part.to(dtype).to(part.dtype)) for part in parts)


def rounding_error(exact: Tensor, rounded: Tensor) -> float:
    """Frobenius norm of the difference of a weight and its rounded copy."""
    pairs = zip(_blocks(exact), _blocks(rounded), strict=True)
    return math.hypot(*(float(torch.linalg.vector_norm(a - b.to(a.dtype))) for a, b in pairs))


def _blocks(weight: Tensor) -> tuple[Tensor, ...]:
    return torch.split(weight.reshape(-1), ENTRIES)


def steps(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of each entry from the next number of a type, in float64."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(weight.abs().clamp_min(info.smallest_normal)).exponent - 1
    return torch.ldexp(torch.full_like(weight, info.eps, dtype=torch.float64), exponent)


def evidence_of_rounding(base: Tensor, update: Tensor) -> tuple[float, float]:
    """Evidence that W0 was rounded to its type after the fine-tune was made of it.

    Δ then holds that rounding: its square is larger by step² / 12 where the step of W0's type is
    larger, which doubles at each power of two, while a fine-tune knows no such steps. A regression
    of Δ² on |W0|, its square and step² / 12 has the coefficient 1 for the last if W0 was rounded,
    and 0 if not.

    Returns:
        `tuple[float, float]`: the coefficient over its variance, and 1 over its variance, which
        add up over weights; zero where nothing can be told.
    """
    stride = max(1, -(-base.numel() // ENTRIES))
    w, delta = (t.reshape(-1)[::stride].cpu().double() for t in (base, update))
    used = w != 0
    w, squares = w[used], delta[used].square()
    if w.numel() < FEWEST or int((squares == 0).sum()) > UNCHANGED * w.numel():
        return 0.0, 0.0
    rounding = steps(w, base.dtype).square() / 12
    size, unit = w.abs() / w.abs().mean(), rounding.mean()
    weight = 1 / (squares.mean() + rounding) * unit  # where rounding is large, so is its spread
    columns = torch.stack([torch.ones_like(size), size, size.square(), rounding / unit], dim=1)
    Q, R = torch.linalg.qr(columns * weight[:, None])
    target = squares / unit * weight
    coefficients = Q.mT @ target
    spread = float((Q[:, 3] * (target - Q @ coefficients)).square().sum())
    found = torch.stack([coefficients[3], R[3, 3]]) * R[3, 3] / spread
    return (float(found[0]), float(found[1])) if found.isfinite().all() else (0.0, 0.0)
