"""Canonical tensor names, one for every layout that a CLIP checkpoint has on disk.

Canonical names are those of `CLIPModel`: `vision_model.*`, `text_model.*`,
`visual_projection.weight`, `text_projection.weight`, `logit_scale`. Every transformers version
loads them into every CLIP class.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from hf_tsv.system.errors import CheckpointError
from hf_tsv.system.text import shortened

T = TypeVar("T")

# Tower of the unprefixed names that transformers 5 writes, by the model type of config.json.
FLAT_PREFIXES = {"clip": "", "clip_vision_model": "vision_model.", "clip_text_model": "text_model."}


@dataclass(frozen=True)
class ModelClass:
    """Canonical names that a CLIP class of transformers 5 has, and its own names for them."""

    parts: tuple[str, ...]  # first components of the canonical names of its parameters
    flat_prefix: str = ""  # of the canonical names, which the class omits
    config_part: str | None = None  # of a CLIP's config.json; None: the class is made from all


VISION, TEXT = "vision_config", "text_config"
MODEL_CLASSES = {
    "CLIPModel": ModelClass(
        ("vision_model", "text_model", "visual_projection", "text_projection", "logit_scale")
    ),
    "CLIPVisionModel": ModelClass(("vision_model",), "vision_model.", VISION),
    "CLIPVisionModelWithProjection": ModelClass(
        ("vision_model", "visual_projection"), config_part=VISION
    ),
    "CLIPForImageClassification": ModelClass(("vision_model",)),
    "CLIPTextModel": ModelClass(("text_model",), "text_model.", TEXT),
    "CLIPTextModelWithProjection": ModelClass(("text_model", "text_projection"), config_part=TEXT),
}

BUFFER = "position_ids"  # in checkpoints of transformers 4, no parameter of the modules
EXTRA = re.compile(
    r"(.+\.)?(position_ids|attn_mask|attention_mask|causal_mask|input_resolution|context_length"
    r"|vocab_size|logit_bias)"
)
"""Buffers and numbers that CLIPs hold beside their weights, and that no merge needs."""

FLAT = re.compile(r"(embeddings|encoder|pre_layrnorm|post_layernorm|final_layer_norm)\.")
TASK_HEAD = re.compile(r"(classifier|cls_classifier|distillation_classifier)\.")
WRAPPERS = ("module", "_orig_mod", "model", "base_model", "clip", "clip_model", "net")
"""Words that torch.compile, DistributedDataParallel, PEFT and trainers put before every name."""

PARTS = frozenset({
    "vision_model", "text_model", "visual_projection", "text_projection", "logit_scale",
    "embeddings", "encoder", "pre_layrnorm", "post_layernorm", "final_layer_norm", "visual",
    "transformer", "token_embedding", "positional_embedding", "ln_final", "text", "layernorm",
    "layers", "layer", "blocks", "pooler",
})  # fmt: skip
"""First components of names that models themselves have."""

ENCODERS = frozenset({"vision_model", "text_model"})
TOWERS = frozenset({"vision_model", "text_model", "visual", "embeddings", "encoder"})

QKV = re.compile(r"(.*\.self_attn)\.([qkv])_proj\.weight$")
BLOCK = re.compile(r"^(vision|text)_model\.encoder\.layers\.(\d+)\.(.+?)(?:\.weight)?$")
ANY_BLOCK = re.compile(r"^.*?\.(\d+)\.(.+?)(?:\.weight)?$")
KINDS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.{q,k,v}_proj",
    "self_attn.out_proj", "mlp.fc1", "mlp.fc2",
)  # fmt: skip
"""Kinds of matrices in a block, in the order of computation."""


def flat_prefix_of(config: Mapping[str, Any], owner: str) -> str:
    """Tower of unprefixed names, by a config.json; of other models than CLIP, names stay.

    Raises:
        [`CheckpointError`]: it announces no model type.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type.isprintable() or not model_type:
        raise CheckpointError(
            f"{owner} is not a model of transformers: its config.json says model_type"
            f" {shortened(model_type)}.",
            "A checkpoint saved by save_pretrained has one.",
        )
    return FLAT_PREFIXES.get(model_type, "")


def is_clip(config: Mapping[str, Any]) -> bool:
    """Tell whether a config.json is a CLIP's; of other models only names and shapes are known.

    Example:
        >>> is_clip({"model_type": "clip_vision_model"}), is_clip({"model_type": "siglip"})
        (True, False)
    """
    return config.get("model_type") in FLAT_PREFIXES


def unwrapped(stored: Mapping[str, T], config: Mapping[str, Any]) -> dict[str, T]:
    """Tensors by the names that the model itself uses, without what all names have in front.

    A task head may lack it. Of a CLIP any word is taken off that is none of its parts, or that
    holds its encoders; of another model only those of [`WRAPPERS`], and its type, as in
    `vit.encoder` of a classifier.

    Example:
        >>> unwrapped({"module.clip.vision_model.a": 1, "module.clip.text_model.b": 2}, {})
        {'vision_model.a': 1, 'text_model.b': 2}
    """
    names, kind = dict(stored), str(config.get("model_type", "clip")).replace("-", "_")
    while True:
        body = [name for name in names if not TASK_HEAD.match(name)]
        words = {name.partition(".")[0] for name in body}
        word = next(iter(words), "")
        if len(words) != 1 or not all(name.count(".") for name in body):
            return names
        inside = kind in FLAT_PREFIXES and ENCODERS & {name.split(".")[1] for name in body}
        if word in PARTS and not inside:
            return names
        own = len(word) > 1 and kind.startswith(word)  # vit of vit_mae
        if kind not in FLAT_PREFIXES and word not in WRAPPERS and not own:
            return names
        shorter = {name.removeprefix(f"{word}."): value for name, value in names.items()}
        if len(shorter) < len(names):
            return names
        names = shorter


def beneath(stored: Mapping[str, T], names: Collection[str]) -> Mapping[str, T]:
    """Tensors by the names of a base model, where that has other parts beside the same encoder.

    The names of the base then have a word in front, which [`unwrapped`] took off the others.

    Example:
        >>> beneath({"encoder.a": 1}, {"bert.encoder.a", "cls.b"})
        {'bert.encoder.a': 1}
    """
    if any(name in names for name in stored):
        return stored
    for word in sorted({name.partition(".")[0] for name in names}):
        if any(f"{word}.{name}" in names for name in stored):
            return {f"{word}.{name}": value for name, value in stored.items()}
    return stored


def model_alone(stored: Mapping[str, T]) -> tuple[dict[str, T], list[str]]:
    """Tensors of the one word in front whose names are a CLIP's, and the names of all others.

    Trainers save a model beside its loss or its teacher: `model.vision_model` and `loss.weight`.

    Example:
        >>> model_alone({"model.vision_model.a": 1, "loss.weight": 2})
        ({'model.vision_model.a': 1}, ['loss.weight'])
    """
    parts = [name.split(".") for name in stored]
    words = {first for first, *rest in parts if TOWERS & set(rest[:2])}
    if len(words) != 1 or any(first in PARTS for first, *_ in parts):
        return dict(stored), []
    word = f"{words.pop()}."
    own = {n: v for n, v in stored.items() if n.startswith(word) or TASK_HEAD.match(n)}
    return own, [name for name in stored if name not in own]


def is_extra(name: str) -> bool:
    """Tell whether a tensor of a CLIP is no weight, by its name.

    Example:
        >>> is_extra("text_model.embeddings.position_ids"), is_extra("logit_scale")
        (True, False)
    """
    return EXTRA.fullmatch(name) is not None


def canonical_name(stored: str, flat_prefix: str) -> str | None:
    """Name of a stored tensor in `CLIPModel`, or None for a task head.

    Example:
        >>> canonical_name("encoder.layers.0.mlp.fc1.weight", "vision_model.")
        'vision_model.encoder.layers.0.mlp.fc1.weight'
    """
    if TASK_HEAD.match(stored):
        return None
    return flat_prefix + stored if FLAT.match(stored) else stored


def name_in_class(name: str, model_class: str) -> str | None:
    """Name of a canonical parameter in a class of [`MODEL_CLASSES`], or None if it is not there.

    Example:
        >>> name_in_class("vision_model.encoder.layers.0.mlp.fc1.weight", "CLIPVisionModel")
        'encoder.layers.0.mlp.fc1.weight'
    """
    kind = MODEL_CLASSES[model_class]
    if name.split(".", maxsplit=1)[0] not in kind.parts or name.endswith(BUFFER):
        return None
    return name.removeprefix(kind.flat_prefix)


def saved_class(config: Mapping[str, Any]) -> str:
    """Class of [`MODEL_CLASSES`] that saved a config.json.

    Example:
        >>> saved_class({"model_type": "clip_vision_model"})
        'CLIPVisionModel'
    """
    named = config.get("architectures")
    if isinstance(named, list) and len(named) == 1 and named[0] in MODEL_CLASSES:
        return str(named[0])
    flat = {"clip_vision_model": "CLIPVisionModel", "clip_text_model": "CLIPTextModel"}
    return flat.get(str(config.get("model_type")), "CLIPModel")


def towers(names: Iterable[str]) -> set[str]:
    """Parts of a CLIP that a set of canonical names covers, by the first name component."""
    return {name.split(".")[0] for name in names}


def qkv_group(name: str) -> tuple[str, str] | None:
    """Attention block and letter of a projection weight; None for other weights.

    Example:
        >>> qkv_group("vision_model.encoder.layers.0.self_attn.k_proj.weight")
        ('vision_model.encoder.layers.0.self_attn', 'k')
    """
    match = QKV.match(name)
    return (match[1], match[2]) if match else None


def block_and_kind(label: str) -> tuple[str, str]:
    """Block of a tower and kind of layer that a weight belongs to.

    Example:
        >>> block_and_kind("vision_model.encoder.layers.3.mlp.fc1.weight")
        ('vision 3', 'mlp.fc1')
        >>> block_and_kind("visual_projection.weight")
        ('other', 'visual_projection')
    """
    if found := BLOCK.match(label):
        return f"{found[1]} {found[2]}", found[3]
    if found := ANY_BLOCK.match(label):
        return f"block {found[1]}", found[2]
    return "other", label.removesuffix(".weight").rpartition("embeddings.")[2]


def brief(label: str) -> str:
    """Short name of a weight, for people who watch it.

    Example:
        >>> brief("vision_model.encoder.layers.3.mlp.fc1.weight"), brief("logit_scale")
        ('vision 3 mlp.fc1', 'logit_scale')
    """
    return " ".join(block_and_kind(label)).removeprefix("other ")


def kind_order(kind: str) -> tuple[int, str]:
    """Sort key of kinds of layers: those of a block in the order of computation, then others."""
    return KINDS.index(kind) if kind in KINDS else len(KINDS), kind


def tower_configs(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Vision and text part of a config.json, whichever class it belongs to.

    Example:
        >>> tower_configs({"model_type": "clip_vision_model", "patch_size": 32})["vision_config"]
        {'model_type': 'clip_vision_model', 'patch_size': 32}
    """
    for tower, kind in ((VISION, "clip_vision_model"), (TEXT, "clip_text_model")):
        if config.get("model_type") == kind:
            return {tower: config}
    return {key: part for key in (VISION, TEXT) if isinstance(part := config.get(key), dict)}


def is_full_model(names: Iterable[str]) -> bool:
    """Tell whether canonical names cover both towers of a `CLIPModel`."""
    return {"vision_model", "text_model"} <= towers(names)
