"""Eigenvectors and polar factors by products, and what uses them on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from unittest.mock import Mock

import pytest
import torch
from reference import (
    bases_near_each_other,
    fine_tunes,
    gaussian,
    generator,
    ill_conditioned,
    lora,
    one_thread,
    orthonormal,
    power_law,
    relative_error,
    tsv,
)
from rules import merge
from torch import Tensor

from hf_tsv.linalg import iterative, polar, products
from hf_tsv.linalg import svd as svd_module
from hf_tsv.linalg.svd import truncated_svd, truncated_svds

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

SIZE = 160
RANK = 20


@pytest.fixture
def by_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU do as a GPU does."""
    monkeypatch.setattr(products, "by_products", lambda matrix: matrix.numel() > 0)


def clustered(shape: tuple[int, int], g: torch.Generator) -> Tensor:
    """Singular values that are nearly equal, some of them on both sides of the rank."""
    s = torch.ones(min(shape), dtype=torch.float64)
    s[: RANK - 4] = 2
    s[RANK - 4 : RANK] = 1.5
    s[RANK : RANK + 4] = 1.5 - 1e-3
    s *= 1 - 1e-9 * torch.arange(len(s))
    return orthonormal(shape[0], len(s), g) * s @ orthonormal(shape[1], len(s), g).T


def with_noise(shape: tuple[int, int], exponent: float, g: torch.Generator) -> Tensor:
    return power_law(shape, exponent, g) + 0.05 * 3e-4 * gaussian(*shape, g)


EXPONENTS = (1.0, 0.75, 0.5, 0.25)
SPECTRA: dict[str, Callable[[tuple[int, int], torch.Generator], Tensor]] = {
    **{f"power-law-{a}": lambda shape, g, a=a: power_law(shape, a, g) for a in EXPONENTS},
    **{f"with-noise-{a}": lambda shape, g, a=a: with_noise(shape, a, g) for a in EXPONENTS},
    "gaussian": lambda shape, g: gaussian(*shape, g),
    "clustered": clustered,
}
every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)


def unit_matrices(*names: str) -> Tensor:
    """A matrix (SIZE + 40, SIZE) of norm 1 for each spectrum."""
    shape = (SIZE + 40, SIZE)
    matrices = [SPECTRA[name](shape, generator(seed)) for seed, name in enumerate(names)]
    return torch.stack([matrix / matrix.norm() for matrix in matrices])


def leading(matrices: Tensor, count: int, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    floors = torch.full((len(matrices),), floor, dtype=torch.float64)
    return iterative.leading_eigh(matrices.mT @ matrices, count, floors)


def assert_leading(a: Tensor, values: Tensor, vectors: Tensor) -> None:
    """Eigenvalues and the best approximation by eigenvectors are those of an SVD."""
    _, S, Vh = torch.linalg.svd(a, full_matrices=False)
    r = len(values)
    torch.testing.assert_close(values, S[:r] ** 2, rtol=0, atol=1e-13 * float(S[0]) ** 2)
    assert relative_error(a @ vectors.T @ vectors, a @ Vh[:r].T @ Vh[:r]) < 1e-9
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(r).double(), rtol=0, atol=1e-13)


@pytest.fixture
def no_eigensolver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left to the eigensolver of whole matrices."""

    def fail(grams: Tensor, count: int) -> None:
        raise AssertionError(f"{len(grams)} matrices did not converge")

    monkeypatch.setattr(iterative, "_eigh", fail)


# Leading eigenvectors


@every_spectrum
def test_ten_filters_find_the_eigenvectors_of_the_svd(
    spectrum: str, no_eigensolver: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iterative, "SWEEPS", 11)
    a = unit_matrices(spectrum)
    values, vectors = leading(a, RANK)
    assert_leading(a[0], values[0], vectors[0])


def test_matrices_of_all_spectra_go_in_one_batch(no_eigensolver: None) -> None:
    a = unit_matrices(*SPECTRA)
    for matrix, values, vectors in zip(a, *leading(a, RANK), strict=True):
        assert_leading(matrix, values, vectors)


def test_eigenvectors_of_low_rank_are_found_and_zeros_do_no_harm(no_eigensolver: None) -> None:
    g = generator(1)
    a = torch.stack([lora((200, SIZE), 16, 3e-4, g), torch.zeros(200, SIZE).double()])
    a[0] /= a[0].norm()
    values, vectors = leading(a, RANK, floor=1e-6)
    assert_leading(a[0], values[0, :16], vectors[0, :16])
    assert values[0, 16:].abs().max() < 1e-15
    assert (values[1] == 0).all()


@pytest.mark.parametrize(("spectrum", "above"), [("power-law-0.5", 8), ("gaussian", 1)])
def test_a_floor_amid_the_spectrum_separates_as_in_the_svd(
    spectrum: str, above: int, no_eigensolver: None
) -> None:
    a = unit_matrices(spectrum)
    floor = float(torch.linalg.svdvals(a[0])[above]) * 1.001
    values, vectors = leading(a, RANK, floor)
    assert int((values[0] > floor**2).sum()) == above
    assert_leading(a[0], values[0, :above], vectors[0, :above])


@pytest.mark.parametrize("distance", [1e-4, 1e-8, 1e-12, 0.0])
def test_bases_are_orthonormal_however_near_columns_are(distance: float) -> None:
    g = generator(13)
    blocks = torch.stack([gaussian(50, 8, g), gaussian(50, 8, g), torch.zeros(50, 8)])
    blocks[0, :, 5] = blocks[0, :, 2] + distance * blocks[0, :, 5]
    bases = iterative._orthonormal(blocks)
    eye = torch.eye(8).double().expand(3, 8, 8)
    torch.testing.assert_close(bases.mT @ bases, eye, rtol=0, atol=1e-14)
    assert relative_error(bases[1] @ bases[1].T @ blocks[1], blocks[1]) < 1e-14


def test_what_does_not_converge_is_left_to_the_eigensolver(monkeypatch) -> None:
    monkeypatch.setattr(iterative, "SWEEPS", 3)
    a = unit_matrices("clustered", "power-law-1.0", "gaussian")
    eigh = Mock(side_effect=iterative._eigh)
    monkeypatch.setattr(iterative, "_eigh", eigh)
    for matrix, values, vectors in zip(a, *leading(a, RANK), strict=True):
        assert_leading(matrix, values, vectors)
    eigh.assert_called_once()


def test_an_eigenvector_that_was_missed_is_noticed() -> None:
    values = torch.linspace(2, 0, 40, dtype=torch.float64)
    gram = values.diag()[None]
    floors = torch.zeros(1, dtype=torch.float64)
    vectors = torch.eye(40, dtype=torch.float64)[None]
    right = iterative.nothing_missed(gram, values[None, :5], vectors[:, :5], floors)
    others = [0, 1, 2, 4, 5]
    wrong = iterative.nothing_missed(gram, values[None, others], vectors[:, others], floors)
    assert (right.tolist(), wrong.tolist()) == ([True], [False])
    above = torch.tensor([values[3].sqrt() * 1.001], dtype=torch.float64)
    garbage = torch.cat([vectors[:, :3], vectors[:, :2] * torch.nan], dim=1)
    assert iterative.nothing_missed(gram, values[None, :5], garbage, above).tolist() == [True]


@pytest.mark.parametrize("count", [1, 53, 54, SIZE])
def test_any_number_of_eigenvectors_is_found(count: int) -> None:
    a = unit_matrices("power-law-0.5")
    values, vectors = leading(a, count)
    assert values.shape == (1, count)
    assert_leading(a[0], values[0], vectors[0])


def test_results_are_the_same_in_every_run() -> None:
    a = unit_matrices("power-law-0.5", "gaussian")
    once, again = leading(a, RANK), leading(a, RANK)
    assert torch.equal(once[0], again[0])
    assert torch.equal(once[1], again[1])


# Polar factor


@pytest.mark.parametrize("shape", [(80, 80), (200, 80), (1, 1)])
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e4, 1e5])
def test_polar_parts_are_the_polar_factor(shape: tuple[int, int], condition: float) -> None:
    g = generator(3)
    P, Q = orthonormal(*shape, g), orthonormal(shape[1], shape[1], g)
    s = torch.logspace(0, -1, shape[1], dtype=torch.float64) ** torch.tensor(condition).log10()
    parts = iterative.polar_parts(7 * P * s @ Q.T, polar.SMALLEST_EIGENVALUE)
    assert parts is not None
    assert relative_error(parts[0] @ parts[1], P @ Q.T) < 1e-11
    for part in parts:
        torch.testing.assert_close(part.T @ part, torch.eye(shape[1]).double(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("smallest", [2e-6, 1e-6, 1e-7, 1e-9, 0.0])
def test_null_directions_have_no_polar_parts(smallest: float) -> None:
    g = generator(4)
    s = torch.ones(50, dtype=torch.float64)
    s[-1] = smallest
    a = orthonormal(70, 50, g) * s @ orthonormal(50, 50, g).T
    assert iterative.polar_parts(a, polar.SMALLEST_EIGENVALUE) is None
    assert iterative.polar_parts(0 * a, polar.SMALLEST_EIGENVALUE) is None


# What uses them


@pytest.mark.parametrize("shape", [(SIZE, SIZE), (SIZE, 260), (260, SIZE)])
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_merges_by_products_are_the_method(
    by_products: None, shape: tuple[int, int], exponent: float
) -> None:
    deltas = fine_tunes(shape, 8, exponent, seed=5)
    result = merge(deltas, RANK)
    assert relative_error(result.matrix, tsv(deltas, [RANK] * 8)) < 1e-8
    assert result.exact == 0


@pytest.mark.parametrize("angle", [1e-5, 1e-6, 1e-7, 1e-8, 1e-9])
@pytest.mark.parametrize("shape", [(SIZE, SIZE), (SIZE, 200)])
def test_ill_conditioned_merges_by_products_are_the_method(
    by_products: None, shape: tuple[int, int], angle: float
) -> None:
    deltas = ill_conditioned(shape, RANK, 8, angle, generator(17))
    result = merge(deltas, RANK)
    assert result.null_directions == 0
    assert relative_error(result.matrix, tsv(deltas, [RANK] * 8)) < 1e-6


@pytest.mark.parametrize("factor", [1.0, -1.0, 2.5])
def test_multiples_of_tasks_merged_by_products_are_merged_once(
    by_products: None, factor: float
) -> None:
    deltas = fine_tunes((SIZE, 200), 4, 0.5, seed=18)
    deltas.append(factor * deltas[0])
    result = merge(deltas, RANK)
    expected = tsv([d.double() for d in deltas[:-1]] + [factor * deltas[0].double()], [RANK] * 5)
    assert result.null_directions == RANK
    assert relative_error(result.matrix, expected) < 1e-6


def test_merges_by_products_clamp_ranks_and_leave_null_directions_out(by_products: None) -> None:
    g = generator(6)
    deltas = [lora((SIZE, 200), 16, 3e-4, g) for _ in range(3)]
    deltas += [deltas[0], torch.zeros(SIZE, 200).double(), gaussian(SIZE, 200, g)]
    result = merge(deltas, RANK, floors=[1e-8] * 6)
    assert result.ranks == (16, 16, 16, 16, 0, RANK)
    assert result.null_directions == 16
    assert relative_error(result.matrix, tsv(deltas, result.ranks)) < 1e-8


def test_what_is_under_the_floor_need_not_converge(
    by_products: None, no_eigensolver: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LoRA after storage: noise has a flat spectrum, which would take many more filters."""
    monkeypatch.setattr(iterative, "SWEEPS", 4)
    g = generator(2)
    delta = lora((200, SIZE), 16, 3e-4, g) + 1e-7 * gaussian(200, SIZE, g)
    (svd,) = truncated_svds([delta], RANK, [1e-3 * float(delta.norm())])
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    assert len(svd.S) == 16
    assert relative_error(svd.U * svd.S @ svd.Vh, U[:, :16] * S[:16] @ Vh[:16]) < 1e-9


def test_more_columns_than_rows_are_whitened_from_the_other_side(by_products: None) -> None:
    U, V = gaussian(20, 45, generator(14)), gaussian(60, 45, generator(15))
    S = torch.linspace(2, 1, 45, dtype=torch.float64)
    fast, exact = (polar.orthogonal_product(U, S, V.T, p) for p in ("fast", "exact"))
    assert fast.exact == 0
    assert relative_error(fast.matrix, exact.matrix) < 1e-10


def test_matrices_of_one_shape_are_decomposed_together(by_products: None, monkeypatch) -> None:
    g = generator(7)
    shapes = [(60, 40)] * 5 + [(40, 60)] * 2 + [(60, 40)]
    matrices = [gaussian(*shape, g) for shape in shapes]
    solve = Mock(side_effect=iterative.leading_eigh)
    monkeypatch.setattr(iterative, "leading_eigh", solve)
    monkeypatch.setattr(svd_module, "BATCH", 3 * 60 * 40)
    found = truncated_svds(matrices, 4, [0.0] * 8)
    assert [len(call.args[0]) for call in solve.call_args_list] == [3, 2, 2, 1]
    for svd, matrix in zip(found, matrices, strict=True):
        expected = torch.linalg.svdvals(matrix)[:4]
        torch.testing.assert_close(svd.S, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_all_singular_values_come_with_the_leading_ones(
    by_products: None, shape: tuple[int, int]
) -> None:
    matrix = gaussian(*shape, generator(16))
    svd = truncated_svd(matrix, 4, 1e-3, spectrum=True)
    assert svd.spectrum is not None and not svd.exact and svd.numerical_rank == 40
    torch.testing.assert_close(svd.spectrum, torch.linalg.svdvals(matrix), rtol=1e-10, atol=0)


def test_what_fails_the_certificate_takes_a_full_svd(by_products: None, monkeypatch) -> None:
    monkeypatch.setattr(iterative, "TOLERANCE", 1e-3)
    matrix = power_law((SIZE, SIZE), 0.5, generator(8))
    (svd,) = truncated_svds([matrix], RANK, [0.0])
    assert svd.exact
    monkeypatch.setattr(iterative, "polar_parts", lambda a, _: (a, torch.eye(24).double()))
    U, V = gaussian(50, 24, generator(9)), gaussian(36, 24, generator(10))
    S = torch.ones(24, dtype=torch.float64)
    fast, exact = (polar.orthogonal_product(U, S, V.T, p) for p in ("fast", "exact"))
    assert relative_error(fast.matrix, exact.matrix) < 1e-10


# On a GPU

GPU = "cuda"
BAR = 1e-6
"""Largest relative error of a merged update on a GPU."""


@cache
def bases(size: int, k: int, tasks: int, seed: int) -> list[Tensor]:
    return bases_near_each_other(size, k, min(k // tasks, 64), tasks, 1e-3, generator(seed))


def realistic(shape: tuple[int, int], tasks: int, exponent: float) -> list[Tensor]:
    """Float32 updates of related tasks with power-law spectra."""
    k = min(shape)
    s = 1e-2 * torch.arange(1, k + 1, dtype=torch.float64) ** -exponent
    left, right = (bases(size, k, tasks, seed) for seed, size in enumerate(shape))
    return [(U * s @ V.T).float() for U, V in zip(left, right, strict=True)]


REALISTIC = pytest.mark.parametrize(
    ("shape", "tasks"), [((768, 768), 8), ((1024, 1024), 20), ((768, 3072), 8)]
)


@pytest.mark.gpu
@REALISTIC
@pytest.mark.parametrize("exponent", [1.0, 0.5, 0.25])
def test_triplets_on_a_gpu_are_those_of_the_cpu(
    shape: tuple[int, int], tasks: int, exponent: float
) -> None:
    deltas, rank = realistic(shape, tasks, exponent), min(shape) // tasks
    on_cpu = truncated_svds(deltas, rank, [0.0] * tasks)
    on_gpu = truncated_svds([d.to(GPU) for d in deltas], rank, [0.0] * tasks)
    for found, expected in zip(on_gpu, on_cpu, strict=True):
        assert not found.exact
        assert found.U.device.type == GPU
        torch.testing.assert_close(found.S.cpu(), expected.S, rtol=1e-10, atol=0)
        matrix = expected.U * expected.S @ expected.Vh
        assert relative_error((found.U * found.S @ found.Vh).cpu(), matrix) < 1e-9


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (512, 768)])
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_products_of_polar_factors_on_a_gpu_are_those_of_the_cpu(
    shape: tuple[int, int], condition: float
) -> None:
    g = generator(11)
    k = min(shape)
    s = torch.logspace(0, -1, k, dtype=torch.float64) ** torch.tensor(condition).log10()
    P, Q = orthonormal(shape[0], k, g), orthonormal(shape[1], k, g)
    V, S = orthonormal(800, shape[1], g), torch.linspace(2, 1, shape[1], dtype=torch.float64)
    found = polar.orthogonal_product(*(t.to(GPU) for t in (P * s @ Q.T, S, V.T)))
    assert found.exact == 0
    assert relative_error(found.matrix.cpu(), P @ Q.T * S @ V.T) < 1e-10


@pytest.mark.gpu
@REALISTIC
@pytest.mark.parametrize("exponent", [1.0, 0.5, 0.25])
def test_merges_on_a_gpu_are_those_of_the_cpu(
    shape: tuple[int, int], tasks: int, exponent: float
) -> None:
    deltas, rank = realistic(shape, tasks, exponent), min(shape) // tasks
    expected = merge(deltas, rank)
    found = merge([d.to(GPU) for d in deltas], rank)
    assert found.exact == 0
    assert relative_error(found.matrix.cpu(), expected.matrix) < BAR


@pytest.mark.gpu
def test_duplicates_zeros_and_low_rank_merge_on_a_gpu_as_on_the_cpu() -> None:
    g = generator(12)
    deltas = [lora((768, 768), 16, 3e-4, g) for _ in range(3)]
    deltas += [deltas[0], torch.zeros(768, 768).double(), 3e-4 * gaussian(768, 768, g)]
    expected = merge(deltas, 96, floors=[1e-6] * 6)
    found = merge([d.to(GPU) for d in deltas], 96, floors=[1e-6] * 6)
    assert found.ranks == expected.ranks == (16, 16, 16, 16, 0, 96)
    assert found.null_directions == expected.null_directions == 16
    assert relative_error(found.matrix.cpu(), expected.matrix) < BAR


@pytest.mark.gpu
def test_merges_on_a_gpu_are_the_same_in_every_run() -> None:
    deltas = [d.to(GPU) for d in realistic((768, 768), 8, 0.5)]
    once, again = (merge(deltas, 96).matrix for _ in range(2))
    assert torch.equal(once, again)
