"""Lazy reading of checkpoints: all headers first, then one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from hf_tsv.checkpoints import layout
from hf_tsv.checkpoints.formats import open_clip, shapes
from hf_tsv.checkpoints.formats.finding import refuse_loose_lora, weight_file
from hf_tsv.checkpoints.formats.task import Task
from hf_tsv.checkpoints.names import CONFIG_FILE, Format
from hf_tsv.checkpoints.reference import PinnedCheckpoint
from hf_tsv.checkpoints.storage.files import read_json
from hf_tsv.checkpoints.storage.headers import read_headers
from hf_tsv.checkpoints.storage.tensors import TensorInfo, read_tensor
from hf_tsv.system.errors import CheckpointError
from hf_tsv.system.text import quoted

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hf_tsv.checkpoints.formats.change import Original


@dataclass(frozen=True)
class Checkpoint(Task):
    """Headers of a fine-tune stored whole, or of a base; OpenCLIP's config is transformers'."""

    kind: ClassVar[str] = "checkpoint"
    says: ClassVar[str] = "is a checkpoint"
    is_whole: ClassVar[bool] = True

    tensors: Mapping[str, TensorInfo]
    config_name: str | None = CONFIG_FILE  # file of its config; None: the shapes tell

    @property
    def needed_files(self) -> tuple[str, ...]:
        """Names of the files that a run reads."""
        return (*filter(None, [self.config_name]), *self.weight_files)

    def completed(self, base: Task) -> Checkpoint:
        """Make the same checkpoint, with the base's config if it has none itself.

        Of other models than CLIP, with the base's names.
        """
        if not layout.is_clip(base.model_config):
            return replace(self, tensors=layout.beneath(self.tensors, base.tensors))
        if self.config_name is not None:
            return self
        own, theirs = (
            layout.tower_configs(self.model_config),
            layout.tower_configs(base.model_config),
        )
        if own.keys() != theirs.keys():  # one tower, of which the base has two
            tower = next(iter(own))
            config = {**theirs.get(tower, {}), "model_type": own[tower]["model_type"]}
        else:
            config = dict(base.model_config)
        return replace(self, model_config=config)

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
        device: torch.device | None = None,
        digests: dict[str, str] | None = None,
    ) -> Original:
        """Weights of this base model, stacked if several, read when they are first asked for.

        The label is by default the first name, the device the CPU; `digests` are those known so
        far, and get W0's.
        """

        from hf_tsv.checkpoints.formats.change import CPU, Original, stacked

        place = device or CPU

        def read() -> Tensor:
            tensors = [self.read(name, pinned=place.type == "cuda") for name in names]
            return stacked(tensors, names, place, digests)

        shapes = [self.tensors[name].shape for name in names] if len(names) > 1 else []
        known = {} if digests is None else digests
        return Original(names, label or names[0], str(self), shapes, read, place, known)

    def read(self, name: str, *, pinned: bool = False) -> Tensor:
        """Read one tensor as stored, by its canonical name, see [`read_tensor`]."""
        return read_tensor(self.pinned.files, self.tensors[name], name, str(self), pinned=pinned)


def open_checkpoint(pinned: PinnedCheckpoint) -> Checkpoint:
    """Read the config and all headers of a checkpoint, and nothing else.

    The names of its tensors tell whether they are OpenCLIP's or transformers'. Without a config,
    the shapes say what a CLIP's would.

    Raises:
        [`CheckpointError`]: no model, no weights, or a damaged file or index.
    """
    owner, there = str(pinned), pinned.files
    configs = {
        name: read_json(there, name, owner)
        for name in (CONFIG_FILE, open_clip.CONFIG_FILE)
        if there.size(name) is not None
    }
    if configs.keys() == {CONFIG_FILE}:  # before its weights: it may be no model at all
        layout.flat_prefix_of(configs[CONFIG_FILE], owner)
    stored, files = read_headers(there, weight_file(there, owner), owner)
    refuse_loose_lora(stored, owner)
    foreign = open_clip.are_names(stored)
    config, file = _config(configs, owner, foreign=foreign)
    foreign = foreign and (not config or layout.is_clip(config))
    tensors, head, extras = _sorted(stored, config, owner, foreign=foreign)
    if not config:
        config = shapes.config_of(tensors, owner)
    elif file == open_clip.CONFIG_FILE:
        _check_sizes(config, tensors, owner)
    own = foreign and file == open_clip.CONFIG_FILE
    form: Format = "open_clip" if own else "transformers"
    return Checkpoint(pinned, config, tensors, files, head, form, extras, file)


def _config(
    configs: Mapping[str, dict[str, Any]], owner: str, *, foreign: bool
) -> tuple[dict[str, Any], str | None]:
    """Configuration in transformers' words and its file; empty and None where there is no file.

    Where there are two, OpenCLIP's belongs to `foreign` names, transformers' to its own.
    """
    if not configs:
        return {}, None
    file = (list(configs)[::-1] if foreign else list(configs))[0]
    config = configs[file]
    if file == open_clip.CONFIG_FILE:
        config = open_clip.transformers_config(config, owner)
    _refuse_quantised(config, owner)
    return config, file


def _sorted(
    stored: dict[str, TensorInfo], config: Mapping[str, Any], owner: str, *, foreign: bool
) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo], tuple[str, ...]]:
    """Weights by canonical name, the task head, and the names of what is neither."""
    clip, extras = not config or layout.is_clip(config), list[str]()
    if clip:
        stored, extras = layout.model_alone(stored)
    stored = layout.unwrapped(stored, config)
    prefix = layout.flat_prefix_of(config, owner) if config else shapes.flat_prefix(stored)
    tensors: dict[str, TensorInfo] = {}
    head: dict[str, TensorInfo] = {}
    for name, info in sorted(stored.items()):
        if clip and layout.is_extra(name) and not _is_buffer(name, info):
            extras.append(name)
            continue
        parts = (
            _parts(name, info, owner) if foreign else {layout.canonical_name(name, prefix): info}
        )
        for canonical, part in parts.items():
            if canonical is None:
                head[name] = part
            elif canonical in tensors:
                raise CheckpointError(f"{owner}: {canonical} is stored twice, once as {name}.")
            else:
                tensors[canonical] = part
    return tensors, head, tuple(extras)


def _is_buffer(name: str, info: TensorInfo) -> bool:
    """Tell whether a tensor is the table of positions that transformers 4 wrote: it is copied."""
    return name.endswith(layout.BUFFER) and not info.dtype.is_floating_point


def _refuse_quantised(config: Mapping[str, Any], owner: str) -> None:
    if isinstance(quantised := config.get("quantization_config"), dict):
        method = quoted(quantised.get("quant_method"))
        hint = "Dequantise it (model.dequantize() in transformers), and save it again."
        raise CheckpointError(f"{owner} is quantised ({method}), and that cannot be merged.", hint)


def _parts(name: str, info: TensorInfo, owner: str) -> dict[str | None, TensorInfo]:
    """Canonical tensors, by name, that a tensor of OpenCLIP holds."""
    if layout.TASK_HEAD.match(name):
        return {None: info}
    found: dict[str | None, TensorInfo] = {}
    for part in open_clip.parts_of(name, info.shape, owner):
        there = open_clip.part_of(info, part, owner)
        if part.name == "logit_scale" and info.nbytes == info.dtype.itemsize:
            there = replace(there, shape=(), order=())  # some files hold a list of one
        found[part.name] = there
    return found


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
