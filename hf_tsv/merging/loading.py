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

from hf_tsv.checkpoints.formats.adapters import Adapter
from hf_tsv.checkpoints.formats.factors import Factors
from hf_tsv.checkpoints.formats.task import Task
from hf_tsv.checkpoints.formats.whole import Checkpoint
from hf_tsv.checkpoints.storage.tensors import digest
from hf_tsv.linalg import updates as updates_
from hf_tsv.linalg.updates import (
    TaskSingularVectors,
    Update,
    norm_of,
    rounding_noise,
    scaled,
    storage_noise,
)
from hf_tsv.merging import costs
from hf_tsv.merging.findings import Finding
from hf_tsv.merging.plan import MergePlan, Weight
from hf_tsv.methods.catalogue import METHODS, Method
from hf_tsv.methods.rules import How, PassBefore, Updates, function_of, rule_of
from hf_tsv.recipes.settings import Settings
from hf_tsv.runs.reading import (
    Seconds,
    expect,
    named,
    read_ahead,
    refuse_huge,
    stop_fetching,
    update_of,
)
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
        deltas (`dict[int, Tensor | TaskSingularVectors]`): updates by the tasks that changed it,
            by input; Δ in float32, or the triplets of a compressed task. Only to be decomposed.
        floors (`dict[int, float]`): their storage noise.
        update (`Tensor`, *optional*): their mean or sum, where that is what is wanted.
        finding ([`Finding`]): what reading found.
    """

    weight: Weight
    base: Tensor
    deltas: dict[int, Update]
    floors: dict[int, float]
    update: Tensor | None
    finding: Finding

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
        deltas = [self.deltas.pop(i) for i in self.floors]
        own = coefficients and [coefficients[i] for i in self.floors]
        how = How(settings.precision, settings.orthogonalizer, keep)
        floors, tasks = list(self.floors.values()), tuple(self.floors)
        shape, rank = self.weight.shape, self.weight.rank
        return Updates(_taken(deltas), floors, tasks, shape, count, rank, how, own, known)


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
        inputs (`Sequence[Checkpoint | Factors]`): the tasks.
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
        inputs (`Sequence[Checkpoint | Factors]`): the tasks.
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
        inputs (`Sequence[Checkpoint | Factors]`): the tasks.
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
            i: {} for i, item in enumerate(self.inputs) if item.pinned.is_local
        }
        if self.base.pinned.is_local or any(isinstance(i, Factors) for i in self.inputs):
            digests[-1] = {}
        w0 = self._read(weight, self.base, digests.get(-1))
        deltas: dict[int, Update] = {}
        floors: dict[int, float] = {}
        samples: dict[int, Tensor] = {}
        norms: dict[int, float] = {}
        update: Tensor | None = None
        averaged = weight.treatment == "averaged"
        coefficients = self.coefficients.get(weight.label) if averaged else None

        def updates() -> Iterator[Update]:
            for i, delta, floor, norm in self._updates(weight, w0, digests):
                samples[i], floors[i], norms[i] = _sample(delta), floor, norm
                yield delta if coefficients is None else scaled(delta, coefficients[i])
                del delta  # before the next one is made

        if weight.treatment in TOGETHER:
            found = list(updates())
            deltas = dict(zip(floors, found, strict=True))
        elif weight.treatment != "copied":
            update = self._combined(weight, updates())
            if update is not None and averaged:
                # tasks that left the weight as it was count in the mean
                update *= len(floors) / len(self.inputs)
        seconds = Seconds(reading=time.monotonic() - started)
        frozen = not floors and weight.treatment != "copied"
        base_norm = norm_of(w0) if floors else 0.0
        finding = Finding(
            weight.label, frozen=frozen, digests=digests, seconds=seconds, tasks=tuple(samples),
            likeness=_products(list(samples.values())),
            norms=tuple(norms.values()), base_norm=base_norm,
        )  # fmt: skip
        return LoadedWeight(weight, w0, deltas, floors, update, finding)

    def _combined(self, weight: Weight, updates: Iterator[Update]) -> Tensor | None:
        """Sum or mean of updates, one in memory at a time; None if there is none."""
        first = list(islice(updates, 1))
        if not first:
            return None
        own = weight.treatment == self.method.treatment
        rule = rule_of(self.method if own else AVERAGE)
        streamed = chain(_taken(first), updates)
        return rule(Updates(streamed, (), (), weight.shape, len(self.inputs))).matrix

    def _updates(
        self, weight: Weight, w0: Tensor, digests: Mapping[int, dict[str, str]]
    ) -> Iterator[tuple[int, Update, float, float]]:
        """Updates of the tasks that changed a weight, each with its storage noise and norm."""
        decomposed = weight.treatment == "decomposed"
        for i in weight.inputs:
            source, scale, floor = self.inputs[i], self.scales[i], 0.0
            if isinstance(source, Adapter) and not source.changes(weight.names):
                continue
            update: Update | None
            if isinstance(source, Factors):
                for name in weight.names:
                    source.check_base(name, digests[-1][name], str(self.base))
                update = _stored_update(source, weight, digests.get(i))
                if update is None:
                    continue
                refuse_huge(weight.label, source, update)
                if decomposed and isinstance(update, Tensor):
                    floor = _stored_noise(source, weight, w0, update)
                update = update.to(self.device)
                norm = math.hypot(*(source.tensors[name].norm for name in weight.names))
            elif decomposed and (own := _own_triplets(source, weight, digests.get(i))) is not None:
                if not own.rank:
                    continue
                refuse_huge(weight.label, source, own)
                update, norm = own.to(self.device), float(own.S.norm())
            else:
                wi = self._read(weight, source, digests.get(i))
                update, largest = update_of(weight.label, source, wi, w0)
                if not largest:
                    continue
                norm = norm_of(update)
                if decomposed:
                    floor = storage_noise(w0, wi, norm, overwrite=True)
                del wi
            if scale != 0.0:
                refuse_huge(weight.label, source, update, scale)
                yield i, scaled(update, scale), floor * abs(scale), norm
            del update

    def _read(self, weight: Weight, source: Checkpoint, digests: dict[str, str] | None) -> Tensor:
        pinned = self.device.type == "cuda"
        tensors = [source.read(name, pinned=pinned) for name in weight.names]
        if digests is not None:
            digests.update({n: digest(t) for n, t in zip(weight.names, tensors, strict=True)})
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return tensor.to(self.device)


def _own_triplets(
    source: Checkpoint, weight: Weight, digests: dict[str, str] | None
) -> TaskSingularVectors | None:
    """Of an adapter, which needs no decomposition; None of other inputs and of stacked weights."""
    if not isinstance(source, Adapter) or len(weight.names) > 1:
        return None
    with named(weight.label, [source]):
        return source.triplets(weight.names[0], digests)


def _stored_update(
    factors: Factors, weight: Weight, digests: dict[str, str] | None
) -> Update | None:
    """The update of a weight from factors; of stacked weights as one dense matrix."""
    updates = [factors.update(name, digests) for name in weight.names]
    if len(updates) == 1 or all(update is None for update in updates):
        return updates[0]
    shapes = [factors.tensors[name].shape for name in weight.names]
    parts = [
        torch.zeros(shape) if update is None else updates_.dense(update).float()
        for update, shape in zip(updates, shapes, strict=True)
    ]
    return torch.cat(parts)


def _stored_noise(factors: Factors, weight: Weight, w0: Tensor, update: Tensor) -> float:
    """Rounding in an update stored whole: of the checkpoint it was made from, and its own."""
    dtypes = [factors.tensors[name].dtype for name in weight.names]
    dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    w1 = (w0.double() + update.double()).to(dtype)
    return storage_noise(w0, w1) + rounding_noise(update, factors.config.factor_dtype)


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
