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


FC = ["q_proj", "fc1"]
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adalora": ("AdaLoraConfig", {"target_modules": FC, "total_step": 10}),
    "adalora of shrunken ranks": ("AdaLoraConfig", {
        "target_modules": FC, "total_step": 10, "init_r": 6, "lora_alpha": 3,
    }),
    "beft": ("BeftConfig", {"target_modules": FC}),
    "boft": ("BOFTConfig", {"target_modules": FC, "boft_block_size": 4}),
    "c3a": ("C3AConfig", {"target_modules": FC, "block_size": 8}),
    "deft": ("DeftConfig", {"target_modules": FC}),
    "delora": ("DeloraConfig", {"target_modules": FC}),
    "fourierft": ("FourierFTConfig", {"target_modules": FC, "n_frequency": 20}),
    "gralora": ("GraloraConfig", {"target_modules": FC, "r": 8}),
    "hira": ("HiraConfig", {"target_modules": FC, "r": 8}),
    "hra": ("HRAConfig", {"target_modules": FC, "r": 4}),
    "ia3": ("IA3Config", {"target_modules": FC, "feedforward_modules": ["fc1"]}),
    "ln tuning": ("LNTuningConfig", {"target_modules": ["layer_norm1"]}),
    "loha": ("LoHaConfig", {
        "target_modules": FC, "r": 4, "rank_pattern": {"fc1": 2}, "alpha_pattern": {"fc1": 5},
    }),
    "lokr": ("LoKrConfig", {"target_modules": FC, "r": 2, "modules_to_save": ["layer_norm2"]}),
    "lokr of any rank": ("LoKrConfig", {"target_modules": FC, "r": 100_000}),
    "miss": ("MissConfig", {"target_modules": FC, "r": 8}),
    "oft": ("OFTConfig", {"target_modules": FC, "oft_block_size": 4, "r": 0, "bias": "oft_only"}),
    "peanut": ("PeanutConfig", {"target_modules": FC, "r": 4}),
    "pvera": ("PveraConfig", {"target_modules": FC, "r": 4}),
    "randlora": ("RandLoraConfig", {"target_modules": FC, "r": 4}),
    "road": ("RoadConfig", {"target_modules": FC, "group_size": 8}),
    "shira": ("ShiraConfig", {"target_modules": FC, "r": 4}),
    "vblora": ("VBLoRAConfig", {"target_modules": FC, "vector_length": 8, "num_vectors": 16}),
    "vblora of the best": ("VBLoRAConfig", {
        "target_modules": FC, "vector_length": 8, "num_vectors": 16, "save_only_topk_weights": True,
    }),
    "vera": ("VeraConfig", {"target_modules": FC, "r": 4}),
    "vera of a seed": ("VeraConfig", {
        "target_modules": FC, "r": 4, "save_projection": False, "projection_prng_key": 9,
    }),
    "waveft": ("WaveFTConfig", {"target_modules": FC, "n_frequency": 20}),
    "pissa": ("LoraConfig", {"target_modules": FC, "r": 4, "init_lora_weights": "pissa"}),
    "olora": ("LoraConfig", {
        "target_modules": FC, "r": 4, "init_lora_weights": "olora", "lora_alpha": 3,
    }),
    "pissa and dora": ("LoraConfig", {
        "target_modules": FC, "r": 4, "init_lora_weights": "pissa", "use_dora": True,
    }),
    "orthogonal": ("LoraConfig", {
        "target_modules": FC, "r": 4, "init_lora_weights": "orthogonal",
    }),
    "mica": ("LoraConfig", {"target_modules": FC, "r": 4, "init_lora_weights": "mica"}),
    "embeddings": ("LoraConfig", {"target_modules": ["q_proj", "position_embedding"], "r": 4}),
    "embeddings and dora": ("LoraConfig", {
        "target_modules": ["position_embedding"], "r": 4, "use_dora": True,
    }),
}  # fmt: skip
"""Adapters beside plain LoRA, with their config's class in PEFT, for either tower."""

OF_TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "tokens": ("LoraConfig", {
        "target_modules": ["q_proj"], "r": 4,
        "trainable_token_indices": {"token_embedding": [3, 5]},
    }),
    "listed tokens": ("LoraConfig", {
        "target_modules": ["q_proj"], "r": 4, "trainable_token_indices": [7, 2],
    }),
    "only tokens": ("TrainableTokensConfig", {
        "target_modules": ["token_embedding"], "token_indices": [4, 1, 250],
    }),
    "token embedding": ("LoraConfig", {"target_modules": ["token_embedding"], "r": 4}),
}  # fmt: skip


def saved(model: Any, config: str, options: dict[str, Any], folder: Path, seed: int = 0) -> None:
    """Save an adapter on a model whose every number has moved."""
    import peft

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, getattr(peft, config)(**options))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.02)
        adapted.save_pretrained(folder)


def merged(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """State of a model with a saved adapter, as PEFT loads and merges it."""
    import peft

    torch.manual_seed(99)  # what is drawn while it is loaded is not what was drawn when it was made
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = peft.PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    return {name: tensor.detach().clone() for name, tensor in state.items()}
