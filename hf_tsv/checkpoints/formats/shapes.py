"""Configuration of a CLIP from the shapes of its weights, where no file says it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from hf_tsv.checkpoints import layout
from hf_tsv.checkpoints.storage.tensors import Described
from hf_tsv.system.errors import CheckpointError

HEAD_WIDTH = 64  # of every published CLIP
LAYER = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.")
VISION_ONLY = re.compile(r"pre_layrnorm\.|post_layernorm\.|embeddings\.(class|patch)_embedding")
TEXT_ONLY = re.compile(r"final_layer_norm\.|embeddings\.token_embedding")


def flat_prefix(names: Collection[str]) -> str:
    """Tower of unprefixed names, from those that only one tower has; empty if none tells."""
    for pattern, tower in ((VISION_ONLY, "vision_model."), (TEXT_ONLY, "text_model.")):
        if any(map(pattern.match, names)):
            return tower
    return ""


def config_of(tensors: Mapping[str, Described], owner: str) -> dict[str, Any]:
    """Configuration of the CLIP of canonical tensors; the activation is not in it.

    Raises:
        [`CheckpointError`]: the shapes are not a CLIP's.
    """
    towers = layout.towers(tensors)
    found = {
        key: _tower(tensors, part)
        for part, key in (("vision", layout.VISION), ("text", layout.TEXT))
        if f"{part}_model" in towers
    }
    if not found or not all(found.values()):
        raise CheckpointError(
            f"{owner} has no config.json, and its weights are not those of a CLIP.",
            "A checkpoint saved by transformers' save_pretrained has one.",
        )
    if len(found) == 1:
        return next(iter(found.values()))
    projection = _shape(tensors, "visual_projection.weight")
    width = {"projection_dim": projection[0]} if projection else {}
    return {"model_type": "clip", **width, **found}


def _tower(tensors: Mapping[str, Described], part: str) -> dict[str, Any]:
    """Configuration of one tower; empty where a shape is missing or odd."""

    def shape(name: str, dimensions: int = 2) -> tuple[int, ...]:
        return _shape(tensors, f"{part}_model.{name}", dimensions)

    layers = {match[2] for name in tensors if (match := LAYER.match(name)) and match[1] == part}
    positions, inner = (
        shape("embeddings.position_embedding.weight"),
        shape("encoder.layers.0.mlp.fc1.weight"),
    )
    table = (
        shape("embeddings.token_embedding.weight")
        if part == "text"
        else shape("embeddings.patch_embedding.weight", 4)
    )
    if not (positions and inner and table):
        return {}
    config = {
        "model_type": f"clip_{part}_model",
        "hidden_size": inner[1],
        "intermediate_size": inner[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, inner[1] // HEAD_WIDTH),
    }
    if part == "text":
        return {**config, "vocab_size": table[0], "max_position_embeddings": positions[0]}
    side = round((positions[0] - 1) ** 0.5)
    return {**config, "patch_size": table[-1], "image_size": side * table[-1]}


def _shape(tensors: Mapping[str, Described], name: str, dimensions: int = 2) -> tuple[int, ...]:
    """Shape of a tensor; () if it is missing, empty or has another number of dimensions."""
    shape = found.shape if (found := tensors.get(name)) is not None else ()
    return shape if len(shape) == dimensions and 0 not in shape else ()
