"""The other rules: mean and sum, and those that came after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import hf_tsv as run
from hypothesis import given, settings
from hypothesis import strategies as st
from others import as_numpy, consensus
from reference import average, generator, task_arithmetic
from rules import merge
from safetensors.torch import load_file
from torch import Tensor

from hf_tsv.linalg.choices import Precision
from hf_tsv.methods import isotropic, tall_masks
from hf_tsv.methods.rules import Rule
from hf_tsv.methods.sums import mean_update, sum_update
from hf_tsv.methods.ties import Sizes
from hf_tsv.methods.ties import ties as ties_rule

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


def merged(rule: Rule, deltas: list[Tensor], **options: Any) -> Tensor:
    """M of a rule that keeps no triplets."""
    return merge(deltas, 0, rule=rule, **options).matrix


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


def ties(deltas: list[np.ndarray], thresholds: list[float]) -> np.ndarray:
    """Entry by entry."""
    found = np.zeros(deltas[0].shape)
    for place in np.ndindex(found.shape):
        kept = [
            d[place] for d, t in zip(deltas, thresholds, strict=True) if abs(d[place]) >= t
        ]  # trim
        sign = np.sign(sum(kept))  # elect
        agreeing = [value for value in kept if np.sign(value) == sign != 0]  # disjoint mean
        found[place] = np.mean(agreeing) if agreeing else 0
    return found


def iso_c(deltas: list[np.ndarray]) -> np.ndarray:
    U, S, Vh = np.linalg.svd(sum(deltas), full_matrices=False)
    return S.mean() * U @ Vh


def iso_cts(deltas: list[np.ndarray], share: float = 0.8) -> np.ndarray:
    U, S, Vh = np.linalg.svd(sum(deltas), full_matrices=False)
    k = len(S)
    own = round((k - int(share * k)) / len(deltas))
    common = k - own * len(deltas)
    left, sigma, right = [U[:, :common]], [S[:common]], [Vh[:common]]
    for delta in deltas:
        outside = delta - U[:, :common] @ U[:, :common].T @ delta
        u, s, vh = np.linalg.svd(outside, full_matrices=False)
        left.append(u[:, :own])
        sigma.append(s[:own])
        right.append(vh[:own])
    P, _, Q = np.linalg.svd(np.hstack(left), full_matrices=False)
    R, _, T = np.linalg.svd(np.vstack(right), full_matrices=False)
    return np.concatenate(sigma).mean() * (P @ Q) @ (R @ T)


@given(st.integers(1, 6), shapes, st.integers(0, 2**32), st.floats(0, 6e-4))
@examples
def test_ties_trims_elects_and_averages(
    tasks: int, shape: tuple[int, ...], seed: int, threshold: float
) -> None:
    deltas = updates(tasks, shape, seed)
    thresholds = [threshold * (i + 1) / tasks for i in range(tasks)]
    expected = torch.from_numpy(np.asarray(ties(as_numpy(deltas), thresholds)))
    found = merged(ties_rule, deltas, known=thresholds)
    assert_rounds_to(found, expected, torch.stack(deltas).abs().sum(0))


def test_ties_by_hand() -> None:
    deltas = [torch.tensor([3.0, 1.0, -2.0, 0.0]), torch.tensor([1.0, -4.0, -1.0, 0.0]),
              torch.tensor([-2.0, 2.0, 0.4, 0.0])]  # fmt: skip
    assert merged(ties_rule, deltas, known=[0.5] * 3).tolist() == [2.0, -4.0, -1.5, 0.0]
    assert merged(ties_rule, deltas, known=[2.0, 2.0, 2.0]).tolist() == [3.0, -4.0, -2.0, 0.0]


@given(st.integers(1, 6), shapes, st.integers(0, 2**32))
@examples
def test_consensus_keeps_what_several_tasks_need(
    tasks: int, shape: tuple[int, ...], seed: int
) -> None:
    deltas = updates(tasks, shape, seed)
    expected = torch.from_numpy(np.asarray(consensus(as_numpy(deltas))))
    found = merged(tall_masks.consensus, deltas)
    assert_rounds_to(found, expected, torch.stack(deltas).abs().sum(0))


def test_consensus_by_hand() -> None:
    deltas = [torch.tensor([1.0, 1.0, 5.0]), torch.tensor([1.0, 0.0, 1.0]),
              torch.tensor([0.0, 0.0, 1.0])]  # fmt: skip
    # needed by two, by one, by one: 1 is less than 0.4 of 5 + 1
    assert merged(tall_masks.consensus, deltas).tolist() == [2.0, 0.0, 0.0]
    assert merged(tall_masks.consensus, [deltas[1]]).tolist() == [1.0, 0.0, 1.0]


matrices = st.tuples(st.integers(2, 24), st.integers(2, 24))


@given(st.integers(1, 5), matrices, st.integers(0, 2**32))
@examples
def test_isotropic_merging_makes_singular_values_equal(
    tasks: int, shape: tuple[int, int], seed: int
) -> None:
    deltas = updates(tasks, shape, seed)
    found = merged(isotropic.iso_c, deltas)
    expected = torch.from_numpy(iso_c(as_numpy(deltas)))
    assert torch.allclose(found, expected, atol=1e-7)
    S = torch.linalg.svdvals(found)
    assert torch.allclose(S, S[0].expand(len(S)))


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize(
    ("tasks", "shape"), [(1, (20, 30)), (2, (40, 24)), (3, (60, 60)), (8, (64, 100)), (9, (20, 9))]
)
def test_tasks_get_directions_of_their_own(
    tasks: int, shape: tuple[int, int], precision: Precision
) -> None:
    deltas = updates(tasks, shape, seed=tasks)
    found = merged(isotropic.iso_cts, deltas, precision=precision)
    expected = torch.from_numpy(iso_cts(as_numpy(deltas)))
    assert torch.allclose(found, expected, atol=1e-7)
    own = round((min(shape) - int(0.8 * min(shape))) / tasks)
    rank = int((torch.linalg.svdvals(found) > 1e-9).sum())
    assert rank == min(shape) and (own > 0) == (tasks < 9)


def test_storage_noise_is_no_direction() -> None:
    """Of LoRA updates: what rounding left beside them does not become as large as they are."""
    g = generator(3)
    low = [torch.randn(40, 2, generator=g) @ torch.randn(2, 30, generator=g) for _ in range(3)]
    noisy = [delta + 1e-6 * torch.randn(40, 30, generator=g) for delta in low]
    floors = [1e-4] * 3
    for rule in (isotropic.iso_c, isotropic.iso_cts):
        found, clean = (merged(rule, deltas, floors=floors) for deltas in (noisy, low))
        assert float((found - clean).norm() / clean.norm()) < 1e-4
        assert int((torch.linalg.svdvals(found) > 1e-6).sum()) == 6


def test_tasks_that_changed_nothing_count() -> None:
    """They have no entry that matters, and their directions are left to the sum."""
    deltas = updates(2, (30, 40))
    zero = torch.zeros(30, 40)
    with_zeros = [*deltas, zero, zero]
    consensus = tall_masks.consensus
    assert torch.equal(merged(consensus, deltas, count=4), merged(consensus, with_zeros))
    assert torch.equal(merged(consensus, deltas[:1], count=4), zero)
    of_four, of_two = (merged(isotropic.iso_cts, deltas, count=n) for n in (4, 2))
    assert not torch.allclose(of_four, of_two)
    assert int((torch.linalg.svdvals(of_four) > 1e-9).sum()) == 30


@given(
    st.integers(0, 2**32),
    st.floats(0.01, 0.9),
    st.lists(st.sampled_from([1, 7, 300, 4000]), min_size=1, max_size=4),
)
@examples
def test_the_largest_entries_of_a_task_are_kept(seed: int, share: float, counts: list[int]) -> None:
    g = generator(seed)
    deltas = [torch.randn(count, generator=g) * 10 ** float(torch.randn(1, generator=g))
              for count in counts]  # fmt: skip
    sizes = Sizes()
    for delta in deltas:
        sizes.add(delta, delta.numel())
    whole = torch.cat(deltas).abs()
    threshold = sizes.threshold(share)
    kept = int((whole >= threshold).sum())
    wanted = int(share * len(whole))
    near = int(((whole / threshold - 1).abs() < 3e-4).sum())  # as fine as sizes are told apart
    assert wanted - near - 1 <= kept <= wanted


def test_entries_of_weights_that_did_not_change_count() -> None:
    sizes = Sizes()
    sizes.add(torch.arange(1.0, 11.0), 10)
    sizes.add(None, 40)
    assert (torch.arange(1.0, 11.0) >= sizes.threshold(0.1)).sum() == 5
    assert sizes.threshold(0.5) == 0.0


# Whole merges


@pytest.mark.parametrize("method", ["ties", "consensus", "iso-c", "iso-cts"])
def test_a_merge_by_another_method(zoo: Path, tmp_path: Path, method: str) -> None:
    kinds, alpha = ["vision", "full", "flat"], 0.7
    base = load_file(zoo / "base" / "model.safetensors")
    states = [fine_tuned(zoo, kind, base) for kind in kinds]
    done = run("merge", *(zoo / kind for kind in kinds), "--base-model", zoo / "base", "--method",
               method, "--alpha", alpha, "-o", tmp_path / "m", "--json")  # fmt: skip
    assert done.code == 0, done.err
    merged = load_file(tmp_path / "m" / "model.safetensors")
    names = [name for name, tensor in base.items() if tensor.is_floating_point()]
    sizes = [np.concatenate([np.abs(s[n] - base[n].double().numpy()).ravel() for n in names])
             for s in states]  # fmt: skip
    thresholds = [np.sort(size)[-int(0.2 * len(size))] for size in sizes]
    wrong = total = 0
    for name in names:
        w0 = base[name].double().numpy()
        deltas = [state[name] - w0 for state in states]
        changed = [delta for delta in deltas if np.any(delta)]
        if not changed:
            expected = w0 * 0
        elif method == "ties":
            expected = ties(deltas, thresholds)
        elif method == "consensus":
            expected = consensus(deltas)
        elif w0.ndim != 2 or name == "text_projection.weight":
            expected = sum(deltas) / len(deltas)
        elif method == "iso-c":
            expected = iso_c(deltas)
        else:
            expected = iso_cts(deltas) if len(changed) == 3 else None
        if expected is not None:
            found = merged[name].double().numpy()
            wrong += int((np.abs(found - w0 - alpha * expected) > 2e-7).sum())
            total += w0.size
    # TIES: sizes are told apart to 2^-12, so the last kept may differ
    assert wrong <= (0.001 if method == "ties" else 0) * total and total > 20_000
    card = (tmp_path / "m" / "README.md").read_text()
    assert f"with the method `{method}`" in card
    again = run("merge", "--recipe", tmp_path / "m", "-o", tmp_path / "n")
    assert again.code == 0, again.err
    a, b = (tmp_path / n / "model.safetensors" for n in "mn")
    assert a.read_bytes() == b.read_bytes()


def fine_tuned(zoo: Path, kind: str, base: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """All weights of a fine-tune under the base's names; the base's where it has none."""
    own = load_file(zoo / kind / "model.safetensors")
    own = {("" if n in base else "vision_model.") + n: tensor for n, tensor in own.items()}
    return {name: own.get(name, tensor).double().numpy() for name, tensor in base.items()}


@pytest.mark.parametrize("method", ["ties", "consensus", "iso-c", "iso-cts"])
def test_what_says_nothing_to_a_method_is_refused(zoo: Path, tmp_path: Path, method: str) -> None:
    words = ["merge", zoo / "vision", zoo / "full", "--base-model", zoo / "base", "--method",
             method, "-o", tmp_path / "m"]  # fmt: skip
    for more in (["--rank", "3"], ["--rank-fraction", "0.1"], ["--report"]):
        done = run(*words, *more)
        assert done.code == 2 and method in done.err and "Hint: " in done.err
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("rule", [isotropic.iso_c, isotropic.iso_cts])
def test_isotropic_merging_of_nothing(rule: Rule) -> None:
    found = merged(rule, [torch.zeros(6, 4)] * 2)
    assert torch.equal(found, torch.zeros(6, 4, dtype=torch.float64))


@pytest.mark.parametrize("factor", [0.3, -1.0])
def test_iso_cts_merges_multiples_of_a_task_once(factor: float) -> None:
    """As if they were multiples exactly, although float32 rounds them apart."""
    first, other = updates(2, (48, 48), seed=7)
    deltas = [first, factor * first, other]
    exact = [first.double(), factor * first.double(), other.double()]
    found, expected = (merge(tasks, 0, rule=isotropic.iso_cts) for tasks in (deltas, exact))
    assert found.null_directions == expected.null_directions > 0
    assert float((found.matrix - expected.matrix).norm() / expected.matrix.norm()) < 1e-5
