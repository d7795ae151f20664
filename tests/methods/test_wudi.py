"""WUDI in closed form against its equations in NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rules import decompose, updates_of
from torch import Tensor

from hf_tsv.linalg.choices import Precision, WudiFilter
from hf_tsv.linalg.updates import Update
from hf_tsv.methods import wudi
from hf_tsv.methods.rules import How

Matrix = NDArray[np.float64]
FILTERS: tuple[WudiFilter, ...] = ("swudi-a", "swudi", "tact")


def reference(deltas: list[Matrix], kind: WudiFilter) -> Matrix:
    """M, written from the equations, with all eigenvectors of C."""
    m, n = deltas[0].shape
    C, D = np.zeros((n, n)), np.zeros((m, n))
    for delta in deltas:
        weight, rows = 1 / (delta**2).sum(), delta
        if kind == "tact":
            kept = np.argsort(-np.abs(delta), axis=None)[: round(delta.size / 2)]
            rows = np.zeros(delta.size)
            rows[kept] = delta.ravel()[kept]
            weight, rows = 1.0, rows.reshape(m, n)
        C += weight * rows.T @ rows
        D += weight * delta @ rows.T @ rows
    if kind == "tact":
        return np.asarray(D @ np.linalg.pinv(C, rcond=1e-12, hermitian=True))
    values, vectors = np.linalg.eigh(C)
    values, vectors = values[::-1].clip(0), vectors[:, ::-1]
    total = np.sum(deltas, axis=0)
    if kind == "swudi":
        count = int(np.ceil(0.65 * n))
        share = 1 - np.exp(-300 * values[:count])
        inverse = np.where(values[:count] > 1e-13, share / values[:count].clip(1e-13), 0)
    else:
        count = int(np.ceil(np.sqrt(values).sum() ** 2 / values.sum()))
        share, inverse = np.ones(count), 1 / values[:count]
    V = vectors[:, :count]
    return np.asarray(total - total @ V * share @ V.T + D @ V * inverse @ V.T)


def tasks(count: int, shape: tuple[int, int], seed: int = 0) -> list[Tensor]:
    """Updates of which most is in their leading directions, as in fine-tunes."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.arange(1, shape[1] + 1) ** -0.5
    mixed = [torch.randn(shape, generator=generator) * columns for _ in range(count)]
    turns = [
        torch.linalg.qr(torch.randn(shape[1], shape[1], generator=generator))[0] for _ in mixed
    ]
    return [1e-2 * (a @ q) for a, q in zip(mixed, turns, strict=True)]


def loras(count: int, shape: tuple[int, int], rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    m, n = shape
    sides = [(torch.randn(m, rank, generator=generator),
              torch.randn(rank, n, generator=generator)) for _ in range(count)]  # fmt: skip
    return [1e-2 * (a @ b) for a, b in sides]


def merged(
    deltas: list[Update], kind: WudiFilter, precision: Precision = "fast", **options: object
) -> Matrix:
    given = replace(updates_of(deltas, 0, **options), how=How(precision, wudi_filter=kind))
    return wudi.wudi(given).matrix.double().numpy()


def near(found: Matrix, expected: Matrix, relative: float = 1e-9) -> bool:
    return bool(np.abs(found - expected).max() <= relative * np.abs(expected).max())


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("shape", [(48, 48), (96, 40), (40, 96)])
@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_it_follows_its_equations(kind: WudiFilter, shape: tuple[int, int], count: int) -> None:
    deltas = tasks(count, shape, seed=count)
    expected = reference([delta.double().numpy() for delta in deltas], kind)
    assert near(merged(list(deltas), kind), expected)
    assert near(merged(list(deltas), kind, "exact"), expected)


@pytest.mark.parametrize("kind", FILTERS)
def test_one_task_is_itself(kind: WudiFilter) -> None:
    (delta,) = tasks(1, (24, 20))
    if kind == "swudi":  # of which the flow, which ends, leaves a part of the difference: none here
        assert near(merged([delta], kind), delta.double().numpy())
    assert near(merged([delta], kind), delta.double().numpy())


@pytest.mark.parametrize("kind", ["swudi-a", "swudi"])
@pytest.mark.parametrize("shape", [(64, 48), (48, 64)])
def test_triplets_give_the_same_as_what_they_are_of(
    kind: WudiFilter, shape: tuple[int, int]
) -> None:
    deltas = loras(4, shape, rank=3)
    triplets: list[Update] = [decompose(delta, 3) for delta in deltas]
    expected = reference([delta.double().numpy() for delta in deltas], kind)
    assert near(merged(triplets, kind), expected, 1e-6)
    mixed: list[Update] = [deltas[0], *triplets[1:]]
    assert near(merged(mixed, kind, floors=[1e-9] * 4), expected, 1e-6)


def test_triplets_of_nothing_change_nothing() -> None:
    nothing: list[Update] = [decompose(torch.zeros(6, 5), 2) for _ in range(2)]
    found = merged(nothing, "swudi-a")
    assert found.shape == (6, 5) and not found.any()


def test_triplets_are_not_made_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    triplets: list[Update] = [decompose(delta, 2) for delta in loras(3, (64, 48), rank=2)]

    def whole(_: object) -> Tensor:
        raise AssertionError("A task was made whole.")

    monkeypatch.setattr("hf_tsv.linalg.updates.TaskSingularVectors.matrix", whole)
    assert np.isfinite(merged(triplets, "swudi-a")).all()


@pytest.mark.parametrize("kind", FILTERS)
def test_order_scale_zeros_and_equal_tasks(kind: WudiFilter) -> None:
    deltas = tasks(4, (40, 32))
    first = merged(list(deltas), kind)
    assert near(merged(list(deltas[::-1]), kind), first)
    assert near(merged([1024 * delta for delta in deltas], kind), 1024 * first)
    assert near(merged([1e-20 * delta for delta in deltas], kind), 1e-20 * first, 1e-6)
    assert near(merged([*deltas, torch.zeros(40, 32)], kind), first)
    assert not merged([torch.zeros(8, 6)] * 2, kind).any()
    same = merged([deltas[0]] * 3, kind)
    assert np.isfinite(same).all()
    if kind != "swudi-a":  # which adds up what it leaves of the sum
        return
    leading = np.linalg.svd(deltas[0].double().numpy())
    u, v = leading[0][:, 0], leading[2][0]
    assert abs(u @ same @ v - leading[1][0]) < 1e-6 * leading[1][0]


@pytest.mark.parametrize("kind", FILTERS)
def test_storage_noise_is_not_amplified(kind: WudiFilter) -> None:
    deltas = loras(3, (64, 48), rank=4)
    generator = torch.Generator().manual_seed(1)
    noisy: list[Update] = [d + 1e-7 * torch.randn(64, 48, generator=generator) for d in deltas]
    clean = merged(list(deltas), kind, floors=[1e-6] * 3)
    assert near(merged(noisy, kind, floors=[2e-6] * 3), clean, 1e-3)


@pytest.mark.parametrize("size", [1.0, 2.0**20])
def test_directions_below_the_noise_of_all_tasks_count_as_zero(size: float) -> None:
    """C of full rank, of which Cholesky's method must not invert what is noise."""
    deltas = [size * delta for delta in tasks(3, (40, 24))]
    rows = []
    for delta in deltas:
        entries = delta.double().numpy()
        kept = np.abs(entries) >= np.median(np.abs(entries))
        rows.append(np.where(kept, entries, 0))
    values = np.linalg.eigvalsh(sum(r.T @ r for r in rows))
    floor = float(np.sqrt((values[7] + values[8]) / 2 / 3))  # of each of the three tasks
    C = sum(r.T @ r for r in rows)
    w, V = np.linalg.eigh(C)
    kept = w > 3 * floor**2
    assert kept.sum() == 16
    D = sum(d.double().numpy() @ r.T @ r for d, r in zip(deltas, rows, strict=True))
    expected = D @ V[:, kept] / w[kept] @ V[:, kept].T
    assert near(merged(list(deltas), "tact", floors=[floor] * 3), expected)


@pytest.mark.parametrize("kind", FILTERS)
def test_updates_that_are_all_noise(kind: WudiFilter, capfd: pytest.CaptureFixture[str]) -> None:
    deltas = tasks(2, (20, 30))
    found = merged(list(deltas), kind, floors=[100.0, 100.0])
    total = torch.stack(deltas).double().sum(0).numpy()
    assert near(found, total) if kind != "tact" else not found.any()
    assert capfd.readouterr() == ("", "")  # nothing of LAPACK either


def test_threads_do_not_change_the_bits() -> None:
    from hf_tsv.linalg import products

    deltas: list[Update] = list(tasks(3, (64, 800)))
    found = []
    for count in (1, 2):
        with products.threads(count):
            found.append(merged(deltas, "swudi-a"))
    assert np.array_equal(*found)
