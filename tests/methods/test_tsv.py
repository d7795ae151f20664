"""Task singular vectors of one weight: what METHOD defines, what follows, and the edge cases."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    base_weights,
    fine_tunes,
    gaussian,
    generator,
    ill_conditioned,
    lora,
    one_thread,
    orthonormal,
    power_law,
    relative_error,
)
from rules import decompose, merge, updates_of
from torch import Tensor

from hf_tsv.linalg import eigen, svd, updates
from hf_tsv.linalg.polar import orthogonal_product, polar
from hf_tsv.linalg.shapes import default_rank
from hf_tsv.methods import tsv
from hf_tsv.methods.ada import orthonormal_vectors

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

SOLVERS = ("fast", "procrustes", "whitening")
STORED = [torch.float32, torch.float16, torch.bfloat16]
BAR = 5e-6
"""Largest relative error of a merged update that is accepted for any spectrum."""

examples = settings(max_examples=15, derandomize=True, deadline=None)
both_solvers = pytest.mark.parametrize("solver", SOLVERS)


class Case(NamedTuple):
    """Task matrices to merge, and the rank of each."""

    deltas: list[Tensor]
    rank: int


@st.composite
def cases(draw: st.DrawFn, *, smallest: int = 1, explicit_rank: bool = False) -> Case:
    """Gaussian float32 task matrices of any shape, square, tall or wide, for 1 to 20 tasks."""
    rows, columns = draw(st.integers(smallest, 32)), draw(st.integers(smallest, 32))
    tasks = draw(st.integers(1, 20))
    g = generator(draw(st.integers(0, 2**32)))
    largest = default_rank((rows, columns), tasks)
    rank = draw(st.integers(1, largest)) if explicit_rank else largest
    return Case([3e-4 * gaussian(rows, columns, g).float() for _ in range(tasks)], rank)


def related(tasks: int = 3, shape: tuple[int, int] = (24, 30), seed: int = 0) -> Case:
    """Updates of tasks that share directions partly."""
    return Case(fine_tunes(shape, tasks, 0.5, seed, smallest_angle=0.1), default_rank(shape, tasks))


def merged(deltas: Sequence[Tensor], rank: int, solver: str = "fast", **kwargs) -> Tensor:
    return merge(deltas, rank, **how(solver), **kwargs).matrix


def how(solver: str) -> dict[str, Any]:
    """Arguments of the merge: certified kernels, or one of the exact solvers."""
    return {} if solver == "fast" else {"precision": "exact", "solver": solver}


def of_reference(solver: str) -> str:
    return "procrustes" if solver == "fast" else solver


# The definition


@both_solvers
@given(case=cases())
@examples
def test_merge_is_the_method(solver: str, case: Case) -> None:
    expected = reference.tsv(case.deltas, [case.rank] * len(case.deltas), of_reference(solver))
    assert relative_error(merged(*case, solver), expected) < 1e-8


@both_solvers
@given(case=cases(explicit_rank=True))
@examples
def test_merge_takes_any_smaller_rank(solver: str, case: Case) -> None:
    expected = reference.tsv(case.deltas, [case.rank] * len(case.deltas), of_reference(solver))
    result = merge(*case, **how(solver))
    assert relative_error(result.matrix, expected) < 1e-8
    assert result.ranks == (case.rank,) * len(case.deltas)


@both_solvers
@given(case=cases())
@examples
def test_merge_is_the_sum_of_truncated_updates_whitened_by_projectors(
    solver: str, case: Case
) -> None:
    expected = reference.tsv_by_projectors(case.deltas, [case.rank] * len(case.deltas))
    assert relative_error(merged(*case, solver), expected) < 1e-7


@given(cases())
@examples
def test_without_orthogonalisation_the_truncated_updates_are_summed(case: Case) -> None:
    expected = reference.low_rank(case.deltas, [case.rank] * len(case.deltas))
    assert relative_error(merged(*case, rule=tsv.low_rank), expected) < 1e-12


@both_solvers
@given(case=cases())
@examples
def test_without_truncation_every_task_is_orthogonalised_at_full_rank(
    solver: str, case: Case
) -> None:
    k = min(case.deltas[0].shape)
    expected = reference.orthogonal(case.deltas, of_reference(solver))
    assert relative_error(merged(case.deltas, k, solver), expected) < 1e-8


@given(cases())
@examples
def test_with_neither_the_updates_are_summed(case: Case) -> None:
    k = min(case.deltas[0].shape)
    expected = reference.task_arithmetic(case.deltas)
    assert relative_error(merged(case.deltas, k, rule=tsv.low_rank), expected) < 1e-12


@given(cases())
@examples
def test_a_task_is_its_leading_singular_triplets(case: Case) -> None:
    delta = case.deltas[0]
    task = decompose(delta, case.rank)
    expected = reference.low_rank_approximation(delta, case.rank)
    assert relative_error(task.matrix(), expected) < 1e-12
    assert task.rank == case.rank
    assert task.U.shape == (delta.shape[0], case.rank)
    assert task.Vh.shape == (case.rank, delta.shape[1])
    assert relative_error(task.S, reference.triplets(delta, case.rank)[1]) < 1e-12


@pytest.mark.parametrize("solver", ["procrustes", "whitening"])
def test_each_exact_solver_is_the_one_it_says(solver: str) -> None:
    deltas, rank = related(3)
    vectors = updates.concatenate([decompose(delta, rank) for delta in deltas])
    found = orthogonal_product(vectors.U, vectors.S, vectors.Vh, "exact", solver)
    left, right = (polar(X, "exact", solver).factors[0] for X in (vectors.U, vectors.Vh))
    expected = (left * vectors.S) @ right
    assert relative_error(found.matrix, expected) < 1e-14 and found.exact == 2


@both_solvers
@given(case=cases(smallest=20))
@examples
def test_the_merged_update_has_the_singular_values_of_the_tasks(solver: str, case: Case) -> None:
    tasks = [reference.triplets(delta, case.rank)[1] for delta in case.deltas]
    expected = torch.cat(tasks).sort(descending=True).values
    found = torch.linalg.svdvals(merged(*case, solver))[: len(expected)]
    assert relative_error(found, expected) < 1e-7


# What follows from the definition


@both_solvers
@given(order=st.permutations(range(5)))
@examples
def test_the_order_of_tasks_does_not_matter(solver: str, order: list[int]) -> None:
    deltas, rank = related(5)
    result = merged([deltas[i] for i in order], rank, solver)
    assert relative_error(result, merged(deltas, rank, solver)) < 1e-11


@both_solvers
@given(case=cases())
@examples
def test_transposing_the_updates_transposes_the_result(solver: str, case: Case) -> None:
    result = merged([delta.T for delta in case.deltas], case.rank, solver)
    assert relative_error(result.T, merged(*case, solver)) < 1e-8


@both_solvers
@given(case=cases(), exponent=st.integers(-66, 50), sign=st.sampled_from([1, -1]))
@examples
def test_scaling_the_updates_scales_the_result(
    solver: str, case: Case, exponent: int, sign: int
) -> None:
    c = sign * 2.0**exponent  # 1e-20 to 1e15, exact in float32
    result = merged([c * delta for delta in case.deltas], case.rank, solver)
    assert relative_error(result / c, merged(*case, solver)) < 1e-8


@both_solvers
@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-20, 1e15, 1e30, 3e37])
def test_updates_at_the_ends_of_float32_neither_underflow_nor_overflow(
    solver: str, scale: float
) -> None:
    g = generator(0)
    deltas = [(scale * gaussian(9, 7, g)).float() for _ in range(3)]
    result = merge(deltas, 2, **how(solver))
    assert relative_error(result.matrix / scale, reference.tsv(deltas, [2] * 3) / scale) < 1e-11
    assert result.ranks == (2, 2, 2)


@both_solvers
@given(case=cases(), seed=st.integers(0, 2**32))
@examples
def test_rotating_the_rows_of_all_updates_rotates_the_result(
    solver: str, case: Case, seed: int
) -> None:
    rows = case.deltas[0].shape[0]
    R = orthonormal(rows, rows, generator(seed))
    result = merged([R @ delta.double() for delta in case.deltas], case.rank, solver)
    assert relative_error(result, R @ merged(*case, solver)) < 1e-8


@both_solvers
@given(case=cases(), seed=st.integers(0, 2**32))
@examples
def test_rotating_the_columns_of_all_updates_rotates_the_result(
    solver: str, case: Case, seed: int
) -> None:
    columns = case.deltas[0].shape[1]
    R = orthonormal(columns, columns, generator(seed))
    result = merged([delta.double() @ R for delta in case.deltas], case.rank, solver)
    assert relative_error(result, merged(*case, solver) @ R) < 1e-8


@both_solvers
@pytest.mark.parametrize("distance", [1.0, 1e-2, 1e-4, 1e-6, 1e-8, 0.0])
def test_merging_amplifies_no_direction(solver: str, distance: float) -> None:
    """‖M‖₂ ≤ max σ, however near the tasks are: U⊥ and V⊥ are contractions."""
    g = generator(1)
    delta, other = gaussian(16, 20, g), gaussian(16, 20, g)
    deltas = [delta, delta + distance * other, other]
    largest = max(float(torch.linalg.matrix_norm(delta, 2)) for delta in deltas)
    result = torch.linalg.matrix_norm(merged(deltas, 5, solver), 2)
    assert float(result) <= largest * (1 + 1e-5)


@both_solvers
def test_updates_that_share_no_direction_are_only_truncated_and_summed(solver: str) -> None:
    g = generator(2)
    U, V = orthonormal(12, 9, g), orthonormal(15, 9, g)
    s = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    deltas = [U[:, i : i + 3] * s @ V[:, i : i + 3].T for i in (0, 3, 6)]
    assert relative_error(merged(deltas, 3, solver), reference.task_arithmetic(deltas)) < 1e-12


# One task; more tasks than directions; the remainder


@both_solvers
@given(case=cases())
@examples
def test_one_task_is_itself(solver: str, case: Case) -> None:
    delta = case.deltas[0]
    result = merged([delta], default_rank(delta.shape, 1), solver)
    assert torch.equal(result.float(), delta)


@both_solvers
def test_one_task_of_explicit_rank_is_truncated_only(solver: str) -> None:
    (delta,), _ = related(1)
    expected = reference.low_rank_approximation(delta, 4)
    assert relative_error(merged([delta], 4, solver), expected) < 1e-12


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 100))
@examples
def test_the_default_rank_is_an_equal_share_of_k_but_never_zero(
    rows: int, columns: int, tasks: int
) -> None:
    rank = default_rank((rows, columns), tasks)
    k = min(rows, columns)
    assert rank == (1 if tasks > k else k // tasks)
    assert tasks > k or rank * tasks <= k


@both_solvers
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (1, 7), (7, 1), (1, 1), (2, 2)])
def test_more_tasks_than_directions_still_merge(solver: str, shape: tuple[int, int]) -> None:
    g = generator(3)
    deltas = [gaussian(*shape, g) for _ in range(20)]
    result = merged(deltas, default_rank(shape, 20), solver)
    assert relative_error(result, reference.tsv(deltas, [1] * 20)) < 1e-9


@both_solvers
def test_the_remainder_of_k_by_tasks_is_unused(solver: str) -> None:
    g = generator(4)
    deltas = [gaussian(11, 13, g) for _ in range(4)]
    singular_values = torch.linalg.svdvals(merged(deltas, default_rank((11, 13), 4), solver))
    assert int((singular_values > 1e-12 * singular_values[0]).sum()) == 4 * (11 // 4)


@both_solvers
@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (1, 1), (2, 2)])
def test_the_smallest_matrices_merge(solver: str, shape: tuple[int, int]) -> None:
    g = generator(5)
    deltas = [gaussian(*shape, g) for _ in range(2)]
    expected = reference.tsv(deltas, [1, 1])
    assert relative_error(merged(deltas, 1, solver), expected) < 1e-12


@both_solvers
def test_a_rank_above_k_is_k(solver: str) -> None:
    deltas, _ = related(3, (6, 8))
    assert merge(deltas, 100, **how(solver)).ranks == (6, 6, 6)


# Zero and constant updates


@both_solvers
@pytest.mark.parametrize("tasks", [1, 3])
def test_only_unchanged_tasks_give_no_update(solver: str, tasks: int) -> None:
    result = merge([torch.zeros(4, 6)] * tasks, default_rank((4, 6), tasks), **how(solver))
    assert not result.matrix.any()
    assert result.matrix.shape == (4, 6)
    assert result.null_directions == 0


@both_solvers
def test_an_unchanged_task_contributes_nothing(solver: str) -> None:
    (first, second, _), rank = related(3)
    zero = torch.zeros_like(first)
    result = merge([zero, first, zero, second], rank, **how(solver))
    assert relative_error(result.matrix, merged([first, second], rank, solver)) < 1e-13
    assert result.ranks == (0, rank, 0, rank)
    assert result.null_directions == 0


@both_solvers
def test_constant_matrices_merge_at_their_only_direction(solver: str) -> None:
    result = merge([torch.full((4, 6), 1.0), torch.full((4, 6), -3.0)], 2, **how(solver))
    torch.testing.assert_close(result.matrix, torch.full((4, 6), -1.0).double(), rtol=1e-12, atol=0)
    assert result.ranks == (1, 1)
    assert result.null_directions == 1


# Equal, opposite and nearly equal updates


@both_solvers
@pytest.mark.parametrize("copies", [2, 3, 5])
def test_equal_tasks_merge_to_the_one_they_are(solver: str, copies: int) -> None:
    (delta,), _ = related(1)
    result = merge([delta] * copies, 4, **how(solver))
    assert relative_error(result.matrix, reference.low_rank_approximation(delta, 4)) < 1e-12
    assert result.null_directions == 4 * (copies - 1)


@both_solvers
def test_opposite_tasks_cancel(solver: str) -> None:
    (delta,), _ = related(1)
    result = merge([delta, -delta], 4, **how(solver))
    assert float(result.matrix.norm() / delta.norm()) < 1e-12
    assert result.null_directions == 4


@both_solvers
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (40, 24)])
def test_a_pair_among_others_takes_the_minimum_norm_factor(
    solver: str, sign: int, shape: tuple[int, int]
) -> None:
    (a, b, c), _ = related(3, shape)
    deltas = [a, b, c, sign * a]
    result = merge(deltas, 6, **how(solver))
    assert relative_error(result.matrix, reference.tsv_by_projectors(deltas, [6] * 4)) < 1e-7
    assert result.null_directions == 6


@both_solvers
@pytest.mark.parametrize("solver_of_reference", SOLVERS[1:])
def test_a_multiple_of_a_task_shares_all_its_directions(
    solver: str, solver_of_reference: str
) -> None:
    (delta, other), _ = related(2)
    exact = [delta.double(), 2.5 * delta.double(), other.double()]
    expected = reference.tsv(exact, [4] * 3, solver_of_reference)
    for deltas in (exact, [delta, 2.5 * delta, other]):  # the multiple is rounded in float32
        result = merge(deltas, 4, **how(solver))
        assert relative_error(result.matrix, expected) < 1e-7
        assert result.null_directions == 4


@both_solvers
def test_equal_directions_are_counted_where_they_cancel_exactly(solver: str) -> None:
    delta = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    result = merge([delta, delta], 2, **how(solver))
    assert result.null_directions == 2
    assert relative_error(result.matrix, torch.diag(torch.tensor([4.0, 3.0, 0.0, 0.0]))) < 1e-15


@both_solvers
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4, 3e-5, 1e-5])
def test_nearly_equal_tasks_stay_two_tasks(solver: str, distance: float) -> None:
    g = generator(6)
    delta, other = gaussian(20, 30, g), gaussian(20, 30, g)
    deltas = [delta, delta + distance * other]
    result = merge(deltas, 5, **how(solver))
    assert relative_error(result.matrix, reference.tsv(deltas, [5, 5])) < BAR
    assert result.null_directions == 0


@pytest.mark.parametrize("angle", [1e-4, 1e-5, 5e-6, 3e-6, 2.5e-6, 1e-6, 1e-7])
def test_the_solvers_agree_however_near_two_tasks_are(angle: float) -> None:
    g = generator(7)
    first, away = orthonormal(40, 20, g).split(10, dim=1)
    V, away_V = orthonormal(30, 20, g).split(10, dim=1)
    angles = angle * torch.arange(1, 11, dtype=torch.float64)
    s = torch.arange(1, 11, dtype=torch.float64) ** -0.5
    second = (
        (first * angles.cos() + away * angles.sin())
        * s
        @ (V * angles.cos() + away_V * angles.sin()).T
    )
    deltas = [first * s @ V.T, second]
    results = [merge(deltas, 10, **how(solver)) for solver in SOLVERS]
    assert relative_error(results[1].matrix, results[0].matrix) < BAR
    assert results[1].null_directions == results[0].null_directions


# Ill-conditioned concatenations, whose directions are independent all the same

ILL = [
    *(((48, 48), angle) for angle in (1e-5, 3e-6, 1e-6, 1e-7, 1e-8, 1e-9)),
    *((sizes, angle) for sizes in ((60, 60), (48, 72)) for angle in (1e-5, 1e-6, 1e-9)),
    ((72, 48), 3e-6), ((72, 48), 1e-7), ((72, 48), 1e-8), ((90, 72), 1e-5), ((90, 72), 1e-9),
]  # fmt: skip
"""Sizes and angles: every angle where both factors are square, the ends in every other shape."""


def conditions(deltas: Sequence[Tensor], rank: int) -> list[float]:
    """Smallest singular value relative to the largest of both concatenations."""
    U, _, Vh = reference.concatenation(deltas, [rank] * len(deltas))
    values = [torch.linalg.svdvals(X) for X in (U, Vh)]
    return [float(s[-1] / s[0]) for s in values]


@cache
def ill(sizes: tuple[int, int], angle: float) -> tuple[list[Tensor], Tensor]:
    """Ill-conditioned updates of eight tasks, and what they merge to."""
    deltas = ill_conditioned(sizes, 6, 8, angle, generator(20))
    assert all(0.1 * angle < ratio < angle for ratio in conditions(deltas, 6))
    return deltas, reference.tsv(deltas, [6] * 8)


@both_solvers
@pytest.mark.parametrize(("sizes", "angle"), ILL)
def test_ill_conditioned_tasks_follow_the_equations(
    solver: str, angle: float, sizes: tuple[int, int]
) -> None:
    deltas, expected = ill(sizes, angle)
    result = merge(deltas, 6, **how(solver))
    assert relative_error(result.matrix, expected) < 1e-6
    assert result.null_directions == 0
    vectors, ranks = orthonormal_vectors(updates_of(deltas, 6, **how(solver)))
    assert relative_error(vectors.matrix(), result.matrix) < 1e-6
    assert ranks == (6,) * 8


@both_solvers
@pytest.mark.parametrize("seed", [1635, 3937])
def test_gaussian_tasks_that_are_ill_conditioned_by_chance_follow_the_equations(
    solver: str, seed: int
) -> None:
    g = generator(seed)
    deltas = [3e-4 * gaussian(48, 48, g).float() for _ in range(8)]
    assert 1e-10 < min(conditions(deltas, 6)) < 1e-6  # two of the first four thousand seeds
    result = merge(deltas, 6, **how(solver))
    assert relative_error(result.matrix, reference.tsv(deltas, [6] * 8)) < 1e-6
    assert result.null_directions == 0


@pytest.mark.parametrize(
    ("size", "angle", "again"), [(48, 1e-6, False), (48, 1e-8, True), (60, 1e-6, True)]
)
def test_one_small_singular_value_of_a_square_factor_is_no_reason_to_decompose_anew(
    size: int, angle: float, again: bool
) -> None:
    """It happens by chance, to one factor in a hundred of tasks that share a subspace."""
    deltas = ill_conditioned((size, size), 6, 8, angle, generator(27))
    result = merge(deltas, 6)
    assert result.exact == (12 if again else 2)
    assert relative_error(result.matrix, reference.tsv(deltas, [6] * 8)) < 1e-6


def test_vectors_that_are_too_rough_for_an_ill_conditioned_factor_are_found_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As rough as the certificate of the fast kernels allows."""
    deltas = ill_conditioned((60, 60), 6, 8, 1e-8, generator(21))
    expected = reference.tsv(deltas, [6] * 8)
    real = eigen.leading_eigh

    def rough(a: Tensor, *args: Any) -> Any:
        found = real(a, *args)
        noise = 1e-9 * gaussian(*found.vectors.shape, generator(22))
        return eigen.Eigen(found.values, torch.linalg.qr((found.vectors + noise).mT)[0].mT)

    monkeypatch.setattr(eigen, "leading_eigh", rough)
    assert not svd.truncated_svd(deltas[0], 6).exact
    result = merge(deltas, 6)
    assert relative_error(result.matrix, expected) < 1e-6
    assert result.exact == 12  # eight tasks, and two polar factors twice


@both_solvers
@pytest.mark.parametrize("sign", [1, -1])
def test_a_pair_in_an_ill_conditioned_merge_is_merged_once_and_no_more_is_left_out(
    solver: str, sign: int
) -> None:
    deltas = ill_conditioned((60, 60), 6, 8, 1e-8, generator(23))
    deltas.append(sign * deltas[0])
    result = merge(deltas, 6, **how(solver))
    assert result.null_directions == 6
    assert relative_error(result.matrix, reference.tsv(deltas, [6] * 9)) < 1e-6


@both_solvers
@pytest.mark.parametrize("dtype", STORED, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("sign", [1, -1])
def test_tasks_given_twice_by_stored_factors_are_merged_once(
    solver: str, sign: int, dtype: torch.dtype
) -> None:
    """Vectors that are orthonormal to the rounding of their storage only."""
    first, second = (decompose(delta, 6).to(dtype) for delta in related(2)[0])
    again = updates.TaskSingularVectors(sign * first.U, 0.3 * first.S, first.Vh)
    result = merge([first, second, again], 6, **how(solver))
    assert result.null_directions == 6
    double = [t.to(torch.float64) for t in (first, second, again)]
    U, S, Vh = (getattr(updates.concatenate(double), name) for name in ("U", "S", "Vh"))
    expected = reference.procrustes(U) * S @ reference.procrustes(Vh.T).T
    assert relative_error(result.matrix, expected) < 1e-6


@both_solvers
def test_a_task_beside_its_own_factors_is_merged_once(solver: str) -> None:
    g = generator(24)
    delta, other = lora((60, 72), 6, 3e-4, g).float(), lora((60, 72), 6, 3e-4, g).float()
    factors = decompose(delta, 6).to(torch.float32)
    result = merge([delta, other, factors], 6, **how(solver))
    expected = reference.tsv([delta, other, delta], [6] * 3)
    assert result.null_directions == 6
    assert relative_error(result.matrix, expected) < 1e-6


@both_solvers
def test_adapters_on_one_frozen_half_share_it(solver: str) -> None:
    g = generator(25)
    A = gaussian(6, 72, g)
    deltas = [gaussian(60, 6, g) @ A for _ in range(4)]
    result = merge(deltas, 6, **how(solver))
    assert result.null_directions == 18
    assert relative_error(result.matrix, reference.tsv(deltas, [6] * 4)) < 1e-6


@both_solvers
@pytest.mark.parametrize("distance", [1e-4, 1e-5, 1e-6])
def test_what_is_more_than_storage_rounding_tells_tasks_apart(solver: str, distance: float) -> None:
    """A pair that is ill-conditioned and not the same: floors and float32 are far below it."""
    g = generator(26)
    first, other = gaussian(40, 60, g), gaussian(40, 60, g)
    deltas = [first.float(), (first + distance * other).float()]
    result = merge(deltas, 5, floors=[1e-9] * 2, **how(solver))
    assert result.null_directions == 0
    assert relative_error(result.matrix, reference.tsv(deltas, [5, 5])) < 1e-6


# Accuracy on the spectra of fine-tuning

SIZES = [((72, 72), 8), ((48, 96), 14), ((96, 48), 20), ((48, 48), 2)]


@cache
def spectrum(
    shape: tuple[int, int], tasks: int, exponent: float, noise: float
) -> tuple[list[Tensor], int, Tensor]:
    """Fine-tuned updates, their rank, and what they merge to."""
    deltas = fine_tunes(shape, tasks, exponent, seed=tasks, noise=noise)
    rank = default_rank(shape, tasks)
    return deltas, rank, reference.tsv(deltas, [rank] * tasks)


@both_solvers
@pytest.mark.parametrize(("shape", "tasks"), SIZES)
@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("exponent", [1.0, 0.75, 0.5, 0.25])
def test_power_laws_with_shared_subspaces_are_merged_accurately(
    solver: str, exponent: float, noise: float, shape: tuple[int, int], tasks: int
) -> None:
    deltas, rank, expected = spectrum(shape, tasks, exponent, noise)
    assert relative_error(merged(deltas, rank, solver), expected) < BAR


@both_solvers
@pytest.mark.parametrize(("shape", "tasks"), SIZES)
def test_gaussian_updates_are_merged_accurately(
    solver: str, shape: tuple[int, int], tasks: int
) -> None:
    g = generator(8)
    deltas = [3e-4 * gaussian(*shape, g).float() for _ in range(tasks)]
    rank = default_rank(shape, tasks)
    expected = reference.tsv(deltas, [rank] * tasks)
    assert relative_error(merged(deltas, rank, solver), expected) < BAR


@both_solvers
@pytest.mark.parametrize(("shape", "tasks"), SIZES)
def test_updates_of_low_rank_are_merged_accurately(
    solver: str, shape: tuple[int, int], tasks: int
) -> None:
    g = generator(9)
    deltas = [lora(shape, 3, 3e-4, g) for _ in range(tasks)]  # rank 3 to float64 rounding
    rank = default_rank(shape, tasks)
    result = merge(deltas, rank, **how(solver))
    assert result.ranks == (min(rank, 3),) * tasks
    assert relative_error(result.matrix, reference.tsv(deltas, result.ranks)) < BAR


@both_solvers
@pytest.mark.parametrize(("shape", "tasks"), SIZES)
@pytest.mark.parametrize("factor", [1, -1, 0])
def test_a_repeated_opposite_or_unchanged_task_is_merged_accurately(
    solver: str, factor: int, shape: tuple[int, int], tasks: int
) -> None:
    deltas, _, _ = spectrum(shape, tasks, 0.5, 0.0)
    rank = default_rank(shape, tasks + 1)
    expected = reference.tsv([*deltas, factor * deltas[0]], [*[rank] * tasks, rank * abs(factor)])
    result = merged([*deltas, factor * deltas[0]], rank, solver)
    assert relative_error(result, expected) < BAR


# Storage rounding


def stored(base: Tensor, delta: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The task matrix of checkpoints saved in `dtype`, and its noise floor."""
    W0 = base.to(dtype)
    W1 = (W0.double() + delta).to(dtype)
    return W1.float() - W0.float(), updates.storage_noise(W0, W1)


every_dtype = pytest.mark.parametrize("dtype", STORED, ids=["fp32", "fp16", "bf16"])
every_kind = pytest.mark.parametrize(
    "kind", ["normal", "heavy-tailed", "outlier-columns", "outlier-rows"]
)


@every_dtype
@every_kind
@pytest.mark.parametrize("rms", [1e-3, 3e-4, 1e-4])
def test_a_lora_of_rank_16_has_rank_16_however_it_was_saved(
    dtype: torch.dtype, kind: str, rms: float
) -> None:
    g = generator(11)
    shape = (144, 192)
    delta, floor = stored(base_weights(kind, shape, g), lora(shape, 16, rms, g), dtype)
    assert decompose(delta, 64, floor).rank == 16


@every_dtype
def test_a_lora_has_its_rank_where_base_and_fine_tune_were_converted_afterwards(
    dtype: torch.dtype,
) -> None:
    """Both are rounded then, not only the fine-tuned weights."""
    g = generator(11)
    W0, delta = base_weights("normal", (144, 192), g), lora((144, 192), 16, 3e-4, g)
    base, fine_tuned = W0.to(dtype), (W0 + delta).to(dtype)
    floor = updates.storage_noise(base, fine_tuned)
    assert decompose(fine_tuned.float() - base.float(), 64, floor).rank == 16


@every_dtype
@every_kind
def test_the_noise_floor_of_transposed_weights_is_the_same(dtype: torch.dtype, kind: str) -> None:
    g = generator(11)
    W0 = base_weights(kind, (24, 40), g).to(dtype)
    W1 = (W0.double() + 3e-4 * gaussian(24, 40, g)).to(dtype)
    assert updates.storage_noise(W0.T, W1.T) == pytest.approx(updates.storage_noise(W0, W1))


@pytest.mark.parametrize("base", STORED, ids=["base fp32", "base fp16", "base bf16"])
@pytest.mark.parametrize("change", [1e-3, 1e-9, 0.0])
@every_dtype
@every_kind
def test_what_is_measured_in_the_memory_of_the_fine_tune_is_the_same(
    dtype: torch.dtype, kind: str, change: float, base: torch.dtype
) -> None:
    """Entries that a small change is lost in count for less in both."""
    g = generator(13)
    W0 = base_weights(kind, (40, 56), g).to(base)
    W1 = (W0.double() + change * gaussian(40, 56, g)).to(dtype)
    delta, place = updates.difference(W1, W0), W1.data_ptr()
    floor = updates.storage_noise(W0, W1)
    found = updates.measured(W1, W0, noisy=True)
    assert torch.equal(found.update, delta)
    assert found.largest == float(delta.abs().max())
    assert found.norm == pytest.approx(float(delta.double().norm()), rel=1e-6)
    assert found.floor == (pytest.approx(floor, rel=1e-5) if found.norm else 0.0)
    alone = dtype == base == torch.float32
    assert (found.update.data_ptr() == place) is alone


@every_dtype
def test_without_the_floor_a_saved_lora_has_full_rank(dtype: torch.dtype) -> None:
    g = generator(12)
    delta, _ = stored(base_weights("normal", (96, 96), g), lora((96, 96), 16, 3e-4, g), dtype)
    assert decompose(delta, 96).rank == 96


@every_dtype
@every_kind
def test_saved_loras_merge_as_they_were_before_they_were_saved(
    dtype: torch.dtype, kind: str
) -> None:
    """The error is no more than the rounding of the updates; without the floor, half of them."""
    g = generator(13)
    base = base_weights(kind, (160, 160), g)
    exact = [lora((160, 160), 16, 3e-4, g) for _ in range(3)]
    deltas, floors = zip(*(stored(base, delta, dtype) for delta in exact), strict=True)
    rounding = max(map(relative_error, deltas, exact))
    expected = reference.tsv(exact, [16] * 3)
    assert relative_error(merged(deltas, 53, floors=floors), expected) < rounding
    assert relative_error(merged(deltas, 53), expected) > 0.4


@pytest.mark.parametrize(
    ("dtype", "rms"), [(torch.float32, 1e-10), (torch.float16, 1e-6), (torch.bfloat16, 1e-5)]
)
def test_a_lora_under_a_tenth_of_a_storage_step_is_lost(dtype: torch.dtype, rms: float) -> None:
    """There it stops: nine entries in ten are saved as they were."""
    g = generator(14)
    shape = (144, 192)
    delta, floor = stored(base_weights("normal", shape, g), lora(shape, 16, rms, g), dtype)
    assert float((delta == 0).float().mean()) > 0.85
    assert decompose(delta, 64, floor).rank < 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_kind
def test_a_checkpoint_saved_in_another_dtype_only_is_no_task(dtype: torch.dtype, kind: str) -> None:
    W0 = base_weights(kind, (96, 144), generator(15)).float()
    W1 = W0.to(dtype)
    floor = updates.storage_noise(W0, W1)
    assert decompose(W1.float() - W0, 96, floor).rank == 0


sixteen_bits = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


@sixteen_bits
@every_kind
@pytest.mark.parametrize("rms", [3e-4, 1e-4, 1e-5])
def test_nothing_of_a_float32_fine_tune_is_rounding_of_its_16_bit_base(
    dtype: torch.dtype, kind: str, rms: float
) -> None:
    g = generator(21)
    W0 = base_weights(kind, (96, 144), g).to(dtype)
    W1 = W0.float() + rms * torch.randn(96, 144, generator=g)
    delta, floor = updates.difference(W1, W0), updates.storage_noise(W0, W1)
    assert decompose(delta, 48, floor).rank == 48
    assert floor < 0.03 * float(torch.linalg.svdvals(delta)[47])


@sixteen_bits
def test_a_lora_that_was_rounded_to_16_bits_and_saved_in_32_has_its_rank(
    dtype: torch.dtype,
) -> None:
    g = generator(22)
    W0 = base_weights("normal", (144, 192), g).to(dtype)
    W1 = (W0.double() + lora((144, 192), 16, 3e-4, g)).to(dtype).float()
    assert decompose(updates.difference(W1, W0), 64, updates.storage_noise(W0, W1)).rank == 16


@every_kind
def test_float64_checkpoints_are_subtracted_in_float64(kind: str) -> None:
    g = generator(16)
    W0 = base_weights(kind, (96, 96), g)
    W1 = W0 + lora((96, 96), 16, 1e-12, g)
    delta = updates.difference(W1, W0)
    assert decompose(delta, 96, updates.storage_noise(W0, W1)).rank == 16
    assert updates.difference(W1, W0.float()).dtype == torch.float64
    assert updates.difference(W1.float(), W0.half()).dtype == torch.float32


def test_weights_below_the_normal_range_of_float16_have_its_absolute_step() -> None:
    g = generator(17)
    delta, floor = stored(
        1e-3 * base_weights("normal", (96, 96), g), lora((96, 96), 4, 4e-6, g), torch.float16
    )
    assert decompose(delta, 96, floor).rank == 4


@pytest.mark.parametrize("exponent", [-100, -40, 40, 100])
def test_the_noise_floor_scales_with_the_weights(exponent: int) -> None:
    g = generator(18)
    W0 = base_weights("normal", (24, 32), g).float()
    W1 = W0 + lora((24, 32), 4, 3e-4, g).float()
    c = 2.0**exponent
    ratio = updates.storage_noise(c * W0, c * W1) / updates.storage_noise(W0, W1)
    assert ratio == pytest.approx(c, rel=1e-6, abs=0)


@pytest.mark.parametrize(
    ("dtype", "tasks"),
    [(torch.float32, 2), (torch.float16, 4), (torch.bfloat16, 8)],
    ids=["fp32", "fp16", "bf16"],
)
@pytest.mark.parametrize("exponent", [1.0, 0.75, 0.5])
def test_a_full_fine_tune_loses_nothing_to_the_floor(
    dtype: torch.dtype, tasks: int, exponent: float
) -> None:
    """Its leading k/T triplets stand above the rounding, and merge as if there were no floor."""
    g = generator(19)
    base, shape = base_weights("normal", (128, 128), g), (128, 128)
    exact = [power_law(shape, exponent, g) for _ in range(tasks)]
    deltas, floors = zip(*(stored(base, delta, dtype) for delta in exact), strict=True)
    rank = default_rank(shape, tasks)
    result = merge(deltas, rank, floors=floors)
    assert result.ranks == (rank,) * tasks
    assert torch.equal(result.matrix, merged(deltas, rank))


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed"])
@pytest.mark.parametrize("exponent", [1.0, 0.75, 0.5])
def test_what_the_floor_drops_of_a_full_fine_tune_was_noise(kind: str, exponent: float) -> None:
    """Without those triplets the merge is as near to that of the unrounded updates."""
    g = generator(20)
    base, shape = base_weights(kind, (96, 96), g), (96, 96)
    exact = [power_law(shape, exponent, g) for _ in range(2)]
    deltas, floors = zip(*(stored(base, delta, torch.bfloat16) for delta in exact), strict=True)
    expected = reference.tsv(exact, [48, 48])
    with_floor = relative_error(merged(deltas, 48, floors=floors), expected)
    assert with_floor < 1.1 * relative_error(merged(deltas, 48), expected)


def test_each_task_has_its_own_floor() -> None:
    deltas, _ = related(2)
    values = [reference.triplets(delta, 8)[1] for delta in deltas]
    floors = [float(values[0][4]) * 1.001, float(values[1][2]) * 1.001]
    result = merge(deltas, 8, floors=floors)
    assert result.ranks == (4, 2)
    assert relative_error(result.matrix, reference.tsv(deltas, [4, 2])) < 1e-11


def test_a_floor_is_in_the_units_of_the_weights() -> None:
    delta = torch.diag(torch.tensor([3.0, 2.0, 1.0])) * 1e-6
    assert decompose(delta, 3, floor=1.5e-6).rank == 2


# Inputs as they come


@both_solvers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_updates_of_any_dtype_are_merged_in_float64(solver: str, dtype: torch.dtype) -> None:
    deltas, rank = related(3)
    deltas = [(1e3 * delta).to(dtype) for delta in deltas]
    result = merged(deltas, rank, solver)
    assert result.dtype == torch.float64
    assert relative_error(result, reference.tsv(deltas, [rank] * 3)) < 1e-9


@both_solvers
def test_non_contiguous_updates_are_merged(solver: str) -> None:
    deltas, rank = related(3)
    spread = [torch.zeros(48, 60) for _ in deltas]
    for wide, delta in zip(spread, deltas, strict=True):
        wide[::2, ::2] = delta
    views = [wide[::2, ::2] for wide in spread]
    assert relative_error(merged(views, rank, solver), merged(deltas, rank, solver)) < 1e-13


@both_solvers
def test_updates_are_left_as_they_were(solver: str) -> None:
    deltas, rank = related(3)
    before = [delta.clone() for delta in deltas]
    merged(deltas, rank, solver)
    assert all(map(torch.equal, deltas, before))


def test_a_task_too_many_or_a_floor_too_few_is_an_error() -> None:
    deltas, rank = related(3)
    with pytest.raises(ValueError, match="shorter"):
        merge(deltas, rank, floors=[0.0, 0.0])
