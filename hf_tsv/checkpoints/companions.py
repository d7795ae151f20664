"""The files beside the weights: config, processor, tokenizer, so that the output just loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_tsv.checkpoints import layout
from hf_tsv.checkpoints.files import MAX_JSON_BYTES
from hf_tsv.checkpoints.reader import Checkpoint, TensorInfo
from hf_tsv.checkpoints.reference import PinnedCheckpoint
from hf_tsv.errors import CheckpointError

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
OTHER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
COMPANIONS = (*PROCESSOR_FILES, *TOKENIZER_FILES, *OTHER_FILES)


def present(item: PinnedCheckpoint) -> list[str]:
    """The companion files that a checkpoint has."""
    return [name for name in COMPANIONS if item.files.size(name) is not None]


def warnings(base: Checkpoint) -> list[str]:
    """What the output will lack to work in a pipeline."""
    have = set(present(base.pinned))
    missing = []
    if "vision_model" in layout.towers(base.tensors) and not have & set(PROCESSOR_FILES):
        missing.append("image processor")
    if "text_model" in layout.towers(base.tensors) and not have & set(TOKENIZER_FILES):
        missing.append("tokenizer")
    return [
        f"The base model {base} has no {part}, so the output has none and pipelines need one."
        for part in missing
    ]


def copy(base: Checkpoint, folder: Path) -> None:
    """Copy the companion files of the base model into the output folder."""
    for name in present(base.pinned):
        if (base.pinned.files.size(name) or 0) > MAX_JSON_BYTES:
            raise CheckpointError(f"{base}: {name} is too large to be what it says.")
        (folder / name).write_bytes(base.pinned.files.read(name))


def output_config(base: Checkpoint, dtypes: set[torch.dtype]) -> dict[str, Any]:
    """config.json of the output: the base's, with the dtype that was written.

    transformers loads in the config's dtype whatever the tensors have, so the two must agree.

    Args:
        base ([`Checkpoint`]): whose config it is.
        dtypes (`set[torch.dtype]`): of all written tensors.
    """
    config: dict[str, Any] = json.loads(json.dumps(base.config))
    config.pop("auto_map", None)  # it would point at code, and no code is copied
    floating = {dtype for dtype in dtypes if dtype.is_floating_point}
    if len(floating) == 1:
        name = str(next(iter(floating))).removeprefix("torch.")
        key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        config[key] = name
        for part in (config.get("text_config"), config.get("vision_config")):
            if isinstance(part, dict):
                part.update({k: name for k in ("dtype", "torch_dtype") if part.get(k)})
    return config


def head_config(config: Mapping[str, Any], head: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """What a task head needs in config.json: its class and its labels.

    Args:
        config (`Mapping[str, Any]`): of the fine-tuned checkpoint.
        head (`Mapping[str, TensorInfo]`): its tensors; the number of labels is theirs, whatever
            the configuration says.
    """
    found = {key: config[key] for key in ("architectures", "problem_type") if key in config}
    labels = next((info.shape[0] for info in head.values() if info.shape), 0)
    named = config.get("id2label")
    if not isinstance(named, dict) or len(named) != labels:
        return {**found, "num_labels": labels}
    return {**found, **{k: config[k] for k in ("id2label", "label2id") if k in config}}
