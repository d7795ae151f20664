"""Tiny checkpoints, adapters and labelled images, the same in every run: made once for both sides.

Run as a program of its own, `inputs.py FOLDER`; it imports nothing of hf_tsv. OpenCLIP's files are
made from these by a merge of one checkpoint into the other format, see [`OPEN_CLIP`].
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

CLASSES = ("cat", "dog", "emu")
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8, "projection_dim": 24,
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 300, "max_position_embeddings": 24, "projection_dim": 24, "bos_token_id": 256,
    "eos_token_id": 257, "pad_token_id": 257,
}  # fmt: skip
WIDE = {**VISION, "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 1}
"""Wide enough for Krylov spaces where four triplets of a matrix are wanted."""

VIT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip

OPEN_CLIP = {"oc-base": ("full", 0.0), "oc-1": ("full", 1.0), "oc-2": ("full2", 1.0)}
"""OpenCLIP folders, the checkpoints that they are made of, and the share of their updates."""

CARD = "---\nbase_model: org/base\nlicense: mit\n---\n# A fine-tune\n"


def make(folder: Path) -> None:
    """Write everything."""
    import torch
    import transformers as hf
    from safetensors.torch import load_file

    hf.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = hf.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=24)
    base = hf.CLIPModel(config)
    base.save_pretrained(folder / "base")
    save_processor(hf, folder / "base")
    wide = hf.CLIPVisionModel(hf.CLIPVisionConfig(**WIDE))
    wide.save_pretrained(folder / "wide-base")

    def tuned(model: Any, seed: int, prefix: str = "") -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: weight + 2e-3 * torch.randn(weight.shape, generator=generator)
            if name.startswith(prefix) and weight.is_floating_point()
            else weight
            for name, weight in model.state_dict().items()
        }

    def whole(seed: int, prefix: str = "") -> Any:
        model = hf.CLIPModel(config)
        model.load_state_dict(tuned(base, seed, prefix))
        return model

    full = whole(4)
    full.save_pretrained(folder / "full")
    whole(9).save_pretrained(folder / "full2")
    full.save_pretrained(folder / "sharded", max_shard_size="40KB")
    (folder / "bin").mkdir()
    (folder / "bin" / "config.json").write_bytes((folder / "full" / "config.json").read_bytes())
    weights = load_file(folder / "full" / "model.safetensors")
    torch.save(weights, folder / "bin" / "pytorch_model.bin")
    for seed, name in enumerate(("half", "brain"), start=20):
        dtype = torch.float16 if name == "half" else torch.bfloat16
        whole(seed, "vision_model.").to(dtype).save_pretrained(folder / name)
    for seed, (name, kind) in enumerate({
        "vision": "CLIPVisionModel", "twin": "CLIPVisionModel", "text": "CLIPTextModel",
        "projection": "CLIPVisionModelWithProjection",
    }.items(), start=1):  # fmt: skip
        prefix = "text_model." if name == "text" else "vision_model."
        whole(1 if name == "twin" else seed, prefix).save_pretrained(folder / "passing")
        getattr(hf, kind).from_pretrained(folder / "passing").save_pretrained(folder / name)
    for name, seed in {"flat": 11, "flat2": 12}.items():
        # As transformers 5 writes a new one: without the prefix.
        state = tuned(base, seed)
        model = hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION))
        own = set(model.state_dict())
        bare = {k.removeprefix("vision_model."): v for k, v in state.items()}
        model.load_state_dict(state if own <= set(state) else bare, strict=False)
        model.save_pretrained(folder / name)
    for name, seed in {"heads-a": 13, "heads-b": 14}.items():
        config.num_labels = 3
        torch.manual_seed(seed)
        model = hf.CLIPForImageClassification(config)
        model.load_state_dict(tuned(base, seed, "vision_model."), strict=False)
        model.save_pretrained(folder / name)
    for seed in (1, 2):
        model = hf.CLIPVisionModel(hf.CLIPVisionConfig(**WIDE))
        model.load_state_dict(tuned(wide, seed))
        model.save_pretrained(folder / f"wide-{seed}")
    vit = hf.ViTModel(hf.ViTConfig(**VIT))
    vit.save_pretrained(folder / "vit-base")
    for seed in (1, 2):
        model = hf.ViTModel(hf.ViTConfig(**VIT))
        model.load_state_dict(tuned(vit, seed))
        model.save_pretrained(folder / f"vit-{seed}")
    shutil.copytree(folder / "vision", folder / "many" / "vision")
    half = shutil.copytree(folder / "half", folder / "variant")
    (half / "model.safetensors").rename(half / "model.fp16.safetensors")
    save_adapters(hf, folder)
    save_images(folder)


def save_processor(hf: Any, folder: Path) -> None:
    """A byte-level CLIP tokenizer and an image processor, as transformers writes them."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())[:128]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({word: i for i, word in enumerate(words)}))
    merges.write_text("#version: 0.2\n")
    tokenizer = hf.CLIPTokenizer(str(vocabulary), str(merges))
    tokenizer.model_max_length = 24
    tokenizer.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    hf.CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder)


def save_adapters(hf: Any, folder: Path) -> None:
    """A LoRA and a DoRA of PEFT whose every number has moved."""
    import peft
    import torch

    for seed, (name, kind, options) in enumerate((
        ("lora", "CLIPModel", {"modules_to_save": ["visual_projection"]}),
        ("dora", "CLIPVisionModel", {"use_dora": True}),
    )):  # fmt: skip
        torch.manual_seed(seed)
        base = getattr(hf, kind).from_pretrained(folder / "base")
        wanted = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "fc1"], **options)
        model = peft.get_peft_model(base, wanted)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.02)
        model.save_pretrained(folder / name)


def save_images(folder: Path) -> None:
    """Two folders of blocks of colour, in three splits, and one split as parquet."""
    import datasets
    import numpy as np
    from PIL import Image

    for seed, task in enumerate(("pets", "blocks")):
        rng = np.random.default_rng(seed)
        for split, count in (("train", 3), ("validation", 6), ("test", 6)):
            for name in CLASSES:
                (folder / task / split / name).mkdir(parents=True)
                for i in range(count):
                    blocks = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
                    image = Image.fromarray(blocks).resize((32, 32), Image.Resampling.NEAREST)
                    image.save(folder / task / split / name / f"{i}.png")
    datasets.disable_progress_bars()
    paths = sorted((folder / "pets" / "test").rglob("*.png"))
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    datasets.Dataset.from_dict(
        {
            "image": [Image.open(path) for path in paths],
            "label": [CLASSES.index(path.parent.name) for path in paths],
        },
        features=datasets.Features(features),
    ).to_parquet(folder / "pets.parquet")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
