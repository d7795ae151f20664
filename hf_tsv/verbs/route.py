"""The verb `route`: fine-tunes become one model that finds out whose task an image is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hf_tsv.checkpoints import companions, layout
from hf_tsv.checkpoints.formats import heads
from hf_tsv.checkpoints.formats.description import FactorsConfig, Origin
from hf_tsv.checkpoints.formats.routing import CLASSES, RoutedTask, Routing, folder_of
from hf_tsv.checkpoints.formats.task import Task, distinct_names, pinned_entry
from hf_tsv.checkpoints.formats.whole import Checkpoint
from hf_tsv.checkpoints.names import CLASSES_FILE, RECIPE_FILE, ROUTING_FILE, TASKS_FOLDER
from hf_tsv.checkpoints.reference import at_revision, listed
from hf_tsv.checkpoints.sources import Access, Sources
from hf_tsv.checkpoints.storage.tensors import TensorSpec
from hf_tsv.compression import beside
from hf_tsv.compression.building import disk_bytes
from hf_tsv.evaluation import class_names
from hf_tsv.evaluation.class_names import Source
from hf_tsv.linalg.choices import AnyDevice, AnyDtype
from hf_tsv.merging.building import built, follow
from hf_tsv.merging.work import Merge, Merged, prepare, recipe_of
from hf_tsv.models.building import check_clip
from hf_tsv.recipes.compressing import Options, RankRule
from hf_tsv.recipes.images import EvaluationTask
from hf_tsv.recipes.settings import Settings
from hf_tsv.reports import cards
from hf_tsv.reports.routing import RoutedCard, RouteReport
from hf_tsv.routing.rule import LAYER, Rule, chosen_layers, refuse_no_choice, short
from hf_tsv.runs.lifecycle import Run, underway
from hf_tsv.runs.target import Target
from hf_tsv.system import processes
from hf_tsv.system.errors import CheckpointError, public

ROUTABLE = "Routing compares the updates of vision towers, by the singular vectors of each."


@public
def route(
    checkpoints: Sequence[str | PathLike[str]],
    *,
    base_model: str | PathLike[str] | None = None,
    output: str | Path | None = None,
    push_to: str | None = None,
    layers: str | Sequence[str] | None = None,
    temperature: float | None = None,
    threshold: float = Rule.threshold,
    max_tasks: int = Rule.max_tasks,
    classes: Mapping[str, Source] | None = None,
    templates: Sequence[str] = (),
    dtype: AnyDtype = "bfloat16",
    reference_factors: bool = False,
    allow_other_base: bool = False,
    max_shard_size: int | str = Settings.max_shard_size,
    device: AnyDevice | None = None,
    force: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    collection: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    subfolder: str | None = None,
    max_memory: int | str | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
) -> RouteReport:
    """Make one model of fine-tuned CLIPs that finds out by itself which tasks an image belongs to.

    The output is the TSV-Merge of all tasks, with the factors of each task and a description of how
    images are routed beside it. `hf_tsv.load_model` and `hf_tsv.pipeline` route; transformers loads
    the merge.

    Args:
        checkpoints (`Sequence[str]`): `org/name`, `org/name@revision`, `hf://…` or folders, of
            task factors, which are copied, or of whole checkpoints and adapters, which are
            compressed to ⌊k/T⌋ singular vectors.
        layers (`Sequence[str]`, *optional*): globs of the layers that are looked at, such as
            `9.mlp.fc1`; default: queries and both layers of the MLP in the upper two thirds of the
            blocks.
        temperature (`float`, *optional*): divides the sums before the softmax; default: in
            proportion to the number of layers.
        threshold (`float`): score from which a task is chosen.
        max_tasks (`int`): most tasks of an image.
        classes (`Mapping[str, Sequence[str]]`, *optional*): names of the classes of tasks, by the
            name of the task; or a text file (`.txt`) with one a line, or a dataset as in
            [`evaluate`]. Candidate labels of zero-shot requests then help to choose.
        templates (`Sequence[str]`): prompts of these names; default: `a photo of a {}.`
        dtype (`str` or `torch.dtype`): type of the factors that are made.
        reference_factors (`bool`): do not copy task factors that are on the Hub; whoever loads the
            model gets them from there, at their commit.
        base_model, output, push_to, allow_other_base, max_shard_size, device, force, private,
            revision, create_pr, commit_message, collection, token, cache_dir, subfolder,
            max_memory, dry_run, progress: as in [`merge`].

    Returns:
        [`RouteReport`]: what was done.

    Raises:
        [`HfTsvError`]: with the reason and what to do; nothing is written or pushed then.

    Example:
        >>> import hf_tsv
        >>> hf_tsv.route(["me/clip-a-tsv", "me/clip-b-tsv"], output="routed")  # doctest: +SKIP
    """
    started = time.monotonic()
    access = Access.of(token, cache_dir, subfolder)
    with processes.joined() as group:
        if group.rank:
            report: RouteReport = follow(group, device, access)
            return report
        with group.leading():
            references, globs = listed(checkpoints), listed(layers)
            numbers: dict[str, Any] = {"threshold": threshold, "max_tasks": max_tasks}
            numbers |= {"temperature": temperature}
            Rule(**numbers)  # refuses numbers before the checkpoints are looked for
            refuse_no_choice(references)
            options = Options(
                RankRule(rank_fraction=1 / len(references)), dtype,  # type: ignore[arg-type]
                max_shard_size=max_shard_size, allow_other_base=allow_other_base,
            )  # fmt: skip
            target = Target(
                None if output is None else Path(output),
                push_to, force, private, revision, create_pr, commit_message, collection,
            ).checked(token, dry_run=dry_run)  # fmt: skip
            base_ref = None if base_model is None else fspath(base_model)
            settings = Settings(out_format="transformers", max_shard_size=max_shard_size)
            work, sources = prepare(references, base_ref, None, settings, access)
            check_clip(sources.base)
            work = replace(work, allow_other_base=allow_other_base).within(max_memory, sources)
            jobs = [beside.job_of(item, sources, options) for item in sources.inputs]
            elsewhere = [reference_factors and _is_elsewhere(item) for item in sources.inputs]
            held = [beside.held(item, job) for item, job in zip(sources.inputs, jobs, strict=True)]
            ruled = partial(_rule, globs, numbers)
            routing = _routing(sources, ruled(sources.base, held), elsewhere)
            known = class_names.named(classes or {}, routing.names, templates, token)
            if known:
                _refuse_no_texts(sources.base)
            most = map(beside.most_bytes_of, sources.inputs, jobs)
            sizes = dict(zip(routing.names, most, strict=True))
            routing, merged = _with_classes(routing, known), None
            with underway(sources, target, progress) as run:
                if not dry_run:
                    needed = work.plan.shards.total_bytes + _beside(routing, sizes)
                    needed += max((disk_bytes(job) for job in jobs if job), default=0)
                    run.check_space(work.identity(sources, torch.device("cpu")), needed)
                    with built(run, work, device, group, whole={TASKS_FOLDER}) as (folder, merged):
                        routing, sizes = _completed(
                            folder, merged, routing, options, ruled, known, show=run.show
                        )
            done = _report(run, work, merged, routing, sizes)
            done = replace(done, seconds=round(time.monotonic() - started, 3))
            group.dismiss(done)
            return done


def _completed(
    folder: Path,
    done: Merged,
    routing: Routing,
    options: Options,
    ruled: Callable[[Task, Sequence[set[str]]], Rule],
    known: Sequence[EvaluationTask],
    *,
    show: bool,
) -> tuple[Routing, dict[str, int]]:
    """Write what stands beside a merge; return its description, and the bytes of each task.

    The layers are those that are stored as factors, which may be fewer than were planned.
    """
    sources, device = done.sources, done.device
    stored = beside.written(folder, sources, routing.tasks, options, device, show=show)
    held = [beside.factors_of(config) for config in stored]
    routing = replace(routing, rule=ruled(sources.base, held))
    _write_classes(folder, known, device, show=show)
    (folder / ROUTING_FILE).write_text(routing.to_json(), encoding="utf-8")
    written = (config.factors_bytes for config in stored)
    sizes = dict(zip(routing.names, written, strict=True))
    _describe(folder, done, routing, stored, sizes)
    return routing, sizes


def _rule(
    globs: Sequence[str], numbers: Mapping[str, Any], base: Task, held: Sequence[set[str]]
) -> Rule:
    """Rule with the layers that all tasks have, and the user's numbers."""
    return Rule(_layers(globs, base, held), **numbers)


def _is_elsewhere(item: Task) -> bool:
    """Tell whether an input is task factors on the Hub, which need not be copied."""
    return item.description is not None and item.pinned.revision is not None


def _beside(routing: Routing, sizes: Mapping[str, int]) -> int:
    """Bytes of the factors that are stored in the folder."""
    return sum(sizes[task.name] for task in routing.tasks if task.folder is not None)


def _layers(globs: Sequence[str], base: Task, held: Sequence[set[str]]) -> tuple[str, ...]:
    """Layers that are looked at: those wanted whose weights all tasks have as factors."""
    names = (name.removesuffix(".weight") for name in base.tensors if name.endswith(".weight"))
    every = sorted(filter(LAYER.fullmatch, names), key=lambda name: (int(name.split(".")[3]), name))
    common = [name for name in every if all(f"{name}.weight" in own for own in held)]
    wanted = chosen_layers(globs, every)
    lacking = [name for name in wanted if name not in common]
    if not common or (globs and lacking):
        first = short(lacking[0]) if lacking else "layer of the vision tower"
        raise CheckpointError(
            f"Not every task has factors of {first}, so images cannot be compared there.",
            "Routing needs layers that all tasks changed." if common else ROUTABLE,
        )
    return tuple(name for name in wanted if name in common) or tuple(common)


def _routing(sources: Sources, rule: Rule, elsewhere: Sequence[bool]) -> Routing:
    """Description of the tasks, each of a name of its own that a folder can have."""
    given = distinct_names([item.pinned for item in sources.inputs])
    names = heads.file_stems([name.removesuffix("-tsv") for name in given])
    tasks = tuple(
        RoutedTask(
            name,
            None if far else folder_of(name),
            _source(item),
            factors=Origin.of(item.pinned) if far else None,
        )
        for name, item, far in zip(names, sources.inputs, elsewhere, strict=True)
    )
    return Routing(Origin.of(sources.base.pinned), tasks, rule)


def _source(item: Task) -> Origin:
    """Fine-tuned checkpoint behind an input."""
    return Origin.of(item.pinned) if item.description is None else item.description.source


def _refuse_no_texts(base: Checkpoint) -> None:
    """Refuse class names for a model that cannot embed them."""
    if not layout.is_full_model(base.tensors):
        problem = f"The base model {base} has no text tower that could embed names of classes."
        raise CheckpointError(problem, "Omit `classes=`, or name a base model that is whole.")
    if not set(companions.present(base.pinned)) & set(companions.TOKENIZER_FILES):
        problem = f"The base model {base} has no tokenizer, which names of classes need."
        raise CheckpointError(problem, "Omit `classes=`, or save the tokenizer beside it.")


def _with_classes(routing: Routing, known: Sequence[EvaluationTask]) -> Routing:
    """Description with the names of classes that are known."""
    names = {task.name: task.classes for task in known}
    tasks = (replace(task, classes=names.get(task.name, ())) for task in routing.tasks)
    return replace(routing, tasks=tuple(tasks))


def _write_classes(
    folder: Path, known: Sequence[EvaluationTask], device: torch.device, *, show: bool
) -> None:
    """Write the embeddings of class names, if there are any."""
    (folder / CLASSES_FILE).unlink(missing_ok=True)  # of a run that was stopped
    if known:
        embeddings = class_names.embedded(folder, known, device, show=show)
        tensors = {f"{name}{CLASSES}": tensor for name, tensor in embeddings.items()}
        save_file(tensors, folder / CLASSES_FILE)


def _describe(
    folder: Path,
    done: Merged,
    routing: Routing,
    stored: Sequence[FactorsConfig],
    sizes: Mapping[str, int],
) -> None:
    """Write recipe and card."""
    (folder / RECIPE_FILE).write_text(recipe_of(done).to_yaml(), encoding="utf-8")
    base, inputs = done.sources.base, done.sources.inputs
    dtypes = {config.factor_dtype.in_torch for config in stored}
    merged, beside_bytes = done.merge.plan.shards.total_bytes, _beside(routing, sizes)
    card = RoutedCard(
        base=cards.CardInput.of(Origin.of(base.pinned), card=base.pinned.card),
        inputs=[
            cards.CardInput.of(
                Origin.of(item.pinned),
                card=item.pinned.card,
                source=None if item.description is None else item.description.source,
            )
            for item in inputs
        ],
        tasks={task.name: _told(task, sizes[task.name]) for task in routing.tasks},
        rule=routing.rule,
        full_model=layout.is_full_model(base.tensors),
        merged_bytes=merged,
        output_bytes=merged + beside_bytes,
        elsewhere_bytes=sum(sizes.values()) - beside_bytes,
        classifiers=all(config.task_head for config in stored),
        checkpoints_bytes=_checkpoints_bytes(base, inputs),
        dtypes=sorted(dtypes),
        warnings=list(map(done.published, done.warnings)),
    )
    (folder / "README.md").write_text(cards.render(card), encoding="utf-8")


def _checkpoints_bytes(base: Checkpoint, inputs: Sequence[Task]) -> int:
    """Size of as many whole checkpoints, each of the weights of the base model."""
    return len(inputs) * sum(TensorSpec(i.dtype, i.shape).nbytes for i in base.tensors.values())


def _told(task: RoutedTask, size: int) -> dict[str, Any]:
    """Entry of a task in the report."""
    where = None if task.factors is None else at_revision(task.factors.ref, task.factors.revision)
    known = len(task.classes) or None
    return {"folder": task.folder, "factors": where, "bytes": size, "classes": known}


def _report(
    run: Run, planned: Merge, done: Merged | None, routing: Routing, sizes: Mapping[str, int]
) -> RouteReport:
    """Tell what was done, or of a dry run what was planned."""
    base, inputs = run.sources.base, run.sources.inputs
    merged, whole = planned.plan.shards.total_bytes, _checkpoints_bytes(base, inputs)
    total = merged + _beside(routing, sizes)
    embedding = 2 * merged if any(task.classes for task in routing.tasks) else 0  # it is loaded
    return RouteReport(
        output=None if run.target.output is None else str(run.target.output),
        base_model=pinned_entry(base),
        inputs=[pinned_entry(item) for item in inputs],
        tasks={t.name: _told(t, sizes[t.name]) for t in routing.tasks},
        rule=asdict(routing.rule) | {"layers": list(routing.rule.layers)},
        merged_bytes=merged,
        output_bytes=total,
        checkpoints_bytes=whole,
        elsewhere_bytes=sum(sizes.values()) - _beside(routing, sizes),
        ratio=(merged + sum(sizes.values())) / whole,
        seconds=0.0,
        warnings=list(planned.warnings) if done is None else done.warnings,
        download_bytes=run.download_bytes,
        peak_memory_bytes=max(planned.peak_memory(run.sources), embedding),
        timings={} if done is None else done.findings.seconds.rounded(),
        device=None if done is None else done.device.type,
        url=run.url,
        dry_run=done is None,
    )
