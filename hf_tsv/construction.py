"""Carrying out a planned merge or reconstruction: download, compute, push; one process or several.

The first process prepares and describes; every process computes its share of the weights, and notes
in a journal what is finished.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_tsv import journal, memory, processes, stream, tsv
from hf_tsv.checkpoints import companions
from hf_tsv.checkpoints.reference import PinnedCheckpoint, at_revision
from hf_tsv.checkpoints.writer import ShardWriter
from hf_tsv.costs import Parallelism, fitting, noted_bytes, operations
from hf_tsv.delivery import Target, final_folder, push, waiting
from hf_tsv.diagnosis import diagnoses
from hf_tsv.errors import CheckpointError, HfTsvError, LostProcessError, OutputError, RecipeError
from hf_tsv.factors import TaskFactors
from hf_tsv.findings import Finding, Findings
from hf_tsv.folders import check_free_space, disk_errors
from hf_tsv.plan import MergePlan, make_plan, resolved
from hf_tsv.processes import Processes
from hf_tsv.progress import bar, logger
from hf_tsv.recipe import PinnedInput, Settings, check_number, current_versions
from hf_tsv.sources import (
    DEFAULT_ACCESS,
    Access,
    Sources,
    equals_base,
    identity_entry,
    open_sources,
)

if TYPE_CHECKING:
    from hf_tsv.adaptation import Adaptation
    from hf_tsv.tuning import AlphaSearch

LIBRARIES = 64_000_000
"""Bytes of the libraries that are loaded when the first weight is computed."""


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
        measure (`bool`): find who disturbs whom.
        thresholds (`tuple[float, ...]`): from which size on TIES keeps entries of each task.
        coefficients (`dict[str, tuple[float, ...]]`): of each task by weight, for the method ada.
        adaptation ([`Adaptation`], *optional*): how they are learned, or were.
        tuning ([`AlphaSearch`], *optional*): how α was chosen.
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
    measure: bool = False
    thresholds: tuple[float, ...] = ()
    coefficients: dict[str, tuple[float, ...]] = field(default_factory=dict)
    adaptation: Adaptation | None = None
    tuning: AlphaSearch | None = None

    def within(self, max_memory: int | None) -> Job:
        """The same job with as much parallelism as memory allows."""
        used = memory.resident() + LIBRARIES + self.sources.waiting_bytes()
        used += noted_bytes(self.plan.weights)
        threads = torch.get_num_threads()
        found = fitting(self.plan.weights, threads, max_memory, used, measure=self.measure)
        return replace(self, max_memory=max_memory, parallelism=found)

    def to_json(self, device: torch.device) -> dict[str, Any]:
        """Everything that decides about the bytes of the result."""
        return {
            "verb": self.verb,
            "base_model": identity_entry(self.sources.base),
            "inputs": [identity_entry(item) for item in self.sources.inputs],
            "weights": self.scales,
            "settings": asdict(self.settings),
            "tensors": {n: [str(t.dtype), t.shape] for n, t in self.plan.specs.items()},
            "versions": current_versions(),
            "device": device.type,
            "measure": self.measure,
            "coefficients": self.coefficients,
        }


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
        measure (`bool`): find who disturbs whom.
        thresholds (`tuple[float, ...]`): from which size on TIES keeps entries of each task.
        coefficients (`dict[str, tuple[float, ...]]`): of each task by weight, for the method ada.
    """

    references: tuple[str, ...]
    base: str
    plan: MergePlan
    scales: tuple[float, ...]
    settings: Settings
    max_memory: int | None
    work: Path
    shares: list[list[str]]
    measure: bool
    thresholds: tuple[float, ...]
    coefficients: dict[str, tuple[float, ...]]


Describe = Callable[[Path, Job, Target, Findings, Sequence[str], torch.device], None]
"""Writes what goes beside the checkpoint: where it comes from, and its card."""


@dataclass(frozen=True)
class Outcome:
    """What was done of a job, or with a dry run is known before.

    Args:
        job ([`Job`]): with all warnings of before the first weight.
        download_bytes (`int`): fetched from the Hub; what the cache held does not count.
        warnings (`list[str]`): all.
        findings ([`Findings`], *optional*): of every weight; None of a dry run.
        url (`str`, *optional*): commit or pull request on the Hub.
        device (`str`, *optional*): type of device computed on.
    """

    job: Job
    download_bytes: int
    warnings: list[str]
    findings: Findings | None = None
    url: str | None = None
    device: str | None = None


def prepare(
    checkpoints: Sequence[str],
    base_ref: str | None,
    scales: Sequence[float] | None,
    settings: Settings,
    access: Access = DEFAULT_ACCESS,
    warnings: Sequence[str] = (),
    *,
    writes: bool = True,
    only_factors: bool = False,
) -> Job:
    """Resolve every reference once, read every header, and plan.

    Args:
        checkpoints (`Sequence[str]`): the tasks.
        base_ref (`str`, *optional*): default: the base they agree on.
        scales (`Sequence[float]`, *optional*): factor of each task's update.
        settings ([`Settings`]): how to merge.
        access ([`Access`]): how checkpoints are reached.
        warnings (`Sequence[str]`): so far.
        writes (`bool`): a checkpoint is to be written, which needs a processor.
        only_factors (`bool`): the tasks must be task factors.
    """
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
    sources = open_sources(checkpoints, base_ref, access, only_factors=only_factors)
    settings = resolved(sources.base, settings)
    plan = make_plan(sources.base, sources.inputs, settings)
    missing = companions.warnings(sources.base) if writes else []
    found = [*warnings, *sources.warnings, *plan.warnings, *missing]
    for warning in found:
        logger.warning(warning)
    expected = (None,) * (len(checkpoints) + 1)
    return Job(sources, tuple(map(float, scales)), settings, plan, found, expected)


def pinned_text(item: PinnedInput | PinnedCheckpoint) -> str:
    """The reference of a commit, or a folder."""
    return at_revision(item.ref, item.revision)


def execute(
    job: Job,
    target: Target,
    device_name: str | None,
    group: Processes,
    describe: Describe,
    *,
    show: bool,
    dry_run: bool,
) -> Outcome:
    """Do what was prepared: download, compute, write, push.

    Args:
        job ([`Job`]): what to do.
        target ([`Target`]): where the result goes.
        device_name (`str`, *optional*): default: the one accelerate chooses.
        group ([`Processes`]): those that share the work; this one is the first.
        describe (`Callable`): writes what goes beside the checkpoint.
        show (`bool`): show bars.
        dry_run (`bool`): only look at what there is.
    """
    target.refuse_inputs([item.pinned for item in job.sources.all()])
    download_bytes = job.sources.download_bytes()
    if dry_run:
        return Outcome(job, download_bytes, list(job.warnings))
    device = stream.pick_device(device_name)
    if job.recipe_device not in (None, device.type):
        warning = (
            f"The recipe was made on {job.recipe_device} and this is {device.type}:"
            " the bytes may differ."
        )
        logger.warning(warning)
        job = replace(job, warnings=[*job.warnings, warning])
    final = final_folder(target, job.to_json(device))
    check_free_space(final, job.plan.shards.total_bytes - journal.begun_bytes(final))
    job = replace(job, sources=job.sources.within_reach(visible=show))
    try:
        refuse_unchanged(job)
        companions.check(job.sources.base)
        for item in job.sources.inputs if job.settings.keep_heads else ():
            for name in item.head:  # damage shows before the work
                item.read(name)
        if job.settings.method == "ties":
            logger.info("Finding the largest entries of each task.")
            base, inputs = job.sources.base, job.sources.inputs
            found = stream.thresholds_of(job.plan, base, inputs, job.scales)
            job = replace(job, thresholds=tuple(found))
        if job.adaptation is not None and not job.coefficients:
            job = _adapted(job, job.adaptation, device, show=show)
        final = final_folder(target, job.to_json(device))  # with what was found or learned
        with waiting(final):
            findings, warnings = _construct(final, job, target, device, show, group, describe)
            url = push(final, target, job.sources.access.token)
    finally:
        job.sources.close()
    return Outcome(job, download_bytes, warnings, findings, url, device.type)


def _adapted(job: Job, adaptation: Adaptation, device: torch.device, *, show: bool) -> Job:
    """The same job with coefficients, learned from images."""
    from hf_tsv.adaptation import learn

    images = f"{len(adaptation.tasks)} task{'s' * (len(adaptation.tasks) != 1)}"
    logger.info("Learning coefficients on images of %s.", images)
    coefficients, found = learn(
        job.sources, job.plan, job.scales, job.settings, adaptation, device, job.parallelism,
        show=show,
    )  # fmt: skip
    return replace(job, coefficients=coefficients, adaptation=found)


def follow(group: Processes, device_name: str | None, access: Access) -> Any:
    """Do this process's share of what the first one has prepared.

    Args:
        group ([`Processes`]): those that share the work; this one is not the first.
        device_name (`str`, *optional*): default: the one accelerate chooses.
        access ([`Access`]): how checkpoints are reached.

    Returns:
        [`MergeReport`]: or whatever the first process reports.
    """
    message = group.receive()
    if not isinstance(message, _Assignment):
        return message
    access = replace(access, subfolder=None)  # what is pinned names it
    group.agree(_do_share(message, group.rank, device_name, access))
    return group.receive()


def _do_share(
    assigned: _Assignment,
    rank: int,
    device_name: str | None,
    access: Access,
) -> HfTsvError | None:
    """Open what the first process has pinned, and work on it; returns what went wrong."""
    try:
        if not (assigned.work / journal.JOB).is_file():
            raise OutputError(
                f"{assigned.work.parent} is not the same folder on every machine.",
                "Choose an output on storage that they share.",
            )
        device = stream.pick_device(device_name)
        sources = open_sources(assigned.references, assigned.base, access).within_reach(
            visible=False
        )
        job = Job(
            sources, assigned.scales, assigned.settings, assigned.plan, [], (),
            measure=assigned.measure, thresholds=assigned.thresholds,
            coefficients=assigned.coefficients,
        ).within(assigned.max_memory)  # fmt: skip
    except HfTsvError as error:
        journal.note_failure(assigned.work)
        return error
    try:
        return _merge_share(job, assigned.work, assigned.shares[rank], rank, device, lambda _: None)
    finally:
        sources.close()


def refuse_unchanged(job: Job) -> None:
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
        if not any(tsv.difference(item.read(n), base.read(n)).any() for n in held):
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
        until_pushed=target.output is None,
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
        references = tuple(pinned_text(item.pinned) for item in job.sources.inputs)
        assignment = _Assignment(
            references, pinned_text(job.sources.base.pinned), job.plan, job.scales,
            job.settings, job.max_memory, work.absolute(), shares, job.measure, job.thresholds,
            job.coefficients,
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
        warnings = [*job.warnings, *warned(job, findings)]
        _complete(folder, job)
        describe(folder, job, target, findings, warnings, device)
    return findings, warnings


def warned(job: Job, findings: Findings) -> list[str]:
    """Tell what is odd about the inputs."""
    found = diagnoses(job.sources.inputs, job.scales, job.plan, findings)
    for diagnosis in found:
        logger.warning(diagnosis.text)
    return [diagnosis.text for diagnosis in found]


def _finished(job: Job, work: Path) -> set[str]:
    """Labels of the weights that an earlier run has written."""
    writer = ShardWriter(work / journal.FILES, job.plan.shards, create=False)
    noted = journal.read(work, Finding.from_dict)
    try:
        found = journal.still_there(noted.values(), writer, job.plan.specs)
    finally:
        writer.abandon()
    journal.rewrite(work, (finding.to_dict() for finding in found))
    logger.info("%d of %d weights are there already.", len(found), len(job.plan.weights))
    return {finding.label for finding in found}


def _all_noted(job: Job, work: Path, count: int) -> list[Finding]:
    """What all processes found, in the order of the plan.

    The bytes of several processes are read back: storage that machines share may lose some where
    two of them write into one page.
    """
    noted = journal.read(work, Finding.from_dict, count)
    if count > 1:
        writer = ShardWriter(work / journal.FILES, job.plan.shards, create=False)
        try:
            there = journal.still_there(noted.values(), writer, job.plan.specs)
        finally:
            writer.abandon()
        journal.rewrite(work, (finding.to_dict() for finding in there))
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
        notes.add(finding.to_dict())
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
                    thresholds=job.thresholds, coefficients=job.coefficients,
                    measure=job.measure,
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
    kind = job.settings.out_format or base.format
    dtypes = {spec.dtype for spec in job.plan.specs.values()}
    config = companions.output_config(base, dtypes, kind)
    if job.head is not None and job.head.head:
        config |= companions.head_config(job.head.config.model_config, job.head.head)
    companions.write(base, folder, config, kind)


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
