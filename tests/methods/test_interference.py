"""Singular task interference of one weight, against its definition in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import concatenation, fine_tunes, gaussian, generator, lora, orthonormal, procrustes
from rules import decompose, merge
from torch import Tensor

from hf_tsv.linalg.updates import TaskSingularVectors
from hf_tsv.methods import interference

SHAPES = [(24, 24), (40, 24), (24, 40)]


def by_definition(U: Tensor, s: Tensor, Vh: Tensor) -> float:
    """‖(UᵀU − I) diag(σ) (VhVhᵀ − I)‖₁, entrywise."""
    eye = torch.eye(len(s), dtype=torch.float64)
    return float(((U.T @ U - eye) @ s.diag() @ (Vh @ Vh.T - eye)).abs().sum())


def measured(deltas: Sequence[Tensor], rank: int, **options: object) -> interference.Interference:
    found = interference.measured(merge(deltas, rank, keep=True, **options))  # type: ignore[arg-type]
    assert found is not None
    return found


def rank_one(u: Sequence[float], sigma: float, v: Sequence[float]) -> Tensor:
    left, right = (torch.tensor(x, dtype=torch.float64) for x in (u, v))
    return sigma * torch.outer(left, right)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_it_is_the_definition(shape: tuple[int, int], precision: str) -> None:
    deltas = fine_tunes(shape, 3, 0.5, seed=1, smallest_angle=0.05)
    factors = concatenation(deltas, [8] * 3)
    found = measured(deltas, 8, precision=precision)
    assert found.sti == pytest.approx(by_definition(*factors), rel=1e-6)
    for i in range(3):
        for j in range(3):
            alone = concatenation([deltas[i], deltas[j]], [8, 8])
            expected = 0.0 if i == j else by_definition(*alone)
            assert found.pairs[i][j] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rows", [1, 5, 7])
def test_the_product_is_computed_in_parts(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = fine_tunes((30, 20), 2, 0.5, seed=2)
    monkeypatch.setattr(interference, "ROWS", rows)
    expected = by_definition(*concatenation(deltas, [9, 9]))
    assert measured(deltas, 9).sti == pytest.approx(expected, rel=1e-6)


def test_more_triplets_than_rows_and_columns() -> None:
    """At full rank there are k of every task."""
    deltas = fine_tunes((12, 16), 4, 0.5, seed=3, smallest_angle=0.1)
    expected = by_definition(*concatenation(deltas, [12] * 4))
    assert measured(deltas, 12).sti == pytest.approx(expected, rel=1e-6)


# Appendix A of the paper: two tasks of one triplet each


def test_orthogonal_tasks_do_not_interfere() -> None:
    found = measured([rank_one([1, 0], 3.0, [1, 0]), rank_one([0, 1], 2.0, [0, 1])], 1)
    assert found.sti == found.sti_after == 0.0
    assert found.pairs == ((0.0, 0.0), (0.0, 0.0))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_collinear_and_opposite_tasks_interfere_most(sign: float) -> None:
    """Double scaling when the vectors agree, cancellation when they disagree: σ1 + σ2."""
    found = measured([rank_one([1, 0], 3.0, [1, 0]), rank_one([sign, 0], 2.0, [1, 0])], 1)
    assert found.sti == pytest.approx(5.0, rel=1e-9)
    assert found.pairs[0][1] == pytest.approx(5.0, rel=1e-9)


@given(st.floats(0.05, 1.5), st.floats(0.05, 1.5))
@settings(deadline=None)
def test_in_between_it_is_proportional_to_the_cosines(left: float, right: float) -> None:
    other = rank_one([math.cos(left), math.sin(left)], 2.0, [math.cos(right), math.sin(right)])
    found = measured([rank_one([1, 0], 3.0, [1, 0]), other], 1)
    assert found.sti == pytest.approx(5.0 * math.cos(left) * math.cos(right), rel=1e-6)


def test_one_side_alone_does_not_interfere() -> None:
    """Inputs that no other task reads, outputs that all write."""
    found = measured([rank_one([1, 0], 3.0, [1, 0]), rank_one([1, 0], 2.0, [0, 1])], 1)
    assert found.sti == 0.0


# Properties


@given(st.permutations(range(4)), st.integers(0, 50))
@settings(deadline=None, max_examples=25)
def test_the_order_of_tasks_does_not_matter(order: list[int], seed: int) -> None:
    deltas = fine_tunes((20, 26), 4, 0.5, seed=seed, smallest_angle=0.05)
    first, second = measured(deltas, 5), measured([deltas[i] for i in order], 5)
    assert second.sti == pytest.approx(first.sti, rel=1e-6)
    pairs = torch.tensor(first.pairs)[order][:, order]
    torch.testing.assert_close(torch.tensor(second.pairs), pairs, rtol=1e-6, atol=0)
    assert first.pairs[1][2] == first.pairs[2][1]


@given(st.floats(1e-20, 1e20))
@settings(deadline=None)
def test_it_has_the_units_of_the_weights(scale: float) -> None:
    deltas = [delta.double() for delta in fine_tunes((20, 26), 3, 0.5, seed=9)]
    first, second = measured(deltas, 6), measured([scale * d for d in deltas], 6)
    assert second.sti == pytest.approx(scale * first.sti, rel=1e-6)
    assert second.effective_ranks == pytest.approx(first.effective_ranks, rel=1e-6)


def test_it_does_not_depend_on_rotations_of_rows_and_columns() -> None:
    g = generator(4)
    deltas = [delta.double() for delta in fine_tunes((20, 26), 3, 0.5, seed=5)]
    P, Q = orthonormal(20, 20, g), orthonormal(26, 26, g)
    rotated = measured([P @ delta @ Q.T for delta in deltas], 6)
    assert rotated.sti == pytest.approx(measured(deltas, 6).sti, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_nothing_is_left_after_orthogonalisation(shape: tuple[int, int], precision: str) -> None:
    found = measured(fine_tunes(shape, 3, 0.5, seed=6), 8, precision=precision)
    assert 0 < found.sti_after < 1e-8 * found.sti


def test_what_is_left_of_equal_tasks_is_said() -> None:
    """Two tasks on the same directions cannot be made orthonormal."""
    delta = gaussian(24, 24, generator(7))
    U, s, Vh = concatenation([delta, delta], [6, 6])
    expected = by_definition(procrustes(U), s, procrustes(Vh.T).T)
    found = measured([delta, delta], 6)
    assert found.sti_after == pytest.approx(expected, rel=1e-5) and found.sti_after > 1


# What is said of each task


def test_energy_and_effective_rank_are_of_each_task() -> None:
    deltas = [gaussian(24, 30, generator(8)), lora((24, 30), 4, 1e-3, generator(9))]
    found = measured(deltas, 6, floors=[0.0, 1e-9])
    for delta, kept, effective in zip(deltas, found.kept, found.effective_ranks, strict=True):
        s = torch.linalg.svdvals(delta.double())
        p = s / s.sum()
        entropy = -(p * p.clamp_min(1e-300).log()).sum()
        assert kept == pytest.approx(float(s[:6].square().sum()), rel=1e-9)
        assert effective == pytest.approx(float(entropy.exp()), rel=1e-5)
    assert found.effective_ranks[1] < 4.01 < 15 < found.effective_ranks[0]


def test_a_spectrum_is_noted_at_shares_of_the_rank() -> None:
    delta = gaussian(64, 70, generator(14))
    found = measured([delta, gaussian(64, 70, generator(15))], 6)
    s = torch.linalg.svdvals(delta.double())
    for share, sigma, energy in zip(
        interference.RANK_SHARES, found.spectra[0], found.energies[0], strict=True
    ):
        if (rank := share * 64).is_integer() and rank < 64:
            assert sigma == pytest.approx(float(s[int(rank)]), rel=1e-6)
            assert energy == pytest.approx(float(s[: int(rank)].square().sum()), rel=1e-6)
    assert found.spectra[0][-1] == 0.0
    assert found.energies[0][-1] == pytest.approx(float(s.square().sum()), rel=1e-9)


def test_what_factors_do_not_keep_is_no_energy() -> None:
    delta = gaussian(32, 40, generator(16)).double()
    found = measured([decompose(delta, 8), gaussian(32, 40, generator(17))], 4)
    s = torch.linalg.svdvals(delta)[:8]
    assert found.energies[0][-1] == pytest.approx(float(s.square().sum()), rel=1e-9)
    assert found.spectra[0][16] == pytest.approx(0.0, abs=1e-12)  # rank 8 of 32


def test_stored_triplets_are_measured_like_the_update() -> None:
    deltas = [delta.double() for delta in fine_tunes((24, 30), 2, 0.5, seed=10)]
    stored = [decompose(delta, 7) for delta in deltas]
    first, second = measured(deltas, 7), measured(stored, 7)
    assert second.sti == pytest.approx(first.sti, rel=1e-9)
    assert second.sti_after < 1e-8 * second.sti


def test_measuring_changes_no_bit_of_the_merge() -> None:
    deltas = fine_tunes((40, 24), 3, 0.5, seed=11)
    plain, with_report = (merge(deltas, 8, keep=flag) for flag in (False, True))
    assert torch.equal(plain.matrix, with_report.matrix) and plain.measurable is None


@pytest.mark.parametrize("rank", [4, 10])
def test_one_task_alone_interferes_with_nobody(rank: int) -> None:
    delta = gaussian(10, 12, generator(12))
    found = measured([delta], rank)
    assert found.pairs == ((0.0,),) and found.sti < 1e-12
    plain, told = (merge([delta], rank, floors=[1.0], keep=m) for m in (False, True))
    assert torch.equal(plain.matrix, told.matrix) and plain.ranks == told.ranks


def test_a_task_without_an_update_takes_no_part() -> None:
    found = measured([torch.zeros(10, 12), gaussian(10, 12, generator(13))], 5)
    assert found.pairs == ((0.0, 0.0), (0.0, 0.0)) and found.effective_ranks[0] == 0.0
    assert found.kept[0] == 0.0


def test_factors_are_what_is_given() -> None:
    """The formula itself takes any factors, orthonormal or not."""
    g = generator(14)
    U, s, Vh = gaussian(9, 5, g), torch.rand(5, generator=g).double(), gaussian(5, 7, g)
    found = interference.singular_task_interference(TaskSingularVectors(U, s, Vh))
    assert found == pytest.approx(by_definition(U, s, Vh), rel=1e-12)
