"""Building transformers models from what checkpoints and configs say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import torch
from torch import Tensor

from hf_tsv.checkpoints import companions, layout
from hf_tsv.checkpoints.formats import heads
from hf_tsv.checkpoints.formats.routing import Routing
from hf_tsv.checkpoints.formats.task import Task
from hf_tsv.checkpoints.formats.whole import Checkpoint
from hf_tsv.linalg.choices import AnyDevice, AnyDtype, Dtype
from hf_tsv.system.checks import choice
from hf_tsv.system.device import pick_device
from hf_tsv.system.errors import CheckpointError, HfTsvError
from hf_tsv.system.progress import others_silent
from hf_tsv.system.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


ZERO_SHOT: Final = "zero-shot-image-classification"
Kind = Literal["zero-shot-image-classification", "image-feature-extraction", "image-classification"]
PIPELINES: dict[str, str] = {  # pipelines of transformers that CLIP has, and their classes
    ZERO_SHOT: "CLIPModel",
    "image-feature-extraction": "CLIPVisionModel",
    "image-classification": "CLIPForImageClassification",
}


@dataclass(frozen=True)
class Head:
    """Classification head: its tensors, and what config.json says of its labels."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]

    @staticmethod
    def of(item: Task) -> Head:
        """The head of a fine-tune; without tensors where it has none."""
        tensors = {name: item.head_tensor(name) for name in item.head}
        return Head(tensors, companions.head_config(item.model_config, item.head))


@dataclass(frozen=True)
class Found:
    """Local fine-tune, its base model or itself where that is whole, and the model class.

    `routing` says how a merge sends images to the tasks beside it; `head` takes the place of the
    fine-tune's own.
    """

    item: Task
    base: Checkpoint
    model_class: str
    processor: Path | None = None
    routing: Routing | None = None
    head: Head | None = None


def missing_parts(items: Sequence[Task], model_class: str) -> list[str]:
    held = set[str]().union(*(layout.towers(item.tensors) for item in items))
    return [part for part in layout.MODEL_CLASSES[model_class].parts if part not in held]


def check_clip(item: Task) -> None:
    """Refuse models other than CLIP, whose classes are unknown here."""
    if not layout.is_clip(item.model_config):
        raise CheckpointError(
            f"{item} is not CLIP but {item.model_config.get('model_type')!r}.", item.loading
        )


def check_head(item: Task, model_class: str) -> None:
    """Refuse a classifier whose head would be random."""
    if model_class == "CLIPForImageClassification" and not item.head:
        kept = heads.tasks_of(item) if item.description is None else []
        raise CheckpointError(
            f"{item} has no classification head, which image-classification needs.",
            f"Choose one of its heads with `head=…`: {', '.join(kept)}."
            if kept
            else "Use zero-shot-image-classification with candidate_labels.",
        )


def check_parts(items: Sequence[Task], model_class: str) -> None:
    """Refuse a class for which transformers would have to invent weights."""
    if missing := missing_parts(items, model_class):
        raise CheckpointError(
            f"{model_class} needs {missing[0]}, which {' and '.join(map(str, items))} lack.",
            "Use another task, or a base model that is a whole CLIPModel.",
        )


def build(
    found: Found,
    dtype: AnyDtype | None,
    device: AnyDevice | None,
    model_class: type[PreTrainedModel] | None = None,
) -> PreTrainedModel:
    """Build the transformers model in evaluation mode, and close its files; see [`load_model`].

    Its class is by default the one of transformers of that name.
    """
    import transformers

    state = {
        own_name: _value(name, found)
        for name in dict.fromkeys([*found.base.tensors, *found.item.tensors])
        if (own_name := layout.name_in_class(name, found.model_class)) is not None
    }
    if found.model_class == PIPELINES["image-classification"]:
        found = replace(found, head=found.head or Head.of(found.item))
        state |= found.head.tensors if found.head else {}
    if not isinstance(dtype, torch.dtype | None):
        names = ("auto", *get_args(Dtype))
        dtype = getattr(torch, choice("dtype", dtype, names), None)
    if dtype is None:
        stored = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
        widest = reduce(torch.promote_types, stored)
        dtype = widest
    cls: Any = model_class or getattr(transformers, found.model_class)
    model: PreTrainedModel
    with understood(found.item), others_silent():
        config = cls.config_class.from_dict(_class_config(found))
        _check_described(config, found)
        model, info = cls.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    if info["missing_keys"]:
        raise CheckpointError(
            f"{found.item} lacks {min(info['missing_keys'])} of {found.model_class}.",
            "Download or save it again.",
        )
    model.name_or_path = str(found.item)
    for item in (found.item, found.base):
        item.pinned.files.close()
    if device is not None:
        torch.nn.Module.to(model, pick_device(device))
    return model


@contextmanager
def understood(item: object) -> Iterator[None]:
    """Turn errors of transformers into one that names the files."""
    try:
        yield
    except (HfTsvError, MemoryError):
        raise
    except Exception as error:  # strange configurations raise a dozen types
        raise CheckpointError(
            f"{item} cannot be loaded with transformers: {first_line(error)}.",
            "Its configuration does not describe it; save it again.",
        ) from error


def _check_described(config: PreTrainedConfig, found: Found) -> None:
    """Refuse a config that describes more than the weights: building it can take any memory."""
    tensors = {**found.base.tensors, **found.item.tensors}
    for part, said in layout.tower_configs(config.to_dict()).items():
        tower = part.replace("_config", "_model")
        if tower not in layout.MODEL_CLASSES[found.model_class].parts:
            continue
        blocks = {n.split(".")[3] for n in tensors if n.startswith(f"{tower}.encoder.layers.")}
        there = tensors.get(f"{tower}.embeddings.position_embedding.weight")
        positions = there.shape[0] if there is not None and there.shape else 0
        wanted = said.get("max_position_embeddings", 0)
        if part == layout.VISION:
            wanted = (said["image_size"] // said["patch_size"]) ** 2 + 1
        if said["num_hidden_layers"] > len(blocks) or wanted > positions:
            raise CheckpointError(
                f"The config.json of {found.item} describes {said['num_hidden_layers']} layers and"
                f" {wanted} positions in the {part.removesuffix('_config')} tower; its weights are"
                f" {len(blocks)} layers and {positions} positions.",
                "Correct its config.json, or save it again.",
            )


def _value(name: str, found: Found) -> Tensor:
    """Weight of the model: W0 + Δ where the task has it, else that of the base."""
    if name not in found.item.tensors:
        return found.base.read(name)
    return found.item.weight(found.base.original([name]))


def _class_config(found: Found) -> dict[str, Any]:
    """Configuration for the class: of one tower, or of both."""
    item, base = found.item, found.base
    config = companions.without_code(dict(item.model_config))
    parts = layout.MODEL_CLASSES[found.model_class].config_part
    if parts is not None:
        towers = layout.tower_configs(config)
        if parts not in towers:
            towers = layout.tower_configs(base.model_config)
        return {**towers[parts], "architectures": [found.model_class]}
    if config.get("model_type") != "clip" and base is not item:
        config = dict(base.model_config)
    if found.model_class == PIPELINES["image-classification"]:
        labels = ("id2label", "label2id", "num_labels")
        config = {key: value for key, value in config.items() if key not in labels}
        config |= found.head.config if found.head else {}
    return {**config, "architectures": [found.model_class]}
