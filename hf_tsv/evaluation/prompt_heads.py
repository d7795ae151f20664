"""Cache of zero-shot heads in the Hub client's home, since one text tower serves many models.

The name of a file is a digest of everything that determines the head: the weights and settings of
the text tower, the tokens of all prompts, the type of device, and versions. Fine-tuned vision
towers and merges of them have the text tower of their base model, and so share its heads.
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

from hf_tsv.checkpoints.storage.tensors import digest, fingerprint
from hf_tsv.evaluation import zero_shot

PARTS = ("text_model.", "text_projection.")
NAME = "head"


def head(
    model: Any, tokenizer: Any, classes: Sequence[str], templates: Sequence[str], key: str
) -> Tensor:
    """Head as [`zero_shot.head`] computes it, read from the file of its [`key_of`] if there is one.

    A damaged file is written again; a folder that cannot be written does not cause a failure.
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
    text: str, model: Any, tokenizer: Any, classes: Sequence[str], templates: Sequence[str]
) -> str:
    """Digest of everything that determines a head; `text` is a digest from [`text_identity`]."""
    prompts = zero_shot.prompts(classes, templates)
    tokens = zero_shot.tokenised(model, tokenizer, prompts)["input_ids"]
    device, versions = model.device.type, [torch.__version__, transformers.__version__]
    said = [text, tokens, len(templates), device, *versions]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def text_identity(model: Any) -> str:
    """Digest of the text tower of a `CLIPModel`."""
    tensors = {
        name: digest(tensor.cpu().contiguous())
        for name, tensor in model.state_dict().items()
        if name.startswith(PARTS)
    }
    config = model.config.text_config.to_json_string(use_diff=False)
    return fingerprint({**tensors, "config": hashlib.sha256(config.encode()).hexdigest()})


def _write(file: Path, head: Tensor) -> None:
    """Write the whole file in one step, because other processes may read it meanwhile."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.stem}-{secrets.token_hex(4)}.new")
    try:
        save_file({NAME: head.cpu().contiguous()}, new)
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)
