"""The verb `inspect`: content of a reference, from headers and small files alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from hf_tsv.checkpoints import layout
from hf_tsv.checkpoints.base_model import SaidBase, lineage, named_by, parents_of, said_by
from hf_tsv.checkpoints.formats.adapter_names import CONFIG_FILE as ADAPTER_CONFIG
from hf_tsv.checkpoints.formats.description import FactorsConfig
from hf_tsv.checkpoints.formats.heads import tasks_of
from hf_tsv.checkpoints.formats.routing import open_routing
from hf_tsv.checkpoints.formats.task import Task
from hf_tsv.checkpoints.names import CONFIG_FILE, RECIPE_FILE
from hf_tsv.checkpoints.opening import InputFormat, format_of, without_base
from hf_tsv.checkpoints.reference import PinnedCheckpoint, card_license, parse, pin
from hf_tsv.checkpoints.storage.files import read_json
from hf_tsv.checkpoints.storage.headers import read_header
from hf_tsv.checkpoints.storage.tensors import Described, TensorInfo, TensorSpec
from hf_tsv.hub import WEIGHT_SUFFIXES
from hf_tsv.merging.plan import treatments
from hf_tsv.recipes.recipe import Recipe
from hf_tsv.recipes.settings import Settings
from hf_tsv.reports.report import Report
from hf_tsv.system.errors import CheckpointError, HfTsvError, public

RECIPE_BYTES = 1_000_000
OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHT = "open_clip_config.json", "visual.conv1.weight"
LONGEST_TEXT = 200  # characters shown of a value from a configuration


@dataclass(frozen=True, repr=False)
class InspectReport(Report):
    """Content of a checkpoint, a merge, or task factors.

    Args:
        ref (`str`): repository id or folder.
        revision (`str`, *optional*): commit sha; None for a folder.
        kind (`str`): `checkpoint`, `merge`, `mask`, `factors`, `adapter`, or `other`.
        model_class (`str`, *optional*): class that saved its config.json.
        model_type (`str`, *optional*): `model_type` of that.
        layout (`str`, *optional*): naming scheme of its tensors: `transformers`, `open_clip`,
            `peft`, or `task factors`.
        base_model (`list[str]`): models it says it was fine-tuned or made from.
        license (`str`, *optional*): license in its card.
        files (`dict[str, int]`): bytes of each weight file.
        parameters (`int`): number of values in all tensors.
        dtypes (`dict[str, dict[str, int]]`): `tensors` and `bytes` by type.
        parts (`dict[str, dict[str, int]]`): `tensors`, `parameters` and `bytes` by tower or
            projection.
        tensors (`dict[str, dict]`): `shape`, `dtype` and `bytes`; for checkpoints that are no merge
            the treatment by `merge` and its `reason`; for factors how it is `stored`, `rank`,
            `numerical_rank` and `energy`.
        recipe (`dict`, *optional*): inputs and settings of a merge.
        factors (`dict`, *optional*): origin, rule, type, bytes and error of task factors.
        heads (`list[str]`): tasks whose heads are beside a merge.
        routing (`dict`, *optional*): `tasks`, with the `folder` and `source` of each, and `rule` of
            a merge that routes images.
        adapter (`dict`, *optional*): `rank`, `target_modules` and `alpha` of an adapter.
        unknown (`list[str]`): facts that headers cannot tell.
        lineage (`list[dict]`): models that it names as parents. Each has `ref`, its own `parents`,
            which are looked up if this model is on the Hub, and a `reason` if those are not told.
    """

    ref: str
    revision: str | None
    kind: str
    model_class: str | None = None
    model_type: str | None = None
    layout: str | None = None
    base_model: list[str] = field(default_factory=list)
    license: str | None = None
    files: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    dtypes: dict[str, dict[str, int]] = field(default_factory=dict)
    parts: dict[str, dict[str, int]] = field(default_factory=dict)
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    recipe: dict[str, Any] | None = None
    factors: dict[str, Any] | None = None
    heads: list[str] = field(default_factory=list)
    routing: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None
    unknown: list[str] = field(default_factory=list)
    lineage: list[dict[str, Any]] = field(default_factory=list)


@public
def inspect(
    reference: str | PathLike[str],
    *,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    subfolder: str | None = None,
) -> InspectReport:
    """Describe the content of a reference from headers and small files, without its weights.

    The models that a repository descends from are looked up by their cards, a request or two each;
    those of a folder are only named.

    Args:
        reference (`str`): `org/name`, `org/name@revision`, `hf://…` or a folder.
        token, cache_dir, subfolder: as in [`merge`].

    Returns:
        [`InspectReport`]: known facts, and a list of unknown ones.

    Raises:
        [`HfTsvError`]: there is no such repository or folder.

    Example:
        >>> import hf_tsv
        >>> hf_tsv.inspect("org/clip-a").dtypes  # doctest: +SKIP
    """
    cache = None if cache_dir is None else str(cache_dir)
    pinned = pin(parse(fspath(reference), subfolder), token=token, cache_dir=cache)
    with closing(pinned.files):
        report, names = _of_any_form(pinned), named_by(pinned)

    def look_up(name: str) -> list[str]:
        return parents_of(pin(parse(f"hf://{name}"), token=token, cache_dir=cache))

    # Without a name in card or config it is that of a folder, for which no Hub is asked.
    on_hub = names and not pinned.is_local
    descent = lineage(pinned.ref, names or report.base_model, look_up if on_hub else None)
    return replace(report, lineage=[asdict(ancestor) for ancestor in descent])


def _of_any_form(pinned: PinnedCheckpoint) -> InspectReport:
    """Report on what a reference holds, without the models it descends from."""
    form = format_of(pinned)
    if form.needs_base:
        return _of_other(pinned, form, "An adapter is read together with its base model.")
    try:
        opened = form.open(pinned, without_base)
    except CheckpointError as error:
        if form.layout is not None:  # its tensors alone say nothing
            raise
        return _of_other(pinned, None, error.message)
    if opened.description is not None:
        return _of_factors(pinned, form, opened, opened.description)
    return _of_checkpoint(pinned, form, opened)


def _of_checkpoint(pinned: PinnedCheckpoint, form: InputFormat, opened: Task) -> InspectReport:
    infos, head = _infos(opened.tensors), _infos(opened.head)
    tensors: dict[str, dict[str, Any]] = {}
    recipe, unknown = _recipe(pinned)
    kind = "merge" if opened.is_whole and recipe else form.name
    for weight in treatments(opened, Settings()):
        entry = tensors[weight.label] = _described(infos[weight.names[0]])
        if kind != "merge":  # which says itself how it was made
            entry["merge"] = weight.treatment
            entry |= {"reason": weight.reason} if weight.reason else {}
    for name, info in head.items():
        tensors[name] = {**_described(info), "merge": "left out", "reason": "a task head"}
    config, routing = opened.model_config, open_routing(pinned)
    clip = layout.is_clip(config)
    if not clip:
        unknown.append(f"Not CLIP but {config['model_type']!r}: generic layout.")
    model_class = layout.saved_class(config) if clip else _architecture(config)
    known = {"kind": kind, "model_class": model_class, "layout": form.layout or opened.format}
    more = {"tensors": tensors, "recipe": recipe, "heads": tasks_of(opened), "unknown": unknown}
    more["routing"] = None if routing is None else asdict(routing)
    return _report(pinned, opened.says_base(), {**infos, **head}, config, **known, **more)


def _of_factors(
    pinned: PinnedCheckpoint, form: InputFormat, opened: Task, config: FactorsConfig
) -> InspectReport:
    kept = sum(weight.bytes for weight in config.weights.values())
    infos = {n: TensorInfo("", w.dtype, w.shape, 0, w.bytes) for n, w in config.weights.items()}
    told = ("stored", "rank", "numerical_rank", "energy")
    tensors = {
        name: {**_described(infos[name]), **{key: getattr(weight, key) for key in told}}
        for name, weight in config.weights.items()
    }
    factors = {
        "source": {"ref": config.source.ref, "revision": config.source.revision},
        "base_model": {"ref": config.base_model.ref, "revision": config.base_model.revision},
        "rank_rule": dict(config.rank_rule),
        "factor_dtype": config.factor_dtype.name,
        "bytes": kept,
        "checkpoint_bytes": config.checkpoint_bytes,
        "ratio": kept / config.checkpoint_bytes if config.checkpoint_bytes else 0.0,
        "update_error": config.update_error,
        "task_head": list(config.task_head),
    }
    said, model_class = opened.says_base(), layout.saved_class(config.model_config)
    known = {"kind": form.name, "model_class": model_class, "layout": form.layout}
    more = {"tensors": tensors, "factors": factors}
    return _report(pinned, said, infos, config.model_config, **known, **more)


def _of_other(pinned: PinnedCheckpoint, form: InputFormat | None, why: str) -> InspectReport:
    """Report on what is not opened here, from safetensors headers; pickles stay unknown."""
    unknown = [why]
    infos: dict[str, TensorInfo] = {}
    config: dict[str, Any] = {}
    if pinned.files.size(CONFIG_FILE) is not None:
        try:
            config = read_json(pinned.files, CONFIG_FILE, str(pinned))
        except CheckpointError as broken:
            unknown.append(broken.message)
    for name in _weight_files(pinned):
        if not name.endswith(".safetensors"):
            why = "only loading it would tell what it holds, and it is not loaded here"
            unknown.append(f"{name} is a pickle: {why}.")
            continue
        try:
            for key, info in read_header(pinned.files, name, str(pinned)).items():
                infos[f"{key} in {name}" if key in infos else key] = info
        except CheckpointError as broken:
            unknown.append(broken.message)
    open_clip = pinned.files.size(OPEN_CLIP_CONFIG) is not None or OPEN_CLIP_WEIGHT in infos
    if form is None:
        said, kind, scheme = said_by(pinned), "other", "open_clip" if open_clip else None
    else:
        said, kind, scheme = form.says_base(pinned), form.name, form.layout
    if not infos and not _weight_files(pinned):
        raise CheckpointError(
            f"{pinned} has no model: there are no weight files.", "Check the path."
        )
    tensors = {name: _described(info) for name, info in sorted(infos.items())}
    known = {"kind": kind, "layout": scheme, "unknown": list(dict.fromkeys(unknown))}
    if pinned.files.size(ADAPTER_CONFIG) is not None:
        known |= _adapter(read_json(pinned.files, ADAPTER_CONFIG, str(pinned)))
    return _report(pinned, said, infos, config, tensors=tensors, **known)


def _adapter(config: Mapping[str, Any]) -> dict[str, Any]:
    """Class, rank and modules of an adapter, from its configuration."""
    modules, mapping = config.get("target_modules"), config.get("auto_mapping")
    names = modules if isinstance(modules, list) else [modules]
    told = {"rank": config.get("r"), "alpha": config.get("lora_alpha")}
    return {
        "model_class": _text(
            (mapping if isinstance(mapping, dict) else {}).get("base_model_class")
        ),
        "adapter": {**told, "target_modules": sorted({_text(n) or "?" for n in names})},
    }


def _weight_files(pinned: PinnedCheckpoint) -> Sequence[str]:
    return [name for name in pinned.files.names() if name.endswith(WEIGHT_SUFFIXES)]


def _report(
    pinned: PinnedCheckpoint,
    said: SaidBase,
    infos: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    **known: Any,
) -> InspectReport:
    """Report with origin, sizes by file, type and part, and what else is known."""
    dtypes: dict[str, dict[str, int]] = {}
    parts: dict[str, dict[str, int]] = {}
    for name, info in infos.items():
        by_type = dtypes.setdefault(info.dtype.name, {"tensors": 0, "bytes": 0})
        none = {"tensors": 0, "parameters": 0, "bytes": 0}
        by_part = parts.setdefault(name.partition(".")[0], none)
        for counts in (by_type, by_part):
            counts["tensors"] += 1
            counts["bytes"] += info.nbytes
        by_part["parameters"] += math.prod(info.shape)
    return InspectReport(
        ref=pinned.ref,
        revision=pinned.revision,
        base_model=list(said.names),
        license=card_license(pinned.card),
        model_type=_text(config.get("model_type")),
        files={name: pinned.files.size(name) or 0 for name in _weight_files(pinned)},
        parameters=sum(part["parameters"] for part in parts.values()),
        dtypes=dtypes,
        parts=parts,
        **known,
    )


def _infos(tensors: Mapping[str, Described]) -> dict[str, TensorInfo]:
    """Type, shape and size of weights that may be stored in another form."""
    specs = {name: TensorSpec(info.dtype, info.shape) for name, info in tensors.items()}
    return {name: TensorInfo("", s.dtype, s.shape, 0, s.nbytes) for name, s in specs.items()}


def _described(info: TensorInfo) -> dict[str, Any]:
    return {"shape": list(info.shape), "dtype": info.dtype.name, "bytes": info.nbytes}


def _recipe(pinned: PinnedCheckpoint) -> tuple[dict[str, Any] | None, list[str]]:
    """Recipe beside the weights, or None and the problem with it."""
    size = pinned.files.size(RECIPE_FILE)
    if size is None:
        return None, []
    if size > RECIPE_BYTES:
        return None, [f"{RECIPE_FILE} is too large and is not read."]
    try:
        return asdict(Recipe.from_yaml(pinned.files.read(RECIPE_FILE).decode(), RECIPE_FILE)), []
    except UnicodeDecodeError:
        return None, [f"{RECIPE_FILE} is not UTF-8."]
    except HfTsvError as error:
        return None, [error.message]


def _architecture(config: Mapping[str, Any]) -> str | None:
    named = config.get("architectures")
    return _text(named[0]) if isinstance(named, list) and named else None


def _text(value: object) -> str | None:
    return value[:LONGEST_TEXT] if isinstance(value, str) else None
