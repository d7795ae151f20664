"""Coefficients of the tasks in each weight, learned on images without labels (method `ada`).

W = W0 + α Σᵢ cᵢ Mᵢ, where Mᵢ = U⊥ᵢ diag(σᵢ) V⊥hᵢ is the share of task i in a TSV-Merge, or Δᵢ / T
where updates are averaged. The shares do not depend on c, and ∂L/∂cᵢ = α ⟨∂L/∂W, Mᵢ⟩, so an
ordinary backward pass suffices. L is the entropy of zero-shot predictions. Source: section D.2.7;
Yang et al., "AdaMerging: Adaptive Model Merging for Multi-Task Learning", ICLR 2024 (arXiv
2310.02575).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_tsv.checkpoints import layout
from hf_tsv.checkpoints.fit import check_whole_clip
from hf_tsv.checkpoints.sources import Sources
from hf_tsv.evaluation import zero_shot
from hf_tsv.evaluation.data import LabelledImages, load, refuse_not_installed
from hf_tsv.evaluation.job import in_one_line
from hf_tsv.linalg import products, updates
from hf_tsv.linalg.updates import TaskSingularVectors
from hf_tsv.merging import loading
from hf_tsv.merging.costs import steps
from hf_tsv.merging.plan import Weight
from hf_tsv.merging.work import Merge
from hf_tsv.methods.ada import Layer, orthonormal_vectors
from hf_tsv.models.building import ZERO_SHOT
from hf_tsv.models.loading import pipeline
from hf_tsv.recipes.learning import Adaptation
from hf_tsv.runs import reading
from hf_tsv.runs.lifecycle import Run
from hf_tsv.system.errors import CheckpointError
from hf_tsv.system.progress import bar, logger
from hf_tsv.system.text import counted
from hf_tsv.verbs.learning.descent import DIGITS, Batches, descend

WHOLE = "CLIPModel"
LEARNED = ("vision_model.", "visual_projection.")
"""Prefixes of the weights that images pass through; all other coefficients are 1."""


def adapting(merge: Merge, sources: Sources, adaptation: Adaptation) -> Merge:
    """The same merge that will learn coefficients first.

    Raises:
        [`HfTsvError`]: the base is no whole CLIP, no merged weight is one that images pass
            through, or a package for reading images is missing.
    """
    refuse_not_installed("The method ada")
    check_whole_clip(sources.base, "The method ada")
    changed = (weight.label for weight in merge.plan.weights if weight.treatment != "copied")
    if not any(label.startswith(LEARNED) for label in changed):
        problem = "The method ada learns from images, and no checkpoint has a vision tower."
        raise CheckpointError(problem, "Use `method=tsv`.")
    tasks, images = len(sources.inputs), len(adaptation.tasks)
    if images < tasks:
        merge = merge.warned(
            f"There are images of {counted(images, 'task')} for {counted(tasks, 'checkpoint')}:"
            " what is learned favours those."
        )
    return replace(merge, adaptation=adaptation)


def adapted(merge: Merge, adaptation: Adaptation, run: Run, device: torch.device) -> Merge:
    """Learn the coefficients with which predictions on images are most certain.

    The result is the same merge with coefficients, and the adaptation with what it found.

    Raises:
        [`HfTsvError`]: a dataset cannot be read, the base model has no processor, or the entropy
            is not finite.
    """
    what = counted(len(adaptation.tasks), "task")
    logger.info("Learning coefficients on images of %s.", what)
    sources, show, token = run.sources, run.show, run.sources.access.token
    data = [_without_labels(load(task, token=token, labelled=False)) for task in adaptation.tasks]
    access: Any = {"token": token, "cache_dir": sources.access.cache_dir, "progress": show}
    pipe: Any = pipeline(ZERO_SHOT, merge.base, dtype=torch.float32, device=str(device), **access)
    pipe.model.requires_grad_(False)
    layers = layers_of(pipe.model, merge, sources, device, show=show)
    if not layers:
        problem = "No checkpoint changes the vision tower: there is nothing to learn from images."
        raise CheckpointError(problem, "Use `method=tsv`.")
    classes = []
    for task, images in zip(adaptation.tasks, data, strict=True):
        with in_one_line(task.name):
            head = zero_shot.head(pipe.model, pipe.tokenizer, images.classes, task.templates)
        classes.append(head.clone())
    batches = Batches(pipe.image_processor, adaptation, data)
    found, told = descend(pipe.model, layers, classes, batches, len(sources.inputs), show=show)
    logger.info("Mean entropy of predictions: %.3f before, %.3f after.", *told)
    pairs = zip(adaptation.tasks, data, strict=True)
    tasks = tuple(replace(task, split=images.split) for task, images in pairs)
    counts = tuple(len(images.rows) for images in data)
    learned = {
        layer.label: tuple(round(c, DIGITS) for c in row)
        for layer, row in zip(layers, found.tolist(), strict=True)
    }
    adaptation = replace(adaptation, tasks=tasks, images=counts, entropy=told)
    return replace(merge, coefficients=learned, adaptation=adaptation)


def _without_labels(images: LabelledImages) -> LabelledImages:
    """Replace the labels of images by the first class."""
    rows = images.rows.remove_columns(images.label)
    return replace(images, rows=rows.add_column(images.label, [0] * len(rows)))


def layers_of(
    model: Any, merge: Merge, sources: Sources, device: torch.device, *, show: bool
) -> list[Layer]:
    """Weights of the base model that images pass through; writes all merged ones into the model."""
    # An averaged weight would be read as one running mean; learning needs every task's update.
    weights = [
        replace(w, treatment="combined") if w.treatment == "averaged" else w
        for w in merge.plan.weights
        if w.treatment != "copied"
    ]
    parameters = dict(model.named_parameters())
    ones = torch.ones(len(sources.inputs))
    found = []
    with (
        products.threads(merge.parallelism.threads),
        bar("Orthogonalising", steps(weights), visible=show) as advance,
    ):
        for loaded in loading.read_weights(weights, merge, sources, device):
            if loaded.deltas and parameters.keys() >= set(_own_names(loaded.weight)):
                tasks = [sources.inputs[i] for i in loaded.finding.tasks]
                with reading.named(loaded.weight.label, tasks):
                    layer = _layer(loaded, parameters, merge)
                layer.place(ones)
                if layer.label.startswith(LEARNED):
                    found.append(layer)
            advance(1)
    return found


def _own_names(weight: Weight) -> list[str]:
    """Names of the weight's parameters in the model; empty for one it does not have."""
    return [layout.name_in_class(name, WHOLE) or "" for name in weight.names]


def _layer(loaded: loading.LoadedWeight, parameters: Mapping[str, Tensor], merge: Merge) -> Layer:
    weight = loaded.weight
    alpha = merge.settings.alpha * weight.alpha_factor
    own = tuple(parameters[name] for name in _own_names(weight))
    dtype = own[0].dtype
    shares: TaskSingularVectors | Tensor
    ranks: tuple[int, ...] = ()
    if weight.treatment == "decomposed":
        vectors, ranks = orthonormal_vectors(loaded.updates(merge))
        shares = replace(vectors, S=vectors.S * alpha).to(dtype)
    else:
        dense = [updates.dense(delta) for delta in loaded.deltas]
        shares = (torch.stack(dense) * (alpha / len(merge.scales))).to(dtype)
    return Layer(weight.label, own, loaded.base.to(dtype), loaded.finding.tasks, shares, ranks)
