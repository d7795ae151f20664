"""Pipelines of transformers for models that route images: the answers name the tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import ImageClassificationPipeline
from transformers.pipelines.zero_shot_image_classification import (
    ZeroShotImageClassificationPipeline,
)

from hf_tsv.models import building
from hf_tsv.models.routed import RoutedCLIPForImageClassification


class RoutedZeroShotPipeline(ZeroShotImageClassificationPipeline):
    """Zero-shot pipeline whose answers name the tasks of their image, as `tasks`."""

    def check_model_type(self, supported_models: Any) -> None:
        """Accept a routed model, which is a `CLIPModel` of another name."""

    def _forward(self, model_inputs: Any) -> Any:  # type: ignore[override]
        labels, texts = model_inputs.pop("candidate_labels"), model_inputs.pop("text_inputs")[0]
        texts = texts[0] if isinstance(texts, list | tuple) else texts  # of a batch
        answer = self.model(**texts, **model_inputs)
        tasks = answer.vision_model_output.tasks
        return {
            "candidate_labels": labels,
            "logits": answer.logits_per_image,
            "tasks": [list(own) for own in tasks],
        }

    def postprocess(self, model_outputs: Any) -> list[dict[str, Any]]:  # type: ignore[override]
        """Labels with their scores, best first, and the tasks of the image."""
        tasks = model_outputs.pop("tasks")
        tasks = tasks[0] if tasks and isinstance(tasks[0], list) else tasks  # of a batch of one
        answers = super().postprocess(model_outputs)  # type: ignore[no-untyped-call]
        return [{**answer, "tasks": tasks} for answer in answers]


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(dim=0),
    "sigmoid": torch.sigmoid,
    "none": torch.clone,
}
"""Functions that `function_to_apply` of the pipeline names."""


class RoutedImageClassificationPipeline(ImageClassificationPipeline):
    """Pipeline of task heads whose answers name the task whose head answered, as `task`."""

    def check_model_type(self, supported_models: Any) -> None:
        """Accept a routed model, which is a `CLIPForImageClassification` of another name."""

    def postprocess(  # type: ignore[override]
        self, model_outputs: Any, function_to_apply: Any = None, top_k: int | None = 5
    ) -> list[dict[str, Any]]:
        """Labels of one head with their scores, best first; by default of a softmax."""
        model = cast(RoutedCLIPForImageClassification, self.model)
        labels = cast(dict[int, str], model.config.id2label)
        logits = model_outputs["logits"][0].float()
        (own,) = (logits != -torch.inf).nonzero(as_tuple=True)
        task = next(name for name, places in model.places.items() if int(own[0]) in places)
        scores = FUNCTIONS[getattr(function_to_apply, "value", "softmax")](logits[own])
        best = scores.argsort(descending=True, stable=True)[:top_k].tolist()
        return [
            {"label": labels[int(own[i])], "score": float(scores[i]), "task": task} for i in best
        ]


CLASSES: dict[str, type] = {
    building.ZERO_SHOT: RoutedZeroShotPipeline,
    "image-classification": RoutedImageClassificationPipeline,
}
"""Pipelines of routed models by their kind; others are those of transformers."""
