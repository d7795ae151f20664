"""The pipeline: read the next weight while this one is computed and the last one is written.

Memory holds the weight being computed, about as much again of the next ones, and the result being
written, whatever the number of layers.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import TypeVar

import torch
from torch import Tensor

from hf_tsv import baselines, costs, linalg, processes, tsv
from hf_tsv.checkpoints.adapters import Adapter
from hf_tsv.checkpoints.ahead import AheadFiles
from hf_tsv.checkpoints.reader import Checkpoint, digest
from hf_tsv.checkpoints.writer import ShardWriter
from hf_tsv.costs import Parallelism
from hf_tsv.errors import CheckpointError, RecipeError
from hf_tsv.factors import TaskFactors
from hf_tsv.findings import Finding, Seconds
from hf_tsv.lapack import NotConvergedError
from hf_tsv.linalg import largest_entry
from hf_tsv.memory import empty, reused, share_one_heap
from hf_tsv.plan import MergePlan, Weight
from hf_tsv.recipe import Settings
from hf_tsv.sources import Task
from hf_tsv.trimming import Sizes
from hf_tsv.tsv import MergedUpdate, TaskSingularVectors, Update

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


def pick_device(name: str | None = None) -> torch.device:
    """The device accelerate chooses (cuda, xpu, mps, else cpu), or the one asked for.

    Raises:
        [`RecipeError`]: it does not exist here.
    """
    if name is None and not torch.accelerator.is_available():
        return torch.device("cpu")  # a second before accelerate is loaded
    if name is None or (name == "cuda" and processes.launched() > 1):
        from accelerate import PartialState

        return torch.device(PartialState().device)
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise RecipeError(f"There is no device {name!r} here.", "Leave --device out.") from None
    return device


def merge_weights(
    weights: Sequence[Weight],
    plan: MergePlan,
    base: Checkpoint,
    inputs: Sequence[Task],
    scales: Sequence[float],
    settings: Settings,
    writer: ShardWriter | None,
    *,
    device: torch.device,
    done: Callable[[Finding], None],
    parallelism: Parallelism,
    thresholds: Sequence[float] = (),
    coefficients: Mapping[str, Sequence[float]] | None = None,
    measure: bool = False,
) -> None:
    """Read, merge and write weights of a plan, one at a time.

    Args:
        weights (`Sequence[Weight]`): which.
        plan ([`MergePlan`]): what to do.
        base ([`Checkpoint`]): W0.
        inputs (`Sequence[Checkpoint | TaskFactors]`): the tasks.
        scales (`Sequence[float]`): factor of each task's update.
        settings ([`Settings`]): how to merge.
        writer ([`ShardWriter`], *optional*): takes the result.
        device (`torch.device`): where to compute.
        done (`Callable[[Finding], None]`): told after each weight is written, in another thread.
        parallelism ([`Parallelism`]): how much goes on at a time.
        thresholds (`Sequence[float]`): of each task, see [`thresholds_of`]; for TIES.
        coefficients (`Mapping[str, Sequence[float]]`, *optional*): of each task, by weight; 1
            where there are none.
        measure (`bool`): find who disturbs whom.
    """
    share_one_heap()
    _expect_all(weights, base, inputs)
    reader = _Reader(base, inputs, scales, device, coefficients or {})
    with (
        reused(),
        linalg.threads(parallelism.threads),
        ThreadPoolExecutor(1, "hf-tsv-read") as reading,
        ThreadPoolExecutor(1, "hf-tsv-write") as writing,
    ):
        written: Future[None] | None = None
        try:
            sizes = [costs.held(weight) for weight in weights]
            loads = read_ahead(reading, reader.load, weights, sizes, ahead=parallelism.ahead)
            while True:
                started = time.monotonic()
                loaded = next(loads, None)
                if loaded is None:
                    break
                waited = time.monotonic() - started
                started = time.monotonic()
                with named(loaded.weight.label, [inputs[i] for i in loaded.floors]):
                    result, finding = _merge_one(
                        loaded, plan, settings, len(inputs), thresholds,
                        reader.coefficients.get(loaded.weight.label),
                        measure=measure, writes=writer is not None,
                    )  # fmt: skip
                computed = time.monotonic() - started
                started = time.monotonic()
                if written is not None:
                    written.result()
                waited += time.monotonic() - started
                seconds = replace(finding.seconds, waiting=waited, computing=computed)
                written = writing.submit(
                    _write, writer, loaded.weight, result, base, replace(finding, seconds=seconds),
                    done,
                )  # fmt: skip
                del loaded, result
            if written is not None:
                written.result()
        except BaseException:
            stop_fetching([base, *inputs])  # else the reading thread would wait for the Hub
            raise
        finally:
            reading.shutdown(cancel_futures=True)


@contextmanager
def named(label: str, tasks: Sequence[object]) -> Iterator[None]:
    """Say whose weight it is that cannot be decomposed.

    Args:
        label (`str`): of the weight.
        tasks (`Sequence`): whose updates of it are decomposed, in order.

    Raises:
        [`CheckpointError`]: a decomposition failed.
    """
    try:
        yield
    except NotConvergedError as error:
        whose = tasks if error.place is None else [tasks[error.place]]
        raise CheckpointError(
            f"{', '.join(map(str, whose))}: {label} cannot be decomposed: {error}.",
            "Leave the checkpoint out or save it again; a merge can also average the weight, with"
            f" --exclude '{label.replace('{q,k,v}', '?')}'.",
        ) from None


def thresholds_of(
    plan: MergePlan, base: Checkpoint, inputs: Sequence[Task], scales: Sequence[float]
) -> list[float]:
    """How large entries of each task must be to be among the largest fifth: reads everything once.

    Args:
        plan ([`MergePlan`]): the weights that share it out.
        base ([`Checkpoint`]): W0.
        inputs (`Sequence[Checkpoint | TaskFactors]`): the tasks.
        scales (`Sequence[float]`): factor of each task's update.
    """
    weights = [weight for weight in plan.weights if weight.treatment == "combined"]
    found = [Sizes() for _ in inputs]
    for loaded in read_weights(weights, base, inputs, scales, torch.device("cpu")):
        for i, sizes in enumerate(found):
            update = loaded.deltas.get(i)
            delta = None if update is None else dense(update)
            sizes.add(delta, math.prod(loaded.weight.shape))
    return [sizes.threshold() for sizes in found]


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
        inputs (`Sequence[Checkpoint | TaskFactors]`): the tasks.
        scales (`Sequence[float]`): factor of each task's update.
        device (`torch.device`): where updates go.
        ahead (`bool`): read the next one meanwhile.
    """
    share_one_heap()
    _expect_all(weights, base, inputs)
    reader, sizes = _Reader(base, inputs, scales, device), list(map(costs.held, weights))
    with reused(), ThreadPoolExecutor(1, "hf-tsv-read") as reading:
        try:
            yield from read_ahead(reading, reader.load, weights, sizes, ahead=ahead)
        except BaseException:
            stop_fetching([base, *inputs])
            raise


def _expect_all(weights: Sequence[Weight], base: Checkpoint, inputs: Sequence[Task]) -> None:
    expect(base, (name for weight in weights for name in weight.names))
    for i, item in enumerate(inputs):
        used = (w for w in weights if i in w.inputs and w.treatment != "copied")
        expect(item, (name for weight in used for name in weight.names))


def stop_fetching(items: Iterable[Task]) -> None:
    """End every wait for the Hub: the run is over."""
    for item in items:
        if isinstance(item.pinned.files, AheadFiles):
            item.pinned.files.close()


def expect(item: Task, names: Iterable[str]) -> None:
    """Begin to fetch what is not on this machine.

    Args:
        item (`Checkpoint | TaskFactors`): what will be read.
        names (`Iterable[str]`): canonical names of weights, in the order they will be read.
    """
    if isinstance(item.pinned.files, AheadFiles):
        parts = (info for name in names for info in item.parts(name))
        item.pinned.files.expect((info.file, info.start, info.nbytes) for info in parts)


def read_ahead(
    pool: ThreadPoolExecutor,
    load: Callable[[S], T],
    items: Sequence[S],
    sizes: Sequence[int],
    *,
    ahead: bool = True,
) -> Iterator[T]:
    """Load items in order; those that the caller will want next meanwhile.

    As many as the largest item takes, and a little more: between two large weights lie small ones,
    during whose computation the next large one could not be read.

    Args:
        pool (`ThreadPoolExecutor`): does the loading.
        load (`Callable`): of one item.
        items (`Sequence`): its arguments.
        sizes (`Sequence[int]`): bytes that each takes.
        ahead (`bool`): without it each is loaded when it is asked for.
    """
    most = max(sizes, default=0) * (1 + costs.LITTLE)
    pending: deque[tuple[Future[T], int]] = deque()
    todo = deque(zip(items, sizes, strict=True))
    taken = 0  # by what is pending

    def submit() -> None:
        nonlocal taken
        item, size = todo.popleft()
        pending.append((pool.submit(load, item), size))
        taken += size

    while todo or pending:
        if not pending:
            submit()
        future, size = pending.popleft()
        taken -= size
        while ahead and todo and taken + todo[0][1] <= most:
            submit()
        yield future.result()


@dataclass(frozen=True)
class _Reader:
    """Reads weights of all checkpoints and subtracts.

    Args:
        base ([`Checkpoint`]): W0.
        inputs (`Sequence[Checkpoint | TaskFactors]`): the tasks.
        scales (`Sequence[float]`): factor of each task's update.
        device (`torch.device`): where updates go.
        coefficients (`Mapping[str, Sequence[float]]`): of each task, by weight; here they concern
            what is averaged.
    """

    base: Checkpoint
    inputs: Sequence[Task]
    scales: Sequence[float]
    device: torch.device
    coefficients: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def load(self, weight: Weight) -> LoadedWeight:
        started = time.monotonic()
        digests: dict[int, dict[str, str]] = {
            i: {} for i, item in enumerate(self.inputs) if item.pinned.is_local
        }
        if self.base.pinned.is_local or any(isinstance(i, TaskFactors) for i in self.inputs):
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
                yield delta if coefficients is None else _scaled(delta, coefficients[i])
                del delta  # before the next one is made

        if weight.treatment in ("decomposed", "combined"):
            found = list(updates())
            deltas = dict(zip(floors, found, strict=True))
        elif weight.treatment != "copied":
            update = self._combined(weight, updates())
            if update is not None and averaged:
                # tasks that left the weight as it was count in the mean
                update *= len(floors) / len(self.inputs)
        seconds = Seconds(reading=time.monotonic() - started)
        frozen = not floors and weight.treatment != "copied"
        base_norm = _norm(w0) if floors else 0.0
        finding = Finding(
            weight.label, frozen=frozen, digests=digests, seconds=seconds, tasks=tuple(samples),
            likeness=_products(list(samples.values())),
            norms=tuple(norms.values()), base_norm=base_norm,
        )  # fmt: skip
        return LoadedWeight(weight, w0, deltas, floors, update, finding)

    def _combined(self, weight: Weight, updates: Iterator[Update]) -> Tensor | None:
        """Sum or mean of updates, one in memory at a time; None if there is none."""
        whole = map(dense, updates)
        first = list(islice(whole, 1))
        if not first:
            return None
        rule = baselines.sum_update if weight.treatment == "summed" else baselines.mean_update
        return rule(chain(_taken(first), whole))

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
            if isinstance(source, TaskFactors):
                for name in weight.names:
                    source.check_base(name, digests[-1][name], str(self.base))
                update = _stored_update(source, weight, digests.get(i))
                if update is None:
                    continue
                _refuse_huge(weight.label, source, update)
                if decomposed and isinstance(update, Tensor):
                    floor = _stored_noise(source, weight, w0, update)
                update = update.to(self.device)
                norm = math.hypot(*(source.tensors[name].norm for name in weight.names))
            elif decomposed and (own := _own_triplets(source, weight, digests.get(i))) is not None:
                if not own.rank:
                    continue
                _refuse_huge(weight.label, source, own)
                update, norm = own.to(self.device), float(own.S.norm())
            else:
                wi = self._read(weight, source, digests.get(i))
                update, largest = update_of(weight.label, source, wi, w0)
                if not largest:
                    continue
                norm = _norm(update)
                if decomposed:
                    floor = tsv.storage_noise(w0, wi, norm, overwrite=True)
                del wi
            if scale != 0.0:
                _refuse_huge(weight.label, source, update, scale)
                yield i, _scaled(update, scale), floor * abs(scale), norm
            del update

    def _read(self, weight: Weight, source: Checkpoint, digests: dict[str, str] | None) -> Tensor:
        pinned = self.device.type == "cuda"
        tensors = [source.read(name, pinned=pinned) for name in weight.names]
        if digests is not None:
            digests.update({n: digest(t) for n, t in zip(weight.names, tensors, strict=True)})
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return tensor.to(self.device)


def update_of(
    name: str, source: Checkpoint, fine_tuned: Tensor, base: Tensor
) -> tuple[Tensor, float]:
    """Δ of one weight, and its largest absolute entry.

    Args:
        name (`str`): of the weight, for the error.
        source ([`Checkpoint`]): the fine-tune, for the error.
        fine_tuned (`Tensor`): W1 as stored.
        base (`Tensor`): W0 as stored.

    Raises:
        [`CheckpointError`]: it overflows.
    """
    update = tsv.difference(fine_tuned, base)
    return update, _refuse_huge(name, source, update)


def _refuse_huge(name: str, source: Task, update: Update, scale: float | None = None) -> float:
    """Refuse an update of entries that are none, before it is scaled or after.

    Returns:
        `float`: its largest absolute entry; of triplets the largest singular value.
    """
    if scale is not None and abs(scale) <= 1:  # as it was before
        return 0.0
    if isinstance(update, Tensor):
        largest = largest_entry(update) if update.numel() else 0.0
    else:
        largest = float(update.S[0]) if update.rank else 0.0
    if largest * abs(scale or 1.0) < LARGEST_UPDATE:
        return largest
    if scale is not None:
        raise CheckpointError(
            f"{source}: the update of {name} times {scale:g}, the weight of the task, is more than"
            f" {LARGEST_UPDATE:g}.",
            "Give it a smaller weight.",
        )
    raise CheckpointError(
        f"{source}: {name} differs from the base model by more than {LARGEST_UPDATE:g}.",
        "The checkpoint is damaged; leave it out or save it again.",
    )


def _own_triplets(
    source: Checkpoint, weight: Weight, digests: dict[str, str] | None
) -> TaskSingularVectors | None:
    """Of an adapter, which needs no decomposition; None of other inputs and of stacked weights."""
    if not isinstance(source, Adapter) or len(weight.names) > 1:
        return None
    with named(weight.label, [source]):
        return source.triplets(weight.names[0], digests)


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


def _norm(tensor: Tensor) -> float:
    """Frobenius norm of a tensor of any shape and floating-point type."""
    wide = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
    return linalg.frobenius_norm(wide.reshape(len(wide), -1) if wide.dim() > 1 else wide)


def _scaled(update: Update, scale: float) -> Update:
    if scale == 1.0:
        return update
    if isinstance(update, TaskSingularVectors):  # singular values stay positive
        sign = -1.0 if scale < 0 else 1.0
        return TaskSingularVectors(update.U * sign, update.S * abs(scale), update.Vh)
    return update.mul_(scale)


def dense(update: Update) -> Tensor:
    """Δ of an update that may be given by its triplets."""
    return update if isinstance(update, Tensor) else update.matrix()


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


def _combine(
    loaded: LoadedWeight,
    settings: Settings,
    tasks: int,
    thresholds: Sequence[float],
    coefficients: Sequence[float] | None,
    *,
    measure: bool,
) -> MergedUpdate:
    """One weight by the rule of the method; lets go of the updates."""
    deltas = [loaded.deltas.pop(i) for i in loaded.floors]
    floors = list(loaded.floors.values())
    if settings.method in ("tsv", "ada", "low-rank", "orthogonal"):
        return tsv.merge(
            deltas,
            loaded.weight.rank,
            floors=floors,
            orthogonal=settings.method != "low-rank",
            solver=settings.orthogonalizer,
            precision=settings.precision,
            measure=measure,
            coefficients=coefficients and [coefficients[i] for i in loaded.floors],
        )
    whole = [dense(delta) for delta in deltas]
    if settings.method == "ties":
        return MergedUpdate(baselines.ties_update(whole, [thresholds[i] for i in loaded.floors]))
    if settings.method == "tall-mask":
        return MergedUpdate(baselines.sum_update(whole))
    if settings.method == "consensus":
        return MergedUpdate(baselines.consensus_update(whole, tasks))
    if settings.method == "iso-c":
        return baselines.isotropic_update(whole, floors, settings.precision)
    return baselines.isotropic_common_update(whole, floors, tasks, settings.precision)


def _merge_one(
    loaded: LoadedWeight,
    plan: MergePlan,
    settings: Settings,
    tasks: int,
    thresholds: Sequence[float],
    coefficients: Sequence[float] | None,
    *,
    measure: bool,
    writes: bool,
) -> tuple[Tensor, Finding]:
    """The merged weight, in the dtype it will be stored in."""
    weight, finding = loaded.weight, loaded.finding
    dtype = plan.specs[weight.names[0]].dtype
    update = loaded.update
    if loaded.deltas:
        merged = _combine(loaded, settings, tasks, thresholds, coefficients, measure=measure)
        update = merged.matrix
        finding = replace(
            finding,
            ranks=merged.ranks,
            null_directions=merged.null_directions,
            exact=merged.exact,
            interference=merged.interference,
        )
    if not writes:
        return loaded.base, finding
    if update is None:
        return _cast(loaded.base, dtype, weight), finding
    update = linalg.in_working_precision(update)
    return _cast(update.mul_(settings.alpha).add_(loaded.base), dtype, weight), finding


def _cast(tensor: Tensor, dtype: torch.dtype, weight: Weight) -> Tensor:
    stored = empty(*tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)
    finite = not dtype.is_floating_point or not stored.numel() or largest_entry(stored) < math.inf
    if not finite:
        raise CheckpointError(
            f"Merged values of {weight.label} do not fit into {str(dtype).removeprefix('torch.')}.",
            "Use --dtype float32 or a smaller --alpha.",
        )
    return stored


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


def _write(
    writer: ShardWriter | None,
    weight: Weight,
    result: Tensor,
    base: Checkpoint,
    finding: Finding,
    done: Callable[[Finding], None],
) -> None:
    started = time.monotonic()
    written = {}
    for name, part in by_name(weight, result, base):
        if writer is None:
            break
        stored = part.cpu().contiguous()
        writer.write(name, stored)
        written[name] = digest(stored)
    seconds = replace(finding.seconds, writing=time.monotonic() - started)
    done(replace(finding, written=written, seconds=seconds))
