"""Checkpoints of many layers, and comparisons of what is merged of them."""

from __future__ import annotations

import json
from pathlib import Path

import clips
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def state(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: t for name, t in load_file(folder / "model.safetensors").items()}


def deep_checkpoints(folder: Path, layers: int, width: int = 256, tasks: int = 2) -> None:
    """A vision-only base and fine-tunes, written without a model class."""
    config = {**clips.VISION, "model_type": "clip_vision_model", "num_hidden_layers": layers}
    base: dict[str, Tensor] = {}
    for index, name in enumerate(("base", *(f"t{i + 1}" for i in range(tasks)))):
        generator = torch.Generator().manual_seed(index)
        tensors = {"vision_model.post_layernorm.weight": torch.full((width,), 1.0 + index)}
        for layer in range(layers):
            prefix = f"vision_model.encoder.layers.{layer}"
            for key in ("q_proj", "k_proj", "v_proj", "out_proj"):
                w = torch.randn(width, width, generator=generator)
                tensors[f"{prefix}.self_attn.{key}.weight"] = w
            tensors[f"{prefix}.mlp.fc1.weight"] = torch.randn(4 * width, width, generator=generator)
            tensors[f"{prefix}.mlp.fc2.weight"] = torch.randn(width, 4 * width, generator=generator)
        base = tensors if not index else base
        if index:  # a fine-tune is near its base
            tensors = {n: base[n] + 0.1 * w if w.dim() > 1 else w for n, w in tensors.items()}
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
