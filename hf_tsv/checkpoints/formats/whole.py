"""Lazy reading of checkpoints: all headers first, then one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_tsv.checkpoints import layout
from hf_tsv.checkpoints.formats import open_clip
from hf_tsv.checkpoints.formats.change import CPU, Original, stacked
from hf_tsv.checkpoints.formats.task import Task
from hf_tsv.checkpoints.names import CONFIG_FILE, PICKLED_FILE, SINGLE_FILE, Format
from hf_tsv.checkpoints.reference import PinnedCheckpoint
from hf_tsv.checkpoints.storage.files import Files, read_json
from hf_tsv.checkpoints.storage.headers import VARIANT, index_of, read_headers
from hf_tsv.checkpoints.storage.pickles import SUFFIXES
from hf_tsv.checkpoints.storage.tensors import TensorInfo, read_tensor
from hf_tsv.system.errors import CheckpointError
from hf_tsv.system.text import quoted

VARIANT_INDEX = re.compile(r"model\.safetensors\.index\.([A-Za-z0-9_]+)\.json")

WEIGHTS: tuple[tuple[str, Format], ...] = (
    (SINGLE_FILE, "transformers"),
    (open_clip.SINGLE_FILE, "open_clip"),
    (PICKLED_FILE, "transformers"),
    (open_clip.PICKLED_FILE, "open_clip"),
)
"""Names of weight files with their layouts, in order of preference."""


@dataclass(frozen=True)
class Checkpoint(Task):
    """Headers of a fine-tune stored whole, or of a base; OpenCLIP's config is transformers'."""

    kind: ClassVar[str] = "checkpoint"
    says: ClassVar[str] = "is a checkpoint"
    is_whole: ClassVar[bool] = True

    tensors: Mapping[str, TensorInfo]

    def parts(self, name: str) -> list[TensorInfo]:
        """Tensors of the files that reading one weight needs."""
        return [self.tensors[name]]

    def weight(self, w0: Original) -> Tensor:
        """Read one weight; W0 is not asked for."""
        return self.read(w0.name, pinned=w0.device.type == "cuda")

    def original(
        self,
        names: Sequence[str],
        label: str = "",
        device: torch.device = CPU,
        digests: dict[str, str] | None = None,
    ) -> Original:
        """Weights of this base model, stacked if several, read when they are first asked for.

        The label is by default the first name; `digests` are those known so far, and get W0's.
        """

        def read() -> Tensor:
            tensors = [self.read(name, pinned=device.type == "cuda") for name in names]
            return stacked(tensors, names, device, digests)

        shapes = [self.tensors[name].shape for name in names] if len(names) > 1 else []
        known = {} if digests is None else digests
        return Original(names, label or names[0], str(self), shapes, read, device, known)

    def read(self, name: str, *, pinned: bool = False) -> Tensor:
        """Read one tensor as stored, by its canonical name, see [`read_tensor`]."""
        return read_tensor(self.pinned.files, self.tensors[name], name, str(self), pinned=pinned)


def open_checkpoint(pinned: PinnedCheckpoint) -> Checkpoint:
    """Read the config and all headers of a checkpoint, and nothing else.

    Raises:
        [`CheckpointError`]: no model, no weights, or a damaged file or index.
    """
    owner, there = str(pinned), pinned.files
    single = _known(there) or _only_variant(there, owner) or _only_pickle(there) or SINGLE_FILE
    kind_of = dict(WEIGHTS).get(single)
    if kind_of is None and there.size(CONFIG_FILE) is None:
        kind_of = "open_clip"
    if kind_of == "open_clip" and there.size(open_clip.CONFIG_FILE) is not None:
        return _open_open_clip(pinned, single, owner)
    config = read_json(there, CONFIG_FILE, owner)
    flat_prefix = layout.flat_prefix_of(config, owner)
    if isinstance(quantised := config.get("quantization_config"), dict):
        method = quoted(quantised.get("quant_method"))
        hint = "Dequantise it (model.dequantize() in transformers), and save it again."
        raise CheckpointError(f"{owner} is quantised ({method}), and that cannot be merged.", hint)
    stored, files = read_headers(there, single, owner)
    tensors: dict[str, TensorInfo] = {}
    head: dict[str, TensorInfo] = {}
    for name, info in sorted(stored.items()):
        canonical = layout.canonical_name(name, flat_prefix)
        if canonical is None:
            head[name] = info
        elif canonical in tensors:
            raise CheckpointError(f"{owner}: {canonical} is stored twice, once without its prefix.")
        else:
            tensors[canonical] = info
    return Checkpoint(pinned, config, tensors, files, head)


def _known(files: Files) -> str | None:
    """First of the known weight files that exists, whole or as shards."""
    there = (s for s, _ in WEIGHTS if any(files.size(n) is not None for n in (s, index_of(s))))
    return next(there, None)


def _only_variant(files: Files, owner: str) -> str | None:
    """Name of the only weights saved by `save_pretrained(variant=…)`, or None."""
    patterns = (VARIANT, VARIANT_INDEX)
    matches = (pattern.fullmatch(name) for name in files.names() for pattern in patterns)
    found = {match[1] for match in matches if match}
    if len(found) > 1:
        raise CheckpointError(
            f"{owner} has only variants of its weights, and several: {', '.join(sorted(found))}.",
            "Load the one you mean with transformers (variant=…) and save it.",
        )
    return f"model.{found.pop()}.safetensors" if found else None


def _only_pickle(files: Files) -> str | None:
    """Name of the only state dict, whatever it is called, or None."""
    found = [n for n in files.names() if n.endswith(SUFFIXES) and "/" not in n]
    return found[0] if len(found) == 1 else None


def _open_open_clip(pinned: PinnedCheckpoint, single: str, owner: str) -> Checkpoint:
    content = read_json(pinned.files, open_clip.CONFIG_FILE, owner)
    config = open_clip.transformers_config(content, owner)
    stored, files = read_headers(pinned.files, single, owner)
    tensors: dict[str, TensorInfo] = {}
    for name, info in sorted(stored.items()):
        for part in open_clip.parts_of(name, info.shape, owner):
            shape = info.shape[::-1] if part.transposed else info.shape
            if part.of > 1:
                shape = (shape[0] // part.of, *shape[1:])
            size = info.nbytes // part.of
            start, turned = info.start + part.index * size, part.transposed != info.transposed
            if info.transposed and part.of > 1:
                raise CheckpointError(
                    f"{owner}: the rows of {name} are not stored contiguously.",
                    "Save it as safetensors.",
                )
            if part.name == "logit_scale" and info.nbytes == info.dtype.itemsize:
                shape = ()  # some files hold a list of one
            if part.name in tensors:
                raise CheckpointError(f"{owner}: {part.name} is stored twice, once as {name}.")
            tensors[part.name] = TensorInfo(info.file, info.dtype, shape, start, size, turned)
    _check_sizes(config, tensors, owner)
    return Checkpoint(pinned, config, tensors, files, format="open_clip")


def _check_sizes(config: dict[str, Any], tensors: Mapping[str, TensorInfo], owner: str) -> None:
    """Refuse a config that does not describe the weights, since nobody could load the output."""
    for tower, embedding in (("vision", "class_embedding"), ("text", "token_embedding.weight")):
        said = config[f"{tower}_config"]
        layers, side = said["num_hidden_layers"], said["hidden_size"]
        prefix = f"{tower}_model.encoder.layers."
        blocks = len({name.split(".")[3] for name in tensors if name.startswith(prefix)})
        there = tensors.get(f"{tower}_model.embeddings.{embedding}")
        width = there.shape[-1] if there is not None and there.shape else 0
        if (blocks, width) != (layers, side):
            raise CheckpointError(
                f"{owner}: its config says {layers} layers of width {side} in the {tower} tower,"
                f" its weights {blocks} of {width}.",
                f"Correct its {open_clip.CONFIG_FILE}.",
            )
