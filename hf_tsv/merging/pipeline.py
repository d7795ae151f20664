"""The pipeline: read the next weight while this one is computed and the last one is written.

Memory holds the weight being computed, about as much again of the next ones, and the result being
written, whatever the number of layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor

from hf_tsv.checkpoints.sources import Sources
from hf_tsv.checkpoints.storage.tensors import digest
from hf_tsv.checkpoints.storage.writer import ShardWriter
from hf_tsv.linalg import grids, products
from hf_tsv.linalg.updates import norm_of
from hf_tsv.merging.findings import Finding
from hf_tsv.merging.loading import LoadedWeight, by_name, merged_update, read_weights
from hf_tsv.merging.plan import Weight
from hf_tsv.merging.work import Merge
from hf_tsv.methods.interference import measured
from hf_tsv.runs.reading import named, stop_fetching
from hf_tsv.system.errors import CheckpointError
from hf_tsv.system.memory import empty


def merge_weights(
    merge: Merge,
    sources: Sources,
    weights: Sequence[Weight],
    writer: ShardWriter | None,
    *,
    device: torch.device,
    done: Callable[[Finding], None],
) -> None:
    """Read, merge and write weights of a plan, one at a time; without a writer only measure.

    `done` is told each finding after its weight is written, in another thread.
    """
    with (
        products.threads(merge.parallelism.threads),
        closing(read_weights(weights, merge, sources, device)) as loads,
        ThreadPoolExecutor(1, "hf-tsv-write") as writing,
    ):
        written: Future[None] | None = None
        try:
            while True:
                started = time.monotonic()
                loaded = next(loads, None)
                if loaded is None:
                    break
                waited = time.monotonic() - started
                started = time.monotonic()
                with named(loaded.weight.label, [sources.inputs[i] for i in loaded.finding.tasks]):
                    result, finding = merge_one(loaded, merge, writes=writer is not None)
                computed = time.monotonic() - started
                started = time.monotonic()
                if written is not None:
                    written.result()
                waited += time.monotonic() - started
                seconds = replace(finding.seconds, waiting=waited, computing=computed)
                finding = replace(finding, seconds=seconds)
                parts = by_name(loaded.weight, result, sources.base)
                written = writing.submit(_write, writer, parts, finding, done)
                del loaded, result, parts
            if written is not None:
                written.result()
        except BaseException:
            stop_fetching(sources.all())  # else the reading thread would wait for the Hub
            raise


def merge_one(loaded: LoadedWeight, merge: Merge, *, writes: bool) -> tuple[Tensor, Finding]:
    """The merged weight, in the dtype it will be stored in."""
    weight, finding = loaded.weight, loaded.finding
    dtype, update = merge.plan.specs[weight.names[0]].dtype.torch, loaded.update
    if loaded.deltas:
        merged = merged_update(loaded, merge)
        update = merged.matrix
        finding = replace(
            finding,
            ranks=merged.ranks,
            null_directions=merged.null_directions,
            exact=merged.exact,
            interference=measured(merged) if merge.measure else None,
        )
    if not writes:
        return loaded.base, finding
    if update is None:
        return _cast(loaded.base, dtype, weight), finding
    update = products.in_working_precision(update).mul_(merge.alpha_of(weight))
    narrow = torch.finfo(dtype).eps > torch.finfo(torch.float32).eps
    norm = norm_of(update) if narrow else 0.0
    result = update.add_(loaded.base)
    stored = _cast(result, dtype, weight)
    if narrow:
        lost = grids.rounding_error(result, stored)
        finding = replace(finding, update_norm=norm, lost=lost)
    return stored, finding


def _cast(tensor: Tensor, dtype: torch.dtype, weight: Weight) -> Tensor:
    stored = empty(*tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)
    if dtype.is_floating_point and stored.numel() and not products.largest_entry(stored) < math.inf:
        narrow = str(dtype).removeprefix("torch.")
        problem = f"Merged values of {weight.label} do not fit into {narrow}."
        raise CheckpointError(problem, "Use `dtype=float32` or a smaller `alpha=`.")
    return stored


def _write(
    writer: ShardWriter | None,
    parts: Sequence[tuple[str, Tensor]],
    finding: Finding,
    done: Callable[[Finding], None],
) -> None:
    started, written = time.monotonic(), {}
    for name, part in parts:
        if writer is None:
            break
        stored = part.cpu().contiguous()
        writer.write(name, stored)
        written[name] = digest(stored)
    seconds = replace(finding.seconds, writing=time.monotonic() - started)
    done(replace(finding, written=written, seconds=seconds))
