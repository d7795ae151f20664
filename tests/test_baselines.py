"""The rules without singular vectors: running mean and sum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import average, generator, task_arithmetic
from torch import Tensor

from hf_tsv.baselines import mean_update, sum_update

RULES = [mean_update, sum_update]
examples = settings(max_examples=30, derandomize=True, deadline=None)


def updates(tasks: int, shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Float32 updates of any shape."""
    g = generator(seed)
    return [3e-4 * torch.randn(shape, generator=g) for _ in range(tasks)]


def assert_rounds_to(found: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    """Equal up to float32 rounding of numbers of this magnitude."""
    assert found.shape == expected.shape
    assert bool(((found - expected).abs() <= 1e-6 * magnitude.double()).all())


shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@given(st.integers(1, 20), shapes, st.integers(0, 2**32))
@examples
def test_the_running_mean_is_the_mean(tasks: int, shape: tuple[int, ...], seed: int) -> None:
    deltas = updates(tasks, shape, seed)
    assert_rounds_to(mean_update(deltas), average(deltas), torch.stack(deltas).abs().amax(0))


@given(st.integers(1, 20), shapes, st.integers(0, 2**32))
@examples
def test_task_arithmetic_is_the_sum(tasks: int, shape: tuple[int, ...], seed: int) -> None:
    deltas = updates(tasks, shape, seed)
    assert_rounds_to(sum_update(deltas), task_arithmetic(deltas), torch.stack(deltas).abs().sum(0))


@given(st.permutations(range(7)))
@examples
def test_the_order_of_tasks_changes_rounding_only(order: list[int]) -> None:
    deltas = updates(7, (4, 6))
    shuffled = [deltas[i] for i in order]
    for rule in RULES:
        assert_rounds_to(rule(shuffled), rule(deltas).double(), torch.stack(deltas).abs().sum(0))


@pytest.mark.parametrize("rule", RULES)
def test_one_task_is_itself(rule) -> None:
    (delta,) = updates(1, (3, 4))
    assert torch.equal(rule([delta]), delta)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_added_up_in_float32(rule, dtype: torch.dtype) -> None:
    deltas = [delta.to(dtype) for delta in updates(5, (8,))]
    result = rule(deltas)
    assert result.dtype == torch.float32
    expected = average(deltas) if rule is mean_update else task_arithmetic(deltas)
    assert_rounds_to(result, expected, torch.stack(deltas).abs().sum(0))


def test_half_precision_sums_do_not_overflow() -> None:
    deltas = [torch.full((2,), 6e4, dtype=torch.float16)] * 3
    assert sum_update(deltas).tolist() == [180000.0, 180000.0]


def test_the_mean_exists_where_the_sum_does_not() -> None:
    huge = torch.full((2,), 3e38)
    assert torch.equal(mean_update([huge] * 20), huge)


@pytest.mark.parametrize("rule", RULES)
def test_updates_are_left_as_they_were(rule) -> None:
    deltas = updates(3, (2, 3))
    before = [delta.clone() for delta in deltas]
    rule(deltas)
    assert all(map(torch.equal, deltas, before))


@pytest.mark.parametrize("rule", RULES)
def test_updates_are_taken_one_at_a_time(rule) -> None:
    deltas = updates(4, (2, 3))
    assert torch.equal(rule(delta for delta in deltas), rule(deltas))


@pytest.mark.parametrize("rule", RULES)
def test_an_update_given_twice_counts_twice(rule) -> None:
    (delta,) = updates(1, (5,))
    assert torch.equal(rule([delta, delta]), delta if rule is mean_update else 2 * delta)


@pytest.mark.parametrize("rule", RULES)
def test_non_contiguous_updates_are_added_up(rule) -> None:
    deltas = updates(3, (4, 6))
    assert torch.equal(rule([delta.T for delta in deltas]), rule(deltas).T)


@pytest.mark.parametrize("rule", RULES)
def test_no_task_is_an_error(rule) -> None:
    with pytest.raises(ValueError, match="at least one task"):
        rule([])
