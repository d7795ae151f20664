"""The pipeline: read the next weight while this one is computed and the last one is written.

Memory holds two weights of all checkpoints at most, whatever the number of layers.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_tsv import baselines, linalg, tsv
from hf_tsv.checkpoints.reader import DTYPE_NAMES, Checkpoint, byte_view
from hf_tsv.checkpoints.writer import ShardWriter
from hf_tsv.errors import CheckpointError, RecipeError
from hf_tsv.plan import MergePlan, Weight
from hf_tsv.recipe import Settings

SKETCH_ENTRIES = 4096
"""Entries of each update that its likeness to the others is judged by."""


@dataclass(frozen=True)
class LoadedWeight:
    """One weight of all checkpoints, in memory.

    Args:
        weight ([`Weight`]): its plan.
        base (`Tensor`): W0 as stored, stacked.
        deltas (`dict[int, Tensor]`): Δ of the tasks that changed it, float32, by input.
        floors (`dict[int, float]`): their storage noise.
    """

    weight: Weight
    base: Tensor
    deltas: dict[int, Tensor]
    floors: dict[int, float]


@dataclass
class Findings:
    """What became known while the weights went by.

    Args:
        ranks (`dict[str, tuple[int, ...]]`): triplets used of each changed task, by weight.
        null_directions (`dict[str, int]`): by weight, where tasks share directions exactly.
        frozen (`set[str]`): planned to change, but equal to the base in every checkpoint.
        likeness (`Tensor`): inner products of sampled updates, shape (T, T).
        digests (`dict[int, dict[str, str]]`): sha256 of each tensor read, by local input;
            −1 is the base.
    """

    tasks: int
    ranks: dict[str, tuple[int, ...]] = field(default_factory=dict)
    null_directions: dict[str, int] = field(default_factory=dict)
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
        lines = (f"{name} {digest}\n" for name, digest in sorted(self.digests[index].items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


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
    inputs: Sequence[Checkpoint],
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
        inputs (`Sequence[Checkpoint]`): the tasks.
        scales (`Sequence[float]`): factor of each task's update.
        settings ([`Settings`]): how to merge.
        writer ([`ShardWriter`]): takes the result.
        device (`torch.device`): where to compute.
        advance (`Callable[[int], None]`): told after each weight.

    Returns:
        [`Findings`]: ranks, frozen weights, likeness of tasks, fingerprints.
    """
    findings = Findings(len(inputs))
    for index, item in enumerate([*inputs, base]):
        if item.pinned.is_local:
            findings.digests[index if item is not base else -1] = {}
    with (
        ThreadPoolExecutor(1, "hf-tsv-read") as reading,
        ThreadPoolExecutor(1, "hf-tsv-write") as writing,
    ):
        written: Future[None] | None = None
        try:
            load = lambda weight: _load(weight, base, inputs, scales, findings)  # noqa: E731
            for loaded in _read_ahead(reading, load, plan.weights):
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


def _read_ahead(
    pool: ThreadPoolExecutor,
    load: Callable[[Weight], LoadedWeight],
    weights: Sequence[Weight],
) -> Iterator[LoadedWeight]:
    """Load weights in order, one ahead of the caller."""
    pending: deque[Future[LoadedWeight]] = deque()
    for weight in weights:
        pending.append(pool.submit(load, weight))
        if len(pending) > 1:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _load(
    weight: Weight,
    base: Checkpoint,
    inputs: Sequence[Checkpoint],
    scales: Sequence[float],
    findings: Findings,
) -> LoadedWeight:
    w0 = _read(weight, base, findings.digests.get(-1))
    deltas: dict[int, Tensor] = {}
    floors: dict[int, float] = {}
    if weight.treatment == "copied":
        return LoadedWeight(weight, w0, deltas, floors)
    for i in weight.inputs:
        wi = _read(weight, inputs[i], findings.digests.get(i))
        delta = wi.float() - w0.float()
        if scales[i] != 1.0:
            delta *= scales[i]
        if not delta.any():
            continue
        deltas[i] = delta
        if weight.treatment == "decomposed":
            floors[i] = tsv.storage_noise(w0, wi) * abs(scales[i])
    _add_likeness(findings, deltas)
    return LoadedWeight(weight, w0, deltas, floors)


def _read(weight: Weight, source: Checkpoint, digests: dict[str, str] | None) -> Tensor:
    tensors = [source.read(name) for name in weight.names]
    if digests is not None:
        for name, tensor in zip(weight.names, tensors, strict=True):
            header = f"{DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)} ".encode()
            digest = hashlib.sha256(header)
            digest.update(byte_view(tensor))
            digests[name] = digest.hexdigest()
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _add_likeness(findings: Findings, deltas: dict[int, Tensor]) -> None:
    if len(deltas) < 2:
        return
    tasks = list(deltas)
    entries = next(iter(deltas.values())).numel()
    stride = -(-entries // SKETCH_ENTRIES)
    sample = torch.stack([deltas[i].reshape(-1)[::stride].double() for i in tasks])
    index = torch.tensor(tasks)
    findings.likeness[index[:, None], index] += sample @ sample.mT


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
        update = baselines.sum_update(deltas)
    else:  # tasks that left the weight as it was count in the mean
        update = baselines.mean_update(deltas) * (len(deltas) / findings.tasks)
    w0 = linalg.in_working_precision(loaded.base.to(device))
    return _cast(w0 + settings.alpha * linalg.in_working_precision(update), dtype, weight)


def _decomposed_update(
    loaded: LoadedWeight, deltas: Sequence[Tensor], settings: Settings, findings: Findings
) -> Tensor:
    merged = tsv.merge(
        deltas,
        loaded.weight.rank,
        floors=list(loaded.floors.values()),
        orthogonal=settings.method != "low-rank",
        solver=settings.orthogonalizer,
    )
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
