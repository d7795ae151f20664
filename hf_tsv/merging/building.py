"""Carrying out a planned merge or reconstruction: download, compute, push; one process or several.

The first process prepares and describes; every process computes its share of the weights, and notes
in a journal what is finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from hf_tsv.checkpoints import companions
from hf_tsv.checkpoints.sources import Access, open_sources
from hf_tsv.checkpoints.storage.tensors import TensorSpec, digest
from hf_tsv.checkpoints.storage.writer import ShardWriter
from hf_tsv.merging import loading, pipeline
from hf_tsv.merging.costs import operations
from hf_tsv.merging.findings import Finding, Findings
from hf_tsv.merging.plan import MergePlan
from hf_tsv.merging.work import Job, refuse_unchanged, warned
from hf_tsv.recipes.recipe import pinned_text
from hf_tsv.recipes.settings import Settings
from hf_tsv.runs import journal
from hf_tsv.runs.target import Target, final_folder, push, waiting
from hf_tsv.system import processes
from hf_tsv.system.device import pick_device
from hf_tsv.system.errors import CheckpointError, HfTsvError, LostProcessError, OutputError
from hf_tsv.system.folders import check_free_space, disk_errors
from hf_tsv.system.processes import Processes
from hf_tsv.system.progress import bar, logger


class Before(Protocol):
    """Adds to a job what has to be learned before its first weight."""

    def __call__(self, job: Job, device: torch.device, *, show: bool) -> Job: ...


Describe = Callable[[Path, Job, Target, Findings, Sequence[str], torch.device], None]
"""Writes what goes beside the checkpoint: where it comes from, and its card."""


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
        known (`Any`): result of the method's pass over all weights before the first is merged.
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
    known: Any
    coefficients: dict[str, tuple[float, ...]]


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


def execute(
    job: Job,
    target: Target,
    device_name: str | None,
    group: Processes,
    describe: Describe,
    *,
    before: Before | None = None,
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
        before (`Callable`, *optional*): adds what has to be learned before the first weight.
        show (`bool`): show bars.
        dry_run (`bool`): only look at what there is.
    """
    target.refuse_inputs([item.pinned for item in job.sources.all()])
    download_bytes = job.sources.download_bytes()
    if dry_run:
        return Outcome(job, download_bytes, list(job.warnings))
    device = pick_device(device_name)
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
                item.head_tensor(name)
        if job.settings.row.before:
            base, inputs = job.sources.base, job.sources.inputs
            known = loading.known_before(job.plan, base, inputs, job.scales, job.settings)
            job = replace(job, known=known)
        if before is not None:
            job = before(job, device, show=show)
        final = final_folder(target, job.to_json(device))  # with what was found or learned
        with waiting(final):
            findings, warnings = _construct(final, job, target, device, show, group, describe)
            url = push(final, target, job.sources.access.token)
    finally:
        job.sources.close()
    return Outcome(job, download_bytes, warnings, findings, url, device.type)


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
        device = pick_device(device_name)
        sources = open_sources(assigned.references, assigned.base, access).within_reach(
            visible=False
        )
        job = Job(
            sources, assigned.scales, assigned.settings, assigned.plan, [], (),
            measure=assigned.measure, known=assigned.known,
            coefficients=assigned.coefficients,
        ).within(assigned.max_memory)  # fmt: skip
    except HfTsvError as error:
        journal.note_failure(assigned.work)
        return error
    try:
        return _merge_share(job, assigned.work, assigned.shares[rank], rank, device, lambda _: None)
    finally:
        sources.close()


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
            job.settings, job.max_memory, work.absolute(), shares, job.measure, job.known,
            job.coefficients,
        )  # fmt: skip
        group.send(assignment)
        with bar(job.verb, len(shares[0]), visible=show) as advance:
            error = _merge_share(job, work, shares[0], 0, device, advance)
        group.agree(error)
        if job.head is not None:
            writer = ShardWriter(folder, job.plan.shards, create=False)
            for name in job.head.head:
                writer.write(name, job.head.head_tensor(name).to(job.plan.specs[name].dtype))
            writer.close()
        findings = Findings(len(job.sources.inputs), _all_noted(job, work, group.count))
        _check_fingerprints(job, findings)
        warnings = [*job.warnings, *warned(job, findings)]
        _complete(folder, job)
        describe(folder, job, target, findings, warnings, device)
    return findings, warnings


def _finished(job: Job, work: Path) -> set[str]:
    """Labels of the weights that an earlier run has written."""
    writer = ShardWriter(work / journal.FILES, job.plan.shards, create=False)
    noted = journal.read(work, Finding.from_dict)
    try:
        found = still_there(noted.values(), writer, job.plan.specs)
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
            there = still_there(noted.values(), writer, job.plan.specs)
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
                pipeline.merge_weights(
                    weights, job.plan, job.sources.base, job.sources.inputs, job.scales,
                    job.settings, writer, device=device, done=done, parallelism=job.parallelism,
                    known=job.known, coefficients=job.coefficients,
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
        config |= companions.head_config(job.head.model_config, job.head.head)
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


def still_there(
    findings: Iterable[Finding], writer: ShardWriter, specs: Mapping[str, TensorSpec]
) -> list[Finding]:
    """Findings whose bytes are still in the files; a power failure may have lost some."""
    return [
        found
        for found in findings
        if all(digest(writer.read_back(n, specs[n])) == d for n, d in found.written.items())
    ]
