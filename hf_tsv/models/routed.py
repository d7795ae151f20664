"""Models that send each image through the tower of the tasks it belongs to.

The rule is in `hf_tsv/routing/`; a tower is the base model with the TSV-Merge of the chosen tasks.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import CLIPForImageClassification, CLIPModel, CLIPVisionModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.clip.modeling_clip import CLIPOutput, image_text_contrastive_loss
from transformers.utils.generic import can_return_tuple

from hf_tsv.routing import scores
from hf_tsv.routing.rule import Rule
from hf_tsv.routing.scores import Route
from hf_tsv.system.errors import UsageError

MAX_TOWERS, MAX_BYTES = 8, 4_000_000_000
"""Towers that are kept by default, and their bytes; one of ViT-B/32 in float32 has 350 MB."""

SIZED = ("interpolate_pos_encoding",)
"""Options of a tower without which it refuses images of another size."""

Weights = Iterable[tuple[str, Tensor]]
"""Weights of a vision tower and of the projection behind it, by canonical name."""


class ImageTower(nn.Module):
    """Vision tower with the projection behind it, if there is one; parameters have canonical names.

    Args:
        model (`CLIPModel` or `CLIPVisionModel`): model whose modules it shares.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        whole = isinstance(model, CLIPModel)
        self.vision_model: Any = model.vision_model if whole else model
        self.visual_projection: Any = model.visual_projection if whole else None

    def forward(self, pixel_values: Tensor, **options: Any) -> BaseModelOutputWithPooling:
        """Features of images, as `CLIPModel.get_image_features` or `CLIPVisionModel` has them."""
        found: BaseModelOutputWithPooling = self.vision_model(pixel_values=pixel_values, **options)
        if self.visual_projection is not None:
            found.pooler_output = self.visual_projection(found.pooler_output)
        return found

    def copied(self, weights: Weights) -> ImageTower:
        """Make a tower of its own with some other weights."""
        made, parameters = deepcopy(self), dict[str, nn.Parameter]()
        parameters.update(made.named_parameters())
        for name, tensor in weights:
            parameters[name].copy_(tensor)
        return made


class Router(nn.Module):
    """Scores, chosen tasks, and a cache of towers by the set of tasks they are merged of.

    Args:
        names (`Sequence[str]`): names of the tasks.
        first ([`ImageTower`]): tower of the base model, for the first pass.
        rule ([`Rule`]): layers and numbers.
        directions (`Sequence[Tensor]`): right singular vectors of the tasks for each layer, shape
            (tasks, r, d_in).
        merged (`Callable`): gives the weights of the tower of some tasks, by their places; they
            are computed on a device.
        classes (`Mapping[str, Tensor]`): embeddings of class names by task, of those that have
            some.
    """

    def __init__(
        self,
        names: Sequence[str],
        first: ImageTower,
        rule: Rule,
        directions: Sequence[Tensor],
        merged: Callable[[tuple[int, ...], torch.device], Weights],
        classes: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.names, self.rule = tuple(names), rule
        self.first = first.requires_grad_(False).eval()
        size = sum(weight.numel() * weight.element_size() for weight in first.parameters())
        self._merged, self._max_towers = merged, max(1, min(MAX_TOWERS, MAX_BYTES // size))
        self._towers = OrderedDict[tuple[int, ...], ImageTower]()
        self._lock = threading.RLock()
        for i, vectors in enumerate(directions):
            self.register_buffer(f"directions_{i}", vectors)
        for i, name in enumerate(self.names):
            self.register_buffer(f"classes_{i}", classes.get(name))

    @property
    def max_towers(self) -> int:
        """Most towers that are kept; the least recently used one goes first."""
        return self._max_towers

    @max_towers.setter
    def max_towers(self, count: int) -> None:
        if type(count) is not int or count < 1:
            raise ValueError(f"max_towers must be a whole number from 1 on (got {count!r}).")
        with self._lock:
            self._max_towers = count
            self._shrink(count)

    @property
    def kept(self) -> list[tuple[str, ...]]:
        """Names of the tasks of each tower in the cache, least recently used first."""
        return [tuple(self.names[i] for i in own) for own in self._towers]

    @torch.no_grad()
    def route(
        self, pixel_values: Tensor, text_embeds: Tensor | None = None, **options: Any
    ) -> Route:
        """Find the tasks that images belong to, by a pass through the base model's tower.

        Embeddings of candidate labels, shape (labels, d), say more where class names are known. The
        options are those of the pass.
        """
        tokens = self._class_tokens(pixel_values, options)
        found = [
            scores.residuals(tokens[layer], self.get_buffer(f"directions_{i}"))
            for i, layer in enumerate(self.rule.layers)
        ]
        shares = scores.scores(found, self.rule.temperature, self._evidence(text_embeds))
        chosen = scores.choose(shares, self.rule.threshold, self.rule.max_tasks)
        return Route(shares, chosen, self.names)

    def tower(self, chosen: tuple[int, ...]) -> ImageTower:
        """Tower merged of some tasks: from the cache, or made now."""
        with self._lock:
            if chosen in self._towers:
                self._towers.move_to_end(chosen)
                return self._towers[chosen]
            self._shrink(self._max_towers - 1)  # before the new one takes its memory
            with torch.inference_mode(mode=False), torch.no_grad():
                device = next(self.first.parameters()).device
                made = self.first.copied(self._merged(chosen, device))
            self._towers[chosen] = made
            return made

    def forward(
        self,
        pixel_values: Tensor,
        all_tasks: Callable[..., Any],
        text_embeds: Tensor | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPooling:
        """Features of images, each from its tower; `all_tasks` serves those of every task.

        The attribute `tasks` of the result has the names of the tasks of each image.
        """
        sized = {key: options[key] for key in SIZED if key in options}
        route = self.route(pixel_values, text_embeds, **sized)
        groups = defaultdict[tuple[int, ...], list[int]](list)
        for row, chosen in enumerate(route.chosen):
            groups[chosen].append(row)
        parts, order = [], list[int]()
        for chosen in sorted(groups):
            whole = len(chosen) == len(self.names)
            run = all_tasks if whole else self.tower(chosen)
            rows = groups[chosen]
            some = pixel_values if len(groups) == 1 else pixel_values[rows]
            parts.append(run(pixel_values=some, return_dict=True, **options))
            order += rows
        found = _in_order(parts, order)
        found.tasks = route.tasks
        return cast(BaseModelOutputWithPooling, found)

    def _evidence(self, text_embeds: Tensor | None) -> Tensor | None:
        """Evidence of candidate labels for the tasks, if there are any."""
        if text_embeds is None or not len(text_embeds):
            return None
        classes = [getattr(self, f"classes_{i}") for i in range(len(self.names))]
        device = next(self.first.parameters()).device
        temperature = self.rule.label_temperature
        return scores.label_evidence(text_embeds.to(device), classes, temperature)

    def _class_tokens(self, pixel_values: Tensor, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """Class tokens at the inputs of the layers, by layer."""
        tokens: dict[str, Tensor] = {}

        def noting(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda module, inputs: tokens.__setitem__(layer, inputs[0][:, 0])

        with self._lock:
            hooks = [
                self.first.get_submodule(layer).register_forward_pre_hook(noting(layer))
                for layer in self.rule.layers
            ]
            try:
                self.first.vision_model(pixel_values=pixel_values, **options)
            finally:
                for hook in hooks:
                    hook.remove()
        return tokens

    def __getstate__(self) -> dict[str, Any]:
        """State of a copy, without towers, which it makes again."""
        return {**self.__dict__, "_towers": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lock = threading.RLock()

    def _shrink(self, count: int) -> None:
        while len(self._towers) > count:
            self._towers.popitem(last=False)

    def _apply(self, *args: Any, **options: Any) -> Any:
        """Let go of the towers where the model is moved or gets another type."""
        with self._lock:
            self._towers.clear()
        return super()._apply(*args, **options)  # type: ignore[no-untyped-call]


class Routed(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Model with a router, the same for all classes."""

    router: Router

    def route(self, pixel_values: Tensor, text_embeds: Tensor | None = None) -> Route:
        """Find the tasks that images belong to: a score for each, and those that are chosen.

        Embeddings of candidate labels help where the class names of tasks are known.
        """
        return self.router.route(pixel_values.to(self.device, self.dtype), text_embeds)

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        """Refuse to save: the factors are not in the model."""
        problem = "A routed model cannot be saved from memory: copy its folder."
        raise UsageError(problem, "`hf-tsv push` uploads the folder.")

    def push_to_hub(self, *args: Any, **options: Any) -> str:  # type: ignore[override]
        """Refuse to save, before a repository is created."""
        self.save_pretrained()
        return ""


class RoutedCLIPModel(Routed, CLIPModel):  # type: ignore[no-untyped-call]
    """`CLIPModel` whose images go through the tower of the tasks they belong to.

    Texts go through the text tower of the merge, and so does what is not routed.
    """

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        **options: Any,
    ) -> CLIPOutput:
        """Similarities of images and texts, as those of `CLIPModel`; the texts help to route."""
        text_options = {k: v for k, v in options.items() if k != "interpolate_pos_encoding"}
        texts = self.get_text_features(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **text_options,
        )
        images = self.get_image_features(pixel_values, text_embeds=texts.pooler_output, **options)
        text_embeds, image_embeds = (
            found.pooler_output / found.pooler_output.norm(dim=-1, keepdim=True)
            for found in (texts, images)
        )
        logits = (text_embeds @ image_embeds.mT) * self.logit_scale.exp()
        return CLIPOutput(
            loss=image_text_contrastive_loss(logits) if return_loss else None,
            logits_per_image=logits.mT,
            logits_per_text=logits,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=texts,
            vision_model_output=images,
        )

    @can_return_tuple  # type: ignore[untyped-decorator]
    def get_image_features(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        text_embeds: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Features of images, as those of `CLIPModel`, with the names of their tasks as `tasks`.

        Embeddings of candidate labels help to route where the class names of tasks are known.
        """
        whole = super().get_image_features
        options["interpolate_pos_encoding"] = interpolate_pos_encoding
        return self.router(pixel_values, whole, text_embeds=text_embeds, **options)


class RoutedCLIPVisionModel(Routed, CLIPVisionModel):  # type: ignore[no-untyped-call]
    """`CLIPVisionModel` whose images go through the tower of the tasks they belong to."""

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(self, pixel_values: Tensor, **options: Any) -> Any:
        """Features of images, as those of `CLIPVisionModel`, with the names of their tasks."""
        return self.router(pixel_values, super().forward, **options)


class RoutedCLIPForImageClassification(Routed, CLIPForImageClassification):  # type: ignore[no-untyped-call]
    """`CLIPForImageClassification` with the heads of all tasks, one after another.

    Of the tasks of an image, the head that is most certain answers: the largest probability of its
    first label. The logits of all other heads are -inf.
    """

    router: Router
    places: Mapping[str, range]
    """Labels of each task."""

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **options: Any
    ) -> ImageClassifierOutput:
        """Logits of all labels, as those of `CLIPForImageClassification`.

        The attribute `tasks` of the result has the names of the tasks of each image.
        """
        found = self.router(pixel_values, self.vision_model, **options)
        logits = self.classifier(found.last_hidden_state[:, 1:].mean(dim=1))
        kept = torch.zeros_like(logits, dtype=torch.bool)
        for row, chosen in enumerate(found.tasks):
            heads = [self.places[name] for name in chosen]
            best = max(heads, key=lambda own: _certainty(logits[row], own))
            kept[row, best.start : best.stop] = True
        logits = logits.masked_fill(~kept, -torch.inf)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        made = ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=found.hidden_states, attentions=found.attentions
        )
        made.tasks = found.tasks
        return made


CLASSES = {
    "CLIPModel": RoutedCLIPModel,
    "CLIPVisionModel": RoutedCLIPVisionModel,
    "CLIPForImageClassification": RoutedCLIPForImageClassification,
}
"""Routed classes by the class of transformers that they are like."""


def stacked(vectors: Sequence[Tensor], most: int) -> Tensor:
    """Right singular vectors of all tasks in one tensor, as many of each as all have."""
    rank = min(most, *(len(own) for own in vectors))
    dtype = reduce(torch.promote_types, (own.dtype for own in vectors))
    return torch.stack([own[:rank].to(dtype) for own in vectors])


def _certainty(row: Tensor, own: range) -> float:
    """Largest probability among the labels of one head."""
    return float(row.detach()[own.start : own.stop].float().softmax(dim=0).max())


def _in_order(parts: Sequence[Any], order: Sequence[int]) -> Any:
    """One output of parts, whose rows are those of `order` one after another."""
    if len(parts) == 1:
        return parts[0]
    places = torch.tensor(order).argsort()

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors))[places.to(tensors[0].device)]

    found = {
        key: tuple(map(joined, zip(*(part[key] for part in parts), strict=True)))
        if isinstance(value, tuple)
        else joined([part[key] for part in parts])
        for key, value in parts[0].items()
    }
    return type(parts[0])(**found)
