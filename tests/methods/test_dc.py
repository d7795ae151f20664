"""DC-Merge against its equations in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rules import merge
from torch import Tensor

from hf_tsv.methods import dc


def reference(deltas: list[np.ndarray], r: int) -> np.ndarray:
    """Ũ B Ṽ, written from the equations with full matrices."""
    m, n = deltas[0].shape
    k = min(m, n)
    parts = [np.linalg.svd(d, full_matrices=False) for d in deltas]

    def polar(a: np.ndarray) -> np.ndarray:
        u, _, vh = np.linalg.svd(a, full_matrices=False)
        return np.asarray(u @ vh)

    left = polar(np.concatenate([u[:, :r] for u, _, _ in parts], axis=1))
    right = polar(np.concatenate([vh[:r] for _, _, vh in parts], axis=0))
    projected = []
    for u, s, vh in parts:
        full = left.T @ (u[:, :r] * s[:r]) @ vh[:r] @ right.T
        order = np.argsort(-np.abs(full), axis=None)[: max(1, int(0.001 * k * k))]
        mask = np.zeros(full.size, dtype=bool)
        mask[order] = True
        projected.append(np.where(mask.reshape(full.shape), full, 0))
    stacked = np.stack(projected)
    sign = np.sign(stacked.sum(axis=0))
    agrees = (np.sign(stacked) == sign) & (sign != 0)
    mean = np.where(agrees, stacked, 0).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1)
    blocks = np.kron(np.eye(len(deltas)), np.ones((r, r)))
    return np.asarray(left @ (mean * blocks) @ right)


def tasks(count: int, shape: tuple[int, int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 1e-2 for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("shape", [(48, 48), (64, 40), (40, 96)])
def test_it_follows_its_equations(count: int, shape: tuple[int, int]) -> None:
    deltas = tasks(count, shape, seed=count)
    r = min(shape) // count
    found = merge(deltas, r, rule=dc.dc)
    expected = reference([delta.double().numpy() for delta in deltas], r)
    assert np.allclose(found.matrix.numpy(), expected, atol=1e-7 * np.abs(expected).max() + 1e-12)


def test_order_and_size_of_tasks_only_order_and_scale() -> None:
    deltas = tasks(4, (48, 32), seed=0)
    first = merge(deltas, 8, rule=dc.dc).matrix
    turned = merge(deltas[::-1], 8, rule=dc.dc).matrix
    larger = merge([8 * delta for delta in deltas], 8, rule=dc.dc).matrix
    assert torch.allclose(turned, first, atol=1e-9)
    assert torch.allclose(larger, 8 * first, atol=1e-8)


def test_zero_and_low_rank_tasks() -> None:
    generator = torch.Generator().manual_seed(3)
    lora = [
        torch.randn(48, 3, generator=generator) @ torch.randn(3, 40, generator=generator) * 1e-2
        for _ in range(3)
    ]
    found = merge(lora, 13, rule=dc.dc, floors=[1e-6] * 3)
    assert found.matrix.isfinite().all() and found.ranks == (3, 3, 3)
    nothing = merge([torch.zeros(8, 6)] * 2, 3, rule=dc.dc)
    assert not nothing.matrix.any()
