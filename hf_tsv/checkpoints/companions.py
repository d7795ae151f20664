"""Files beside the weights (config, processor, tokenizer), with which the output loads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_tsv.checkpoints import layout
from hf_tsv.checkpoints.formats import open_clip
from hf_tsv.checkpoints.formats.whole import Checkpoint
from hf_tsv.checkpoints.names import Format
from hf_tsv.checkpoints.reference import PinnedCheckpoint
from hf_tsv.checkpoints.storage.dtypes import DType
from hf_tsv.checkpoints.storage.files import read_json
from hf_tsv.checkpoints.storage.tensors import TensorInfo
from hf_tsv.system.errors import CheckpointError
from hf_tsv.system.progress import logger

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model")
OTHER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
               "generation_config.json")  # fmt: skip
COMPANIONS = (*PROCESSOR_FILES, *TOKENIZER_FILES, *OTHER_FILES)
LARGEST = 100_000_000
NAME_CLASSES = (*PROCESSOR_FILES, "tokenizer_config.json")
LABELS = ("id2label", "label2id", "num_labels", "problem_type")  # of a task head
CODE = ("auto_map", "custom_pipelines", "attn_implementation", "_attn_implementation")
"""Keys by which a configuration makes transformers load code from a repository."""


def present(item: PinnedCheckpoint) -> list[str]:
    """Names of the companion files that a checkpoint has."""
    return [name for name in COMPANIONS if item.files.size(name) is not None]


def warnings(base: Checkpoint) -> list[str]:
    """Warnings about files that pipelines need and the output will not have; refuses links out."""
    have = set(present(base.pinned))
    for name in sorted(have):
        _check_here(base, name)
    has_processor = have & set(PROCESSOR_FILES) or base.format == "open_clip"
    parts = (
        ("vision_model", "image processor", has_processor),
        ("text_model", "tokenizer", have & set(TOKENIZER_FILES)),
    )
    return [
        f"The base model {base} has no {part}, so the output has none and pipelines need one."
        for tower, part, there in parts
        if tower in layout.towers(base.tensors) and not there
    ]


def write(base: Checkpoint, folder: Path, config: dict[str, Any], out_format: Format) -> None:
    """Copy processor and tokenizer, and write the output's `config` as its layout has it."""
    for name in present(base.pinned):
        content = _content(base, name)
        harmless = without_code(content)
        if content == harmless:
            (folder / name).write_bytes(base.pinned.files.read(name))
        else:
            logger.warning("%s asks for code in its %s; no code is copied.", base, name)
            _write_json(folder / name, harmless)
    if out_format == "transformers":
        _write_json(folder / "config.json", config)
    if base.format == out_format == "open_clip":
        _write_json(folder / open_clip.CONFIG_FILE, _own_config(base))
    elif out_format == "open_clip":
        processor = next((n for n in PROCESSOR_FILES if (folder / n).exists()), None)
        images = json.loads((folder / processor).read_text()) if processor else {}
        images = images.get("image_processor", images)
        _write_json(folder / open_clip.CONFIG_FILE, open_clip.open_clip_config(config, images))
    elif base.format == "open_clip" and not set(present(base.pinned)) & set(PROCESSOR_FILES):
        processor_config = open_clip.processor_config(_own_config(base))
        _write_json(folder / "preprocessor_config.json", processor_config)


def check(base: Checkpoint) -> None:
    """Read what will be copied, so that damage, or a link out, is refused before the work."""
    for name in present(base.pinned):
        _content(base, name)


def _content(base: Checkpoint, name: str) -> dict[str, Any]:
    """Content of a companion file that may name code, and {} for any other."""
    _check_here(base, name)
    if (base.pinned.files.size(name) or 0) > LARGEST:
        raise CheckpointError(f"{base}: {name} is too large for a file of this kind.", "Remove it.")
    return read_json(base.pinned.files, name, str(base)) if name in NAME_CLASSES else {}


def _check_here(base: Checkpoint, name: str) -> None:
    """Refuse a link out of the folder, which would copy a file of the user's own."""
    if base.pinned.files.is_elsewhere(name):
        raise CheckpointError(
            f"{base}: {name} is a link to a file outside its folder, and is not copied.",
            "Remove it, or put the file itself there if it belongs to the checkpoint.",
        )


def _own_config(base: Checkpoint) -> dict[str, Any]:
    return read_json(base.pinned.files, open_clip.CONFIG_FILE, str(base))


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def without_code(content: Any) -> Any:
    """Copy of a configuration without the keys that load code, since no code is copied."""
    if isinstance(content, list):
        return [without_code(item) for item in content]
    if isinstance(content, dict):
        return {
            key: without_code(value)
            for key, value in content.items()
            if not (key in CODE and isinstance(value, dict | list | str))
        }
    return content


def output_config(
    base: Checkpoint, dtypes: set[DType], out_format: Format = "transformers"
) -> dict[str, Any]:
    """Configuration of the output: the base's, with the dtype that was written.

    transformers loads in the config's dtype whatever the tensors have, so the two must agree. For
    OpenCLIP's file layout, defaults that transformers omits are added.
    """
    config: dict[str, Any] = without_code(base.model_config)
    if base.head and isinstance(named := config.get("architectures"), list):  # it is left out
        config["architectures"] = [re.sub(r"For[A-Z]\w*$", "Model", str(name)) for name in named]
        config = {key: value for key, value in config.items() if key not in LABELS}
    if out_format == "open_clip":
        from transformers import CLIPConfig

        return dict(CLIPConfig(**config).to_dict())
    floating = {dtype for dtype in dtypes if dtype.is_floating_point}
    if len(floating) == 1:
        name = next(iter(floating)).in_torch
        key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        config[key] = name
        for part in (config.get("text_config"), config.get("vision_config")):
            if isinstance(part, dict):
                part.update({k: name for k in ("dtype", "torch_dtype") if part.get(k)})
    return config


def head_config(config: Mapping[str, Any], head: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Keys of a fine-tune's config.json that its task head needs: the class and the labels.

    The tensors of the head decide the number of labels, whatever the configuration says.
    """
    found = {key: config[key] for key in ("architectures", "problem_type") if key in config}
    labels = next((info.shape[0] for info in head.values() if info.shape), 0)
    named = config.get("id2label")
    if not isinstance(named, dict) or len(named) != labels:
        return {**found, "num_labels": labels}
    return {**found, **{k: config[k] for k in ("id2label", "label2id") if k in config}}
