"""Reading the updates of one weight from all tasks, ahead of the computation."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_tsv.checkpoints.formats.change import Original, refuse_huge
from hf_tsv.checkpoints.formats.whole import Checkpoint
from hf_tsv.checkpoints.sources import Sources
from hf_tsv.linalg.updates import TaskSingularVectors, Update, norm_of, scaled
from hf_tsv.merging import costs
from hf_tsv.merging.findings import Finding
from hf_tsv.merging.plan import Weight
from hf_tsv.merging.work import Merge
from hf_tsv.methods.calibration import calibrated
from hf_tsv.methods.catalogue import METHODS
from hf_tsv.methods.rules import How, MergedUpdate, PassBefore, Updates, function_of, rule_of
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
        base (`Tensor`): W0 as stored, stacked.
        finding ([`Finding`]): what reading found, also which tasks changed the weight.
        floors (`tuple[float, ...]`): storage noise of each of their updates.
        deltas (`list[Tensor | TaskSingularVectors]`): their updates; Δ in float32, or the triplets
            of a compressed task. Empty where only their mean or sum is wanted, which is `update`.
    """

    weight: Weight
    base: Tensor
    finding: Finding
    floors: tuple[float, ...]
    deltas: list[Update]
    update: Tensor | None

    def delta_of(self, task: int) -> Update | None:
        """Update of an input; None: it left the weight as it was."""
        tasks = self.finding.tasks
        return self.deltas[tasks.index(task)] if task in tasks else None

    def updates(self, merge: Merge, *, keep: bool = False) -> Updates:
        """All that a rule is given of the weight; lets go of the updates.

        `keep` asks the rule for what interference is measured from.
        """
        deltas = list(self.deltas)
        self.deltas.clear()
        tasks, settings = self.finding.tasks, merge.settings
        coefficients = merge.coefficients.get(self.weight.label)
        return Updates(
            _taken(deltas), self.floors, tasks, self.weight.shape, len(merge.scales),
            self.weight.rank,
            How(
                settings.precision, settings.orthogonalizer, keep, settings.wudi_filter or "swudi-a"
            ),
            coefficients and [coefficients[i] for i in tasks], merge.known,
        )  # fmt: skip


def merged_update(loaded: LoadedWeight, merge: Merge) -> MergedUpdate:
    """Merge the updates of one weight by the rule of the method, and calibrate the result."""
    row, deltas = merge.settings.row, list(loaded.deltas) if loaded.weight.calibrated else []
    merged = rule_of(row)(loaded.updates(merge, keep=merge.measure))
    if not deltas:
        return merged
    least = 1.0 if row.calibrates == "one" else 1 / len(merge.scales)
    matrix, exact = calibrated(
        merged.matrix, deltas, len(merge.scales), least, merge.settings.precision
    )
    return replace(merged, matrix=matrix, exact=merged.exact + exact)


def known_before(merge: Merge, sources: Sources) -> Any:
    """Run the pass of a method over all weights before the first is merged: reads everything once.

    Coefficients play no part in it, learned or not.
    """
    merge = replace(merge, coefficients={})
    weights = [weight for weight in merge.plan.weights if weight.treatment in TOGETHER]
    run: PassBefore = function_of(merge.settings.row, merge.settings.row.before)
    loads = read_weights(weights, merge, sources, torch.device("cpu"))
    return run((loaded.updates(merge) for loaded in loads), len(merge.scales))


def read_weights(
    weights: Sequence[Weight], merge: Merge, sources: Sources, device: torch.device
) -> Generator[LoadedWeight, None, None]:
    """Weights with the updates of all tasks, one at a time; the next are read meanwhile."""
    share_one_heap()
    _expect(weights, sources)
    reader, sizes = Reader(merge, sources, device), list(map(costs.held, weights))
    with reused(), ThreadPoolExecutor(1, "hf-tsv-read") as reading:
        try:
            ahead = merge.parallelism.ahead
            yield from read_ahead(reading, reader.load, weights, sizes, ahead=ahead)
        except GeneratorExit:  # nobody wants more of this pass, but others may follow
            raise
        except BaseException:
            stop_fetching(sources.all())  # else the reading thread would wait for the Hub
            raise
        finally:
            reading.shutdown(cancel_futures=True)


def _expect(weights: Sequence[Weight], sources: Sources) -> None:
    """Begin to fetch what will be read."""
    expect(sources.base, (name for weight in weights for name in weight.names))
    for i, item in enumerate(sources.inputs):
        used = (w for w in weights if i in w.inputs and w.treatment != "copied")
        expect(item, (name for weight in used for name in weight.names))


@dataclass(frozen=True)
class Reader:
    """Reads weights of all checkpoints and subtracts; updates go to the device.

    The coefficients of the merge concern what is averaged here.
    """

    merge: Merge
    sources: Sources
    device: torch.device

    def load(self, weight: Weight) -> LoadedWeight:
        started = time.monotonic()
        items = [*enumerate(self.sources.inputs), (-1, self.sources.base)]
        digests: dict[int, dict[str, str]] = {i: {} for i, item in items if item.pinned.is_local}
        w0 = self.sources.base.original(weight.names, weight.label, self.device, digests.get(-1))
        read: list[_Read] = []
        deltas: list[Update] = []
        update: Tensor | None = None
        changes = self._changes(weight, w0, digests, read)
        if weight.together:
            deltas = list(changes)
        elif weight.is_kept:
            self._note_digests(weight, w0, digests)
        elif weight.treatment != "copied":
            update = self._combined(weight, changes)
            if update is not None and weight.treatment == "averaged":
                # tasks that left the weight as it was count in the mean
                update *= len(read) / len(self.sources.inputs)
        seconds = Seconds(reading=time.monotonic() - started)
        tasks = tuple(one.task for one in read)
        finding = Finding(
            weight.label, frozen=not read and weight.treatment != "copied", digests=digests,
            seconds=seconds, tasks=tasks, likeness=_products([one.sample for one in read]),
            norms=tuple(one.norm for one in read), base_norm=norm_of(w0.tensor) if read else 0.0,
            factors=tuple(one.factor for one in read),
            rounded_base=tuple(one.rounded_base for one in read),
        )  # fmt: skip
        floors = tuple(one.floor for one in read)
        return LoadedWeight(weight, w0.tensor, finding, floors, deltas, update)

    def _combined(self, weight: Weight, updates: Iterator[Update]) -> Tensor | None:
        """Sum or mean of updates, one in memory at a time; None if there is none."""
        first = list(islice(updates, 1))
        if not first:
            return None
        method = self.merge.settings.row
        rule = rule_of(method if weight.treatment == method.treatment else AVERAGE)
        streamed = chain(_taken(first), updates)
        return rule(Updates(streamed, (), (), weight.shape, len(self.sources.inputs))).matrix

    def _changes(
        self, weight: Weight, w0: Original, digests: Mapping[int, dict[str, str]], read: list[_Read]
    ) -> Iterator[Update]:
        """Scaled updates of a weight, one in memory at a time; each is noted in `read`."""
        averaged, decomposed = (weight.treatment == t for t in ("averaged", "decomposed"))
        coefficients = self.merge.coefficients.get(weight.label) if averaged else None
        for i in weight.inputs:
            task, scale = self.sources.inputs[i], self.merge.scales[i] * weight.factor_of(i)
            with named(weight.label, [task]):
                change = task.change(w0, decomposed=decomposed, digests=digests.get(i))
            if change is not None and scale != 0.0:
                refuse_huge(weight.label, task, change.update, scale)
                update = scaled(change.update, scale)
                facts = scale, change.floor * abs(scale), change.norm, _sample(update)
                read.append(_Read(i, *facts, change.rounded_base))
                yield update if coefficients is None else scaled(update, coefficients[i])
                del update
            del change  # before the next one is made

    def _note_digests(
        self, weight: Weight, w0: Original, digests: Mapping[int, dict[str, str]]
    ) -> None:
        """Read a weight that is not merged of local folders: their fingerprints include it."""
        for i in weight.inputs:
            if i in digests:
                self.sources.inputs[i].change(w0, digests=digests[i])


@dataclass(frozen=True)
class _Read:
    """Facts that are kept of the update of one task: its factor and ‖Δ‖ before it is scaled, then
    its storage noise, the entries by which it is compared with others, and the evidence of a
    rounded base.
    """

    task: int
    factor: float
    floor: float
    norm: float
    sample: Tensor
    rounded_base: tuple[float, float]


def _taken(items: list[T]) -> Iterator[T]:
    """Hand out items without keeping them."""
    while items:
        yield items.pop(0)


def _products(samples: Sequence[Tensor]) -> tuple[tuple[float, ...], ...]:
    """Inner products of every two of several vectors."""
    if not samples:
        return ()
    stacked = torch.stack(list(samples))
    return tuple(map(tuple, (stacked @ stacked.mT).tolist()))


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
    """Tensors of a weight by name; several are stacked, and the base knows the shape of each."""
    if len(weight.names) == 1:
        return [(weight.names[0], stacked)]
    rows = [base.tensors[name].shape[0] for name in weight.names]
    return list(zip(weight.names, torch.split(stacked, rows), strict=True))
