"""Rank rules, budgets, and the allocation of bytes checked against every other allocation."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, chain, combinations, product
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_tsv.compression.allocation import Choice, allocate, rank_of_energy
from hf_tsv.compression.candidates import DENSE
from hf_tsv.recipes.compressing import DEFAULT_RANK_FRACTION, RankRule
from hf_tsv.system.errors import RecipeError

GIVEN: dict[str, Any] = {"rank_fraction": 0.2, "rank": 3, "energy": 0.9, "budget": "10%"}

tiny = settings(max_examples=100, deadline=None, database=None)


# One rule


def test_a_tenth_of_the_rank_is_kept_by_default() -> None:
    assert (
        RankRule().to_dict() == {"rank_fraction": DEFAULT_RANK_FRACTION} == {"rank_fraction": 0.1}
    )
    assert RankRule() == RankRule(rank_fraction=0.1)


@pytest.mark.parametrize("name", GIVEN)
def test_a_rule_alone_is_the_one_that_applies(name: str) -> None:
    rule = RankRule(**{name: GIVEN[name]})
    assert rule.to_dict() == {name: GIVEN[name]}


@pytest.mark.parametrize(("first", "second"), [*combinations(GIVEN, 2)])
def test_two_rules_exclude_each_other(first: str, second: str) -> None:
    with pytest.raises(RecipeError, match=f"`{first}=` and `{second}=` cannot be combined"):
        RankRule(**{first: GIVEN[first], second: GIVEN[second]})


def test_the_default_given_in_words_excludes_another_rule_too() -> None:
    with pytest.raises(RecipeError, match="`rank_fraction=` and `rank=` cannot be combined"):
        RankRule(rank_fraction=DEFAULT_RANK_FRACTION, rank=1)


@pytest.mark.parametrize("name", ["rank_fraction", "energy"])
@pytest.mark.parametrize(
    "value", [0, 0.0, -0.1, 1.1, 10**400, float("nan"), float("inf"), True, "0.1", [0.1]]
)
def test_a_share_is_a_number_above_0_and_up_to_1(name: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=f"^`{name}=` must be "):
        RankRule(**{name: value})


@pytest.mark.parametrize("value", [0, -1, 1.0, 2.5, True, "3", [3], float("nan")])
def test_a_rank_is_a_whole_number_from_1_on(value: Any) -> None:
    with pytest.raises(RecipeError, match=r"^`rank=` must be (at least 1|a whole number) "):
        RankRule(rank=value)


@pytest.mark.parametrize("name", ["rank_fraction", "energy"])
def test_all_of_it_is_a_share(name: str) -> None:
    share = RankRule(**{name: 1}).to_dict()[name]
    assert share == 1.0
    assert isinstance(share, float)


# Rank known before the singular values


@pytest.mark.parametrize(("rank", "k", "kept"), [(1, 8, 1), (7, 8, 7), (8, 8, 8), (9, 8, 8)])
def test_a_number_of_triplets_is_capped_by_how_many_there_are(rank: int, k: int, kept: int) -> None:
    assert RankRule(rank=rank).rank_before(k) == kept


@given(percent=st.integers(1, 100), k=st.integers(1, 5000))
@example(percent=29, k=100)  # 0.29 · 100 = 28.999999999999996
def test_a_share_of_the_rank_is_rounded_down_and_keeps_one_triplet(percent: int, k: int) -> None:
    assert RankRule(rank_fraction=percent / 100).rank_before(k) == max(1, percent * k // 100)


@pytest.mark.parametrize("rule", [RankRule(energy=0.5), RankRule(budget=1000)])
def test_a_rank_that_depends_on_singular_values_is_not_known_before(rule: RankRule) -> None:
    assert rule.rank_before(32) is None


# Rank of a share of the energy

ENERGIES = st.lists(st.integers(1, 1000), min_size=1, max_size=12).map(
    lambda values: sorted(values, reverse=True)
)


@given(energies=ENERGIES, share=st.integers(1, 1000).map(lambda n: n / 1000) | st.floats(1e-6, 1))
def test_the_rank_of_an_energy_is_the_smallest_that_suffices(
    energies: list[int], share: float
) -> None:
    tensor = torch.tensor(energies, dtype=torch.float64)
    rank = rank_of_energy(tensor, float(sum(energies)), share)
    wanted = Fraction(share) * sum(energies)
    assert sum(energies[:rank]) >= wanted * (1 - Fraction(1, 10**11))
    assert sum(energies[: rank - 1]) < wanted


@pytest.mark.parametrize("total", [8.0, 8.0 * (1 + 1e-14)])
def test_a_share_that_is_just_reached_suffices_whatever_the_rounding(total: float) -> None:
    assert rank_of_energy(torch.tensor([4.0, 2.0, 2.0]).double(), total, share=0.75) == 2


@given(energies=ENERGIES)
def test_all_of_the_energy_takes_all_triplets(energies: list[int]) -> None:
    roots = torch.tensor(energies, dtype=torch.float64).sqrt() * 1e-3
    assert rank_of_energy(roots.square(), float(roots.norm()) ** 2, 1.0) == len(energies)


def test_triplets_that_do_not_suffice_are_all_kept() -> None:
    assert rank_of_energy(torch.tensor([4.0, 2.0, 1.0]), total=10.0, share=0.8) == 3


# Allocation, against brute force


def choice(
    energies: list[int], triplet_bytes: int, dense_bytes: int | None = None, rest: int = 0
) -> Choice:
    """A weight whose squared singular values are these, and `rest` beyond them."""
    tensor = torch.tensor(energies, dtype=torch.float64)
    return Choice(tensor, float(sum(energies) + rest), triplet_bytes, dense_bytes)


@st.composite
def weights(draw: st.DrawFn, *, dense: bool = True) -> Choice:
    energies = sorted(draw(st.lists(st.integers(0, 50), max_size=4)), reverse=True)
    dense_bytes = draw(st.none() | st.integers(1, 24)) if dense else None
    return choice(energies, draw(st.integers(1, 7)), dense_bytes, draw(st.integers(0, 20)))


INSTANCES = st.lists(weights(), min_size=1, max_size=3)
BUDGETS = st.integers(0, 60)


def cost(choices: list[Choice], kept: list[int]) -> int:
    """Bytes of an allocation."""
    return sum(
        (c.dense_bytes or 0) if rank == DENSE else rank * c.triplet_bytes
        for c, rank in zip(choices, kept, strict=True)
    )


def error(choices: list[Choice], kept: list[int]) -> float:
    """Squared error of an allocation."""
    return sum(
        0.0 if rank == DENSE else c.total - float(c.energies[:rank].sum())
        for c, rank in zip(choices, kept, strict=True)
    )


def best(choices: list[Choice], budget: int) -> float:
    """The smallest squared error of all allocations within the budget."""
    options = [
        [*range(len(c.energies) + 1), *([] if c.dense_bytes is None else [DENSE])] for c in choices
    ]
    allowed = (list(kept) for kept in product(*options))
    return min(error(choices, kept) for kept in allowed if cost(choices, kept) <= budget)


@dataclass(frozen=True)
class Step:
    """From one corner of a hull of energy over bytes to the next."""

    slope: Fraction
    weight: int
    bytes: int
    energy: int


def hull_steps(choices: list[Choice]) -> list[Step]:
    """The steps of all hulls, steepest first; of equal ones those of the first weight."""
    steps = []
    for i, c in enumerate(choices):
        gains = accumulate(map(int, c.energies.tolist()))
        points = [(n * c.triplet_bytes, gain, False) for n, gain in enumerate(gains, start=1)]
        if c.dense_bytes is not None:
            points.append((c.dense_bytes, int(c.total), True))
        at, got = 0, 0
        while ahead := [point for point in points if point[0] > at and point[1] > got]:
            slope, _, _, end, gain = max(
                (Fraction(gain - got, end - at), dense, -end, end, gain)
                for end, gain, dense in ahead
            )
            steps.append(Step(slope, i, end - at, gain - got))
            at, got = end, gain
    return sorted(steps, key=lambda step: (-step.slope, step.weight))


def first_too_large(choices: list[Choice], budget: int) -> int:
    """Energy of the first step that does not fit; 0 if all do."""
    for step in hull_steps(choices):
        if step.bytes > budget:
            return step.energy
        budget -= step.bytes
    return 0


@tiny
@given(choices=INSTANCES, budget=BUDGETS)
def test_an_allocation_stays_within_the_budget(choices: list[Choice], budget: int) -> None:
    kept = allocate(choices, budget)
    assert cost(choices, kept) <= budget
    for c, rank in zip(choices, kept, strict=True):
        assert 0 <= rank <= len(c.energies) or (rank == DENSE and c.dense_bytes is not None)


@tiny
@given(choices=INSTANCES, budget=BUDGETS)
def test_the_error_is_at_most_one_step_above_the_optimum(
    choices: list[Choice], budget: int
) -> None:
    found = error(choices, allocate(choices, budget))
    assert found <= best(choices, budget) + first_too_large(choices, budget)


@tiny
@given(choices=INSTANCES, taken=st.integers(0, 15))
def test_nothing_is_better_where_the_budget_ends_with_a_step(
    choices: list[Choice], taken: int
) -> None:
    budget = sum(step.bytes for step in hull_steps(choices)[:taken])
    kept = allocate(choices, budget)
    assert cost(choices, kept) == budget
    assert error(choices, kept) == best(choices, budget)


@tiny
@given(choices=INSTANCES, budget=BUDGETS, more=st.integers(1, 20))
def test_a_larger_budget_leaves_no_larger_error_beyond_one_step(
    choices: list[Choice], budget: int, more: int
) -> None:
    before = error(choices, allocate(choices, budget))
    after = error(choices, allocate(choices, budget + more))
    assert after <= before + first_too_large(choices, budget + more)


@tiny
@given(choices=INSTANCES, budget=BUDGETS)
def test_no_triplet_that_still_fits_is_left_out(choices: list[Choice], budget: int) -> None:
    kept = allocate(choices, budget)
    left = budget - cost(choices, kept)
    for c, rank in zip(choices, kept, strict=True):
        if rank == DENSE or rank == len(c.energies) or not c.energies[rank]:
            continue
        whole = c.dense_bytes is not None and (rank + 1) * c.triplet_bytes >= c.dense_bytes
        assert (
            (c.dense_bytes or 0) - rank * c.triplet_bytes > left
            if whole
            else (c.triplet_bytes > left)
        )


@tiny
@given(spectra=st.lists(ENERGIES, min_size=1, max_size=4), triplets=st.integers(0, 20))
def test_equal_costs_keep_the_largest_singular_values(
    spectra: list[list[int]], triplets: int
) -> None:
    choices = [choice(energies, triplet_bytes=5) for energies in spectra]
    kept = allocate(choices, 5 * triplets + 4)
    together = [e for energies, r in zip(spectra, kept, strict=True) for e in energies[:r]]
    assert sorted(together, reverse=True) == sorted(chain(*spectra), reverse=True)[:triplets]


@tiny
@given(choices=INSTANCES)
def test_a_budget_for_everything_loses_nothing_that_can_be_stored(choices: list[Choice]) -> None:
    everything = sum(max(c.dense_bytes or 0, len(c.energies) * c.triplet_bytes) for c in choices)
    assert error(choices, allocate(choices, everything)) == best(choices, everything)


def test_a_budget_for_everything_stores_whole_what_its_triplets_do_not_cover() -> None:
    choices = [choice([9, 4], 3, dense_bytes=10, rest=1), choice([9, 4], 3, dense_bytes=7, rest=2)]
    assert allocate(choices, 17) == [DENSE, DENSE]


def test_a_budget_for_everything_keeps_all_triplets_where_they_are_all_there_is() -> None:
    assert allocate([choice([9, 4], 3), choice([1], 4, dense_bytes=20)], 10) == [2, 1]


@tiny
@given(choices=INSTANCES)
def test_no_budget_keeps_nothing(choices: list[Choice]) -> None:
    assert allocate(choices, 0) == [0] * len(choices)


def test_a_cheap_triplet_comes_before_a_larger_one_that_costs_more_than_it_carries() -> None:
    assert allocate([choice([10], 10), choice([6], 4)], 10) == [0, 1]


def test_what_is_too_little_for_the_next_step_goes_to_smaller_ones() -> None:
    assert allocate([choice([100], 10), choice([1, 1], 4)], 9) == [0, 2]


def test_single_triplets_fill_what_is_too_little_for_the_update_itself() -> None:
    flat = choice([4, 3, 3], 4, dense_bytes=14, rest=10)
    assert allocate([flat], 14) == [DENSE]
    assert allocate([flat], 13) == [3]
    assert allocate([flat], 9) == [2]


def test_triplets_that_take_as_many_bytes_as_the_update_itself_are_never_kept() -> None:
    assert allocate([choice([8, 8, 8], 5, dense_bytes=15)], 15) == [DENSE]
    assert allocate([choice([8, 8, 8], 5, dense_bytes=15)], 14) == [2]


def test_directions_without_energy_cost_nothing() -> None:
    assert allocate([choice([5, 0, 0], 2, dense_bytes=7)], 100) == [1]


def test_an_update_is_weighed_as_a_whole_where_its_triplets_alone_are_worth_less() -> None:
    whole = choice([6], 6, dense_bytes=10, rest=6)  # 1 a byte for the triplet, 1.2 for all of it
    assert allocate([whole, choice([11], 10)], 10) == [DENSE, 0]
