"""Singular value calibration against its equations in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rules import decompose
from torch import Tensor

from hf_tsv.linalg.updates import Update
from hf_tsv.methods.calibration import calibrated

Matrix = NDArray[np.float64]


def reference(merged: Matrix, deltas: list[Matrix], count: int, least: float) -> Matrix:
    """Σⱼ sⱼ/ηⱼ uⱼ vⱼᵀ, one direction at a time."""
    u, s, vh = np.linalg.svd(merged, full_matrices=False)
    result = np.zeros_like(merged)
    for j in range(len(s)):
        response = u[:, j] @ merged
        ratios = []
        for delta in deltas:
            own = u[:, j] @ delta
            ratios.append(response @ own / (own @ own) if own.any() else 0.0)
        ratios += [0.0] * (count - len(deltas))
        eta = np.mean([max(ratio, least) for ratio in ratios])
        result += s[j] / eta * np.outer(u[:, j], vh[j])
    return result


def tasks(count: int, shape: tuple[int, int]) -> list[Tensor]:
    """Updates that have something in common."""
    generator = torch.Generator().manual_seed(count)
    common = torch.randn(shape, generator=generator)
    return [1e-2 * (common + torch.randn(shape, generator=generator)) for _ in range(count)]


def assert_near(found: Tensor, expected: Matrix, relative: float = 1e-9) -> None:
    assert np.abs(found.numpy() - expected).max() <= relative * np.abs(expected).max()


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
@pytest.mark.parametrize("count", [1, 2, 8, 20])
@pytest.mark.parametrize("sums", [True, False])
def test_it_follows_its_equations(shape: tuple[int, int], count: int, sums: bool) -> None:
    deltas = tasks(count, shape)
    least = 1 / count if sums else 1.0
    merged = torch.stack(deltas).sum(0).double()
    wide = [delta.double().numpy() for delta in deltas]
    found, exact = calibrated(merged, list(deltas), count, least, "fast")
    assert_near(found, reference(merged.numpy(), wide, count, least))
    assert not exact
    found, exact = calibrated(merged, list(deltas), count, least, "exact")
    assert_near(found, reference(merged.numpy(), wide, count, least))
    assert exact


def test_triplets_and_tasks_without_an_update_count_too() -> None:
    deltas = tasks(3, (24, 16))
    deltas[1] = deltas[1][:, :4] @ deltas[1][:4]
    triplets: list[Update] = [deltas[0], decompose(deltas[1], 4), deltas[2]]
    merged = torch.stack(deltas).sum(0).double()
    expected = reference(merged.numpy(), [d.double().numpy() for d in deltas], 5, 0.2)
    assert_near(calibrated(merged, triplets, 5, 0.2, "fast")[0], expected, 1e-6)


def test_equal_tasks_come_back_once_and_zeros_stay() -> None:
    (delta,) = tasks(1, (16, 12))
    found, _ = calibrated(4 * delta.double(), [delta] * 4, 4, 0.25, "fast")
    assert_near(found, delta.double().numpy())
    nothing, _ = calibrated(torch.zeros(4, 3).double(), [torch.zeros(4, 3)], 1, 1.0, "fast")
    assert not nothing.any()


def test_only_the_size_changes_with_the_size() -> None:
    deltas = tasks(3, (16, 12))
    merged = torch.stack(deltas).sum(0).double()
    first, _ = calibrated(merged, list(deltas), 3, 1 / 3, "fast")
    small, _ = calibrated(1e-20 * merged, [1e-20 * d for d in deltas], 3, 1 / 3, "fast")
    assert_near(1e20 * small, first.numpy(), 1e-6)
