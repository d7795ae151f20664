"""Rules for the number of triplets kept of each weight: by share, number, energy, or bytes."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_tsv.compression.candidates import DENSE, Compression, Measured
from hf_tsv.compression.files import plan_adapter, spec_of
from hf_tsv.linalg.shapes import matrix_shape
from hf_tsv.recipes.compressing import Options, RankRule
from hf_tsv.system.errors import RecipeError
from hf_tsv.system.text import human_bytes


def rank_of_energy(energies: Tensor, total: float, share: float) -> int:
    """Smallest rank that keeps a share of the energy; k if the singular values do not suffice.

    The energies are squared singular values, descending, shape (k,), and `total` is the squared
    Frobenius norm of the update.
    """
    enough = torch.nonzero(energies.cumsum(0) >= share * total * (1 - 1e-12))
    return int(enough[0]) + 1 if len(enough) else len(energies)


@dataclass(frozen=True)
class Choice:
    """Alternatives for storing one weight.

    The energies are squared singular values that may be kept, descending, shape (n,); `total` is
    the squared Frobenius norm of the update, and `dense_bytes` the cost of storing that; None if it
    may not be.
    """

    energies: Tensor
    total: float
    triplet_bytes: int
    dense_bytes: int | None


def allocate(choices: Sequence[Choice], budget: int) -> list[int]:
    """Spend bytes on the triplets that carry most energy per byte, over all weights.

    The squared error of a weight is the energy of the omitted triplets (Eckart and Young, 1936), so
    the total error is a sum of terms that each depend on one rank. Singular values descend, so each
    further triplet of a weight adds at most as much energy as the one before. The curve of energy
    over bytes is therefore concave, and so is its hull, in which storing the update itself is the
    last step. Taking the steepest steps of all hulls first minimises error + λ · bytes for the λ of
    the last step taken: no allocation of as many bytes or fewer has a smaller error. When the rest
    of the budget is too small for the next step, it is spent on smaller steps that still fit; the
    result is worse than the best one by at most the energy of that next step.

    The budget is in bytes, for all weights together; the result is the rank of each, or [`DENSE`].
    """
    kept = [0] * len(choices)
    energies = [choice.energies.tolist() for choice in choices]
    bends = [_bend(choice, e) for choice, e in zip(choices, energies, strict=True)]
    queue: list[tuple[float, int, int, int]] = []

    def offer(i: int) -> None:
        """Queue the next step of a weight: one triplet, or at its bend the update itself."""
        choice, rank = choices[i], kept[i]
        gain, cost, after = 0.0, choice.triplet_bytes, rank + 1
        if rank == bends[i] and choice.dense_bytes is not None:
            gain = choice.total - sum(energies[i][:rank])
            cost, after = choice.dense_bytes - rank * choice.triplet_bytes, DENSE
        elif rank < _most(choice):
            gain = energies[i][rank]
        if gain > 0:
            heapq.heappush(queue, (-gain / cost, i, after, cost))

    for i in range(len(choices)):
        offer(i)
    left = budget
    while queue:
        _, i, after, cost = heapq.heappop(queue)
        if cost <= left:
            left -= cost
            kept[i] = after
        elif after == DENSE:
            bends[i] = DENSE  # too large, but single triplets may still fit
        else:
            continue
        if kept[i] != DENSE:
            offer(i)
    return kept


def _most(choice: Choice) -> int:
    """Largest rank that takes fewer bytes than the update itself."""
    if choice.dense_bytes is None:
        return len(choice.energies)
    return min(len(choice.energies), (choice.dense_bytes - 1) // choice.triplet_bytes)


def _bend(choice: Choice, energies: Sequence[float]) -> int:
    """Rank at which the hull leaves the curve of triplets for the update itself."""
    rank = _most(choice)
    if choice.dense_bytes is None:
        return DENSE
    rest = max(choice.total - sum(energies[:rank]), 0.0)
    cost = choice.dense_bytes - rank * choice.triplet_bytes
    while rank and energies[rank - 1] * cost <= rest * choice.triplet_bytes:
        rank -= 1
        rest += energies[rank]
        cost += choice.triplet_bytes
    return rank


def choose_ranks(measured: Sequence[Measured], job: Compression) -> list[int]:
    """Rank of every weight by the rule, or [`DENSE`]."""
    rule = job.options.rule
    if rule.budget is not None:
        return _within_budget(measured, job, rule.budget_bytes(job.checkpoint_bytes))
    return [_rank(item, rule) for item in measured]


def _rank(item: Measured, rule: RankRule) -> int:
    if item.norm == 0:
        return 0
    limit, kept = item.candidate.limit, len(item.singular_values)
    if limit == 0:
        return DENSE
    if rule.energy is not None and kept:
        rank = rank_of_energy(item.singular_values.square(), item.norm**2, rule.energy)
        short = item.energy(rank) < rule.energy
    else:
        rank = kept
        wanted = rule.rank_before(min(matrix_shape(item.candidate.shape)))
        short = wanted is not None and wanted > limit
    # The remainder is worth storing only if it exceeds the rounding of the checkpoints.
    return DENSE if short and item.numerical_rank > kept else rank


def _within_budget(measured: Sequence[Measured], job: Compression, budget: int) -> list[int]:
    ranks = [_rank(item, job.options.rule) for item in measured]
    fixed, paid = _fixed_bytes(measured, job)
    _refuse_above(fixed, budget, job.options)
    free = [i for i, item in enumerate(measured) if item.norm and item.candidate.limit]
    held = [min(paid, len(measured[i].singular_values)) for i in free]
    choices = [_choice(measured[i], already) for i, already in zip(free, held, strict=True)]
    chosen = allocate(choices, budget - fixed)
    for i, already, rank in zip(free, held, chosen, strict=True):
        ranks[i] = DENSE if rank == DENSE else already + rank
    return ranks


def refuse_small_budget(job: Compression) -> None:
    """Refuse a budget for task factors that what is stored whole exceeds, before the work.

    Headers say how much it is if everything was changed; only if that is too much, it is read.
    """
    rule, base = job.options.rule, job.sources.base
    if rule.budget is None or job.options.out_format != "factors":
        return
    budget = rule.budget_bytes(job.checkpoint_bytes)
    sizes = {item.name: item.dense_bytes or 0 for item in job.candidates if not item.limit}
    if job.head_bytes + sum(sizes.values()) > budget:
        changed = (name for name in sizes if job.source.differs(base.original([name])))
        _refuse_above(job.head_bytes + sum(map(sizes.__getitem__, changed)), budget, job.options)


def _refuse_above(fixed: int, budget: int, options: Options) -> None:
    if fixed > budget:
        raise RecipeError(
            f"The budget is {human_bytes(budget)}, and what is stored whole (biases, norms, …)"
            f" alone takes {human_bytes(fixed)}.",
            f"Give a larger `budget=`{_smaller(options)}.",
        )


def _smaller(options: Options) -> str:
    """Hint about the options that would reduce the size of what is stored whole."""
    adapter_only = options.out_format == "peft"
    flags = {
        "`dtype=bfloat16`": options.dtype == "float32",
        "`compress_conv=True`": not (adapter_only or options.compress_conv),
        "`dense=False`": adapter_only and options.dense,
    }
    return "".join(f", or {flag}" for flag, helps in flags.items() if helps)


def _choice(item: Measured, held: int) -> Choice:
    """Triplets that may be stored of a weight beyond those already paid for."""
    energies = item.singular_values.square()
    # Storing the update itself is no choice if it only adds the rounding of the checkpoints.
    more = item.numerical_rank > len(energies)
    return Choice(
        energies[held:],
        item.norm**2 - float(energies[:held].sum()),
        item.candidate.triplet_bytes,
        item.candidate.dense_bytes if more else None,
    )


def _fixed_bytes(measured: Sequence[Measured], job: Compression) -> tuple[int, int]:
    """Bytes of everything without a rank to choose, and the triplets per matrix they include."""
    if job.options.out_format == "factors":
        whole = (m.candidate for m in measured if m.norm and not m.candidate.limit)
        return job.head_bytes + sum(candidate.dense_bytes or 0 for candidate in whole), 0
    largest = {m.candidate.name: m.numerical_rank for m in measured if m.candidate.limit}
    plan = plan_adapter(job, measured, largest)
    base = job.sources.base.tensors
    values = sum(spec_of(job, name).nbytes for name in plan.values)
    if not plan.biases:
        return values, 0
    biases = (
        sum(math.prod(base[name].shape) for name in plan.biases) * job.options.stored_dtype.itemsize
    )
    pairs = (m.candidate.triplet_bytes for m in measured if m.candidate.name in plan.pairs)
    return values + biases + sum(pairs), 1  # a bias needs a pair of rank 1 or more beside it
