"""Loading of compressed, merged and plain checkpoints as transformers models and pipelines."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_tsv.checkpoints import companions, layout
from hf_tsv.checkpoints.fit import check_fit
from hf_tsv.checkpoints.formats import heads
from hf_tsv.checkpoints.formats.routing import open_routing
from hf_tsv.checkpoints.formats.task import Task
from hf_tsv.checkpoints.formats.whole import Checkpoint
from hf_tsv.checkpoints.opening import format_of, open_base
from hf_tsv.checkpoints.reference import PinnedCheckpoint, parse, pin
from hf_tsv.checkpoints.sources import Access, fetched, open_sources
from hf_tsv.linalg.choices import AnyDevice, AnyDtype
from hf_tsv.models import building
from hf_tsv.models.building import PIPELINES, Found, Kind
from hf_tsv.system.errors import CheckpointError, RecipeError, public
from hf_tsv.system.progress import visible_by_default
from hf_tsv.system.text import one_of

if TYPE_CHECKING:
    from transformers import Pipeline, PreTrainedModel


T = TypeVar("T", bound=Task)


@public
def load_model(  # noqa: PLR0913  (what users may ask for)
    reference: str | PathLike[str],
    *,
    kind: Kind | None = None,
    head: str | None = None,
    base_model: str | PathLike[str] | None = None,
    dtype: AnyDtype | None = None,
    device: AnyDevice | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    subfolder: str | None = None,
    progress: bool | None = None,
) -> PreTrainedModel:
    """Load task factors, or any CLIP checkpoint, as a transformers model.

    Parts that a repository lacks come from its base model: everything under task factors, the text
    tower and projections under a fine-tuned vision tower. An output of [`route`] sends each image
    through the tower of the tasks it belongs to; `model.route(pixel_values)` says which.

    Args:
        reference (`str`): `org/name`, `org/name@revision`, `hf://…` or a folder.
        kind (`str`, *optional*): kind of pipeline, which determines the class; default: the class
            of the checkpoint; for factors that of the base model, or of their task head.
        head (`str`, *optional*): name of the classifier's head, from those beside a merge.
        base_model (`str`, *optional*): default: the one named by the factors or the card.
        dtype (`torch.dtype` or `str`, *optional*): `"bfloat16"`, `"bf16"` and so on; default
            and `"auto"`: the stored type, or one that holds all of them.
        device (`str`, `int` or `torch.device`, *optional*): `"cuda:1"`, `0` (the first
            accelerator), `-1` (the CPU), `"auto"` (the best there is); default: the CPU.
        token, cache_dir, subfolder, progress: as in [`merge`].

    Returns:
        `transformers.PreTrainedModel`: model in evaluation mode.

    Raises:
        [`HfTsvError`]: it cannot be read, or lacks a part that the kind of pipeline needs.

    Example:
        >>> from transformers import pipeline
        >>> model = load_model("me/clip-sun397-tsv")  # doctest: +SKIP
    """
    access = Access.of(token, cache_dir, subfolder)
    found = _find(reference, kind, head, base_model, access, progress, processor=False)
    return _built(found, dtype, device, base_model, access, progress)


@public
def pipeline(  # noqa: PLR0913  (what users may ask for)
    task: Kind,
    model: str | PathLike[str],
    *,
    head: str | None = None,
    base_model: str | PathLike[str] | None = None,
    dtype: AnyDtype | None = None,
    device: AnyDevice | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    subfolder: str | None = None,
    progress: bool | None = None,
    **kwargs: Any,
) -> Pipeline:
    """Make a transformers pipeline from task factors, or from any CLIP checkpoint.

    Zero-shot answers of an output of [`route`] name the tasks of their image, as `tasks`; in
    `image-classification` the head of one of them answers, named as `task`.

    Args:
        task (`str`): `zero-shot-image-classification`, `image-feature-extraction`, or
            `image-classification`.
        model (`str`): reference, as in [`load_model`], like all that follow it.
        base_model (`str`, *optional*): its processor and tokenizer are used if the repository has
            none.
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
    found = _find(model, task, head, base_model, access, progress, processor=not given)
    with building.understood(found.processor):
        if "image_processor" not in kwargs:
            load: Any = transformers.AutoImageProcessor.from_pretrained  # without annotations
            kwargs["image_processor"] = load(found.processor, trust_remote_code=False)
        if found.model_class == "CLIPModel" and "tokenizer" not in kwargs:
            kwargs["tokenizer"] = transformers.AutoTokenizer.from_pretrained(
                found.processor, trust_remote_code=False
            )
    loaded = _built(found, dtype, device, base_model, access, progress)
    if found.routing is not None:
        from hf_tsv.models import routed_pipelines

        kwargs = {"pipeline_class": routed_pipelines.CLASSES.get(task), **kwargs}
    make: Any = transformers.pipeline  # its overloads want a literal task
    made: Pipeline = make(task, model=loaded, device=loaded.device, **kwargs)
    return made


def _find(
    reference: str | PathLike[str],
    kind: str | None,
    head: str | None,
    base_model: str | PathLike[str] | None,
    access: Access,
    progress: bool | None,
    *,
    processor: bool,
) -> Found:
    if kind is not None and kind not in PIPELINES:
        raise RecipeError(f"There is no CLIP pipeline {kind!r}.", f"Choose {one_of(PIPELINES)}.")
    if head is not None:
        kind = _kind_of_head(head, kind)
    text = fspath(reference)
    pinned = pin(parse(text, access.subfolder), token=access.token, cache_dir=access.cache_dir)
    routing = open_routing(pinned)
    if routing is not None and head is not None:
        problem = f"{pinned} routes images, and each image chooses its head."
        raise CheckpointError(problem, "Omit `head=`, or load one of its tasks.")
    form = format_of(pinned).task
    if not form.loads_as_model:
        raise CheckpointError(f"{pinned} {form.says}.", form.loading)
    wanted = None if kind is None else PIPELINES[kind]
    item, base, model_class = _complete(pinned, head, wanted, processor=processor) or _on_base(
        text, head, wanted, None if base_model is None else fspath(base_model), access
    )
    own_processor = _has_processor(item, model_class)
    items = [item] if item is base else [item, base]
    if routing is None:  # else the heads are those of its tasks
        building.check_head(item, model_class)
    building.check_parts(items, model_class)
    if processor and not (own_processor or _has_processor(base, model_class)):
        tokenizer = " and tokenizer" if model_class == "CLIPModel" else ""
        raise CheckpointError(
            f"Neither {item} nor its base model has the processor{tokenizer} that {kind} needs.",
            "Save them beside the weights, or pass image_processor=… and tokenizer=….",
        )
    show = visible_by_default() if progress is None else progress
    files = fetched(items, companions_of=items, visible=show)
    local = base.reading_from(files[-1])
    item = local if item is base else item.reading_from(files[0])
    return Found(item, local, model_class, files[0 if own_processor else -1].folder, routing)


def _built(
    found: Found,
    dtype: AnyDtype | None,
    device: AnyDevice | None,
    base_model: str | PathLike[str] | None,
    access: Access,
    progress: bool | None,
) -> PreTrainedModel:
    """The model; one that routes its images where the reference says so."""
    if found.routing is None:
        return building.build(found, dtype, device)
    from hf_tsv.models.routing import routed

    base = None if base_model is None else fspath(base_model)
    show = visible_by_default() if progress is None else progress
    return routed(found, found.routing, dtype, device, base, access, show=show)


def _complete(
    pinned: PinnedCheckpoint, head: str | None, wanted: str | None, *, processor: bool
) -> tuple[Task, Checkpoint, str] | None:
    """A checkpoint that has everything, as its own base, and its class; None: it needs a base."""
    if not format_of(pinned).task.is_whole:
        return None
    whole = open_base(pinned)
    building.check_clip(whole)
    whole = _headed(whole, head)
    model_class = wanted or layout.saved_class(whole.model_config)
    lacking = processor and not _has_processor(whole, model_class)
    lacking = lacking or bool(building.missing_parts([whole], model_class))
    return None if lacking else (whole, whole, model_class)


def _on_base(
    text: str, head: str | None, wanted: str | None, base_text: str | None, access: Access
) -> tuple[Task, Checkpoint, str]:
    """A fine-tune, its base model, and the class of the two."""
    sources = open_sources([text], base_text, access)
    (item,), base = sources.inputs, sources.base
    building.check_clip(item)
    check_fit(base, [item])
    model_class = wanted or item.model_class or layout.saved_class(base.model_config)
    return _headed(item, head), base, model_class


def _kind_of_head(head: str, kind: str | None) -> str:
    if head in PIPELINES:
        raise RecipeError(f"{head} is a kind of pipeline, not a head.", f"Write `kind={head!r}`.")
    if kind not in (None, "image-classification"):
        raise RecipeError(
            f"The head {head!r} does image-classification, not {kind}.", "Omit `head=`."
        )
    return "image-classification"


def _headed(item: T, head: str | None) -> T:
    """Add a head, if one is named."""
    if head is None:
        return item
    if item.description is not None:
        raise CheckpointError(f"{item} holds one task.", "Omit `head=`.")
    return heads.with_head(item, head)


def _has_processor(item: Task, model_class: str) -> bool:
    have = set(companions.present(item.pinned))
    text = model_class != "CLIPModel" or not have.isdisjoint(companions.TOKENIZER_FILES)
    return text and not have.isdisjoint(companions.PROCESSOR_FILES)
