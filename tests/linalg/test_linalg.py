"""Decompositions of one matrix: truncated SVD and the two ways to the polar factor."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import gaussian, generator, one_thread, orthonormal, relative_error
from torch import Tensor

from hf_tsv.linalg import choices, lanczos, lapack, products
from hf_tsv.linalg import svd as svd_
from hf_tsv.linalg.polar import orthogonal_product, polar
from hf_tsv.linalg.svd import singular_values, truncated_svd, truncated_svds

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

SHAPES = [(12, 12), (30, 7), (7, 30), (1, 9), (9, 1), (1, 1)]
examples = settings(max_examples=30, derandomize=True, deadline=None)


def polar_factor(
    matrix: Tensor, solver: choices.Orthogonalizer = "procrustes"
) -> tuple[Tensor, int]:
    """The polar factor of a matrix, and the number of null directions that were left out."""
    found = polar(matrix, "exact", solver)
    return found.factors[0], found.null_directions


def polar_factor_by_whitening(matrix: Tensor) -> tuple[Tensor, int]:
    return polar_factor(matrix, "whitening")


POLAR = [polar_factor, polar_factor_by_whitening]


Triplets = Callable[..., tuple[Tensor, Tensor, Tensor]]


@pytest.fixture(params=["fast", "exact"])
def svd(request: pytest.FixtureRequest) -> Triplets:
    """The truncated SVD, by either way."""

    def triplets(matrix: Tensor, rank: int, floor: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        found = truncated_svd(matrix, rank, floor, request.param)
        assert found.exact or request.param == "fast"
        return found.U, found.S, found.Vh

    return triplets


def with_singular_values(values: list[float], shape: tuple[int, int], seed: int = 0) -> Tensor:
    """A float64 matrix with these singular values, in random directions."""
    g = generator(seed)
    U, V = orthonormal(shape[0], len(values), g), orthonormal(shape[1], len(values), g)
    return U * torch.tensor(values, dtype=torch.float64) @ V.T


# Truncated SVD


@pytest.mark.parametrize("shape", SHAPES)
def test_all_triplets_give_the_matrix_back(svd: Triplets, shape: tuple[int, int]) -> None:
    matrix = gaussian(*shape, generator(1))
    U, S, Vh = svd(matrix, min(shape))
    assert relative_error(U * S @ Vh, matrix) < 1e-14


@pytest.mark.parametrize("shape", [(12, 12), (30, 7), (7, 30)])
def test_leading_triplets_give_the_nearest_matrix_of_that_rank(
    svd: Triplets, shape: tuple[int, int]
) -> None:
    matrix = gaussian(*shape, generator(2))
    U, S, Vh = svd(matrix, 3)
    assert (U.shape, S.shape, Vh.shape) == ((shape[0], 3), (3,), (3, shape[1]))
    dropped = torch.linalg.svdvals(matrix)[3:].norm()  # Eckart, Young
    assert float((U * S @ Vh - matrix).norm() / dropped) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_descend(svd: Triplets, shape: tuple[int, int]) -> None:
    _, S, _ = svd(gaussian(*shape, generator(3)), min(shape))
    assert S.tolist() == sorted(S.tolist(), reverse=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_vectors_are_orthonormal(svd: Triplets, shape: tuple[int, int]) -> None:
    U, S, Vh = svd(gaussian(*shape, generator(4)), 5)
    identity = torch.eye(len(S), dtype=torch.float64)
    torch.testing.assert_close(U.T @ U, identity, rtol=0, atol=1e-14)
    torch.testing.assert_close(Vh @ Vh.T, identity, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [(6, 6), (9, 6), (6, 9)])
@pytest.mark.parametrize(("floor", "kept"), [(0.0, 4), (1e-3, 3), (0.5, 2), (2.5, 1), (5.0, 0)])
def test_singular_values_under_the_floor_are_dropped(
    svd: Triplets, shape: tuple[int, int], floor: float, kept: int
) -> None:
    matrix = with_singular_values([3.0, 2.0, 0.1, 1e-4], shape)
    assert len(svd(matrix, 4, floor)[1]) == kept


def test_a_singular_value_at_the_floor_is_dropped(svd: Triplets) -> None:
    assert svd(torch.diag(torch.tensor([2.0, 1.0])), 2, 1.0)[1].tolist() == [2.0]


def test_a_zero_matrix_has_no_triplets(svd: Triplets) -> None:
    U, S, Vh = svd(torch.zeros(4, 6), 3)
    assert (U.shape, S.shape, Vh.shape) == ((4, 0), (0,), (0, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_stored_numbers_are_decomposed_in_float64(svd: Triplets, dtype: torch.dtype) -> None:
    matrix = gaussian(8, 5, generator(5)).to(dtype)
    U, S, Vh = svd(matrix, 5)
    assert {U.dtype, S.dtype, Vh.dtype} == {torch.float64}
    assert relative_error(U * S @ Vh, matrix) < 1e-14


def test_triplets_do_not_keep_the_untruncated_factors_in_memory(svd: Triplets) -> None:
    factors = svd(gaussian(40, 30, generator(6)), 2)
    assert [f.untyped_storage().nbytes() for f in factors] == [8 * 40 * 2, 8 * 2, 8 * 2 * 30]


# Polar factor


@pytest.mark.parametrize("polar", POLAR)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_polar_factor_has_orthonormal_columns_or_rows(polar, shape: tuple[int, int]) -> None:
    X, null = polar(gaussian(*shape, generator(7)))
    gram = X.T @ X if shape[0] >= shape[1] else X @ X.T
    torch.testing.assert_close(gram, torch.eye(len(gram)).double(), rtol=0, atol=1e-11)
    assert null == 0


@pytest.mark.parametrize("polar", POLAR)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_rest_of_the_polar_decomposition_is_symmetric_and_positive(
    polar, shape: tuple[int, int]
) -> None:
    """A = X H with H = XᵀA: what makes X the nearest one, and not just any orthonormal basis."""
    A = gaussian(*shape, generator(8))
    X, _ = polar(A)
    H = X.T @ A if shape[0] >= shape[1] else A @ X.T
    torch.testing.assert_close(H, H.T, rtol=0, atol=1e-11)
    assert torch.linalg.eigvalsh((H + H.T) / 2).min() > 0


@pytest.mark.parametrize("polar", POLAR)
def test_an_orthonormal_matrix_is_its_own_polar_factor(polar) -> None:
    Q = orthonormal(20, 8, generator(9))
    assert relative_error(polar(Q)[0], Q) < 1e-13


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32))
@examples
def test_whitening_equals_procrustes(rows: int, columns: int, seed: int) -> None:
    A = gaussian(rows, columns, generator(seed))
    assert relative_error(polar_factor_by_whitening(A)[0], polar_factor(A)[0]) < 1e-7


@pytest.mark.parametrize("shape", [(20, 6), (6, 20), (6, 6)])
@pytest.mark.parametrize("smallest", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10])
@pytest.mark.parametrize("polar", POLAR)
def test_the_polar_factor_is_accurate_down_to_the_tolerance(
    polar, smallest: float, shape: tuple[int, int]
) -> None:
    values = [1.0, 0.5, 0.2, 10 * smallest, 1.5 * smallest, smallest]
    A = with_singular_values(values, shape, seed=10)
    expected = with_singular_values([1.0] * 6, shape, seed=10)
    X, null = polar(A)
    assert relative_error(X, expected) < 1e-7 + 2e-16 / smallest  # rounding of A, amplified
    assert null == 0


@pytest.mark.parametrize("shape", [(20, 6), (6, 20), (6, 6)])
@pytest.mark.parametrize("smallest", [5e-12, 1e-12, 1e-13, 1e-16])
@pytest.mark.parametrize("polar", POLAR)
def test_null_directions_are_left_out_and_counted(
    polar, smallest: float, shape: tuple[int, int]
) -> None:
    A = with_singular_values([1.0, 0.5, 0.3, 0.2, smallest, smallest / 2], shape, seed=11)
    minimum_norm = with_singular_values([1.0] * 4 + [0.0] * 2, shape, seed=11)
    X, null = polar(A)
    assert relative_error(X, minimum_norm) < 1e-7
    assert null == 2


@pytest.mark.parametrize("polar", POLAR)
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_null_directions_that_are_exactly_zero_count_too(polar, shape: tuple[int, int]) -> None:
    A = torch.zeros(shape)
    A[0, 0] = A[1, 1] = 1.0
    X, null = polar(A)
    assert torch.equal(X, A.double())
    assert null == 2


@pytest.mark.parametrize("polar", POLAR)
def test_a_repeated_column_is_shared_between_its_copies(polar) -> None:
    column = orthonormal(5, 1, generator(12))
    X, null = polar(torch.cat([column, column, -column], dim=1))
    expected = torch.cat([column, column, -column], dim=1) / 3**0.5
    assert relative_error(X, expected) < 1e-13
    assert null == 2


@pytest.mark.parametrize("polar", POLAR)
def test_the_polar_factor_of_zeros_is_zero(polar) -> None:
    X, null = polar(torch.zeros(3, 5))
    assert torch.equal(X, torch.zeros(3, 5, dtype=torch.float64))
    assert null == 3


@pytest.mark.parametrize("polar", POLAR)
def test_the_polar_factor_of_nothing_is_nothing(polar) -> None:
    X, null = polar(torch.zeros(3, 0))
    assert X.shape == (3, 0)
    assert null == 0


@pytest.mark.parametrize("polar", POLAR)
@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_the_polar_factor_does_not_depend_on_scale(polar, scale: float) -> None:
    A = gaussian(9, 6, generator(13))
    assert relative_error(polar(scale * A)[0], polar(A)[0]) < 1e-12


@pytest.mark.parametrize("polar", POLAR)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_polar_factors_of_stored_numbers_are_computed_in_float64(polar, dtype) -> None:
    A = gaussian(9, 6, generator(14)).to(dtype)
    X, _ = polar(A)
    assert X.dtype == torch.float64
    assert relative_error(X, polar(A.double())[0]) < 1e-14


# Norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-1000, -140, -70, -38, 0, 38, 70, 120, 1000])
def test_norms_of_numbers_of_any_size(exponent: int, dtype: torch.dtype) -> None:
    if dtype == torch.float32 and abs(exponent) > 140:
        exponent //= 10
    plain = gaussian(9, 6, generator(15)).to(dtype)
    matrix = torch.ldexp(plain, torch.tensor(exponent))
    size = math.ldexp(1, exponent)
    for tensor in (matrix, matrix[0]):
        expected = float(torch.linalg.vector_norm(torch.ldexp(tensor, torch.tensor(-exponent))))
        assert products.frobenius_norm(tensor) / size == pytest.approx(expected, rel=1e-5)
    row, column = products.norms(matrix)
    assert row / size == pytest.approx(float(plain.norm(dim=1).max()), rel=1e-2)
    assert column / size == pytest.approx(float(plain.norm(dim=0).max()), rel=1e-2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_norms_of_what_is_not_finite_are_not_finite(value: float) -> None:
    matrix = torch.ones(4, 3)
    matrix[1, 2] = value
    assert not math.isfinite(products.frobenius_norm(matrix))
    assert not any(map(math.isfinite, products.norms(matrix)))
    assert products.norms(torch.zeros(4, 3)) == (0.0, 0.0)
    assert products.norms(torch.zeros(0, 3)) == (0.0, 0.0)


# The certified kernels


def test_triplets_by_the_gram_matrix_are_those_of_the_svd() -> None:
    matrix = gaussian(60, 40, generator(30))
    for shape in (matrix, matrix.T):
        fast, exact = (truncated_svd(shape, 7, 0.0, p) for p in ("fast", "exact"))
        assert (fast.exact, exact.exact) == (False, True)
        assert relative_error(fast.S, exact.S) < 1e-12
        assert relative_error(fast.U * fast.S @ fast.Vh, exact.U * exact.S @ exact.Vh) < 1e-12


def test_what_a_gram_matrix_cannot_tell_is_left_to_the_svd() -> None:
    """Singular values eight orders of magnitude apart: squared they are beyond float64."""
    matrix = with_singular_values([1.0, 1e-2, 1e-9, 3e-10], (30, 20))
    found = truncated_svd(matrix, 4)
    assert found.exact
    expected = torch.tensor([1.0, 1e-2, 1e-9, 3e-10], dtype=torch.float64)
    torch.testing.assert_close(found.S, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_product_of_polar_factors_does_not_depend_on_the_way(scale: float) -> None:
    U, V = gaussian(50, 24, generator(31)), gaussian(36, 24, generator(32))
    S = torch.linspace(2, 1, 24, dtype=torch.float64) * scale
    fast, exact = (orthogonal_product(U, S, V.T, p) for p in ("fast", "exact"))
    assert (fast.exact, exact.exact) == (0, 2)
    assert relative_error(fast.matrix, exact.matrix) < 1e-10


def test_more_columns_than_rows_are_whitened_from_the_other_side() -> None:
    U, V = gaussian(20, 45, generator(33)), gaussian(60, 45, generator(34))
    S = torch.linspace(2, 1, 45, dtype=torch.float64)
    fast, exact = (orthogonal_product(U, S, V.T, p) for p in ("fast", "exact"))
    assert fast.exact == 0
    assert relative_error(fast.matrix, exact.matrix) < 1e-10


@pytest.mark.parametrize("solver", ["procrustes", "whitening"])
@pytest.mark.parametrize(
    ("distance", "null"), [(0.0, 6), (1e-15, 6), (1e-13, 6), (1e-9, 0), (1e-8, 0), (1e-7, 0)]
)
def test_dependent_columns_are_left_to_the_svd(distance: float, null: int, solver: str) -> None:
    """Equal tasks, or nearly so: what is a null direction is decided on singular values."""
    U = orthonormal(40, 6, generator(35))
    twice = torch.cat([U, U + distance * gaussian(40, 6, generator(36))], dim=1)
    V = orthonormal(30, 12, generator(37))
    S = torch.ones(12, dtype=torch.float64)
    fast, exact = (orthogonal_product(twice, S, V.T, p, solver) for p in ("fast", "exact"))
    assert fast.exact == 1
    assert fast.null_directions == exact.null_directions == null
    assert fast.ill_conditioned == exact.ill_conditioned == (null == 0)
    assert relative_error(fast.matrix, exact.matrix) < 1e-7


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    deltas = [gaussian(70, 500, generator(40 + i)).float() for i in range(4)]
    U, V = gaussian(90, 40, generator(50)), gaussian(800, 40, generator(51))
    S = torch.linspace(2, 1, 40, dtype=torch.float64)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        with products.threads():
            triplets = truncated_svds(deltas, 9, [0.0] * 4)
            product = orthogonal_product(U, S, V.T)
        assert torch.get_num_threads() == count
        found.append([product.matrix, *(t for svd in triplets for t in (svd.U, svd.S, svd.Vh))])
    torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_no_library_starts_threads_of_its_own() -> None:
    """In a fresh process, where SciPy is not loaded before."""
    code = """
import torch
from hf_tsv.linalg import products, svd
torch.set_num_threads(2)
with products.threads():
    svd.truncated_svds([torch.randn(30, 20) for _ in range(2)], 3, [0.0, 0.0])
    from threadpoolctl import threadpool_info
    found = {i["filepath"]: i["num_threads"] for i in threadpool_info() if i["user_api"] == "blas"}
assert len(found) == 2, found  # NumPy's and SciPy's
assert set(found.values()) == {1}, found
"""
    limits = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in limits}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (20, 20)])
@pytest.mark.parametrize("floor", [1.0, 0.3, 1e-3, 1e-6, 2e-7, 1e-9, 1e-12])
def test_singular_values_above_a_floor_are_counted(shape: tuple[int, int], floor: float) -> None:
    """In the tridiagonal form where that is exact, else by the values themselves."""
    values = [2.0, 0.5, 0.4, 1e-2, 1e-4, 1e-5, 5e-7, 1e-8, 1e-10]
    matrix = with_singular_values(values, shape, seed=3)
    above = sum(value > floor for value in values)
    svd = truncated_svd(matrix, 2, floor, spectrum=True)
    assert (svd.numerical_rank, svd.S.numel()) == (above, min(above, 2))
    assert truncated_svd(matrix, 2, floor).spectrum is None


def test_counting_does_not_decompose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "svdvals", None)
    matrix = gaussian(70, 50, generator(60))
    floor = float(torch.linalg.matrix_norm(matrix, 2)) / 2
    expected = int((floor < torch.linalg.svd(matrix).S).sum())
    assert 0 < expected < 50
    assert truncated_svd(matrix, 4, floor, spectrum=True).numerical_rank == expected


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (30, 30)])
@pytest.mark.parametrize("rank", [1, 4, 29, 30])
@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_all_singular_values_come_with_the_leading_triplets(
    shape: tuple[int, int], rank: int, precision: choices.Precision
) -> None:
    matrix = 1e-3 * gaussian(*shape, generator(61))
    expected = torch.linalg.svdvals(matrix)
    svd = truncated_svd(matrix, rank, 1e-5, precision, spectrum=True)
    assert svd.spectrum is not None
    torch.testing.assert_close(svd.spectrum, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(svd.S, expected[:rank], rtol=1e-9, atol=0)


@pytest.mark.parametrize("size", [256, 768, 796, 1061, 1592, 4096])
def test_probes_look_in_all_directions(size: int) -> None:
    probes = products.probe_vectors(torch.zeros(3, size, dtype=torch.float64))
    assert probes.abs().eq(1).all()
    spread = torch.linalg.eigvalsh(probes @ probes.T / size)
    assert float(spread[0]) > 0.6 and float(spread[-1]) < 1.5


# Where a routine does not converge


def refuse(*_: object, **__: object) -> None:
    raise torch.linalg.LinAlgError("did not converge")


@pytest.fixture
def unconverged(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let routines of LAPACK say that they did not converge."""
    call = lapack._call

    def these(*routines: str) -> None:
        def failing(name: str, *arguments: object) -> None:
            call(name, *arguments)
            if name in routines:
                arguments[-1].value = 1  # info

        monkeypatch.setattr(lapack, "_call", failing)

    return these


@pytest.mark.parametrize("shape", [*SHAPES, (0, 4), (4, 0)])
def test_qr_iterations_find_the_triplets(shape: tuple[int, int]) -> None:
    matrix = gaussian(*shape, generator(80))
    before = matrix.clone()
    U, S, Vh = lapack.svd(matrix)
    assert (U.shape, S.shape, Vh.shape) == (
        (shape[0], min(shape)),
        (min(shape),),
        (min(shape), shape[1]),
    )
    torch.testing.assert_close(U * S @ Vh, matrix, rtol=0, atol=1e-13)
    torch.testing.assert_close(S, torch.linalg.svdvals(matrix), rtol=1e-13, atol=0)
    assert torch.equal(matrix, before)


def test_the_transpose_of_a_matrix_in_memory_is_decomposed_as_it_is() -> None:
    matrix = gaussian(5, 8, generator(81)).T
    U, S, Vh = lapack.svd(matrix)
    assert relative_error(U * S @ Vh, matrix) < 1e-14


@pytest.mark.parametrize(
    "routines", [["dstemr"], ["dlarre", "dstemr"], ["eigh"], ["dlarre", "dsterf"]]
)
def test_an_eigensolver_that_fails_leaves_it_to_the_svd(
    monkeypatch: pytest.MonkeyPatch, unconverged: Callable[..., None], routines: list[str]
) -> None:
    matrix, rank = gaussian(60, 40, generator(82)), 3
    rank = {"eigh": 40, "dlarre": 20}.get(routines[0], rank)
    spectrum = "dsterf" in routines
    plain = truncated_svd(matrix, rank, spectrum=spectrum)
    unconverged(*routines)
    if routines == ["eigh"]:
        monkeypatch.setattr(torch.linalg, "eigh", refuse)
    found = truncated_svd(matrix, rank, spectrum=spectrum)
    assert (plain.exact, found.exact) == (False, True)
    assert relative_error(found.U * found.S @ found.Vh, plain.U * plain.S @ plain.Vh) < 1e-12


SPECTRA = {
    "power": lambda j: j**-0.5,
    "steep": lambda j: 10.0 ** (-j / 8),
    "flat": torch.ones_like,
    "low rank": lambda j: torch.where(j <= 9, j**-0.5, 0.0),
    "noisy": lambda j: torch.where(j <= 9, j**-0.5, 1e-7 / j),
    "pairs": lambda j: ((j + 1) // 2) ** -0.5,
    "cluster": lambda j: 1 + 1e-9 * j.cos(),
    "nothing": torch.zeros_like,
}


@pytest.mark.parametrize("fails", [None, "dlarre", "dlarrv"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_leading_eigenpairs_of_every_spectrum(
    unconverged: Callable[..., None], spectrum: str, fails: str | None
) -> None:
    unconverged(*filter(None, [fails]))
    for n, counts in ((2, (1, 2)), (30, (1, 4, 30)), (97, (1, 12, 60, 96))):
        values = SPECTRA[spectrum](torch.arange(1, n + 1, dtype=torch.float64))
        Q = torch.linalg.qr(gaussian(n, n, generator(n)))[0]
        gram = (Q * values) @ Q.mT
        gram = (gram + gram.mT) / 2
        expected = torch.linalg.eigvalsh(gram).flip(0)
        for count in counts:
            found, rows, every = lapack.leading_eigh(gram.clone(), count, spectrum=count % 2 == 0)
            assert every is None or (every - expected).abs().max() < 1e-14
            assert (found - expected[:count]).abs().max() < 1e-14
            assert (gram @ rows.mT - rows.mT * found).abs().max() < 1e-14
            assert (rows @ rows.mT - torch.eye(count, dtype=torch.float64)).abs().max() < 1e-11


def test_all_eigenvalues_are_found_where_many_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    called, call = [], lapack._call
    monkeypatch.setattr(lapack, "_call", lambda name, *a: [called.append(name), call(name, *a)])
    gram = gaussian(64, 64, generator(5))
    gram = gram @ gram.mT
    for count, routine in ((3, "dstemr"), (8, "dlarrv")):
        lapack.leading_eigh(gram.clone(), count)
        assert routine in called and len({"dstemr", "dlarrv"} & {*called}) == 1
        called.clear()


@pytest.mark.parametrize("shape", SHAPES)
def test_an_svd_that_fails_is_left_to_qr_iterations(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    matrix = 1e-3 * gaussian(*shape, generator(83))
    expected = svd_.svd(matrix)
    monkeypatch.setattr(torch.linalg, "svd", refuse)
    found = svd_.svd(matrix)
    for part, other in zip(found, expected, strict=True):
        torch.testing.assert_close(part.abs(), other.abs(), rtol=1e-9, atol=1e-12)


def wrong_value(U: Tensor, S: Tensor, Vh: Tensor) -> None:
    S[-1] += 1e-6 * S[0]


def wrong_left(U: Tensor, S: Tensor, Vh: Tensor) -> None:
    U[2, 3] += 1e-6


def wrong_right(U: Tensor, S: Tensor, Vh: Tensor) -> None:
    Vh[3, 2] += 1e-6


def not_orthonormal(U: Tensor, S: Tensor, Vh: Tensor) -> None:
    """Its product is right."""
    U *= 1 + 1e-6
    S /= 1 + 1e-6


def no_number(U: Tensor, S: Tensor, Vh: Tensor) -> None:
    U[:, 5] = torch.nan


@pytest.mark.parametrize(
    "damage", [wrong_value, wrong_left, wrong_right, not_orthonormal, no_number]
)
@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (20, 20)])
def test_an_svd_that_is_wrong_is_noticed(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], damage: Callable[..., None]
) -> None:
    matrix, right = gaussian(*shape, generator(84)), torch.linalg.svd

    def wrong(a: Tensor, **options: bool) -> tuple[Tensor, ...]:
        found = right(a, **options)
        damage(*found)
        return found

    monkeypatch.setattr(torch.linalg, "svd", wrong)
    U, S, Vh = svd_.svd(matrix)
    torch.testing.assert_close(U * S @ Vh, matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(U.T @ U, torch.eye(len(S)).double(), rtol=0, atol=1e-12)


def test_singular_values_that_fail_or_are_wrong_come_from_the_svd(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix = gaussian(30, 20, generator(85))
    expected = singular_values(matrix)
    for wrong in (refuse, lambda a: expected * 1.001, lambda a: expected * torch.nan):
        monkeypatch.setattr(torch.linalg, "svdvals", wrong)
        torch.testing.assert_close(singular_values(matrix), expected, rtol=1e-12, atol=0)


def test_whitening_that_fails_is_left_to_procrustes(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = gaussian(20, 6, generator(86))
    expected = polar_factor(matrix)
    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    found = polar_factor_by_whitening(matrix)
    assert torch.equal(found[0], expected[0]) and found[1] == expected[1] == 0


def test_where_no_way_converges_the_matrix_is_named(
    monkeypatch: pytest.MonkeyPatch, unconverged: Callable[..., None]
) -> None:
    matrices = [gaussian(8, 8 + i % 2, generator(87 + i)) for i in range(4)]
    unconverged("dgesvd")
    real = torch.linalg.svd

    def third(a: Tensor, **options: bool) -> tuple[Tensor, ...]:
        return refuse() if a.shape == (9, 8) else real(a, **options)

    monkeypatch.setattr(torch.linalg, "svd", third)
    for count in (1, 2):
        torch.set_num_threads(count)
        with (
            products.threads(),
            pytest.raises(lapack.NotConvergedError, match="no solver") as error,
        ):
            truncated_svds(matrices, 3, [0.0] * 4, "exact")
        assert error.value.place == 1
    torch.set_num_threads(1)
    with pytest.raises(lapack.NotConvergedError) as error:
        polar_factor(matrices[1])
    assert error.value.place is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_what_is_no_number_is_not_decomposed(value: float, precision: choices.Precision) -> None:
    matrix = gaussian(6, 5, generator(90))
    matrix[2, 3] = value
    with pytest.raises(lapack.NotConvergedError, match="NaN or Inf") as error:
        truncated_svds([gaussian(6, 5, generator(91)), matrix], 2, [0.0] * 2, precision)
    assert error.value.place == 1
    for way in (singular_values, svd_.svd):
        with pytest.raises(lapack.NotConvergedError, match="NaN or Inf"):
            way(matrix)


@pytest.mark.gpu
@pytest.mark.parametrize("fails", [1, 2, 3])
def test_a_gpu_that_fails_leaves_it_to_the_cpu(monkeypatch: pytest.MonkeyPatch, fails: int) -> None:
    """By its own other routine, then by those of the CPU."""
    matrix, calls, real = gaussian(50, 30, generator(92)), [], torch.linalg.svd

    def failing(a: Tensor, **options: object) -> tuple[Tensor, ...]:
        calls.append((a.device.type, options.get("driver")))
        return refuse() if len(calls) <= fails else real(a, **options)

    monkeypatch.setattr(torch.linalg, "svd", failing)
    U, S, Vh = svd_.svd(matrix.cuda())
    assert {part.device.type for part in (U, S, Vh)} == {"cuda"}
    assert relative_error((U * S @ Vh).cpu(), matrix) < 1e-13
    assert calls == [("cuda", None), ("cuda", "gesvd"), ("cpu", None)][: fails + 1]


# Lanczos' method


def gram_of(values: Tensor, seed: int = 70) -> Tensor:
    """A positive semi-definite matrix of these eigenvalues."""
    Q = orthonormal(len(values), len(values), generator(seed))
    return lapack.gram((Q * values.sqrt()).T.contiguous())


def decaying(size: int, exponent: float) -> Tensor:
    return torch.arange(1, size + 1, dtype=torch.float64) ** -exponent


@pytest.mark.parametrize("count", [1, 5, 20])
@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0, 2.0, 4.0])
def test_few_eigenvectors_are_found_in_a_krylov_space(exponent: float, count: int) -> None:
    values = decaying(240, exponent)
    gram = gram_of(values)
    found = lanczos.leading_eigh(gram.clone(), count, 0.0)
    assert found is not None
    torch.testing.assert_close(found[0], values[:count], rtol=1e-12, atol=1e-14)
    _, expected, _ = lapack.leading_eigh(gram, count)
    cosines = (found[1] @ expected.T).diagonal().abs()
    assert float((1 - cosines).max()) < 1e-12
    torch.testing.assert_close(
        found[1] @ found[1].T, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-13
    )


def test_many_eigenvectors_are_not_looked_for_there() -> None:
    assert lanczos.leading_eigh(gram_of(decaying(60, 0.5)), 6, 0.0) is None


def test_an_eigenvector_that_was_missed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start without any of it never finds it; the proof fails, and LAPACK takes over."""

    class Start:
        def standard_normal(self, n: int) -> np.ndarray:
            start = np.ones(n)
            start[1] = 0
            return start

    monkeypatch.setattr(lanczos.np.random, "default_rng", lambda seed: Start())
    values = decaying(120, 0.5)
    assert lanczos.leading_eigh(values.diag(), 4, 0.0) is None
    svd = truncated_svd(values.diag(), 4)
    assert not svd.exact
    torch.testing.assert_close(svd.S, values[:4], rtol=1e-10, atol=0)


@pytest.mark.parametrize("noise", [0.0, 1e-18, 1e-13, 1e-9])
def test_what_is_under_the_floor_need_not_converge(noise: float) -> None:
    """An update of rank 3, exactly or with the rounding of its storage."""
    values = noise * (1 + decaying(240, 0.5))
    values[:3] = torch.tensor([1.0, 0.1, 1e-3])
    found = lanczos.leading_eigh(gram_of(values), 12, floor=1e-8)
    assert found is not None
    torch.testing.assert_close(found[0], values[:3], rtol=1e-8, atol=0)
    assert found[1].shape == (3, 240)


def test_zeros_have_no_eigenvectors_there() -> None:
    assert lanczos.leading_eigh(torch.zeros(240, 240, dtype=torch.float64), 3, 0.0) is None
