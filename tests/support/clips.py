"""Tiny CLIP checkpoints: real transformers classes, saved by save_pretrained, random updates."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KINDS = ("vision", "flat", "projection", "full", "text", "classifier")

CARD = "---\nbase_model: org/base\nlicense: mit\n---\n# A fine-tune\n"
"""Model card of a fine-tune on the Hub."""

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 24,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 24,
    "projection_dim": 24,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}


def clip_config() -> Any:
    """Config of the tiny CLIP."""
    from transformers import CLIPConfig, logging

    logging.set_verbosity_error()

    return CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=24)


def save(model: Any, folder: Path, **kwargs: Any) -> Path:
    """`save_pretrained` without its progress bar."""
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder, **kwargs)
    return folder


def load(cls: Any, folder: str | Path, **kwargs: Any) -> Any:
    """`from_pretrained` without its report."""
    with contextlib.redirect_stderr(io.StringIO()):
        return cls.from_pretrained(folder, **kwargs)


def make_base(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, positions: int = 24
) -> Path:
    """A complete CLIPModel repository: weights, config, tokenizer and image processor."""
    from transformers import CLIPModel

    torch.manual_seed(seed)
    config = clip_config()
    config.text_config.max_position_embeddings = positions
    model = CLIPModel(config).eval().to(dtype)
    save(model, folder)
    save_processor(folder, positions)
    return folder


def save_processor(folder: Path, positions: int = 24) -> None:
    """A byte-level CLIP tokenizer and a 32x32 image processor, as transformers writes them."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPImageProcessor, CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())[:128]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    vocab = {token: i for i, token in enumerate(tokens)}
    vocab["<|startoftext|>"] = 256
    vocab["<|endoftext|>"] = 257
    source = folder / "tokenizer-source"
    source.mkdir(parents=True)
    (source / "vocab.json").write_text(json.dumps(vocab))
    (source / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(source / "vocab.json"), str(source / "merges.txt"))
    tokenizer.model_max_length = positions
    tokenizer.save_pretrained(folder)
    for file in source.iterdir():
        file.unlink()
    source.rmdir()
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder)


def update(shape: torch.Size, generator: torch.Generator, rank: int | None = None) -> Tensor:
    """A random task update, full rank or of the rank given."""
    if len(shape) == 2 and rank is not None:
        a = torch.randn(shape[0], rank, generator=generator)
        return a @ torch.randn(rank, shape[1], generator=generator) * 1e-3
    return torch.randn(shape, generator=generator) * 2e-3


def fine_tuned_state(base: Path, seed: int, prefix: str = "vision_model.") -> dict[str, Tensor]:
    """State of the base with every weight under `prefix` updated."""
    from safetensors.torch import load_file

    generator = torch.Generator().manual_seed(seed)
    state = load_file(base / "model.safetensors")
    return {
        name: tensor + update(tensor.shape, generator).to(tensor.dtype)
        if name.startswith(prefix) and tensor.is_floating_point()
        else tensor
        for name, tensor in state.items()
    }


def make_fine_tune(base: Path, folder: Path, seed: int, kind: str = "vision") -> Path:
    """A fine-tune of `base` as users publish it.

    Args:
        base: folder of the base.
        folder: where to write.
        seed: of its update.
        kind: `vision` (CLIPVisionModel, prefixed), `flat` (as transformers 5 writes a new one),
            `projection` (CLIPVisionModelWithProjection), `full` (CLIPModel), `text`, or
            `classifier` (CLIPForImageClassification with 3 classes).
    """
    from transformers import (
        CLIPForImageClassification,
        CLIPModel,
        CLIPTextModel,
        CLIPVisionModel,
        CLIPVisionModelWithProjection,
    )

    prefix = {"full": "", "text": "text_model."}.get(kind, "vision_model.")
    state = fine_tuned_state(base, seed, prefix)
    full = load(CLIPModel, base, dtype="auto")
    full.load_state_dict(state)
    whole = folder.with_name(folder.name + "-whole")
    save(full, whole)
    if kind == "full":
        whole.rename(folder)
        return folder
    if kind == "classifier":
        config = clip_config()
        config.num_labels = 3
        torch.manual_seed(seed)
        model = CLIPForImageClassification(config)
        missing = model.load_state_dict(state, strict=False)
        assert set(missing.missing_keys) == {"classifier.weight", "classifier.bias"}
        save(model, folder)
    elif kind == "flat":
        model = CLIPVisionModel(clip_config().vision_config)
        model.load_state_dict(
            {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        )
        save(model, folder)
    else:
        cls = {
            "vision": CLIPVisionModel,
            "projection": CLIPVisionModelWithProjection,
            "text": CLIPTextModel,
        }[kind]
        save(load(cls, whole, dtype="auto"), folder)
    for file in whole.iterdir():
        file.unlink()
    whole.rmdir()
    return folder


def patterned(count: int, seed: int = 0) -> torch.Tensor:
    """Images that differ in colour and pattern, so that not all belong to the same tasks."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(count, 3, n, n, generator=generator) for n in (1, 4, 32)]
    return sum(torch.nn.functional.interpolate(part, 32) for part in parts) * 2


def make_tasks(folder: Path, seeds: Mapping[str, int], *kinds: str) -> Path:
    """A base model and fine-tunes of it by name, of these kinds in turn."""
    make_base(folder / "base")
    for (name, seed), kind in zip(seeds.items(), cycle(kinds)):
        make_fine_tune(folder / "base", folder / name, seed, kind)
    return folder
