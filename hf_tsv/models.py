"""Loading of compressed, merged and plain checkpoints as transformers models and pipelines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_tsv import linalg, tsv
from hf_tsv.checkpoints import companions, heads, layout
from hf_tsv.checkpoints.adapters import Adapter
from hf_tsv.checkpoints.files import LocalFiles
from hf_tsv.checkpoints.masks import Masked
from hf_tsv.checkpoints.reader import Checkpoint, digest
from hf_tsv.checkpoints.reference import parse, pin
from hf_tsv.errors import CheckpointError, HfTsvError, RecipeError
from hf_tsv.factors import TaskFactors
from hf_tsv.plan import check_fit
from hf_tsv.progress import first_line, visible_by_default
from hf_tsv.sources import Access, Task, config_of, fetched, open_sources, open_task
from hf_tsv.stream import pick_device

if TYPE_CHECKING:
    from transformers import Pipeline, PreTrainedConfig, PreTrainedModel

ZERO_SHOT = "zero-shot-image-classification"
PIPELINES = {
    ZERO_SHOT: "CLIPModel",
    "image-feature-extraction": "CLIPVisionModel",
    "image-classification": "CLIPForImageClassification",
}
"""Kinds of transformers pipelines that CLIP supports, and the class for each."""


def load_model(
    reference: str | PathLike[str],
    *,
    kind: str | None = None,
    task: str | None = None,
    base_model: str | PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    subfolder: str | None = None,
    progress: bool | None = None,
) -> PreTrainedModel:
    """Load task factors, or any CLIP checkpoint, as a transformers model.

    Parts that a repository lacks come from its base model: everything under task factors, the text
    tower and projections under a fine-tuned vision tower.

    Args:
        reference (`str`): `org/name`, `org/name@revision`, `hf://…` or a folder.
        kind (`str`, *optional*): kind of pipeline, which determines the class; default: the class
            of the checkpoint; for factors that of the base model, or of their task head.
        task (`str`, *optional*): task whose head a classifier gets, from those beside a merge.
        base_model (`str`, *optional*): default: the one named by the factors or the card.
        dtype (`torch.dtype`, *optional*): default: the stored type, or one that holds all of them.
        device (`str`, *optional*): default: cpu.
        token (`str`, *optional*): default: the one the Hub client is logged in with.
        cache_dir (`str` or `Path`, *optional*): default: the Hub client's cache.
        subfolder (`str`, *optional*): folder in the repository; same as `org/name/subfolder`.
        progress (`bool`, *optional*): show a bar; default: on a terminal.

    Returns:
        `transformers.PreTrainedModel`: model in evaluation mode.

    Raises:
        [`HfTsvError`]: it cannot be read, or lacks a part that the kind of pipeline needs.

    Example:
        >>> from transformers import pipeline
        >>> model = load_model("me/clip-sun397-tsv")  # doctest: +SKIP
    """
    access = Access.of(token, cache_dir, subfolder)
    found = _find(reference, kind, task, base_model, access, progress, processor=False)
    return build(found, dtype, device)


def pipeline(
    kind: str,
    /,
    model: str | PathLike[str],
    *,
    task: str | None = None,
    base_model: str | PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    subfolder: str | None = None,
    progress: bool | None = None,
    **kwargs: Any,
) -> Pipeline:
    """Make a transformers pipeline from task factors, or from any CLIP checkpoint.

    Args:
        kind (`str`): `zero-shot-image-classification`, `image-feature-extraction`, or
            `image-classification`.
        model (`str`): see [`load_model`].
        task (`str`, *optional*): task whose head a classifier gets, from those beside a merge.
        base_model (`str`, *optional*): see [`load_model`]; its processor and tokenizer are used if
            the repository has none.
        dtype (`torch.dtype`, *optional*): default: the stored type, or one that holds all of them.
        device (`str`, *optional*): default: cpu.
        token (`str`, *optional*): default: the one the Hub client is logged in with.
        cache_dir (`str` or `Path`, *optional*): default: the Hub client's cache.
        subfolder (`str`, *optional*): folder in the repository; same as `org/name/subfolder`.
        progress (`bool`, *optional*): show a bar; default: on a terminal.
        kwargs: further arguments of `transformers.pipeline`.

    Returns:
        `transformers.Pipeline`: ready to be called.

    Raises:
        [`HfTsvError`]: the kind is none of these, or the repository cannot do it.

    Example:
        >>> classify = pipeline("zero-shot-image-classification", "me/clip-sun397-tsv")
        ... # doctest: +SKIP
    """
    import transformers

    given = {"image_processor", "tokenizer"} <= kwargs.keys()
    access = Access.of(token, cache_dir, subfolder)
    found = _find(model, kind, task, base_model, access, progress, processor=not given)
    with _understood(found.processor):
        if "image_processor" not in kwargs:
            load: Any = transformers.AutoImageProcessor.from_pretrained  # without annotations
            kwargs["image_processor"] = load(found.processor, trust_remote_code=False)
        if found.model_class == "CLIPModel" and "tokenizer" not in kwargs:
            kwargs["tokenizer"] = transformers.AutoTokenizer.from_pretrained(
                found.processor, trust_remote_code=False
            )
    loaded = build(found, dtype, device)
    make: Any = transformers.pipeline  # its overloads want a literal task
    made: Pipeline = make(kind, model=loaded, device=loaded.device, **kwargs)
    return made


@dataclass(frozen=True)
class Found:
    """Local checkpoint or factors, the base if needed, and the model class."""

    item: Task
    base: Checkpoint | None
    model_class: str
    processor: Path | None = None


def _find(
    reference: str | PathLike[str],
    kind: str | None,
    task: str | None,
    base_model: str | PathLike[str] | None,
    access: Access,
    progress: bool | None,
    *,
    processor: bool,
) -> Found:
    if kind is not None:
        _check_pipeline(kind)
    if task is not None:
        kind = _kind_of_head(task, kind)
    text = fspath(reference)
    named = parse(text, access.subfolder)
    item = open_task(pin(named, token=access.token, cache_dir=access.cache_dir))
    check_clip(item)
    item = _headed(item, task)
    model_class = default_class(item) if kind is None else PIPELINES[kind]
    base = None
    own_processor = _has_processor(item, model_class)
    complete = (
        isinstance(item, Checkpoint)
        and not isinstance(item, Masked)
        and not _missing_parts(item, model_class)
    )
    if not complete or (processor and not own_processor):
        base_text = None if base_model is None else fspath(base_model)
        sources = open_sources([text], base_text, access)
        (item,), base = sources.inputs, sources.base
        check_fit(base, [item])
        item = _headed(item, task)
        if model_class == "base":
            model_class = default_class(base)
    check_head(item, model_class)
    check_parts([item] if base is None else [item, base], model_class)
    if processor and not (own_processor or (base and _has_processor(base, model_class))):
        tokenizer = " and tokenizer" if model_class == "CLIPModel" else ""
        raise CheckpointError(
            f"Neither {item} nor its base model has the processor{tokenizer} that {kind} needs.",
            "Save them beside the weights, or pass image_processor=… and tokenizer=….",
        )
    show = visible_by_default() if progress is None else progress
    items = [item] if base is None else [item, base]
    item, *rest = fetched(items, with_companions=items, visible=show)
    base = rest[0] if rest and isinstance(rest[0], Checkpoint) else None
    if isinstance(item, Masked) and base is not None:
        item = item.on(base)
    folder = _folder(item) if own_processor or base is None else _folder(base)
    return Found(item, base, model_class, folder)


def _kind_of_head(task: str, kind: str | None) -> str:
    if task in PIPELINES:
        raise RecipeError(f"{task} is a kind of pipeline, not a task.", f"Write kind={task!r}.")
    if kind not in (None, "image-classification"):
        raise RecipeError(
            f"The head of the task {task!r} does image-classification, not {kind}.",
            "Leave task=… out.",
        )
    return "image-classification"


def _headed(item: Task, task: str | None) -> Task:
    """Add the head of a task, if one is named."""
    if task is None:
        return item
    if isinstance(item, TaskFactors):
        raise CheckpointError(f"{item} holds one task.", "Leave task=… out.")
    return heads.with_head(item, task)


def default_class(item: Task) -> str:
    """Class a checkpoint was saved as; for factors without a task head, that of the base."""
    if isinstance(item, TaskFactors):
        return PIPELINES["image-classification"] if item.head else "base"
    return layout.saved_class(item.config)


def _missing_parts(item: Checkpoint, model_class: str) -> set[str]:
    return set(layout.MODEL_CLASSES[model_class].parts) - layout.towers(item.tensors)


def _has_processor(item: Task, model_class: str) -> bool:
    have = set(companions.present(item.pinned))
    text = model_class == "CLIPModel"
    return bool(have & set(companions.PROCESSOR_FILES)) and (
        not text or bool(have & set(companions.TOKENIZER_FILES))
    )


def check_clip(item: Task) -> None:
    """Refuse models other than CLIP, whose classes are unknown here."""
    if isinstance(item, Adapter):
        raise CheckpointError(
            f"{item} is an adapter.", "Load it with PEFT: PeftModel.from_pretrained(base, …)."
        )
    config = config_of(item)
    if not layout.is_clip(config):
        whole = "`hf-tsv reconstruct` it, then load" if isinstance(item, TaskFactors) else "Load"
        raise CheckpointError(
            f"{item} is not CLIP but {config.get('model_type')!r}.",
            f"{whole} it with transformers' AutoModel.",
        )


def check_whole_clip(base: Checkpoint, what: str) -> None:
    """Refuse to classify images with a base model that cannot.

    Args:
        base ([`Checkpoint`]): W0.
        what (`str`): feature that classifies, for the error.
    """
    if not layout.is_clip(base.config) or not layout.is_full_model(base.tensors):
        raise CheckpointError(
            f"{what} classifies images, and the base model {base} is no CLIPModel.",
            "Name a whole CLIPModel with --base-model.",
        )


def check_head(item: Task, model_class: str) -> None:
    """Refuse a classifier whose head would be random."""
    if model_class == "CLIPForImageClassification" and not item.head:
        kept = heads.tasks_of(item) if isinstance(item, Checkpoint) else []
        raise CheckpointError(
            f"{item} has no classification head, which image-classification needs.",
            f"Choose one of its tasks with task=…: {', '.join(kept)}."
            if kept
            else "Use zero-shot-image-classification with candidate_labels.",
        )


def _check_pipeline(task: str) -> None:
    if task not in PIPELINES:
        raise RecipeError(f"There is no CLIP pipeline {task!r}.", f"Choose {one_of(PIPELINES)}.")


def check_parts(items: Sequence[Task], model_class: str) -> None:
    """Refuse a class for which transformers would have to invent weights."""
    held = set[str]().union(*(layout.towers(item.tensors) for item in items))
    missing = [part for part in layout.MODEL_CLASSES[model_class].parts if part not in held]
    if missing:
        raise CheckpointError(
            f"{model_class} needs {missing[0]}, which {' and '.join(map(str, items))} lack.",
            "Use another task, or a base model that is a whole CLIPModel.",
        )


def close(item: Task) -> None:
    """Close the files of a checkpoint that has been read."""
    item.pinned.files.close()


def _folder(item: Task) -> Path:
    files = item.pinned.files
    assert isinstance(files, LocalFiles)  # fetched before
    return files.root


def build(
    found: Found, dtype: torch.dtype | None, device: str | torch.device | None
) -> PreTrainedModel:
    """Build the transformers model in evaluation mode, and close its files.

    Args:
        found ([`Found`]): checkpoint or factors, base, and class.
        dtype (`torch.dtype`, *optional*): default: the stored type, or one that holds all of them.
        device (`str`, *optional*): default: cpu.
    """
    import transformers

    state = {}
    names = dict.fromkeys([*(found.base.tensors if found.base else ()), *found.item.tensors])
    for name in names:
        own_name = layout.name_in_class(name, found.model_class)
        if own_name is not None:
            state[own_name] = _value(name, found)
    if found.model_class == "CLIPForImageClassification":
        state |= {name: found.item.read(name) for name in found.item.head}
    if dtype is None:
        stored = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
        dtype = reduce(torch.promote_types, stored)
    cls = getattr(transformers, found.model_class)
    model: PreTrainedModel
    with _understood(found.item):
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
        if item is not None:
            close(item)
    if device is not None:
        torch.nn.Module.to(model, pick_device(str(device)))
    return model


@contextmanager
def _understood(item: object) -> Iterator[None]:
    """Turn errors of transformers into one that names the files."""
    try:
        yield
    except (HfTsvError, MemoryError):
        raise
    except Exception as error:  # strange configurations raise a dozen types
        raise CheckpointError(
            f"{item} cannot be loaded with transformers: {first_line(error)}",
            "Its configuration does not describe it; save it again.",
        ) from error


def _check_described(config: PreTrainedConfig, found: Found) -> None:
    """Refuse a config that describes more than the weights: building it can take any memory."""
    tensors: dict[str, Any] = {**(found.base.tensors if found.base else {}), **found.item.tensors}
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
    """Weight of the model: from the checkpoint, the base, or the base and the task's update."""
    item, base = found.item, found.base
    if isinstance(item, Checkpoint):
        if name in item.tensors:
            return item.read(name)
        assert base is not None  # a name that the item lacks comes from the base
        return base.read(name)
    assert base is not None  # factors always have one
    w0 = base.read(name)
    if name not in item.tensors:
        return w0
    item.check_base(name, digest(w0), str(base))
    update = item.update(name)
    if update is None:
        return w0
    weight = (linalg.in_working_precision(w0) + tsv.dense(update)).to(w0.dtype)
    if not weight.isfinite().all():
        raise CheckpointError(f"{item}: {name} does not fit into {w0.dtype} with its update.")
    return weight


def _class_config(found: Found) -> dict[str, Any]:
    """Configuration for the class: of one tower, or of both."""
    item, base = found.item, found.base
    config = companions.without_code(dict(config_of(item)))
    parts = layout.MODEL_CLASSES[found.model_class].config_part
    if parts is not None:
        towers = layout.tower_configs(config)
        if parts not in towers and base is not None:
            towers = layout.tower_configs(base.config)
        return {**towers[parts], "architectures": [found.model_class]}
    if config.get("model_type") != "clip" and base is not None:
        config = base.config
    if found.model_class == PIPELINES["image-classification"]:
        labels = ("id2label", "label2id", "num_labels")
        config = {key: value for key, value in config.items() if key not in labels}
        config |= companions.head_config(config_of(item), item.head)
    return {**config, "architectures": [found.model_class]}


def one_of(names: Mapping[str, object] | Sequence[str]) -> str:
    """List of names as text.

    Example:
        >>> one_of(["a", "b", "c"])
        'a, b or c'
    """
    return (
        " or ".join([", ".join(list(names)[:-1]), list(names)[-1]])
        if len(names) > 1
        else str(next(iter(names)))
    )
