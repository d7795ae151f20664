"""LoRA adapters that the real PEFT has trained."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import clips
import torch

ATTENTION = ["q_proj", "v_proj"]

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("CLIPModel", {"target_modules": [*ATTENTION, "fc1"]}),
    "vision": ("CLIPVisionModel", {"target_modules": ATTENTION, "lora_alpha": 16}),
    "text": ("CLIPTextModel", {"target_modules": ATTENTION}),
    "patterns": ("CLIPModel", {
        "target_modules": [*ATTENTION, "fc1"], "rank_pattern": {"layers.0.mlp.fc1": 2},
        "alpha_pattern": {"vision_model.*q_proj": 5, "fc1": 3},
    }),
    "rslora": ("CLIPVisionModel", {"target_modules": ATTENTION, "use_rslora": True}),
    "dora": ("CLIPVisionModel", {"target_modules": ATTENTION, "use_dora": True}),
    "saved modules": ("CLIPModel", {
        "target_modules": ATTENTION, "modules_to_save": ["visual_projection", "post_layernorm"],
    }),
    "lora bias": ("CLIPVisionModel", {"target_modules": ATTENTION, "lora_bias": True}),
    "all biases": ("CLIPVisionModel", {"target_modules": ATTENTION, "bias": "all"}),
    "convolution": ("CLIPVisionModel", {"target_modules": ["patch_embedding", "fc2"]}),
}  # fmt: skip


def trained(zoo: Path, folder: Path, kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Save an adapter whose every number has moved; returns what PEFT merges it to."""
    import peft
    import transformers

    cls, options = KINDS[kind]
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = clips.load(getattr(transformers, cls), zoo / "base")
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, **options))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.02)
        model.save_pretrained(folder)
        merged = model.merge_and_unload()
    prefix = {"CLIPVisionModel": "vision_model.", "CLIPTextModel": "text_model."}.get(cls, "")
    return {prefix + name: tensor.detach().clone() for name, tensor in merged.state_dict().items()}
