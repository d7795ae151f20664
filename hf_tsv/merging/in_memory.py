"""Weights of a TSV-Merge in memory, computed as a merge writes them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor

from hf_tsv.checkpoints.sources import Sources
from hf_tsv.linalg import products
from hf_tsv.merging.loading import by_name, read_weights
from hf_tsv.merging.pipeline import merge_one
from hf_tsv.merging.plan import make_plan, resolved
from hf_tsv.merging.work import Merge
from hf_tsv.recipes.scaling import Factor
from hf_tsv.recipes.settings import Settings
from hf_tsv.runs.reading import named


def merged_weights(
    sources: Sources, names: Collection[str], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Merge the tasks of sources with the defaults of a merge, and yield some weights by name.

    The weights have the types of the base model, and the bytes that `hf-tsv merge` writes of them.
    Task factors need no decomposition, and one task alone is what it is.
    """
    settings = resolved(sources.base, Settings())
    plan = make_plan(sources.base, sources.inputs, settings)
    merge = Merge(
        references=(),
        base="",
        factors=(Factor(),) * len(sources.inputs),
        settings=settings,
        plan=plan,
        warnings=(),
        expected=(),
    )
    threads = torch.get_num_threads()
    merge = replace(merge, parallelism=replace(merge.parallelism, threads=threads))
    weights = [weight for weight in plan.weights if any(name in names for name in weight.names)]
    with products.threads(threads), closing(read_weights(weights, merge, sources, device)) as loads:
        for loaded in loads:
            with named(loaded.weight.label, [sources.inputs[i] for i in loaded.finding.tasks]):
                result, _ = merge_one(loaded, merge, writes=True)
            parts = by_name(loaded.weight, result, sources.base)
            yield from ((name, part) for name, part in parts if name in names)
