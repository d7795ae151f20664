"""The TALL-masks of a merge: which weights each task needs of the sum of all updates."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from hf_tsv.checkpoints.formats import heads, masks
from hf_tsv.checkpoints.formats.task import Task, distinct_names
from hf_tsv.checkpoints.formats.whole import Checkpoint, open_checkpoint
from hf_tsv.checkpoints.reference import PinnedCheckpoint, at_revision
from hf_tsv.checkpoints.sources import Sources
from hf_tsv.checkpoints.storage.dtypes import DTYPES
from hf_tsv.checkpoints.storage.files import LocalFiles
from hf_tsv.checkpoints.storage.tensors import TensorSpec, digest
from hf_tsv.checkpoints.storage.writer import ShardPlan, ShardWriter, plan_shards
from hf_tsv.linalg import updates
from hf_tsv.merging import loading
from hf_tsv.merging.plan import MergePlan, Weight
from hf_tsv.merging.work import Merge, Merged
from hf_tsv.methods.rules import function_of
from hf_tsv.recipes.settings import Settings


def mask_folders(settings: Settings, inputs: Sequence[Task]) -> list[str]:
    """Folders of the tasks' masks in the output; none with methods that write none."""
    if not settings.row.beside:
        return []
    names = heads.file_stems(distinct_names([item.pinned for item in inputs]))
    return [f"{masks.FOLDER}/{name}" for name in names]


def mask_bytes(merge: Merge, sources: Sources, unchanged: frozenset[str]) -> int:
    """Bytes of the masks of all tasks together; `unchanged` are weights that none has changed."""
    folders = mask_folders(merge.settings, sources.inputs)
    return len(folders) * _layout(sources.base, _changed(merge.plan, unchanged)).total_bytes


def write_masks(folder: Path, done: Merged) -> None:
    """Write the mask of every task into the folder of its merge: reads all checkpoints again."""
    merge = done.merge
    shutil.rmtree(folder / masks.FOLDER, ignore_errors=True)  # of a run that was stopped
    base, inputs = done.sources.base, done.sources.inputs
    mask_of = function_of(merge.settings.row, merge.settings.row.beside)
    merged = open_checkpoint(PinnedCheckpoint(str(folder), None, LocalFiles(folder), {}))
    weights = _changed(merge.plan, done.findings.frozen)
    changed = {name for weight in weights for name in weight.names}
    digests = {name: digest(base.read(name)) for name in base.tensors if name not in changed}
    places = [folder / name for name in mask_folders(merge.settings, inputs)]
    with ExitStack() as opened:
        opened.callback(merged.pinned.files.close)
        writers = []
        for place in places:
            place.mkdir(parents=True)
            writers.append(ShardWriter(place, _layout(base, weights)))
            opened.callback(writers[-1].abandon)
        together = [replace(weight, treatment="combined") for weight in weights]
        for loaded in loading.read_weights(together, merge, done.sources, torch.device("cpu")):
            stored = [merged.read(name) for name in loaded.weight.names]
            whole = torch.cat(stored) if len(stored) > 1 else stored[0]
            total = updates.difference(whole, loaded.base)
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
        task = at_revision(item.pinned.name, item.pinned.revision)
        masks.write_config(place, task, base.pinned, digests, mask_of.scale)


def _changed(plan: MergePlan, unchanged: frozenset[str]) -> list[Weight]:
    return [w for w in plan.weights if w.treatment != "copied" and w.label not in unchanged]


def _layout(base: Checkpoint, weights: Sequence[Weight]) -> ShardPlan:
    shapes = {name: base.tensors[name].shape for w in weights for name in w.names}
    specs = {n: TensorSpec(DTYPES["U8"], masks.packed_shape(shape)) for n, shape in shapes.items()}
    return plan_shards(specs, "1000GB", single=masks.MASK_FILE)
