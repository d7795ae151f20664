"""Passes over all weights before the first is merged: what a method, or factors of layers, need."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import replace

import torch

from hf_tsv.checkpoints.layout import BLOCK
from hf_tsv.checkpoints.sources import Sources
from hf_tsv.linalg import products
from hf_tsv.merging.costs import steps
from hf_tsv.merging.loading import LoadedWeight, known_before, merged_update, read_weights
from hf_tsv.merging.plan import MergePlan, Weight
from hf_tsv.merging.work import Merge
from hf_tsv.methods.layer_scales import Layers, Likeness, larv, likenesses, lines, size, sum_of
from hf_tsv.runs.reading import named
from hf_tsv.system.progress import bar, logger


def surveyed(merge: Merge, sources: Sources, device: torch.device, *, visible: bool) -> Merge:
    """The same merge with what passes over all its weights find; each reads them once.

    Tasks are scaled before the method looks at them, and what is merged of them is scaled last.
    """
    if merge.settings.layer_scale == "larv":
        merge = replace(merge, plan=_by_task(merge, sources, device, visible=visible))
    if merge.settings.row.before:
        merge = replace(merge, known=known_before(merge, sources))
    if merge.settings.layer_scale == "lines":
        merge = replace(merge, layers=_by_depth(merge, sources, device, visible=visible))
    return merge


def _by_task(merge: Merge, sources: Sources, device: torch.device, *, visible: bool) -> MergePlan:
    """The plan with factors of LARV for each task in each weight that is merged as a matrix."""
    weights = [replace(w, treatment="decomposed") for w in merge.plan.weights if w.surveyed]
    found: dict[int, dict[str, Likeness]] = defaultdict(dict)

    def measure(loaded: LoadedWeight) -> None:
        for task, likeness in zip(
            loaded.finding.tasks, likenesses(loaded.base, loaded.deltas), strict=True
        ):
            found[task][loaded.weight.label] = likeness

    _visit("Measuring layers", weights, measure, merge, sources, device, visible)
    depths = {label: (block + 1) / count for label, block, count in _places(weights, merge.plan)}
    factors = {task: larv(measured, depths) for task, measured in found.items()}
    every = [factor for own in factors.values() for factor in own.values()]
    if every:
        logger.info("Updates are scaled by %.2f to %.2f (LARV).", min(every), max(every))

    def with_factors(weight: Weight) -> Weight:
        own = [
            weight.factor_of(i) * factors.get(i, {}).get(weight.label, 1.0)
            for i in range(len(merge.factors))
        ]
        return replace(weight, task_factors=tuple(own)) if set(own) != {1.0} else weight

    return replace(merge.plan, weights=tuple(map(with_factors, merge.plan.weights)))


def _by_depth(merge: Merge, sources: Sources, device: torch.device, *, visible: bool) -> Layers:
    """Factors of LiNeS, for which every weight is merged once to know its size."""
    weights = [weight for weight in merge.plan.weights if weight.treatment != "copied"]
    sizes: list[tuple[float, float]] = []
    tasks = len(merge.scales)

    def measure(loaded: LoadedWeight) -> None:
        if loaded.deltas:
            summed = size(sum_of(loaded.deltas))
            sizes.append((summed, size(merged_update(loaded, merge).matrix)))
        elif loaded.update is not None:
            own = size(loaded.update)
            of_mean = loaded.weight.treatment == "averaged"
            sizes.append((own * tasks if of_mean else own, own))

    _visit("Measuring layers", weights, measure, merge, sources, device, visible)
    depths = {
        label: block / max(count - 1, 1)
        for label, block, count in _places(weights, merge.plan)
        if BLOCK.match(label)
    }
    layers = lines(sizes, tasks, depths)
    first, last = layers.start, layers.start + merge.settings.alpha
    logger.info("Updates are scaled by %.3g in the first block to %.3g in the last.", first, last)
    return layers


def _visit(
    description: str,
    weights: Sequence[Weight],
    measure: Callable[[LoadedWeight], None],
    merge: Merge,
    sources: Sources,
    device: torch.device,
    visible: bool,
) -> None:
    """Read weights one at a time, and look at each."""
    with (
        bar(description, steps(weights), visible=visible) as advance,
        products.threads(merge.parallelism.threads),
        closing(read_weights(weights, merge, sources, device)) as loads,
    ):
        for loaded in loads:
            with named(loaded.weight.label, [sources.inputs[i] for i in loaded.finding.tasks]):
                measure(loaded)
            advance(1)


def _places(weights: Iterable[Weight], plan: MergePlan) -> list[tuple[str, int, int]]:
    """Label of each weight, its block, and the number of blocks of its tower in the plan.

    What comes before the blocks counts as in the first, what comes after as in the last.
    """
    labels = [weight.label for weight in weights]
    blocks = {label: (found[1], int(found[2])) for label in labels if (found := BLOCK.match(label))}
    counts: dict[str, int] = defaultdict(int)
    for weight in plan.weights:
        if found := BLOCK.match(weight.label):
            counts[found[1]] = max(counts[found[1]], int(found[2]) + 1)
    most = max(counts.values(), default=1)
    return [
        (label, blocks[label][1], counts[blocks[label][0]])
        if label in blocks
        else (label, 0 if "embedding" in label else most - 1, most)
        for label in labels
    ]
