"""Zero-shot heads kept in the Hub client's home, as the same text tower serves many models.

The name of a file is a digest of everything that decides about the head: the weights and settings
of the text tower, the tokens of all prompts, the type of device, and versions. A fine-tuned vision
tower, and a merge of several, has the text tower of its base model, and so its heads.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_tsv.checkpoints.reader import digest, fingerprint
from hf_tsv.evaluation import zero_shot

PARTS = ("text_model.", "text_projection.")
NAME = "head"


def head(
    model: Any, tokenizer: Any, classes: Sequence[str], templates: Sequence[str], key: str
) -> Tensor:
    """A head as [`zero_shot.head`] makes it, from a file if there is one.

    A file that is damaged is written again; a folder that cannot be written is no reason to fail.

    Args:
        model: a `CLIPModel`.
        tokenizer: its own.
        classes (`Sequence[str]`): names.
        templates (`Sequence[str]`): with `{}` for the name.
        key (`str`): see [`key_of`].

    Returns:
        `Tensor`: shape (classes, projection), on the model's device.
    """
    file = Path(constants.HF_HOME) / "hf-tsv" / "heads" / f"{key}.safetensors"
    with suppress(OSError, SafetensorError, KeyError):
        kept = load_file(file)[NAME]
        if kept.shape == (len(classes), model.config.projection_dim):
            return kept.to(model.device)
    made = zero_shot.head(model, tokenizer, classes, templates)
    with suppress(OSError):
        _write(file, made)
    return made


def key_of(
    text: str, tokenizer: Any, classes: Sequence[str], templates: Sequence[str], device: str
) -> str:
    """A digest of everything that decides about a head.

    Args:
        text (`str`): see [`text_identity`].
        tokenizer: of the model.
        classes (`Sequence[str]`): names.
        templates (`Sequence[str]`): with `{}` for the name.
        device (`str`): type of it.
    """
    tokens = tokenizer(zero_shot.prompts(classes, templates), truncation=True)["input_ids"]
    said = [text, tokens, len(templates), device, torch.__version__, transformers.__version__]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def text_identity(model: Any) -> str:
    """A digest of the text tower of a `CLIPModel`."""
    tensors = {
        name: digest(tensor.cpu().contiguous())
        for name, tensor in model.state_dict().items()
        if name.startswith(PARTS)
    }
    config = model.config.text_config.to_json_string(use_diff=False)
    return fingerprint({**tensors, "config": hashlib.sha256(config.encode()).hexdigest()})


def _write(file: Path, head: Tensor) -> None:
    """The whole file or none: others may read at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.stem}-{secrets.token_hex(4)}.new")
    try:
        save_file({NAME: head.cpu().contiguous()}, new)
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)
