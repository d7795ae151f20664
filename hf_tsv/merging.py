"""The verb `merge`: from references to a merged checkpoint in a folder or on the Hub."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from os import PathLike, fspath
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch

from hf_tsv import cards, journal, memory, processes, stream
from hf_tsv.checkpoints import companions, layout
from hf_tsv.checkpoints.reference import PinnedCheckpoint
from hf_tsv.checkpoints.writer import ShardWriter, check_free_space, disk_errors
from hf_tsv.costs import Parallelism, fitting, memory_size, operations, peak_memory
from hf_tsv.delivery import Target, final_folder, push
from hf_tsv.errors import CheckpointError, HfTsvError, LostProcessError, OutputError, RecipeError
from hf_tsv.factors import Origin, TaskFactors
from hf_tsv.findings import Finding, Findings
from hf_tsv.plan import MergePlan, make_plan
from hf_tsv.processes import Processes
from hf_tsv.progress import bar, logger, visible_by_default
from hf_tsv.recipe import (
    RECIPE_FILE,
    PinnedInput,
    Recipe,
    Settings,
    check_number,
    current_versions,
)
from hf_tsv.sources import Sources, Task, equals_base, open_sources, pinned_entry

LIBRARIES = 64_000_000
"""Bytes of the libraries that are loaded when the first weight is computed."""

SAME_UPDATE = 0.999
"""Cosine from which two updates are one checkpoint under two names."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, or with `dry_run` would do.

    Args:
        output (`str`, *optional*): the folder written, if it is kept.
        base_model (`dict[str, str | None]`): `ref` and `revision` of W0.
        inputs (`list[dict[str, str | None]]`): the same of every task.
        weights (`dict[str, int]`): tensors `decomposed`, `averaged` (or summed), `copied`.
        output_bytes (`int`): size of the weight files.
        seconds (`float`): wall time.
        warnings (`list[str]`): what the user should know.
        method (`str`): see [`Settings`].
        treatments (`dict[str, dict]`): per weight its treatment, rank and reason.
        left_out (`dict[str, list[str]]`): task heads not merged, by checkpoint.
        download_bytes (`int`): fetched from the Hub; what the cache held does not count.
        exact_decompositions (`int`): that took a full SVD: all with `precision="exact"`, else those
            that failed the check.
        peak_memory_bytes (`int`): estimate, on top of the interpreter and its libraries.
        timings (`dict[str, float]`): seconds `reading`, `waiting` for reads and writes,
            `computing` and `writing`, over all weights; those of each are in `treatments`.
        device (`str`, *optional*): type of device computed on.
        url (`str`, *optional*): commit or pull request on the Hub.
        dry_run (`bool`): nothing was written.
    """

    output: str | None
    base_model: dict[str, str | None]
    inputs: list[dict[str, str | None]]
    weights: dict[str, int]
    output_bytes: int
    seconds: float
    warnings: list[str]
    method: str
    treatments: dict[str, dict[str, Any]]
    left_out: dict[str, list[str]]
    download_bytes: int
    peak_memory_bytes: int
    exact_decompositions: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    device: str | None = None
    url: str | None = None
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return asdict(self)


@dataclass(frozen=True)
class Job:
    """A merge whose references are resolved and whose headers fit.

    Args:
        sources ([`Sources`]): base model and tasks.
        scales (`tuple[float, ...]`): factor of each task's update.
        settings ([`Settings`]): how to merge.
        plan ([`MergePlan`]): which weight gets which treatment.
        warnings (`list[str]`): so far.
        expected (`tuple[str | None, ...]`): fingerprints of local folders in a recipe; base last.
        recipe_device (`str`, *optional*): type of device in a recipe.
        head ([`TaskFactors`], *optional*): whose task head the output gets.
        verb (`str`): what is done, for the bar.
        max_memory (`int`, *optional*): bytes each process may use.
        parallelism ([`Parallelism`]): what fits into them.
    """

    sources: Sources
    scales: tuple[float, ...]
    settings: Settings
    plan: MergePlan
    warnings: list[str]
    expected: tuple[str | None, ...]
    recipe_device: str | None = None
    head: TaskFactors | None = None
    verb: str = "Merging"
    max_memory: int | None = None
    parallelism: Parallelism = field(default_factory=Parallelism)

    def within(self, max_memory: int | None) -> Job:
        """The same job with as much parallelism as memory allows."""
        used = memory.resident() + LIBRARIES
        found = fitting(self.plan.weights, torch.get_num_threads(), max_memory, used)
        return replace(self, max_memory=max_memory, parallelism=found)

    def to_json(self, device: torch.device) -> dict[str, Any]:
        """Everything that decides about the bytes of the result."""
        return {
            "verb": self.verb,
            "base_model": _identity(self.sources.base),
            "inputs": [_identity(item) for item in self.sources.inputs],
            "weights": self.scales,
            "settings": asdict(self.settings),
            "tensors": {n: [str(t.dtype), t.shape] for n, t in self.plan.specs.items()},
            "versions": current_versions(),
            "device": device.type,
        }


def _identity(item: Task) -> dict[str, Any]:
    """Which commit; or which folder, and size and time of change of its files."""
    entry: dict[str, Any] = {**pinned_entry(item)}
    if item.pinned.is_local:
        root = Path(item.pinned.ref).expanduser()
        stats = {name: (root / name).stat() for name in item.needed_files}
        entry["files"] = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    return entry


@dataclass(frozen=True)
class _Assignment:
    """What the other processes need to know.

    Args:
        references (`tuple[str, ...]`): the tasks, pinned.
        base (`str`): the base model, pinned.
        plan ([`MergePlan`]): of all weights.
        scales (`tuple[float, ...]`): factor of each task's update.
        settings ([`Settings`]): how to merge.
        max_memory (`int`, *optional*): bytes each process may use.
        work (`Path`): the folder under construction.
        shares (`list[list[str]]`): labels of the weights of each process.
    """

    references: tuple[str, ...]
    base: str
    plan: MergePlan
    scales: tuple[float, ...]
    settings: Settings
    max_memory: int | None
    work: Path
    shares: list[list[str]]


Describe = Callable[[Path, Job, Target, Findings, Sequence[str], torch.device], None]
"""Writes what goes beside the checkpoint: where it comes from, and its card."""


def merge(
    checkpoints: str | PathLike[str] | Sequence[str | PathLike[str]] = (),
    *,
    base_model: str | PathLike[str] | None = None,
    output: str | Path | None = None,
    push_to: str | None = None,
    recipe: str | Path | Recipe | None = None,
    method: str = Settings.method,
    orthogonalizer: str = Settings.orthogonalizer,
    precision: str = Settings.precision,
    alpha: float = Settings.alpha,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    rank_fraction: float | None = None,
    exclude: str | Sequence[str] = Settings.exclude,
    qkv: str = Settings.qkv,
    dtype: str | None = None,
    max_shard_size: int | str = Settings.max_shard_size,
    device: str | None = None,
    force: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    max_memory: int | str | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
) -> MergeReport:
    """Merge fine-tuned CLIP checkpoints into one multi-task checkpoint (TSV-Merge).

    Args:
        checkpoints (`Sequence[str]`): `org/name`, `org/name@revision`, `hf://…` or folders, of
            whole checkpoints or of task factors, which need no decomposition.
        base_model (`str`, *optional*): W0; default: the one the checkpoints' cards agree on.
        output (`str` or `Path`, *optional*): folder to write.
        push_to (`str`, *optional*): repository to upload to.
        recipe (`str`, `Path` or [`Recipe`], *optional*): repeat a merge; instead of
            `checkpoints`, `base_model` and the settings.
        method (`str`): `tsv`, `low-rank`, `orthogonal`, `task-arithmetic` or `average`.
        orthogonalizer (`str`): `procrustes` or `whitening`; the same result up to rounding, and
            with `precision="fast"` the same computation.
        precision (`str`): `fast`: by Gram matrices in float64, each result checked, with a full SVD
            of what fails the check; `exact`: full float64 SVDs only.
        alpha (`float`): α, scale of the merged update.
        weights (`Sequence[float]`, *optional*): factor of each task's update.
        rank (`int`, *optional*): triplets kept of each task; default ⌊k/T⌋.
        rank_fraction (`float`, *optional*): the same as a share of k.
        exclude (`Sequence[str]`): globs of weights that are averaged instead.
        qkv (`str`): `split` or `fused` attention projections.
        dtype (`str`, *optional*): of the output; default as the base.
        max_shard_size (`int` or `str`): bytes of an output file, or `"5GB"`.
        device (`str`, *optional*): default: the one accelerate chooses.
        force (`bool`): replace an output folder that hf-tsv wrote.
        private (`bool`, *optional*): make a new repository private.
        revision (`str`, *optional*): branch to push to.
        create_pr (`bool`): push as a pull request.
        commit_message (`str`, *optional*): of the upload.
        token (`str`, *optional*): default: the one the Hub client is logged in with.
        cache_dir (`str` or `Path`, *optional*): default: the Hub client's cache.
        max_memory (`int` or `str`, *optional*): bytes the process may use, or `"2GB"`; less goes
            on at a time then.
        dry_run (`bool`): plan only; touches neither disk nor Hub.
        progress (`bool`, *optional*): show bars; default: on a terminal.

    Returns:
        [`MergeReport`]: what was done; the same in every process of a launch.

    Raises:
        [`HfTsvError`]: with the reason and what to do; nothing is written or pushed then.

    Example:
        >>> import hf_tsv
        >>> hf_tsv.merge(["org/clip-a", "org/clip-b"], output="merged")  # doctest: +SKIP
    """
    started = time.monotonic()
    cache = None if cache_dir is None else str(cache_dir)
    with processes.joined() as group:
        if group.rank:
            done: MergeReport = follow(group, device, token, cache)
            return done
        with group.leading():
            show = visible_by_default() if progress is None else progress
            references = _listed(checkpoints)
            base_ref = None if base_model is None else fspath(base_model)
            target = Target(
                None if output is None else Path(output),
                push_to, force, private, revision, create_pr, commit_message,
            )  # fmt: skip
            settings = Settings(
                method, orthogonalizer, alpha, rank, rank_fraction,  # type: ignore[arg-type]
                tuple(_listed(exclude)), qkv, dtype, max_shard_size, precision,  # type: ignore[arg-type]
            )  # fmt: skip
            named = references or base_ref is not None or weights is not None
            if recipe is not None and (named or settings != Settings()):
                raise RecipeError(
                    "A recipe already names the checkpoints and every setting.",
                    "Give a recipe, or checkpoints and settings.",
                )
            if recipe is not None and not isinstance(recipe, Recipe):
                recipe = Recipe.load(recipe)
            target = target.checked(token, dry_run=dry_run)
            if recipe is not None:
                job = _job_of_recipe(recipe, token, cache)
            else:
                job = prepare(references, base_ref, weights, settings, token, cache)
            job = job.within(memory_size(max_memory))
            target.refuse_inputs([item.pinned for item in job.sources.all()])
            if dry_run:
                size = job.sources.download_bytes()
                done = report(job, target, started, size, dry_run=True)
            else:
                done = execute(job, target, device, show, token, started, group)
            group.dismiss(done)
            return done


def _listed(names: str | PathLike[str] | Sequence[str | PathLike[str]]) -> list[str]:
    """A single name where a list is expected is a list of one."""
    return [fspath(n) for n in ([names] if isinstance(names, str | PathLike) else names)]


def _job_of_recipe(recipe: Recipe, token: str | None, cache_dir: str | None) -> Job:
    for item in (*recipe.inputs, recipe.base_model):
        if item.revision is None and not Path(item.ref).expanduser().is_dir():
            raise RecipeError(
                f"The recipe was made from the folder {item.ref}, which is not here.",
                "Run it where that folder is, or restore it.",
            )
    job = prepare(
        [_pinned_text(item) for item in recipe.inputs],
        _pinned_text(recipe.base_model),
        [item.weight for item in recipe.inputs],
        recipe.settings,
        token,
        cache_dir,
        warnings=_version_warnings(recipe),
    )
    expected = tuple(item.fingerprint for item in (*recipe.inputs, recipe.base_model))
    return replace(job, expected=expected, recipe_device=recipe.device)


def prepare(
    checkpoints: Sequence[str],
    base_ref: str | None,
    scales: Sequence[float] | None,
    settings: Settings,
    token: str | None,
    cache_dir: str | None,
    warnings: Sequence[str] = (),
) -> Job:
    """Resolve every reference once, read every header, and plan."""
    if not checkpoints:
        raise RecipeError("There is nothing to merge.", "Name at least one checkpoint.")
    scales = [1.0] * len(checkpoints) if scales is None else list(scales)
    if len(scales) != len(checkpoints):
        raise RecipeError(
            f"There are {len(scales)} weights for {len(checkpoints)} checkpoints.",
            "Give one weight for each checkpoint.",
        )
    for scale in scales:
        check_number("A weight", scale)
    if not any(scales):
        raise RecipeError("Every weight is 0.", "Give at least one task a weight.")
    sources = open_sources(checkpoints, base_ref, token=token, cache_dir=cache_dir)
    plan = make_plan(sources.base, sources.inputs, settings)
    found = [
        *warnings, *sources.warnings, *plan.warnings, *companions.warnings(sources.base),
    ]  # fmt: skip
    for warning in found:
        logger.warning(warning)
    expected = (None,) * (len(checkpoints) + 1)
    return Job(sources, tuple(map(float, scales)), settings, plan, found, expected)


def _pinned_text(item: PinnedInput | PinnedCheckpoint) -> str:
    return item.ref if item.revision is None else f"{item.ref}@{item.revision}"


def _version_warnings(recipe: Recipe) -> list[str]:
    here = current_versions()
    different = [
        f"{name} {version} (here {here[name]})"
        for name, version in recipe.versions.items()
        if here.get(name, version) != version
    ]
    if not different:
        return []
    return [f"The recipe was made with {', '.join(different)}: the bytes may differ."]


def execute(
    job: Job,
    target: Target,
    device_name: str | None,
    show: bool,
    token: str | None,
    started: float,
    group: Processes,
    describe: Describe | None = None,
) -> MergeReport:
    """Do what was prepared: download, compute, write, push.

    Args:
        job ([`Job`]): what to do.
        target ([`Target`]): where the result goes.
        device_name (`str`, *optional*): default: the one accelerate chooses.
        show (`bool`): show bars.
        token (`str`, *optional*): default: the one the Hub client is logged in with.
        started (`float`): monotonic time at which the run began.
        group ([`Processes`]): those that share the work; this one is the first.
        describe (`Callable`, *optional*): default: writes recipe and card of a merge.
    """
    device = stream.pick_device(device_name)
    if job.recipe_device not in (None, device.type):
        warning = (
            f"The recipe was made on {job.recipe_device} and this is {device.type}:"
            " the bytes may differ."
        )
        logger.warning(warning)
        job = replace(job, warnings=[*job.warnings, warning])
    parent = target.output or Path(gettempdir())
    check_free_space(parent, job.plan.shards.total_bytes - journal.begun_bytes(target.output))
    download_bytes = job.sources.download_bytes()
    job = replace(job, sources=job.sources.downloaded(visible=show))
    try:
        _refuse_unchanged(job)
        with final_folder(target) as final:
            findings, warnings = _construct(
                final, job, target, device, show, group, describe or _describe
            )
            url = push(final, target, token)
    finally:
        job.sources.close()
    done = report(job, target, started, download_bytes, findings=findings, warnings=warnings)
    return replace(done, url=url, device=device.type)


def follow(
    group: Processes, device_name: str | None, token: str | None, cache_dir: str | None
) -> Any:
    """Do this process's share of what the first one has prepared.

    Args:
        group ([`Processes`]): those that share the work; this one is not the first.
        device_name (`str`, *optional*): default: the one accelerate chooses.
        token (`str`, *optional*): default: the one the Hub client is logged in with.
        cache_dir (`str`, *optional*): default: the Hub client's cache.

    Returns:
        [`MergeReport`]: or whatever the first process reports.
    """
    message = group.receive()
    if not isinstance(message, _Assignment):
        return message
    group.agree(_do_share(message, group.rank, device_name, token, cache_dir))
    return group.receive()


def _do_share(
    assigned: _Assignment,
    rank: int,
    device_name: str | None,
    token: str | None,
    cache_dir: str | None,
) -> HfTsvError | None:
    """Open what the first process has pinned, and work on it; returns what went wrong."""
    try:
        if not (assigned.work / journal.JOB).is_file():
            raise OutputError(
                f"{assigned.work.parent} is not the same folder on every machine.",
                "Choose an output on storage that they share.",
            )
        device = stream.pick_device(device_name)
        sources = open_sources(
            assigned.references, assigned.base, token=token, cache_dir=cache_dir
        ).downloaded(visible=False)
        job = Job(sources, assigned.scales, assigned.settings, assigned.plan, [], ())
        job = job.within(assigned.max_memory)
    except HfTsvError as error:
        journal.note_failure(assigned.work)
        return error
    try:
        return _merge_share(job, assigned.work, assigned.shares[rank], rank, device, lambda _: None)
    finally:
        sources.close()


def _refuse_unchanged(job: Job) -> None:
    """Find inputs that equal the base before the first decomposition: smallest weights first."""
    base = job.sources.base
    names = (n for w in job.plan.weights if w.treatment != "copied" for n in w.names)
    by_size = sorted(names, key=lambda name: base.tensors[name].nbytes)
    for item in job.sources.inputs:
        if isinstance(item, TaskFactors):
            if all(weight.stored == "none" for weight in item.tensors.values()):
                raise equals_base(str(item), str(base))
            continue
        held = (name for name in by_size if name in item.tensors)
        if all(torch.equal(item.read(n).float(), base.read(n).float()) for n in held):
            raise equals_base(str(item), str(base))


def _construct(
    final: Path,
    job: Job,
    target: Target,
    device: torch.device,
    show: bool,
    group: Processes,
    describe: Describe,
) -> tuple[Findings, list[str]]:
    """Write a complete checkpoint: weights, config, companions, description."""
    with journal.under_construction(
        final,
        job.to_json(device),
        job.plan.shards,
        force=target.force,
        keep=target.output is not None,
    ) as (work, resumed):
        folder = work / journal.FILES
        finished = _finished(job, work) if resumed else set()
        left = [weight for weight in job.plan.weights if weight.label not in finished]
        shares = [
            [left[i].label for i in share]
            for share in processes.shares([operations(w) for w in left], group.count)
        ]
        tasks = f"{len(job.sources.inputs)} task{'s' * (len(job.sources.inputs) != 1)}"
        where = device.type if group.count == 1 else f"{device.type}, {group.count} processes"
        logger.info("%s %d weights of %s on %s.", job.verb, len(left), tasks, where)
        references = tuple(_pinned_text(item.pinned) for item in job.sources.inputs)
        assignment = _Assignment(
            references, _pinned_text(job.sources.base.pinned), job.plan, job.scales,
            job.settings, job.max_memory, work.absolute(), shares,
        )  # fmt: skip
        group.send(assignment)
        with bar(job.verb, len(shares[0]), visible=show) as advance:
            error = _merge_share(job, work, shares[0], 0, device, advance)
        group.agree(error)
        if job.head is not None:
            writer = ShardWriter(folder, job.plan.shards, create=False)
            for name in job.head.head:
                writer.write(name, job.head.read(name).to(job.plan.specs[name].dtype))
            writer.close()
        findings = Findings(len(job.sources.inputs), _all_noted(job, work, group.count))
        _check_fingerprints(job, findings)
        warnings = [*job.warnings, *_finding_warnings(job.sources.inputs, findings)]
        _complete(folder, job)
        describe(folder, job, target, findings, warnings, device)
    return findings, warnings


def _finished(job: Job, work: Path) -> set[str]:
    """Labels of the weights that an earlier run has written."""
    writer = ShardWriter(work / journal.FILES, job.plan.shards, create=False)
    try:
        found = journal.still_there(journal.read(work).values(), writer, job.plan.specs)
    finally:
        writer.abandon()
    journal.rewrite(work, found)
    logger.info("%d of %d weights are there already.", len(found), len(job.plan.weights))
    return {finding.label for finding in found}


def _all_noted(job: Job, work: Path, count: int) -> list[Finding]:
    """What all processes found, in the order of the plan.

    The bytes of several processes are read back: storage that machines share may lose some where
    two of them write into one page.
    """
    noted = journal.read(work, count)
    if count > 1:
        writer = ShardWriter(work / journal.FILES, job.plan.shards, create=False)
        try:
            there = journal.still_there(noted.values(), writer, job.plan.specs)
        finally:
            writer.abandon()
        journal.rewrite(work, there)
        noted = {finding.label: finding for finding in there}
    if missing := [weight.label for weight in job.plan.weights if weight.label not in noted]:
        raise LostProcessError(
            f"{len(missing)} weights of other processes have not arrived, {missing[0]} first.",
            processes.AGAIN,
        )
    return [noted[weight.label] for weight in job.plan.weights]


def _merge_share(
    job: Job,
    work: Path,
    labels: Sequence[str],
    rank: int,
    device: torch.device,
    advance: Callable[[int], None],
) -> HfTsvError | None:
    """Merge some weights into the files under construction; returns what went wrong."""
    wanted = set(labels)
    weights = [weight for weight in job.plan.weights if weight.label in wanted]

    def done(finding: Finding) -> None:
        notes.add(finding)
        advance(1)
        if (work / journal.FAILED).exists():
            raise LostProcessError("Another process failed.", "See its message.")

    try:
        with disk_errors(work), journal.Journal(work, rank) as notes:
            writer = ShardWriter(work / journal.FILES, job.plan.shards, create=False)
            try:
                stream.merge_weights(
                    weights, job.plan, job.sources.base, job.sources.inputs, job.scales,
                    job.settings, writer, device=device, done=done, parallelism=job.parallelism,
                )  # fmt: skip
                writer.close()
            finally:
                writer.abandon()
    except HfTsvError as error:
        journal.note_failure(work)
        return error
    except BaseException:
        journal.note_failure(work)
        raise
    return None


def _complete(folder: Path, job: Job) -> None:
    """Write what makes the weights load: config, processor, tokenizer."""
    base = job.sources.base
    companions.copy(base, folder)
    config = companions.output_config(base, {spec.dtype for spec in job.plan.specs.values()})
    if job.head is not None and job.head.head:
        config |= companions.head_config(job.head.config.model_config, job.head.head)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _describe(
    folder: Path,
    job: Job,
    target: Target,
    findings: Findings,
    warnings: Sequence[str],
    device: torch.device,
) -> None:
    """Write recipe and card of a merge."""
    recipe = _recipe(job, findings, device)
    (folder / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    card = _card(job, target, recipe, findings, warnings)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _finding_warnings(inputs: Sequence[Task], findings: Findings) -> list[str]:
    warnings = []
    cosines = findings.cosines()
    for i, j in combinations(range(len(inputs)), 2):
        cosine = float(cosines[i, j])
        if abs(cosine) < SAME_UPDATE or str(inputs[i]) == str(inputs[j]):
            continue
        if cosine < 0:
            what = "are opposite updates and cancel out"
        elif findings.null_directions:
            what = "are the same update, which is merged once"
        else:
            what = "are nearly the same update, and what distinguishes them is amplified"
        warnings.append(f"{inputs[i]} and {inputs[j]} {what} (cosine {cosine:.4f}); leave one out.")
    if findings.null_directions and not warnings:
        warnings.append(
            f"Tasks have directions in common in {len(findings.null_directions)} weights; these"
            " are merged once."
        )
    for warning in warnings:
        logger.warning(warning)
    return warnings


def _check_fingerprints(job: Job, findings: Findings) -> None:
    """A recipe's local folders must still hold what they held."""
    keys = [*range(len(job.sources.inputs)), -1]
    for key, wanted in zip(keys, job.expected, strict=True):
        if wanted is not None and findings.fingerprint(key) not in (None, wanted):
            item = job.sources.base if key == -1 else job.sources.inputs[key]
            raise CheckpointError(
                f"{item} is not what it was when the recipe was written.",
                "Restore the folder, or merge anew without the recipe.",
            )


def _recipe(job: Job, findings: Findings, device: torch.device) -> Recipe:
    def pinned(item: Task, key: int, scale: float) -> PinnedInput:
        fingerprint = findings.fingerprint(key) if item.pinned.is_local else None
        return PinnedInput(item.pinned.ref, item.pinned.revision, fingerprint, scale)

    inputs = tuple(
        pinned(item, i, scale)
        for i, (item, scale) in enumerate(zip(job.sources.inputs, job.scales, strict=True))
    )
    return Recipe(pinned(job.sources.base, -1, 1.0), inputs, job.settings, device.type)


def _card(
    job: Job,
    target: Target,
    recipe: Recipe,
    findings: Findings,
    warnings: Sequence[str],
) -> str:
    def card_input(item: Task, scale: float = 1.0) -> cards.CardInput:
        origin = Origin.of(item.pinned)
        return cards.CardInput(origin.ref, origin.revision, origin.license, scale)

    return cards.merge_card(
        recipe,
        card_input(job.sources.base),
        [card_input(*pair) for pair in zip(job.sources.inputs, job.scales, strict=True)],
        full_model=layout.is_full_model(job.sources.base.tensors),
        repo_id=target.push_to,
        counts=job.plan.counts(findings.frozen),
        left_out={card_input(c).name: c.left_out for c in job.sources.inputs if c.left_out},
        warnings=warnings,
    )


def report(
    job: Job,
    target: Target,
    started: float,
    download_bytes: int,
    *,
    findings: Findings | None = None,
    warnings: Sequence[str] | None = None,
    dry_run: bool = False,
) -> MergeReport:
    """What was done, or without `findings` would be done; see [`MergeReport`]."""
    ranks = {} if findings is None else findings.ranks
    frozen = frozenset() if findings is None else findings.frozen
    seconds = {found.label: found.seconds for found in findings.weights} if findings else {}
    treatments: dict[str, dict[str, Any]] = {}
    for weight in job.plan.weights:
        entry: dict[str, Any] = {"treatment": weight.treatment}
        if weight.label in frozen:
            entry = {"treatment": "copied", "reason": "equal to the base in every checkpoint"}
        elif weight.treatment == "decomposed":
            entry["rank"] = weight.rank
            if weight.label in ranks:
                entry["ranks"] = list(ranks[weight.label])
        elif weight.reason:
            entry["reason"] = weight.reason
        if weight.label in seconds:
            entry["seconds"] = seconds[weight.label].rounded()
        treatments[weight.label] = entry
    return MergeReport(
        output=None if target.output is None else str(target.output),
        base_model=pinned_entry(job.sources.base),
        inputs=[pinned_entry(item) for item in job.sources.inputs],
        weights=job.plan.counts(frozen),
        output_bytes=job.plan.shards.total_bytes,
        seconds=round(time.monotonic() - started, 3),
        warnings=list(job.warnings if warnings is None else warnings),
        method=job.settings.method,
        treatments=treatments,
        left_out={str(item): list(item.left_out) for item in job.sources.inputs if item.left_out},
        download_bytes=download_bytes,
        peak_memory_bytes=peak_memory(job.plan.weights, job.parallelism),
        exact_decompositions=0 if findings is None else findings.exact,
        timings={} if findings is None else findings.seconds.rounded(),
        dry_run=dry_run,
    )
