"""Loading of a merge that routes images to the tasks beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_tsv.checkpoints.fit import check_fit
from hf_tsv.checkpoints.formats.routing import Routing, class_embeddings
from hf_tsv.checkpoints.formats.task import Task
from hf_tsv.checkpoints.reference import PinnedCheckpoint, at_revision
from hf_tsv.checkpoints.sources import DEFAULT_ACCESS, Access, Sources, open_sources
from hf_tsv.linalg.choices import AnyDevice, AnyDtype
from hf_tsv.linalg.shapes import default_rank
from hf_tsv.linalg.updates import TaskSingularVectors
from hf_tsv.merging.in_memory import merged_weights
from hf_tsv.models import building
from hf_tsv.models.building import Found, Head
from hf_tsv.models.routed import (
    CLASSES,
    ImageTower,
    RoutedCLIPForImageClassification,
    RoutedCLIPModel,
    Router,
    stacked,
)
from hf_tsv.system.errors import CheckpointError
from hf_tsv.system.text import one_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def routed(
    found: Found,
    routing: Routing,
    dtype: AnyDtype | None,
    device: AnyDevice | None,
    base: str | None,
    access: Access,
    *,
    show: bool,
) -> PreTrainedModel:
    """Build the model of a merge that routes images, with the factors beside it.

    Args:
        base (`str`, *optional*): base model; default: the one the merge was made with.

    Raises:
        [`CheckpointError`]: factors are missing, or of another base model.
    """
    model_class = CLASSES.get(found.model_class)
    if model_class is None:
        raise CheckpointError(
            f"{found.item} routes images, and {found.model_class} is no class that can.",
            f"Choose the `kind=` of {one_of(CLASSES)}, or load one of its tasks.",
        )
    sources = _sources(found.item.pinned, routing, base, access).within_reach(visible=show)
    first_class, places = found.model_class, dict[str, range]()
    if model_class is RoutedCLIPForImageClassification:
        first_class = "CLIPVisionModel"
        heads = {n: Head.of(i) for n, i in zip(routing.names, sources.inputs, strict=True)}
        width = sources.base.tensors["vision_model.post_layernorm.weight"].shape[0]
        head, places = _joined(heads, width, found.item)
        found = replace(found, head=head)
    building.check_parts([sources.base], first_class)
    model = cast(RoutedCLIPModel, building.build(found, dtype, device, model_class))
    tower = Found(sources.base, sources.base, first_class)
    first = ImageTower(building.build(tower, model.dtype, model.device))
    directions = _directions(sources, routing)
    public = replace(sources, access=DEFAULT_ACCESS)  # copies of the model hold no token
    merged = Merging(public, frozenset(dict(first.named_parameters())))
    classes = _classes(found.item.pinned, routing, model)
    router = Router(routing.names, first, routing.rule, directions, merged, classes)
    model.router = router.to(model.device)
    model.config.hf_tsv_routing = {"tasks": list(routing.names), **vars(routing.rule)}
    if isinstance(model, RoutedCLIPForImageClassification):
        model.places = places
    return model


def _joined(heads: Mapping[str, Head], width: int, item: Task) -> tuple[Head, dict[str, range]]:
    """One head of all labels, those of one task after those of another, and their places.

    The width is that of the features.

    Raises:
        [`CheckpointError`]: a task has no head, or one that is not a single linear layer.
    """
    places, labels, start = dict[str, range](), dict[int, str](), 0
    for name, head in heads.items():
        if not head.tensors:
            problem = f"The task {name} of {item} has no classification head."
            raise CheckpointError(problem, "Use zero-shot-image-classification, or load one task.")
        shapes = {part: tensor.shape for part, tensor in head.tensors.items()}
        count = shapes[BIAS].numel() if BIAS in shapes else 0
        if shapes != {WEIGHT: (count, width), BIAS: (count,)}:
            raise CheckpointError(f"The head of the task {name} of {item} is not one linear layer.")
        own = places[name] = range(start, start + count)
        named = head.config.get("id2label", {})
        labels |= {i: str(named.get(str(n), named.get(n, f"LABEL_{n}"))) for n, i in enumerate(own)}
        start = own.stop
    joined = {part: torch.cat([head.tensors[part] for head in heads.values()]) for part in PARTS}
    config = {"id2label": labels, "label2id": {label: i for i, label in labels.items()}}
    return Head(joined, config), places


PARTS = WEIGHT, BIAS = "classifier.weight", "classifier.bias"
"""Tensors of a head that is one linear layer."""


@dataclass(frozen=True)
class Merging:
    """Merges some of the tasks, by their places, for the weights of a tower by canonical name."""

    sources: Sources
    names: frozenset[str]

    def __call__(
        self, chosen: tuple[int, ...], device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """Weights of the tower of some tasks."""
        inputs = tuple(self.sources.inputs[i] for i in chosen)
        some = replace(self.sources, inputs=inputs)
        try:
            yield from merged_weights(some, self.names, device)
        finally:
            some.close()


def _sources(
    pinned: PinnedCheckpoint, routing: Routing, base: str | None, access: Access
) -> Sources:
    """The base model and the factors of the tasks, opened by their headers."""
    said = routing.base_model
    if base is None and said.revision is not None:
        base = f"hf://{at_revision(said.ref, said.revision)}"
    access = replace(access, subfolder=None)  # what is pinned names it
    references = [task.reference(pinned) for task in routing.tasks]
    sources = open_sources(references, base, access, only_factors=True)
    building.check_clip(sources.base)
    check_fit(sources.base, sources.inputs)
    return sources


def _classes(
    pinned: PinnedCheckpoint, routing: Routing, model: RoutedCLIPModel
) -> dict[str, Tensor]:
    """Embeddings of class names by task, for a model that embeds texts."""
    if not isinstance(model, RoutedCLIPModel):
        return {}
    found = class_embeddings(pinned, routing, model.config.projection_dim)
    return {name: normalize(embeddings.float(), dim=-1) for name, embeddings in found.items()}


def _directions(sources: Sources, routing: Routing) -> list[Tensor]:
    """Right singular vectors of all tasks, for each layer, after a check of the base model."""
    try:
        found = []
        for layer in routing.rule.layers:
            name = f"{layer}.weight"
            vectors = _vectors(sources, routing, name)
            shape = sources.base.tensors[name].shape
            found.append(stacked(vectors, default_rank(shape, len(vectors))))
        return found
    finally:
        sources.close()


def _vectors(sources: Sources, routing: Routing, name: str) -> Sequence[Tensor]:
    vectors, digests = [], dict[str, str]()
    for task, item in zip(routing.names, sources.inputs, strict=True):
        there = name in sources.base.tensors and name in item.tensors
        change = item.change(sources.base.original([name], digests=digests)) if there else None
        if change is None or not isinstance(change.update, TaskSingularVectors):
            problem = f"{name} of the task {task} is not stored as factors."
            raise CheckpointError(problem, "Choose other layers with `hf-tsv route`.")
        vectors.append(change.update.Vh)
    return vectors
