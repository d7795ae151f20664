"""The pipeline: read the next weight while this one is computed and the last one is written.

Memory holds two weights of all checkpoints at most, whatever the number of layers.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from hf_tsv import baselines, linalg, tsv
from hf_tsv.checkpoints.reader import Checkpoint, digest, fingerprint
from hf_tsv.checkpoints.writer import ShardWriter
from hf_tsv.errors import CheckpointError, RecipeError
from hf_tsv.factors import TaskFactors
from hf_tsv.linalg import largest_entry
from hf_tsv.memory import give_back_large_blocks
from hf_tsv.plan import MergePlan, Weight
from hf_tsv.recipe import Settings
from hf_tsv.sources import Task
from hf_tsv.tsv import TaskSingularVectors, Update

S = TypeVar("S")
T = TypeVar("T")

LARGEST_UPDATE = 1e30
"""Entries beyond it are no update, and sums of their squares would overflow."""

SKETCH_ENTRIES = 4096
"""Entries of each update that its likeness to the others is judged by."""


@dataclass(frozen=True)
class LoadedWeight:
    """One weight of all checkpoints, in memory.

    Args:
        weight ([`Weight`]): its plan.
        base (`Tensor`): W0 as stored, stacked.
        deltas (`dict[int, Tensor | TaskSingularVectors]`): updates by the tasks that changed it,
            by input; Δ in float32, or the triplets of a compressed task.
        floors (`dict[int, float]`): their storage noise.
    """

    weight: Weight
    base: Tensor
    deltas: dict[int, Update]
    floors: dict[int, float]


@dataclass
class Findings:
    """What became known while the weights went by.

    Args:
        ranks (`dict[str, tuple[int, ...]]`): triplets used of each changed task, by weight.
        null_directions (`dict[str, int]`): by weight, where tasks share directions exactly.
        exact (`int`): decompositions that took a full SVD.
        frozen (`set[str]`): planned to change, but equal to the base in every checkpoint.
        likeness (`Tensor`): inner products of sampled updates, shape (T, T).
        digests (`dict[int, dict[str, str]]`): sha256 of each tensor read, by local input;
            −1 is the base.
    """

    tasks: int
    ranks: dict[str, tuple[int, ...]] = field(default_factory=dict)
    null_directions: dict[str, int] = field(default_factory=dict)
    exact: int = 0
    frozen: set[str] = field(default_factory=set)
    likeness: Tensor = field(init=False)
    digests: dict[int, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.likeness = torch.zeros(self.tasks, self.tasks, dtype=torch.float64)

    def cosines(self) -> Tensor:
        """Cosine between the updates of every two tasks, from the samples, shape (T, T)."""
        norms = self.likeness.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        return self.likeness / norms / norms[:, None]

    def fingerprint(self, index: int) -> str:
        """sha256 over names, types and bytes of the tensors read from one folder."""
        return fingerprint(self.digests[index])


def pick_device(name: str | None = None) -> torch.device:
    """The device accelerate chooses (cuda, xpu, mps, else cpu), or the one asked for.

    Raises:
        [`RecipeError`]: it does not exist here, or several processes were launched.
    """
    if os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1"):
        raise RecipeError(
            "Several processes are not supported.", "Run hf-tsv without torchrun or accelerate."
        )
    if name is None:
        from accelerate import PartialState

        return torch.device(PartialState(cpu=not torch.accelerator.is_available()).device)
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise RecipeError(f"There is no device {name!r} here.", "Leave --device out.") from None
    return device


def merge_weights(
    plan: MergePlan,
    base: Checkpoint,
    inputs: Sequence[Task],
    scales: Sequence[float],
    settings: Settings,
    writer: ShardWriter,
    *,
    device: torch.device,
    advance: Callable[[int], None],
) -> Findings:
    """Read, merge and write every weight of a plan, one at a time.

    Args:
        plan ([`MergePlan`]): what to do.
        base ([`Checkpoint`]): W0.
        inputs (`Sequence[Checkpoint | TaskFactors]`): the tasks.
        scales (`Sequence[float]`): factor of each task's update.
        settings ([`Settings`]): how to merge.
        writer ([`ShardWriter`]): takes the result.
        device (`torch.device`): where to compute.
        advance (`Callable[[int], None]`): told after each weight.

    Returns:
        [`Findings`]: ranks, frozen weights, likeness of tasks, fingerprints.
    """
    give_back_large_blocks()
    findings = Findings(len(inputs))
    findings.digests = {i: {} for i, item in enumerate(inputs) if item.pinned.is_local}
    if base.pinned.is_local or any(isinstance(item, TaskFactors) for item in inputs):
        findings.digests[-1] = {}
    with (
        linalg.threads(),
        ThreadPoolExecutor(1, "hf-tsv-read") as reading,
        ThreadPoolExecutor(1, "hf-tsv-write") as writing,
    ):
        written: Future[None] | None = None
        try:
            load = lambda weight: _load(weight, base, inputs, scales, findings)  # noqa: E731
            for loaded in read_ahead(reading, load, plan.weights):
                result = _merge_one(loaded, plan, settings, device, findings)
                if written is not None:
                    written.result()
                written = writing.submit(_write, writer, loaded.weight, result, base)
                advance(1)
            if written is not None:
                written.result()
        finally:
            reading.shutdown(cancel_futures=True)
    return findings


def read_ahead(pool: ThreadPoolExecutor, load: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
    """Load items in order, one ahead of the caller.

    Args:
        pool (`ThreadPoolExecutor`): does the loading.
        load (`Callable`): of one item.
        items (`Sequence`): its arguments.
    """
    pending: deque[Future[T]] = deque()
    for item in items:
        pending.append(pool.submit(load, item))
        if len(pending) > 1:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _load(
    weight: Weight,
    base: Checkpoint,
    inputs: Sequence[Task],
    scales: Sequence[float],
    findings: Findings,
) -> LoadedWeight:
    w0 = _read(weight, base, findings.digests.get(-1))
    deltas: dict[int, Update] = {}
    floors: dict[int, float] = {}
    if weight.treatment == "copied":
        return LoadedWeight(weight, w0, deltas, floors)
    for i in weight.inputs:
        source, floor = inputs[i], 0.0
        if isinstance(source, TaskFactors):
            _check_base(source, weight, findings, base)
            update = _stored_update(source, weight, findings.digests.get(i))
            if update is None:
                continue
            if weight.treatment == "decomposed" and isinstance(update, Tensor):
                floor = _stored_noise(source, weight, w0, update)
        else:
            wi = _read(weight, source, findings.digests.get(i))
            update = update_of(weight.label, source, wi, w0)
            if not largest_entry(update):
                continue
            if weight.treatment == "decomposed":
                floor = tsv.storage_noise(w0, wi, update)
        if scales[i] == 0.0:
            continue
        deltas[i] = update if scales[i] == 1.0 else _scaled(update, scales[i])
        floors[i] = floor * abs(scales[i])
    _add_likeness(findings, deltas)
    return LoadedWeight(weight, w0, deltas, floors)


def update_of(name: str, source: Checkpoint, fine_tuned: Tensor, base: Tensor) -> Tensor:
    """Δ of one weight.

    Args:
        name (`str`): of the weight, for the error.
        source ([`Checkpoint`]): the fine-tune, for the error.
        fine_tuned (`Tensor`): W1 as stored.
        base (`Tensor`): W0 as stored.

    Raises:
        [`CheckpointError`]: it overflows.
    """
    update = tsv.difference(fine_tuned, base)
    if update.numel() and not largest_entry(update) < LARGEST_UPDATE:
        raise CheckpointError(
            f"{source}: {name} differs from the base model by more than {LARGEST_UPDATE:g}.",
            "The checkpoint is damaged; leave it out or save it again.",
        )
    return update


def _read(weight: Weight, source: Checkpoint, digests: dict[str, str] | None) -> Tensor:
    tensors = [source.read(name) for name in weight.names]
    if digests is not None:
        digests.update({n: digest(t) for n, t in zip(weight.names, tensors, strict=True)})
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _check_base(factors: TaskFactors, weight: Weight, findings: Findings, base: Checkpoint) -> None:
    for name in weight.names:
        factors.check_base(name, findings.digests[-1][name], str(base))


def _stored_update(
    factors: TaskFactors, weight: Weight, digests: dict[str, str] | None
) -> Update | None:
    """The update of a weight from factors; of stacked weights as one dense matrix."""
    updates = [factors.update(name, digests) for name in weight.names]
    if len(updates) == 1 or all(update is None for update in updates):
        return updates[0]
    shapes = [factors.tensors[name].shape for name in weight.names]
    parts = [
        torch.zeros(shape) if update is None else tsv.dense(update).float()
        for update, shape in zip(updates, shapes, strict=True)
    ]
    return torch.cat(parts)


def _stored_noise(factors: TaskFactors, weight: Weight, w0: Tensor, update: Tensor) -> float:
    """Rounding in an update stored whole: of the checkpoint it was made from, and its own."""
    dtypes = [factors.tensors[name].dtype for name in weight.names]
    dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    w1 = (w0.double() + update.double()).to(dtype)
    return tsv.storage_noise(w0, w1) + tsv.rounding_noise(update, factors.config.factor_dtype)


def _scaled(update: Update, scale: float) -> Update:
    if isinstance(update, TaskSingularVectors):  # singular values stay positive
        sign = -1.0 if scale < 0 else 1.0
        return TaskSingularVectors(update.U * sign, update.S * abs(scale), update.Vh)
    return update * scale


def _add_likeness(findings: Findings, deltas: Mapping[int, Update]) -> None:
    if len(deltas) < 2:
        return
    tasks = list(deltas)
    sample = torch.stack([_sample(deltas[i]) for i in tasks])
    index = torch.tensor(tasks)
    findings.likeness[index[:, None], index] += sample @ sample.mT


def _sample(update: Update) -> Tensor:
    """Every so many entries of Δ, float64."""
    entries = math.prod(update.shape)
    stride = -(-entries // SKETCH_ENTRIES)
    if not isinstance(update, TaskSingularVectors):
        return update.reshape(-1)[::stride].double()
    chosen = torch.arange(0, entries, stride)
    rows, columns = chosen // update.shape[1], chosen % update.shape[1]
    left = update.U.double()[rows] * update.S.double()
    return (left * update.Vh.double().mT[columns]).sum(dim=1)


def _merge_one(
    loaded: LoadedWeight,
    plan: MergePlan,
    settings: Settings,
    device: torch.device,
    findings: Findings,
) -> Tensor:
    """The merged weight, in the dtype it will be stored in."""
    weight = loaded.weight
    dtype = plan.specs[weight.names[0]].dtype
    if not loaded.deltas:
        if weight.treatment != "copied":
            findings.frozen.add(weight.label)
        return _cast(loaded.base, dtype, weight)
    deltas = [delta.to(device) for delta in loaded.deltas.values()]
    if weight.treatment == "decomposed":
        update = _decomposed_update(loaded, deltas, settings, findings)
    elif weight.treatment == "summed":
        update = baselines.sum_update(map(tsv.dense, deltas))
    else:  # tasks that left the weight as it was count in the mean
        update = baselines.mean_update(map(tsv.dense, deltas)) * (len(deltas) / findings.tasks)
    w0 = linalg.in_working_precision(loaded.base.to(device))
    return _cast(w0 + settings.alpha * linalg.in_working_precision(update), dtype, weight)


def _decomposed_update(
    loaded: LoadedWeight, deltas: Sequence[Update], settings: Settings, findings: Findings
) -> Tensor:
    merged = tsv.merge(
        deltas,
        loaded.weight.rank,
        floors=list(loaded.floors.values()),
        orthogonal=settings.method != "low-rank",
        solver=settings.orthogonalizer,
        precision=settings.precision,
    )
    findings.exact += merged.exact
    label = loaded.weight.label
    findings.ranks[label] = merged.ranks
    if merged.null_directions:
        findings.null_directions[label] = merged.null_directions
    return merged.matrix


def _cast(tensor: Tensor, dtype: torch.dtype, weight: Weight) -> Tensor:
    stored = tensor.to(dtype)
    if dtype.is_floating_point and not stored.isfinite().all():
        raise CheckpointError(
            f"Merged values of {weight.label} do not fit into {str(dtype).removeprefix('torch.')}.",
            "Use --dtype float32 or a smaller --alpha.",
        )
    return stored


def _write(writer: ShardWriter, weight: Weight, result: Tensor, base: Checkpoint) -> None:
    rows = [base.tensors[name].shape[0] for name in weight.names] if len(weight.names) > 1 else None
    parts = [result] if rows is None else torch.split(result, rows)
    for name, part in zip(weight.names, parts, strict=True):
        writer.write(name, part)
