"""Names of an adapter's tensors, and the weights of the base model that they stand for."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from hf_tsv.checkpoints import layout
from hf_tsv.checkpoints.formats import open_clip
from hf_tsv.checkpoints.formats.open_clip import part_shape
from hf_tsv.checkpoints.formats.whole import Checkpoint
from hf_tsv.checkpoints.names import ADAPTER_CONFIG
from hf_tsv.checkpoints.reference import PinnedCheckpoint
from hf_tsv.checkpoints.storage.tensors import Part, TensorInfo
from hf_tsv.system.errors import CheckpointError

CONFIG_FILE = ADAPTER_CONFIG
OUTER = re.compile(r"(?:base_model\.(?:model\.)?)*")  # of PEFT's models, which may be nested
ADAPTER = re.compile(r"\.default(?=\.|$)")  # the adapter's own name, in a model's state dict
WRAPPER = re.compile(r"\.(?:base_layer|modules_to_save|token_adapter)(?=\.)")
COPY = ".modules_to_save."
IN_OPEN_CLIP = re.compile(r"(?:text\.)?(?:visual\.)?transformer\.resblocks\.")
TOWERS = {"vision_model.": "Vision", "text_model.": "Text"}  # prefixes; parts of classes' names
VISUAL = "visual."
OPEN_CLIP_PREFIXES = {"VisionTransformer": (VISUAL,), "TextTransformer": ("",), "CLIP": ("",)}
"""OpenCLIP's classes, and the part of the whole model's names that those of the class lack."""

Fits = Callable[[Part, tuple[int, ...]], bool]
"""Test whether a weight of the base model of this shape can be the one that is meant."""


@dataclass(frozen=True)
class Place:
    """Prefix that the names of an adapter lack, and whether they are OpenCLIP's names.

    `outer` is a word that they have in front of those of the base model, as in `vit.encoder`.
    """

    prefix: str
    in_open_clip: bool = False
    outer: str = ""

    def parts(self, name: str, shape: tuple[int, ...] = ()) -> list[Part]:
        """Canonical tensors that a tensor of the adapted model is, or holds; none if unknown."""
        if not self.in_open_clip:
            return [Part(self.prefix + name.removeprefix(self.outer), name)]
        try:
            return open_clip.parts_of(self.prefix + name, shape, "")
        except CheckpointError:
            return []

    def holds(self, name: str, fits: Fits, base: Checkpoint) -> bool:
        """Tell whether a tensor of the adapted model has its place in the base model."""
        parts = self.parts(name, (0, 0))
        infos = [base.tensors.get(part.name) for part in parts]
        pairs = zip(parts, infos, strict=True)
        return bool(parts) and all(info and fits(part, info.shape) for part, info in pairs)


def own_names(stored: Mapping[str, TensorInfo], owner: str) -> dict[str, TensorInfo]:
    """Tensors by their names in the adapted model, without what PEFT puts around and into them."""
    result: dict[str, TensorInfo] = {}
    for name in sorted(stored, key=lambda name: COPY in name):
        if ".original_module." in name:  # of the base, beside the module that replaces it
            continue
        inner = name[len(match[0]) if (match := OUTER.match(name)) else 0 :]
        own = WRAPPER.sub("", ADAPTER.sub("", inner))
        if own in result and COPY in name:  # once more, with the biases
            continue
        if own in result:
            raise CheckpointError(f"{owner}: {own} is stored twice, once as {name}.")
        result[own] = stored[name]
    return result


def attention_of(module: str) -> str | None:
    """Attention of OpenCLIP that an output projection belongs to, by the projection's name."""
    attention = module.removesuffix(".out_proj")
    is_inside = attention != module and attention.endswith(".attn")
    return attention if is_inside and IN_OPEN_CLIP.search(module) else None


def weight_of(module: str) -> str:
    """Name of a module's weight in the adapted model: OpenCLIP's attention stacks q, k and v."""
    stacked = module.endswith(".attn") and IN_OPEN_CLIP.search(module)
    return f"{module}.in_proj_weight" if stacked else f"{module}.weight"


def shaped(shape: tuple[int, ...]) -> Fits:
    """Test for a tensor that replaces, or is added to, those it stands for."""
    return lambda part, there: part_shape(shape, part) == there


def find_place(
    wanted: Mapping[str, Fits],
    modules: Collection[str],
    base: Checkpoint,
    config: Mapping[str, Any],
    pinned: PinnedCheckpoint,
) -> Place:
    """Find where in the base model all names of an adapter are.

    `wanted` are the tensors that have to be there, and `modules` those that the adapter adapts.
    Where the towers agree in names and shapes, its config decides: by the class that it was made
    with, or because it adapts all modules that it targets.

    Raises:
        [`CheckpointError`]: a tensor is not in the base, or nothing tells which tower is meant.
    """
    misfits = {
        place: [name for name, fits in wanted.items() if not place.holds(name, fits, base)]
        for place in _candidates(wanted, config, base)
    }
    fitting = [place for place, missing in misfits.items() if not missing]
    if not fitting:
        place = min(misfits, key=lambda one: len(misfits[one]))
        raise no_place(str(pinned), place.prefix + misfits[place][0], base)
    if len(fitting) > 1:
        complete = [place for place in fitting if _is_complete(place, modules, base, config)]
        fitting = complete or fitting
    if len(fitting) > 1 and wanted:
        raise _ask(pinned, fitting[0])
    return fitting[0]


def no_place(owner: str, name: str, base: Checkpoint) -> CheckpointError:
    """Error for a tensor that the base model has not."""
    return CheckpointError(
        f"{owner}: {name} is not in the base model {base}, or of another shape.",
        "Name the base model that the adapter was trained on with `base_model=REF`.",
    )


def _candidates(
    wanted: Collection[str], config: Mapping[str, Any], base: Checkpoint
) -> list[Place]:
    """Places that the class allows which the adapter was made with, or all if it is unknown."""
    mapping = config.get("auto_mapping")
    said = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if any(map(IN_OPEN_CLIP.match, wanted)):
        prefixes = OPEN_CLIP_PREFIXES.get(str(said), ("", VISUAL))
        return [Place(prefix, in_open_clip=True) for prefix in prefixes]
    known = layout.MODEL_CLASSES.get(str(said))
    if known is None:  # such as SiglipVisionModel
        towers = [prefix for prefix, word in TOWERS.items() if word in str(said)]
        found = [Place(prefix) for prefix in ("", *(towers or TOWERS))]
        words = {name.partition(".")[0] for name in wanted}
        if len(words) == 1 and not layout.is_clip(base.model_config):
            found.append(Place("", outer=f"{words.pop()}."))
        return found
    return [Place(prefix) for prefix in dict.fromkeys((known.flat_prefix, ""))]


def _is_complete(
    place: Place, modules: Collection[str], base: Checkpoint, config: Mapping[str, Any]
) -> bool:
    """Tell whether an adapter has every module of a tower that its config targets.

    True, too, where the config does not list them.
    """
    targets = config.get("target_modules")
    partial = any(config.get(key) for key in ("layers_to_transform", "exclude_modules"))
    if not isinstance(targets, list) or partial or place.in_open_clip:
        return True
    ends = tuple(f".{target}.weight" for target in targets)
    inside = (name for name in base.tensors if name.startswith(place.prefix))
    own = (name.removeprefix(place.prefix) for name in inside if name.endswith(ends))
    return all(name.removesuffix(".weight") in modules for name in own)


def _ask(pinned: PinnedCheckpoint, place: Place) -> CheckpointError:
    classes = "VisionTransformer CLIP" if place.in_open_clip else "CLIPVisionModel CLIPTextModel"
    vision, text = (f'"auto_mapping": {{"base_model_class": "{c}"}}' for c in classes.split())
    copy = "" if pinned.is_local else f"Download it (`hf download {pinned.ref} --local-dir DIR`). "
    return CheckpointError(
        f"{pinned} may be an adapter of the vision tower or of the text tower: its names and"
        " shapes are those of both.",
        f"{copy}In its {CONFIG_FILE} write {vision} for the vision tower, {text} for the text"
        " tower.",
    )
