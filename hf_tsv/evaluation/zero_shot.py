"""Zero-shot classification: a head of class prompts, and the one nearest to each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

TEXTS_AT_ONCE = 256


def prompts(classes: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Texts for the text tower: every template of every class.

    Example:
        >>> prompts(["cat", "dog"], ["a {}.", "the {}."])
        ['a cat.', 'the cat.', 'a dog.', 'the dog.']
    """
    return [template.replace("{}", name) for name in classes for template in templates]


@torch.inference_mode()
def head(model: Any, tokenizer: Any, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Compute one direction per class: the mean of its prompts' embeddings of length 1.

    Args:
        model: a `CLIPModel`.
        tokenizer: the model's tokenizer.
        classes (`Sequence[str]`): names of the classes.
        templates (`Sequence[str]`): prompts with `{}` for the name.

    Returns:
        `Tensor`: shape (classes, projection).
    """
    written = prompts(classes, templates)
    parts = []
    for start in range(0, len(written), TEXTS_AT_ONCE):
        texts = tokenizer(
            written[start : start + TEXTS_AT_ONCE],
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(model.device)
        parts.append(_normalised(_features(model.get_text_features(**texts))))
    embeddings = torch.cat(parts).reshape(len(classes), len(templates), -1)
    return _normalised(embeddings.mean(dim=1))


@torch.inference_mode()
def classify(model: Any, directions: Tensor, pixels: Tensor) -> Tensor:
    """Predict the class of each image: the one whose direction is nearest.

    Args:
        model: a `CLIPModel`.
        directions (`Tensor`): class directions from [`head`].
        pixels (`Tensor`): output of its image processor, shape (images, 3, height, width).

    Returns:
        `Tensor`: shape (images,), on the CPU.
    """
    pixels = pixels.to(model.device, model.dtype)
    seen = _features(model.get_image_features(pixel_values=pixels))
    return (_normalised(seen) @ directions.mT).argmax(dim=1).cpu()


def _features(found: Any) -> Tensor:
    """Embeddings, unwrapped where a version of transformers wraps them."""
    features: Tensor = getattr(found, "pooler_output", found)
    return features


def _normalised(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)
