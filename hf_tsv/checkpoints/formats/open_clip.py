"""Conversion from and to OpenCLIP's names, stacked attention and config.

OpenCLIP keeps q, k and v of an attention in one tensor, and both projections transposed. The rows
of a tensor lie together in a file, so each canonical tensor is read and written in its place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from hf_tsv.checkpoints.storage.pickles import CONTIGUOUS
from hf_tsv.checkpoints.storage.tensors import Part, TensorInfo
from hf_tsv.system.errors import CheckpointError

CONFIG_FILE = "open_clip_config.json"
SINGLE_FILE = "open_clip_model.safetensors"
PICKLED_FILE = "open_clip_pytorch_model.bin"

TOP = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
PROJECTIONS = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}
"""Canonical names of the projections, which OpenCLIP stores transposed."""

ALONE = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
KINDS = ("weight", "bias")
IN_BLOCK = {
    f"{stored}.{kind}": [f"{own}.{kind}"] for stored, own in ALONE.items() for kind in KINDS
}
IN_BLOCK |= {
    f"attn.in_proj_{kind}": [f"self_attn.{x}_proj.{kind}" for x in "qkv"] for kind in KINDS
}
"""Canonical names of the parts of each tensor in a block, of which OpenCLIP stacks q, k and v."""

BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d{1,4})\.(.+)")
CANONICAL_BLOCK = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)")
OWN = re.compile(r"(^|\.)(visual\.(conv1|transformer|ln_post)|transformer\.resblocks)\.")
OTHER_TEXT = "text."  # prefix of the text tower in OpenCLIP's class for towers of several kinds
HEAD_WIDTH, MLP_RATIO = 64, 4.0  # OpenCLIP's defaults


def are_names(names: Iterable[str]) -> bool:
    """Tell whether names of tensors, with whatever in front, are OpenCLIP's or OpenAI's."""
    return any(map(OWN.search, names))


def parts_of(stored: str, shape: tuple[int, ...], owner: str) -> list[Part]:
    """Canonical tensors that a stored tensor of this name and shape holds, which CLIP must have.

    Example:
        >>> parts_of("visual.proj", (768, 512), "me/model")[0].name
        'visual_projection.weight'
    """
    name = stored.removeprefix(OTHER_TEXT)
    if name in TOP:
        return [Part(TOP[name], stored)]
    if name in PROJECTIONS and len(shape) == 2:
        return [Part(PROJECTIONS[name], stored, transposed=True)]
    found = BLOCK.fullmatch(name)
    own = IN_BLOCK.get(found[3], []) if found else []
    if found and own and (len(own) == 1 or (shape and shape[0] % len(own) == 0)):
        prefix = f"{'vision' if found[1] else 'text'}_model.encoder.layers.{int(found[2])}"
        return [Part(f"{prefix}.{part}", stored, i, len(own)) for i, part in enumerate(own)]
    hint = "Supported OpenCLIP models are plain ViTs, such as ViT-B-32 or ViT-H-14."
    raise CheckpointError(f"{owner}: {stored} has no place in the CLIP of transformers.", hint)


def part_shape(shape: tuple[int, ...], part: Part) -> tuple[int, ...]:
    """Shape of a canonical tensor, by that of the tensor it is a part of; () if it is none."""
    shape = shape[::-1] if part.transposed else shape
    if part.of == 1:
        return shape
    return (shape[0] // part.of, *shape[1:]) if shape and shape[0] % part.of == 0 else ()


def part_of(info: TensorInfo, part: Part, owner: str) -> TensorInfo:
    """Location of a canonical tensor in the one that holds it."""
    order = info.order
    if part.transposed:
        order = () if order else (1, 0)
    if part.of > 1 and order:
        problem = f"{owner}: the rows of {part.stored} are not stored contiguously."
        raise CheckpointError(problem, CONTIGUOUS)
    size = info.nbytes // part.of
    start, shape = info.start + part.index * size, part_shape(info.shape, part)
    return replace(info, shape=shape, start=start, nbytes=size, order=order)


def placed(names: Iterable[str]) -> dict[str, Part]:
    """Place of each canonical tensor, buffers excluded, in OpenCLIP's tensors, if it has one."""
    outside = {canonical: stored for stored, canonical in (TOP | PROJECTIONS).items()}
    in_block = {
        canonical: (stored, i, len(parts))
        for stored, parts in IN_BLOCK.items()
        for i, canonical in enumerate(parts)
    }
    result = {}
    for name in names:
        found = CANONICAL_BLOCK.fullmatch(name)
        if name in outside:
            result[name] = Part(name, outside[name], transposed=outside[name] in PROJECTIONS)
        elif found is not None and found[3] in in_block:
            stored, index, of = in_block[found[3]]
            tower = "visual." if found[1] == "vision" else ""
            stored = f"{tower}transformer.resblocks.{found[2]}.{stored}"
            result[name] = Part(name, stored, index, of)
        else:
            raise CheckpointError(f"OpenCLIP has no place for {name}.", "Omit `out_format=`.")
    return result


def transformers_config(content: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Configuration in transformers of the model that an open_clip_config.json describes.

    Raises:
        [`CheckpointError`]: transformers' CLIP has no such architecture, or a value is missing.
    """
    model: Any = content.get("model_cfg")
    try:
        vision, text = (dict(model[key]) for key in ("vision_cfg", "text_cfg"))
        _check_supported(vision, text, owner)
        act = "quick_gelu" if model.get("quick_gelu") else "gelu"
        embed = int(model["embed_dim"])
        processor_config(content)  # refuses before any work what cannot be converted
        size = vision["image_size"]
        if isinstance(size, list) and (len(size) != 2 or size[0] != size[1]):
            raise ValueError(f"image_size is {size}")
        width, text_width = int(vision["width"]), int(text["width"])
        heads = width // int(vision.get("head_width", HEAD_WIDTH)), int(text["heads"])
        for side, count in ((width, heads[0]), (text_width, heads[1])):
            if count < 1 or side % count:
                raise ValueError(f"{count} heads in a width of {side}")
        vocabulary = int(text.get("vocab_size", 49408))
        return {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": embed,
            "logit_scale_init_value": 2.6592,
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_act": act,
                "hidden_size": width,
                "intermediate_size": int(width * vision.get("mlp_ratio", MLP_RATIO)),
                "num_hidden_layers": int(vision["layers"]),
                "num_attention_heads": heads[0],
                "image_size": int(size[0] if isinstance(size, list) else size),
                "patch_size": int(vision["patch_size"]),
                "projection_dim": embed,
            },
            "text_config": {
                "model_type": "clip_text_model",
                "hidden_act": act,
                "hidden_size": text_width,
                "intermediate_size": int(text_width * text.get("mlp_ratio", MLP_RATIO)),
                "num_hidden_layers": int(text["layers"]),
                "num_attention_heads": heads[1],
                "max_position_embeddings": int(text.get("context_length", 77)),
                "vocab_size": vocabulary,
                "projection_dim": embed,
                "bos_token_id": vocabulary - 2,
                "eos_token_id": vocabulary - 1,
                "pad_token_id": 0,
            },
        }
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"{owner}: {CONFIG_FILE} does not describe a model ({type(error).__name__}: {error}).",
            "OpenCLIP writes it when it pushes a model.",
        ) from None


UNSUPPORTED = {
    "vision_cfg": (
        "timm_model_name", "ls_init_value", "no_ln_pre", "attentional_pool", "patch_dropout_only",
        "final_ln_after_pool", "pos_embed_type", "norm_kwargs", "act_kwargs", "block_type",
    ),
    "text_cfg": (
        "hf_model_name", "ls_init_value", "embed_cls", "no_causal_mask", "final_ln_after_pool",
        "proj_bias", "norm_kwargs", "act_kwargs", "block_type",
    ),
}  # fmt: skip
"""Settings of OpenCLIP that, unless they are off, make an architecture transformers lacks."""


def _check_supported(vision: Mapping[str, Any], text: Mapping[str, Any], owner: str) -> None:
    parts = {"vision_cfg": vision, "text_cfg": text}
    odd = [f"{part}.{key}" for part, keys in UNSUPPORTED.items() for key in keys
           if parts[part].get(key) not in (None, False, "default", "learnable")]  # fmt: skip
    odd += [] if vision.get("pool_type", "tok") == "tok" else ["vision_cfg.pool_type"]
    odd += [] if text.get("pool_type", "argmax") == "argmax" else ["text_cfg.pool_type"]
    odd += ["vision_cfg.layers"] if isinstance(vision.get("layers"), list) else []
    if odd:
        raise CheckpointError(
            f"{owner} is an OpenCLIP model that transformers' CLIP is not: it has {odd[0]}.",
            "Supported OpenCLIP models are plain ViTs, such as ViT-B-32 or ViT-H-14.",
        )


def open_clip_config(config: Mapping[str, Any], processor: Mapping[str, Any]) -> dict[str, Any]:
    """Content of open_clip_config.json for a `CLIPModel` and its processor, which may be empty.

    Its config is complete, as transformers fills it in.
    """
    vision, text = config["vision_config"], config["text_config"]
    model: dict[str, Any] = {
        "embed_dim": config["projection_dim"],
        "vision_cfg": {
            "image_size": vision["image_size"],
            "layers": vision["num_hidden_layers"],
            "width": vision["hidden_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "mlp_ratio": _ratio(vision["intermediate_size"], vision["hidden_size"]),
            "patch_size": vision["patch_size"],
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
            "mlp_ratio": _ratio(text["intermediate_size"], text["hidden_size"]),
        },
    }
    if vision["hidden_act"] == "quick_gelu":
        model["quick_gelu"] = True
    preprocess = {"mean": processor.get("image_mean"), "std": processor.get("image_std")}
    given = {key: value for key, value in preprocess.items() if value is not None}
    return {"model_cfg": model, "preprocess_cfg": given}


def _ratio(inner: int, width: int) -> float:
    """Ratio for which int(width · ratio), as OpenCLIP computes it, is the inner size again."""
    ratio = inner / width
    return ratio if int(width * ratio) == inner else math.nextafter(ratio, math.inf)


# Mean and standard deviation of CLIP's training images; also OpenCLIP's default.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers


def processor_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """Content of preprocessor_config.json that treats images as an open_clip_config.json says."""
    given = content.get("preprocess_cfg")
    images: Mapping[str, Any] = given if isinstance(given, dict) else {}
    size = images.get("size") or content["model_cfg"]["vision_cfg"]["image_size"]
    height, width = (int(s) for s in (size if isinstance(size, list) else (size, size)))
    squash = images.get("resize_mode") == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": height, "width": width} if squash else {"shortest_edge": height},
        "resample": RESAMPLING.get(str(images.get("interpolation", "bicubic")), 3),
        "do_center_crop": not squash,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [float(value) for value in images.get("mean", MEAN)],
        "image_std": [float(value) for value in images.get("std", STD)],
    }
