"""Choice of the triplets to keep of a task, and writing of its files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hf_tsv import adapter, linalg
from hf_tsv.checkpoints import layout
from hf_tsv.checkpoints.reader import Checkpoint
from hf_tsv.checkpoints.writer import ShardWriter, TensorSpec, plan_shards
from hf_tsv.errors import CheckpointError, RecipeError
from hf_tsv.factors import (
    FACTORS_FILE,
    StoredWeight,
    matrix_shape,
    tensor_specs,
)
from hf_tsv.progress import human_bytes
from hf_tsv.ranks import DENSE, Choice, RankRule, allocate, budget_bytes, rank_of_energy
from hf_tsv.spectra import Job, Measured, Options, Spool
from hf_tsv.tsv import TaskSingularVectors

ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Written:
    """Content of the weight files.

    Args:
        weights (`Mapping[str, StoredWeight]`): stored form of each weight, by canonical name.
        rounding (`float`): squared error of rounding to the factor dtype.
        tensor_bytes (`int`): size of all tensors, without headers.
        file_bytes (`int`): size of the files.
        left_out (`tuple[str, ...]`): changed tensors that the format cannot hold.
    """

    weights: Mapping[str, StoredWeight]
    rounding: float
    tensor_bytes: int
    file_bytes: int
    left_out: tuple[str, ...] = ()


def choose_ranks(measured: Sequence[Measured], job: Job) -> list[int]:
    """Rank of every weight by the rule, or [`DENSE`]."""
    rule = job.options.rule
    if rule.budget is not None:
        return _within_budget(measured, job, budget_bytes(rule.budget, job.checkpoint_bytes))
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


def _within_budget(measured: Sequence[Measured], job: Job, budget: int) -> list[int]:
    ranks = [_rank(item, job.options.rule) for item in measured]
    fixed, paid = _fixed_bytes(measured, job)
    if fixed > budget:
        raise RecipeError(
            f"The budget is {human_bytes(budget)}, and what is stored whole (biases, norms, …)"
            f" alone takes {human_bytes(fixed)}.",
            f"Give a larger --budget{_smaller(job.options)}.",
        )
    free = [i for i, item in enumerate(measured) if item.norm and item.candidate.limit]
    held = [min(paid, len(measured[i].singular_values)) for i in free]
    choices = [_choice(measured[i], already) for i, already in zip(free, held, strict=True)]
    chosen = allocate(choices, budget - fixed)
    for i, already, rank in zip(free, held, chosen, strict=True):
        ranks[i] = DENSE if rank == DENSE else already + rank
    return ranks


def _smaller(options: Options) -> str:
    """Hint about the options that would reduce the size of what is stored whole."""
    adapter_only = options.format == "peft"
    flags = [
        *(["--factor-dtype bfloat16"] if options.factor_dtype == "float32" else []),
        *(["--compress-conv"] if not (adapter_only or options.compress_conv) else []),
        *(["--no-dense"] if adapter_only and options.dense else []),
    ]
    return "".join(f", or {flag}" for flag in flags)


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


def _fixed_bytes(measured: Sequence[Measured], job: Job) -> tuple[int, int]:
    """Bytes of everything without a rank to choose, and the triplets per matrix they include."""
    if job.options.format == "factors":
        whole = (m.candidate for m in measured if m.norm and not m.candidate.limit)
        return job.head_bytes + sum(candidate.dense_bytes or 0 for candidate in whole), 0
    largest = {m.candidate.name: m.numerical_rank for m in measured if m.candidate.limit}
    plan = _plan_adapter(job, measured, largest)
    base = job.sources.base.tensors
    values = sum(_holder(job, name).tensors[name].nbytes for name in plan.values)
    if not plan.biases:
        return values, 0
    biases = sum(math.prod(base[name].shape) for name in plan.biases) * job.options.dtype.itemsize
    pairs = (m.candidate.triplet_bytes for m in measured if m.candidate.name in plan.pairs)
    return values + biases + sum(pairs), 1  # a bias needs a pair of rank 1 or more beside it


def _stored(item: Measured, rank: int) -> StoredWeight:
    candidate = item.candidate
    stored = "dense" if rank == DENSE else "factors" if rank else "none"
    sizes = {"dense": candidate.dense_bytes or 0, "factors": rank * candidate.triplet_bytes}
    return StoredWeight(
        stored=stored,
        shape=candidate.shape,
        dtype=candidate.dtype,
        rank=max(rank, 0),
        numerical_rank=item.numerical_rank if stored == "factors" else 0,
        energy=item.energy(rank),
        norm=item.norm,
        bytes=sizes.get(stored, 0),
        base_sha256=item.base_sha256,
    )


@linalg.threads(1)  # errors are sums, whose last digits depend on how many add them up
def write_factors(
    folder: Path, job: Job, spool: Spool, measured: Sequence[Measured], ranks: Sequence[int]
) -> Written:
    head = job.source.head
    weights = {
        item.candidate.name: _stored(item, rank) for item, rank in zip(measured, ranks, strict=True)
    }
    specs = tensor_specs(weights, job.options.dtype, head)
    plan = plan_shards(specs, job.options.max_shard_size, FACTORS_FILE)
    rounding = 0.0
    writer = ShardWriter(folder, plan)
    try:
        for item in measured:
            rounding += _write_update(writer, job, spool, item, weights[item.candidate.name])
        for name in head:
            writer.write(f"{name}.value", job.source.read(name))
        writer.close()
    finally:
        writer.abandon()
    tensor_bytes = sum(item.bytes for item in weights.values()) + job.head_bytes
    return Written(weights, rounding, tensor_bytes, plan.total_bytes)


def _write_update(
    writer: ShardWriter, job: Job, spool: Spool, item: Measured, weight: StoredWeight
) -> float:
    """Write the update of one weight, and return the squared error of rounding it."""
    name, dtype = item.candidate.name, job.options.dtype
    if weight.stored == "none":
        return 0.0
    if weight.stored == "dense":
        delta = job.delta(name)
        rounded = cast(delta, dtype, name)
        writer.write(f"{name}.delta", rounded)
        return _squared(linalg.in_working_precision(delta) - rounded)
    vectors = spool.get(item, weight.rank)
    stored = TaskSingularVectors(
        *(cast(part, dtype, name) for part in (vectors.U, vectors.S, vectors.Vh))
    )
    for part in ("U", "S", "Vh"):
        writer.write(f"{name}.{part}", getattr(stored, part))
    return 0.0 if dtype == torch.float32 else _squared(vectors.matrix() - stored.matrix())


@linalg.threads(1)
def write_adapter(
    folder: Path, job: Job, spool: Spool, measured: Sequence[Measured], ranks: Sequence[int]
) -> Written:
    dtype, base = job.options.dtype, job.sources.base
    by_name = {item.candidate.name: item for item in measured}
    kept = {
        item.candidate.name: rank
        for item, rank in zip(measured, ranks, strict=True)
        if item.candidate.limit
    }
    plan = _plan_adapter(job, measured, kept)
    specs: dict[str, TensorSpec] = {}
    for name, module in plan.pairs.items():
        (d_out, d_in), r = base.tensors[name].shape, max(1, kept[name])
        key_a, key_b = adapter.pair_keys(module)
        specs |= {key_a: TensorSpec(dtype, (r, d_in)), key_b: TensorSpec(dtype, (d_out, r))}
    for name, key in plan.biases.items():
        specs[key] = TensorSpec(dtype, base.tensors[name].shape)
    values = {name: _holder(job, name) for name in plan.values}
    for name, key in plan.values.items():
        info = values[name].tensors[name]
        specs[key] = TensorSpec(info.dtype, info.shape)
    shards = plan_shards(specs, 2**62, ADAPTER_FILE)  # PEFT reads a single file
    rounding = 0.0
    writer = ShardWriter(folder, shards)
    try:
        for name, module in plan.pairs.items():
            vectors = spool.get(by_name[name], kept[name])
            pair = adapter.lora_pair(vectors)
            A, B = (cast(factor, dtype, name) for factor in pair)
            for key, factor in zip(adapter.pair_keys(module), (A, B), strict=True):
                writer.write(key, factor)
            if dtype != torch.float32:
                rounding += _squared(vectors.matrix() - B.double() @ A.double())
        for name, key in plan.biases.items():
            delta = job.delta(name) if name in job.source.tensors else base.read(name).float() * 0
            rounded = cast(delta, dtype, name)
            writer.write(key, rounded)
            rounding += _squared(delta.double() - rounded)
        for name, key in plan.values.items():
            writer.write(key, values[name].read(name))
        writer.close()
    finally:
        writer.abandon()
    (folder / "adapter_config.json").write_text(json.dumps(plan.config, indent=2) + "\n")
    keys = {name: list(adapter.pair_keys(module)) for name, module in plan.pairs.items()}
    keys |= {name: [key] for name, key in (plan.biases | plan.values).items()}
    weights = {}
    for name, item in by_name.items():
        whole = name in keys and name not in kept and item.norm > 0
        weight = _stored(item, DENSE if whole else kept.get(name, 0))
        stored_bytes = sum(specs[key].nbytes for key in keys.get(name, ()))
        weights[name] = replace(weight, bytes=stored_bytes)
    left_out = (*plan.left_out, *job.source.head)
    return Written(
        weights, rounding, sum(spec.nbytes for spec in specs.values()), shards.total_bytes, left_out
    )


def _plan_adapter(
    job: Job, measured: Sequence[Measured], ranks: Mapping[str, int]
) -> adapter.Adapter:
    base = job.sources.base
    return adapter.plan_adapter(
        ranks,
        {item.candidate.name for item in measured if item.norm},
        [name for name, info in base.tensors.items() if info.dtype.is_floating_point],
        model_class_of(job),
        dense=job.options.dense,
        base_model=base.pinned.ref,
        revision=base.pinned.revision,
    )


def model_class_of(job: Job) -> str:
    """Name of the model class that an adapter is for."""
    return job.options.model_class or layout.saved_class(job.source.config)


def _holder(job: Job, name: str) -> Checkpoint:
    """Checkpoint with the fine-tuned value of a weight: the base where the task has none."""
    return job.source if name in job.source.tensors else job.sources.base


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Round an update to the type it is stored in.

    Raises:
        [`CheckpointError`]: a value is too large for the type.
    """
    rounded = tensor.to(dtype)
    if not rounded.isfinite().all():
        raise CheckpointError(
            f"The update of {name} does not fit into {str(dtype).removeprefix('torch.')}.",
            "Use --factor-dtype bfloat16, whose range is that of float32.",
        )
    return rounded


def _squared(error: Tensor) -> float:
    return float(torch.linalg.vector_norm(error, dtype=torch.float64)) ** 2
