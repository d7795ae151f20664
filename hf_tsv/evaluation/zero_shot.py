"""Zero-shot classification: a head of class prompts, and the one nearest to each image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from hf_tsv.evaluation.data import LabelledImages
from hf_tsv.evaluation.pixels import batches
from hf_tsv.models.routed import RoutedCLIPModel
from hf_tsv.recipes.images import EvaluationTask
from hf_tsv.system.progress import bar

Chosen = list[tuple[str, ...]]
"""Names of the tasks of each image, of a model that routes; of any other nothing."""

TEXTS_AT_ONCE = 256
IMAGES_AT_ONCE = 512  # in memory while all variants classify them: 0.3 GB of 224 × 224 pixels


def prompts(classes: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Texts for the text tower: every template of every class.

    Example:
        >>> prompts(["cat", "dog"], ["a {}.", "the {}."])
        ['a cat.', 'the cat.', 'a dog.', 'the dog.']
    """
    return [template.replace("{}", name) for name in classes for template in templates]


def tokenised(model: Any, tokenizer: Any, texts: Sequence[str], **options: Any) -> Any:
    """Tokens of texts, cut to the positions of a `CLIPModel`, which not every tokenizer knows."""
    most = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
    return tokenizer(list(texts), truncation=True, max_length=most, **options)


@torch.inference_mode()
def head(model: Any, tokenizer: Any, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Compute one direction per class: the mean of its prompts' embeddings of length 1.

    The result, shape (classes, projection), is on the device of the model, a `CLIPModel`.
    """
    written = prompts(classes, templates)
    parts = []
    for start in range(0, len(written), TEXTS_AT_ONCE):
        some = written[start : start + TEXTS_AT_ONCE]
        texts = tokenised(model, tokenizer, some, padding=True, return_tensors="pt")
        texts = texts.to(model.device)
        parts.append(_normalised(_features(model.get_text_features(**texts))))
    embeddings = torch.cat(parts).reshape(len(classes), len(templates), -1)
    return _normalised(embeddings.mean(dim=1))


@torch.inference_mode()
def classify(model: Any, directions: Tensor, pixels: Tensor) -> tuple[Tensor, Chosen]:
    """Predict the class of each image, whose direction of [`head`] is nearest, on the CPU.

    The pixels, shape (images, 3, height, width), come from the image processor of a `CLIPModel`. Of
    one that routes, the tasks of each image are told too.
    """
    pixels = pixels.to(model.device, model.dtype)
    known = {"text_embeds": directions} if isinstance(model, RoutedCLIPModel) else {}
    seen = model.get_image_features(pixel_values=pixels, **known)
    found = (_normalised(_features(seen)) @ directions.mT).argmax(dim=1).cpu()
    return found, seen.tasks if known else []


def _features(found: Any) -> Tensor:
    """Embeddings, unwrapped where a version of transformers wraps them."""
    features: Tensor = getattr(found, "pooler_output", found)
    return features


def _normalised(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)


def accuracies(
    pipe: Any,
    variants: Sequence[Callable[[], None]],
    task: EvaluationTask,
    images: LabelledImages,
    *,
    batch_size: int,
    show: bool,
    same_text: bool = False,
) -> list[float]:
    """Top-1 accuracy, 0 to 1, of every variant on one task; each image is read once.

    The pipeline is a zero-shot one of a `CLIPModel`; each variant loads weights into the model.
    With `same_text` none changes what texts are embedded as, and one head serves all.
    """
    heads: list[Tensor] = []
    for put in variants:
        if heads and same_text:
            heads.append(heads[0])
            continue
        put()
        heads.append(head(pipe.model, pipe.tokenizer, images.classes, task.templates))
    right, count = [0] * len(variants), len(images.rows)
    with bar(f"Classifying {task.name}", count, visible=show) as advance:
        every = [range(count)[i : i + IMAGES_AT_ONCE] for i in range(0, count, IMAGES_AT_ONCE)]
        parts = [
            [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)] for rows in every
        ]
        with closing(batches(images, pipe.image_processor, chain(*parts), task.name)) as read:
            for rows, own in zip(every, parts, strict=True):
                seen = list(islice(read, len(own)))
                for i, put in enumerate(variants):
                    put()
                    for pixels, labels in seen:
                        found = classify(pipe.model, heads[i], pixels)[0].tolist()
                        right[i] += sum(a == b for a, b in zip(found, labels, strict=True))
                advance(len(rows))
    return [found / count for found in right]
