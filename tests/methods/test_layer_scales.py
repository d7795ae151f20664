"""Factors of layers against their equations in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rules import decompose

from hf_tsv.methods.layer_scales import Likeness, larv, likenesses, lines


@pytest.mark.parametrize("shape", [(20, 20), (30, 12), (12, 30)])
def test_likeness_is_that_of_its_equations(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    base, *deltas = (torch.randn(shape, generator=generator) for _ in range(4))
    deltas[1] = base * 0.1  # commutes
    deltas[2] = deltas[2][:, :3] @ deltas[2][:3]

    def effective_rank(a: np.ndarray) -> float:
        shares = np.linalg.svd(a, compute_uv=False) ** 2
        shares = shares[shares > 1e-14 * shares[0]] / shares.sum()
        return float(np.exp(-(shares * np.log(shares)).sum()))

    given = [deltas[0], deltas[1], decompose(deltas[2], 3)]
    w0 = base.double().numpy()
    for delta, found in zip(deltas, likenesses(base, given), strict=True):
        d = delta.double().numpy()
        apart = np.linalg.norm(w0 @ d.T - d @ w0.T) + np.linalg.norm(w0.T @ d - d.T @ w0)
        expected = apart / 2 / np.linalg.norm(w0) / np.linalg.norm(d)
        assert found.commutator == pytest.approx(expected, abs=1e-7)
        assert found.contrast == pytest.approx(effective_rank(w0) / effective_rank(d), rel=1e-5)


def test_larv_is_its_equation() -> None:
    found = {"a": Likeness(1.2, 0.1), "b": Likeness(3.0, 0.4), "c": Likeness(0.5, 0.25)}
    depths = {"a": 1 / 3, "b": 2 / 3, "c": 1.0}
    c = np.array([0.1, 0.4, 0.25])
    for i, (label, factor) in enumerate(larv(found, depths).items()):
        conflict = np.log1p(np.exp((c[i] - c.mean()) / c.std()))
        quality = found[label].contrast * depths[label] ** 0.5 / (conflict + 1)
        assert factor == pytest.approx(1 + 0.5 * np.tanh(3 * (quality - 1)), rel=1e-12)
        assert 0.5 <= factor <= 1.5
    same = larv({"a": Likeness(1.0, 0.2), "b": Likeness(1.0, 0.2)}, {"a": 1.0, "b": 1.0})
    assert same["a"] == same["b"] == pytest.approx(1 + 0.5 * np.tanh(3 / (np.log(2) + 1) - 3))
    assert larv({}, {}) == {}


def test_lines_runs_from_the_first_block_to_the_last() -> None:
    layers = lines([(6.0, 1.0), (2.0, 1.0)], 2, {"first": 0.0, "middle": 0.5, "last": 1.0})
    assert layers.start == 2.0  # 8 / (2 · 2)
    factors = [layers.factor(label, 0.8) for label in ("first", "middle", "last", "embedding")]
    assert factors == pytest.approx([2.0, 2.4, 2.8, 2.0])
    assert lines([(0.0, 0.0)], 4, {}).start == lines([], 4, {}).start == 0.25
