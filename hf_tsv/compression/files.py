"""Choice of the triplets to keep of a task, and writing of its files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hf_tsv.checkpoints.formats.description import StoredWeight, tensor_specs
from hf_tsv.checkpoints.names import ADAPTER_FILE, FACTORS_FILE
from hf_tsv.checkpoints.storage.dtypes import DType
from hf_tsv.checkpoints.storage.tensors import TensorSpec
from hf_tsv.checkpoints.storage.writer import ShardWriter, plan_shards
from hf_tsv.compression import peft
from hf_tsv.compression.candidates import DENSE, Compression, Measured, Spool
from hf_tsv.linalg import products
from hf_tsv.linalg.updates import TaskSingularVectors
from hf_tsv.system.errors import CheckpointError


@dataclass(frozen=True)
class Written:
    """Content of the weight files: the stored form of each weight, by canonical name.

    `rounding` is the squared error of rounding to the factor dtype, `tensor_bytes` the size of all
    tensors, without headers, and `left_out` the changed tensors that the format cannot hold.
    """

    weights: Mapping[str, StoredWeight]
    rounding: float
    tensor_bytes: int
    file_bytes: int
    left_out: tuple[str, ...] = ()


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


@products.threads(1)  # errors are sums, whose last digits depend on how many add them up
def write_factors(
    folder: Path, job: Compression, spool: Spool, measured: Sequence[Measured], ranks: Sequence[int]
) -> Written:
    head = job.source.head
    pairs = zip(measured, ranks, strict=True)
    weights = {item.candidate.name: _stored(item, rank) for item, rank in pairs}
    specs = tensor_specs(weights, job.options.stored_dtype, head)
    plan = plan_shards(specs, job.options.max_shard_size, FACTORS_FILE)
    rounding = 0.0
    writer = ShardWriter(folder, plan)
    try:
        for item in measured:
            rounding += _write_update(writer, job, spool, item, weights[item.candidate.name])
        for name in head:
            writer.write(f"{name}.value", job.source.head_tensor(name))
        writer.close()
    finally:
        writer.abandon()
    tensor_bytes = sum(item.bytes for item in weights.values()) + job.head_bytes
    return Written(weights, rounding, tensor_bytes, plan.total_bytes)


def _write_update(
    writer: ShardWriter, job: Compression, spool: Spool, item: Measured, weight: StoredWeight
) -> float:
    """Write the update of one weight, and return the squared error of rounding it."""
    name, dtype = item.candidate.name, job.options.stored_dtype
    if weight.stored == "none":
        return 0.0
    if weight.stored == "dense":
        delta = job.delta(name)
        rounded = cast(delta, dtype, name)
        writer.write(f"{name}.delta", rounded)
        return _squared(products.in_working_precision(delta) - rounded)
    vectors = spool.get(item, weight.rank)
    stored = TaskSingularVectors(
        *(cast(part, dtype, name) for part in (vectors.U, vectors.S, vectors.Vh))
    )
    for part in ("U", "S", "Vh"):
        writer.write(f"{name}.{part}", getattr(stored, part))
    return 0.0 if dtype.name == "F32" else _squared(vectors.matrix() - stored.matrix())


@products.threads(1)
def write_adapter(
    folder: Path, job: Compression, spool: Spool, measured: Sequence[Measured], ranks: Sequence[int]
) -> Written:
    dtype, base = job.options.stored_dtype, job.sources.base
    by_name = {item.candidate.name: item for item in measured}
    by_rank = zip(by_name.items(), ranks, strict=True)
    kept = {name: rank for (name, item), rank in by_rank if item.candidate.limit}
    plan = plan_adapter(job, measured, kept)
    specs: dict[str, TensorSpec] = {}
    for name, module in plan.pairs.items():
        (d_out, d_in), r = base.tensors[name].shape, max(1, kept[name])
        key_a, key_b = peft.pair_keys(module)
        specs |= {key_a: TensorSpec(dtype, (r, d_in)), key_b: TensorSpec(dtype, (d_out, r))}
    specs |= {key: TensorSpec(dtype, base.tensors[n].shape) for n, key in plan.biases.items()}
    specs |= {key: spec_of(job, name) for name, key in plan.values.items()}
    shards = plan_shards(specs, 2**62, ADAPTER_FILE)  # PEFT reads a single file
    rounding = 0.0
    writer = ShardWriter(folder, shards)
    try:
        for name, module in plan.pairs.items():
            vectors = spool.get(by_name[name], kept[name])
            A, B = (cast(factor, dtype, name) for factor in peft.lora_pair(vectors))
            for key, factor in zip(peft.pair_keys(module), (A, B), strict=True):
                writer.write(key, factor)
            if dtype.name != "F32":
                rounding += _squared(vectors.matrix() - B.double() @ A.double())
        for name, key in plan.biases.items():
            delta = job.delta(name) if name in job.source.tensors else base.read(name).float() * 0
            rounded = cast(delta, dtype, name)
            writer.write(key, rounded)
            rounding += _squared(delta.double() - rounded)
        for name, key in plan.values.items():
            writer.write(key, _fine_tuned(job, name))
        writer.close()
    finally:
        writer.abandon()
    (folder / "adapter_config.json").write_text(json.dumps(plan.config, indent=2) + "\n")
    keys = {name: list(peft.pair_keys(module)) for name, module in plan.pairs.items()}
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


def plan_adapter(
    job: Compression, measured: Sequence[Measured], ranks: Mapping[str, int]
) -> peft.Adapter:
    base = job.sources.base
    return peft.plan_adapter(
        ranks,
        {item.candidate.name for item in measured if item.norm},
        [name for name, info in base.tensors.items() if info.dtype.is_floating_point],
        job.model_class,
        dense=job.options.dense,
        base_model=base.pinned.name,
        revision=base.pinned.revision,
    )


def spec_of(job: Compression, name: str) -> TensorSpec:
    """Type and shape of a weight: those of the base where the task has none."""
    held = job.source.tensors
    info = held[name] if name in held else job.sources.base.tensors[name]
    return TensorSpec(info.dtype, info.shape)


def _fine_tuned(job: Compression, name: str) -> Tensor:
    """Fine-tuned value of a weight: that of the base where the task has none."""
    w0 = job.sources.base.original([name])
    return job.source.weight(w0) if name in job.source.tensors else w0.tensor


def cast(tensor: Tensor, dtype: DType, name: str) -> Tensor:
    """Round an update to the type it is stored in, and refuse values too large for that."""
    rounded = tensor.to(dtype.torch)
    if not rounded.isfinite().all():
        raise CheckpointError(
            f"The update of {name} does not fit into {dtype.in_torch}.",
            "Use `dtype=bfloat16`, which has the range of float32.",
        )
    return rounded


def _squared(error: Tensor) -> float:
    return float(torch.linalg.vector_norm(error, dtype=torch.float64)) ** 2
