"""Rounding to floating-point types: its steps, its error, and a base rounded afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from reference import generator
from torch import Tensor

from hf_tsv.linalg import grids, updates
from hf_tsv.merging.diagnosis import RELIABLE, ROUNDED_BASE

SIXTEEN = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@SIXTEEN
def test_steps_are_those_to_the_next_number(dtype: torch.dtype) -> None:
    found = torch.randn(4000, generator=generator(1), dtype=torch.float64) * 0.03
    weights = torch.cat([found, found * 1e-4, torch.tensor([0.0, 1.0, -2.0, 6e-8, 1e-5])]).to(dtype)
    bits = weights.abs().view(torch.int16)
    after = (bits + 1).view(dtype).double() - weights.abs().double()
    assert torch.equal(grids.steps(weights.double(), dtype), torch.where(
        weights == 0, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, after
    ))  # fmt: skip


@pytest.mark.parametrize("shape", [(), (7,), (130, 70), (4, 3, 2, 2), (0, 8)])
@SIXTEEN
def test_a_weight_lies_on_a_grid_if_every_entry_does(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    exact = torch.randn(shape, generator=generator(2))
    rounded = exact.to(dtype).float()
    assert grids.on_grid(rounded, dtype) and (not exact.numel() or not grids.on_grid(exact, dtype))
    if exact.numel():
        rounded.view(-1)[-1] = 0.1
        assert not grids.on_grid(rounded, dtype)


@SIXTEEN
def test_the_error_of_rounding_is_a_norm(dtype: torch.dtype) -> None:
    exact = torch.randn(700, 90, generator=generator(3), dtype=torch.float64)
    wanted = float((exact - exact.to(dtype).double()).norm())
    assert grids.rounding_error(exact, exact.to(dtype)) == pytest.approx(wanted, rel=1e-12)
    assert grids.rounding_error(exact[:0], exact[:0].to(dtype)) == 0


def gaussian(w: Tensor, size: float, g: torch.Generator) -> Tensor:
    return size * torch.randn(w.shape, generator=g, dtype=torch.float64)


UPDATES: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "normal": gaussian,
    "rows": lambda w, s, g: gaussian(w, s, g) * gaussian(w[:, :1], 1.0, g).exp(),
    "proportional": lambda w, s, g: gaussian(w, s, g) * w.abs() / w.abs().mean(),
    "decayed": lambda w, s, g: gaussian(w, s, g) - 3e-3 * w,
    "sparse": lambda w, s, g: gaussian(w, 3 * s, g) * (gaussian(w, 1.0, g) > 1.3),
    "low-rank": lambda w, s, g: gaussian(w[:, :4], s, g) @ gaussian(w[:4], 0.5, g),
}


def coefficient(base: Tensor, start: Tensor, dtype: torch.dtype, kind: str, size: float) -> Tensor:
    """Coefficient and standard error over four weights, tuned from `start`; W0 has 16 bits."""
    found = torch.zeros(2, dtype=torch.float64)
    for seed, (w, begun) in enumerate(zip(base, start, strict=True)):
        w1 = (begun + UPDATES[kind](begun, size, generator(seed))).float()
        w0 = w.to(dtype)
        delta = updates.difference(w1, w0)
        found += torch.tensor(updates.evidence_of_rounded_base(w1, w0, delta))
    return torch.tensor([found[0] / found[1], found[1] ** -0.5])


@SIXTEEN
@pytest.mark.parametrize("kind", UPDATES)
def test_a_base_that_was_rounded_afterwards_is_told_apart(dtype: torch.dtype, kind: str) -> None:
    g = generator(5)
    original = 0.03 * torch.randn(4, 256, 320, generator=g, dtype=torch.float64).float().double()
    stored = original.to(dtype).double()
    size = 5e-5 if dtype == torch.bfloat16 else 6e-6
    size = size / 3 if kind == "rows" else size
    if (dtype, kind) != (torch.float16, "decayed"):  # its decay is far above the steps of float16
        value, error = coefficient(original, original, dtype, kind, size)
        assert abs(value - 1) < 0.25 and error < RELIABLE, (value, error)
    for factor in (0.1, 1, 3, 10):
        value, error = coefficient(stored, stored, dtype, kind, factor * size)
        assert value < ROUNDED_BASE or error > RELIABLE, (factor, value, error)


@SIXTEEN
@pytest.mark.parametrize("which", ["large", "small"])
def test_a_fine_tune_of_few_entries_of_one_size_tells_nothing(
    dtype: torch.dtype, which: str
) -> None:
    """What the others lack is a rounding of W0, whatever the size of those that changed."""
    w = (0.03 * torch.randn(4, 256, 320, generator=generator(5))).to(dtype)
    chosen = w.abs() > 0.05 if which == "large" else w.abs() < 0.012
    for scale in (1e-5, 1e-4, 1e-3):
        change = scale * chosen * torch.randn(w.shape, generator=generator(6))
        for w0, delta in zip(w, updates.difference(w + change, w), strict=True):
            assert updates.evidence_of_rounded_base(w0 + delta, w0, delta) == (0.0, 0.0)


def test_a_fine_tune_that_was_rounded_itself_tells_nothing_of_its_base() -> None:
    w = 0.03 * torch.randn(256, 256, generator=generator(6))
    base = w.to(torch.bfloat16)
    tuned = (w + 1e-4 * torch.randn(256, 256, generator=generator(7))).to(torch.bfloat16).float()
    delta = updates.difference(tuned, base)
    assert updates.evidence_of_rounded_base(tuned, base, delta) == (0.0, 0.0)
    same = base.float()
    assert updates.evidence_of_rounded_base(same + 0.1, base, same * 0) == (0.0, 0.0)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30])
def test_extreme_numbers_tell_something_finite(scale: float) -> None:
    w = scale * torch.randn(64, 64, generator=generator(8))
    base = w.to(torch.bfloat16)
    assert all(map(math.isfinite, grids.evidence_of_rounding(base, w - base.float())))
    ones = torch.ones(64, 64, dtype=torch.bfloat16)
    found = grids.evidence_of_rounding(ones, 1e-3 * w / scale)
    assert all(map(math.isfinite, found)) and found[1] < 1e-6
