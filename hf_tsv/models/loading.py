"""Loading of compressed, merged and plain checkpoints as transformers models and pipelines."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_tsv.checkpoints import companions
from hf_tsv.checkpoints.fit import check_fit
from hf_tsv.checkpoints.formats import heads
from hf_tsv.checkpoints.formats.factors import Factors
from hf_tsv.checkpoints.formats.masks import Masked
from hf_tsv.checkpoints.formats.task import Task
from hf_tsv.checkpoints.formats.whole import Checkpoint
from hf_tsv.checkpoints.opening import open_task
from hf_tsv.checkpoints.reference import parse, pin
from hf_tsv.checkpoints.sources import Access, fetched, open_sources
from hf_tsv.checkpoints.storage.files import LocalFiles
from hf_tsv.models.building import (
    PIPELINES,
    Found,
    build,
    check_clip,
    check_head,
    check_parts,
    default_class,
    missing_parts,
    understood,
)
from hf_tsv.system.errors import CheckpointError, RecipeError
from hf_tsv.system.progress import visible_by_default
from hf_tsv.system.text import one_of

if TYPE_CHECKING:
    from transformers import Pipeline, PreTrainedModel


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
    with understood(found.processor):
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
        and not missing_parts(item, model_class)
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
    if isinstance(item, Factors):
        raise CheckpointError(f"{item} holds one task.", "Leave task=… out.")
    return heads.with_head(item, task)


def _has_processor(item: Task, model_class: str) -> bool:
    have = set(companions.present(item.pinned))
    text = model_class == "CLIPModel"
    return bool(have & set(companions.PROCESSOR_FILES)) and (
        not text or bool(have & set(companions.TOKENIZER_FILES))
    )


def _check_pipeline(task: str) -> None:
    if task not in PIPELINES:
        raise RecipeError(f"There is no CLIP pipeline {task!r}.", f"Choose {one_of(PIPELINES)}.")


def _folder(item: Task) -> Path:
    files = item.pinned.files
    assert isinstance(files, LocalFiles)  # fetched before
    return files.root
