"""The TALL-masks of a merge: which weights each task needs of the sum of all updates."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from hf_tsv.checkpoints.formats import heads, masks
from hf_tsv.checkpoints.formats.task import distinct_names
from hf_tsv.checkpoints.formats.whole import open_checkpoint
from hf_tsv.checkpoints.reference import PinnedCheckpoint, at_revision
from hf_tsv.checkpoints.storage.files import LocalFiles
from hf_tsv.checkpoints.storage.tensors import TensorSpec, digest
from hf_tsv.checkpoints.storage.writer import ShardPlan, ShardWriter, plan_shards
from hf_tsv.linalg import updates
from hf_tsv.merging import loading
from hf_tsv.merging.plan import Weight
from hf_tsv.merging.work import Job
from hf_tsv.methods.rules import function_of


def mask_folders(job: Job) -> list[str]:
    """Where the mask of each task lies in the output; none with methods that write none.

    Args:
        job ([`Job`]): a merge.
    """
    if not job.settings.row.beside:
        return []
    names = heads.file_stems(distinct_names([item.pinned for item in job.sources.inputs]))
    return [f"{masks.FOLDER}/{name}" for name in names]


def mask_bytes(job: Job, unchanged: frozenset[str] = frozenset()) -> int:
    """Of the masks of all tasks together.

    Args:
        job ([`Job`]): a merge.
        unchanged (`frozenset[str]`): labels of weights that no task changed.
    """
    return len(mask_folders(job)) * _layout(job, _changed(job, unchanged)).total_bytes


def write_masks(folder: Path, job: Job, unchanged: frozenset[str]) -> None:
    """Write the mask of every task, in a second pass over all checkpoints.

    Args:
        folder (`Path`): of the merge, complete but for these.
        job ([`Job`]): that made it.
        unchanged (`frozenset[str]`): labels of weights that no task changed.
    """
    shutil.rmtree(folder / masks.FOLDER, ignore_errors=True)  # of a run that was stopped
    base, inputs = job.sources.base, job.sources.inputs
    mask_of = function_of(job.settings.row, job.settings.row.beside)
    merged = open_checkpoint(PinnedCheckpoint(str(folder), None, LocalFiles(folder), {}))
    weights = _changed(job, unchanged)
    changed = {name for weight in weights for name in weight.names}
    digests = {name: digest(base.read(name)) for name in base.tensors if name not in changed}
    places = [folder / name for name in mask_folders(job)]
    with ExitStack() as opened:
        opened.callback(merged.pinned.files.close)
        writers = []
        for place in places:
            place.mkdir(parents=True)
            writers.append(ShardWriter(place, _layout(job, weights)))
            opened.callback(writers[-1].abandon)
        together = [replace(weight, treatment="combined") for weight in weights]
        device, ahead = torch.device("cpu"), job.parallelism.ahead
        for loaded in loading.read_weights(together, base, inputs, job.scales, device, ahead=ahead):
            stored = [merged.read(name) for name in loaded.weight.names]
            total = updates.difference(
                torch.cat(stored) if len(stored) > 1 else stored[0], loaded.base
            )
            for name, w0 in loading.by_name(loaded.weight, loaded.base, base):
                digests[name] = digest(w0)
            for i, writer in enumerate(writers):
                update = loaded.delta_of(i)
                delta = torch.zeros_like(total) if update is None else updates.matrix_of(update)
                mask = mask_of(delta, total)
                for name, part in loading.by_name(loaded.weight, mask, base):
                    writer.write(name, masks.packed(part))
        for writer in writers:
            writer.close()
    for place, item in zip(places, inputs, strict=True):
        task = at_revision(item.pinned.ref, item.pinned.revision)
        masks.write_config(place, task, base.pinned, digests, mask_of.scale)


def _changed(job: Job, unchanged: frozenset[str]) -> list[Weight]:
    return [w for w in job.plan.weights if w.treatment != "copied" and w.label not in unchanged]


def _layout(job: Job, weights: Sequence[Weight]) -> ShardPlan:
    shapes = {name: job.sources.base.tensors[name].shape for w in weights for name in w.names}
    specs = {n: TensorSpec(torch.uint8, masks.packed_shape(shape)) for n, shape in shapes.items()}
    return plan_shards(specs, "1000GB", single=masks.MASK_FILE)
