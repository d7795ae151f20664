"""Reading the updates of one weight from all tasks, ahead of the computation."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_tsv.checkpoints.formats.change import Original, refuse_huge
from hf_tsv.checkpoints.formats.task import Task
from hf_tsv.checkpoints.formats.whole import Checkpoint
from hf_tsv.linalg.updates import TaskSingularVectors, Update, norm_of, scaled
from hf_tsv.merging import costs
from hf_tsv.merging.findings import Finding
from hf_tsv.merging.plan import MergePlan, Weight
from hf_tsv.methods.catalogue import METHODS, Method
from hf_tsv.methods.rules import How, PassBefore, Updates, function_of, rule_of
from hf_tsv.recipes.settings import Settings
from hf_tsv.runs.reading import Seconds, expect, named, read_ahead, stop_fetching
from hf_tsv.system.memory import reused, share_one_heap

T = TypeVar("T")

AVERAGE = METHODS["average"]
"""Method by which all others merge what their own rule does not."""

TOGETHER = ("decomposed", "combined")
"""Treatments that need the updates of all tasks at once."""

SKETCH_ENTRIES = 4096
"""Entries of each update that its likeness to the others is judged by."""


@dataclass(frozen=True)
class LoadedWeight:
    """One weight of all checkpoints, in memory.

    Args:
        weight ([`Weight`]): its plan.
        base (`Tensor`): W0 as stored, stacked.
        tasks (`tuple[int, ...]`): inputs that changed it.
        floors (`tuple[float, ...]`): storage noise of each of their updates.
        deltas (`list[Tensor | TaskSingularVectors]`): their updates; Δ in float32, or the triplets
            of a compressed task. Empty where only their mean or sum is wanted.
        update (`Tensor`, *optional*): their mean or sum, where that is what is wanted.
        finding ([`Finding`]): what reading found.
    """

    weight: Weight
    base: Tensor
    tasks: tuple[int, ...]
    floors: tuple[float, ...]
    deltas: list[Update]
    update: Tensor | None
    finding: Finding

    def delta_of(self, task: int) -> Update | None:
        """Update of an input; None: it left the weight as it was."""
        return self.deltas[self.tasks.index(task)] if task in self.tasks else None

    def updates(
        self,
        settings: Settings,
        count: int,
        *,
        coefficients: Sequence[float] | None = None,
        known: Any = None,
        keep: bool = False,
    ) -> Updates:
        """All that a rule is given of the weight; lets go of the updates.

        Args:
            settings ([`Settings`]): settings of the merge.
            count (`int`): number of all tasks, T.
            coefficients (`Sequence[float]`, *optional*): factor of each of all tasks.
            known (`Any`): result of the method's pass before.
            keep (`bool`): ask the rule for what interference is measured from.
        """
        deltas = list(self.deltas)
        self.deltas.clear()
        own = coefficients and [coefficients[i] for i in self.tasks]
        how = How(settings.precision, settings.orthogonalizer, keep)
        shape, rank = self.weight.shape, self.weight.rank
        return Updates(_taken(deltas), self.floors, self.tasks, shape, count, rank, how, own, known)


def known_before(
    plan: MergePlan,
    base: Checkpoint,
    inputs: Sequence[Task],
    scales: Sequence[float],
    settings: Settings,
) -> Any:
    """Run the pass of a method over all weights before the first is merged: reads everything once.

    Args:
        plan ([`MergePlan`]): plan of the merge.
        base ([`Checkpoint`]): W0.
        inputs (`Sequence[Task]`): the tasks.
        scales (`Sequence[float]`): factor of each task's update.
        settings ([`Settings`]): settings of the merge.
    """
    weights = [weight for weight in plan.weights if weight.treatment in TOGETHER]
    run: PassBefore = function_of(settings.row, settings.row.before)
    loads = read_weights(weights, base, inputs, scales, torch.device("cpu"))
    return run((loaded.updates(settings, len(inputs)) for loaded in loads), len(inputs))


def read_weights(
    weights: Sequence[Weight],
    base: Checkpoint,
    inputs: Sequence[Task],
    scales: Sequence[float],
    device: torch.device,
    *,
    ahead: bool = True,
) -> Iterator[LoadedWeight]:
    """Weights with the updates of all tasks, one at a time.

    Args:
        weights (`Sequence[Weight]`): which.
        base ([`Checkpoint`]): W0.
        inputs (`Sequence[Task]`): the tasks.
        scales (`Sequence[float]`): factor of each task's update.
        device (`torch.device`): where updates go.
        ahead (`bool`): read the next one meanwhile.
    """
    share_one_heap()
    expect_all(weights, base, inputs)
    reader, sizes = Reader(base, inputs, scales, device), list(map(costs.held, weights))
    with reused(), ThreadPoolExecutor(1, "hf-tsv-read") as reading:
        try:
            yield from read_ahead(reading, reader.load, weights, sizes, ahead=ahead)
        except BaseException:
            stop_fetching([base, *inputs])
            raise


def expect_all(weights: Sequence[Weight], base: Checkpoint, inputs: Sequence[Task]) -> None:
    expect(base, (name for weight in weights for name in weight.names))
    for i, item in enumerate(inputs):
        used = (w for w in weights if i in w.inputs and w.treatment != "copied")
        expect(item, (name for weight in used for name in weight.names))


@dataclass(frozen=True)
class Reader:
    """Reads weights of all checkpoints and subtracts.

    Args:
        base ([`Checkpoint`]): W0.
        inputs (`Sequence[Task]`): the tasks.
        scales (`Sequence[float]`): factor of each task's update.
        device (`torch.device`): where updates go.
        coefficients (`Mapping[str, Sequence[float]]`): of each task, by weight; here they concern
            what is averaged.
        method ([`Method`]): method of the merge.
    """

    base: Checkpoint
    inputs: Sequence[Task]
    scales: Sequence[float]
    device: torch.device
    coefficients: Mapping[str, Sequence[float]] = field(default_factory=dict)
    method: Method = AVERAGE

    def load(self, weight: Weight) -> LoadedWeight:
        started = time.monotonic()
        digests: dict[int, dict[str, str]] = {
            i: {} for i, item in [*enumerate(self.inputs), (-1, self.base)] if item.pinned.is_local
        }
        w0 = self.base.original(weight.names, weight.label, self.device, digests.get(-1))
        base = w0.tensor
        read: list[_Read] = []
        deltas: list[Update] = []
        update: Tensor | None = None
        averaged = weight.treatment == "averaged"
        changes = self._changes(weight, w0, digests, read)
        if weight.treatment in TOGETHER:
            deltas = list(changes)
        elif weight.treatment != "copied":
            update = self._combined(weight, changes)
            if update is not None and averaged:
                # tasks that left the weight as it was count in the mean
                update *= len(read) / len(self.inputs)
        seconds = Seconds(reading=time.monotonic() - started)
        tasks = tuple(one.task for one in read)
        finding = Finding(
            weight.label, frozen=not read and weight.treatment != "copied", digests=digests,
            seconds=seconds, tasks=tasks, likeness=_products([one.sample for one in read]),
            norms=tuple(one.norm for one in read), base_norm=norm_of(base) if read else 0.0,
        )  # fmt: skip
        floors = tuple(one.floor for one in read)
        return LoadedWeight(weight, base, tasks, floors, deltas, update, finding)

    def _combined(self, weight: Weight, updates: Iterator[Update]) -> Tensor | None:
        """Sum or mean of updates, one in memory at a time; None if there is none."""
        first = list(islice(updates, 1))
        if not first:
            return None
        own = weight.treatment == self.method.treatment
        rule = rule_of(self.method if own else AVERAGE)
        streamed = chain(_taken(first), updates)
        return rule(Updates(streamed, (), (), weight.shape, len(self.inputs))).matrix

    def _changes(
        self,
        weight: Weight,
        w0: Original,
        digests: Mapping[int, dict[str, str]],
        read: list[_Read],
    ) -> Iterator[Update]:
        """Scaled updates of a weight, one in memory at a time; each is noted in `read`."""
        averaged = weight.treatment == "averaged"
        coefficients = self.coefficients.get(weight.label) if averaged else None
        for i in weight.inputs:
            task, scale = self.inputs[i], self.scales[i]
            with named(weight.label, [task]):
                change = task.change(
                    w0, decomposed=weight.treatment == "decomposed", digests=digests.get(i)
                )
            if change is not None and scale != 0.0:
                refuse_huge(weight.label, task, change.update, scale)
                update = scaled(change.update, scale)
                read.append(_Read(i, change.floor * abs(scale), change.norm, _sample(update)))
                yield update if coefficients is None else scaled(update, coefficients[i])
                del update
            del change  # before the next one is made


@dataclass(frozen=True)
class _Read:
    """What is kept of the update of one task.

    Args:
        task (`int`): index of the input.
        floor (`float`): storage noise, of the scaled update.
        norm (`float`): ‖Δ‖, before it is scaled.
        sample (`Tensor`): entries by which it is compared with others.
    """

    task: int
    floor: float
    norm: float
    sample: Tensor


def _taken(items: list[T]) -> Iterator[T]:
    """Hand out items without keeping them."""
    while items:
        yield items.pop(0)


def _products(samples: Sequence[Tensor]) -> tuple[tuple[float, ...], ...]:
    """Inner products of every two of several vectors."""
    if not samples:
        return ()
    stacked = torch.stack(list(samples))
    return tuple(tuple(row) for row in (stacked @ stacked.mT).tolist())


def _sample(update: Update) -> Tensor:
    """Every so many entries of Δ, float64."""
    entries = math.prod(update.shape)
    stride = -(-entries // SKETCH_ENTRIES)
    if not isinstance(update, TaskSingularVectors):
        return update.reshape(-1)[::stride].cpu().double()
    chosen = torch.arange(0, entries, stride)
    rows, columns = chosen // update.shape[1], chosen % update.shape[1]
    update = update.to(torch.device("cpu"))
    left = update.U.double()[rows] * update.S.double()
    return (left * update.Vh.double().mT[columns]).sum(dim=1)


def by_name(weight: Weight, stacked: Tensor, base: Checkpoint) -> list[tuple[str, Tensor]]:
    """The tensors of a weight, which are stacked if there are several.

    Args:
        weight ([`Weight`]): its plan.
        stacked (`Tensor`): of its shape.
        base ([`Checkpoint`]): knows the shape of each.
    """
    if len(weight.names) == 1:
        return [(weight.names[0], stacked)]
    rows = [base.tensors[name].shape[0] for name in weight.names]
    return list(zip(weight.names, torch.split(stacked, rows), strict=True))
