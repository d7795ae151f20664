"""Carrying out a planned merge or reconstruction, in one process or several.

The first process prepares and describes; every process computes its share of the weights, and notes
in a journal what is finished.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hf_tsv.checkpoints import companions
from hf_tsv.checkpoints.fit import refuse_other_base
from hf_tsv.checkpoints.sources import Access, Sources, open_sources
from hf_tsv.checkpoints.storage.tensors import digest
from hf_tsv.checkpoints.storage.writer import ShardWriter
from hf_tsv.linalg.choices import AnyDevice
from hf_tsv.merging import pipeline, surveying
from hf_tsv.merging.costs import operations, steps
from hf_tsv.merging.findings import Finding, Findings
from hf_tsv.merging.plan import MergePlan
from hf_tsv.merging.work import Merge, Merged, diagnosed, refuse_unchanged
from hf_tsv.runs import journal
from hf_tsv.runs.lifecycle import Run
from hf_tsv.system import processes
from hf_tsv.system.device import pick_device
from hf_tsv.system.errors import CheckpointError, HfTsvError, LostProcessError, OutputError
from hf_tsv.system.folders import disk_errors
from hf_tsv.system.processes import Processes
from hf_tsv.system.progress import bar, logger
from hf_tsv.system.text import counted


@dataclass(frozen=True)
class _Assignment:
    """Knowledge that all processes share; `shares` has the labels of the weights of each."""

    merge: Merge
    work: Path
    shares: list[set[str]]


@contextmanager
def built(
    run: Run,
    merge: Merge,
    device_name: AnyDevice | None,
    group: Processes,
    *,
    before: Callable[[Merge, Run, torch.device], Merge] | None = None,
    whole: Collection[str] = (),
) -> Iterator[tuple[Path, Merged]]:
    """Make a complete checkpoint: weights, config, companions; the body describes it.

    `before` adds what has to be learned before the first weight. `whole` names folders of the body,
    which a resumed run finds again. The body is given the folder,
    which gets its place when the body succeeds, and what was done.
    """
    device = pick_device(device_name)
    if merge.recipe_device not in (None, device.type):
        merge = merge.warned(
            f"The recipe was made on {merge.recipe_device} and this is {device.type}:"
            " the bytes may differ."
        )
    run.check_space(merge.identity(run.sources, device), merge.plan.shards.total_bytes)
    run.fetch()
    _check_inputs(merge, run.sources)
    merge = surveying.surveyed(merge, run.sources, device, visible=run.show)
    if before is not None:
        merge = before(merge, run, device)
    identity = merge.identity(run.sources, device)  # with what was learned
    with (
        run.result(identity) as final,
        journal.under_construction(
            final,
            identity,
            merge.plan.shards,
            force=run.target.force,
            until_pushed=run.target.output is None,
            whole=whole,
        ) as (work, resumed),
    ):
        done = _computed(run, merge, work, device, group, resumed=resumed)
        _complete(work / journal.FILES, done)
        yield work / journal.FILES, done


def _check_inputs(merge: Merge, sources: Sources) -> None:
    """Find damage, and inputs without an update, before the work."""
    refuse_unchanged(merge.plan, sources)
    if not merge.allow_other_base:
        refuse_other_base(sources.base, sources.inputs)
    companions.check(sources.base)
    for item in sources.inputs if merge.settings.keep_heads else ():
        for name in item.head:
            item.head_tensor(name)


def follow(group: Processes, device_name: AnyDevice | None, access: Access) -> Any:
    """Do this process's share of what the first one prepares, and return what that one reports."""
    message = group.receive()
    if not isinstance(message, _Assignment):
        return message
    access = replace(access, subfolder=None)  # what is pinned names it
    group.agree(_do_share(message, group.rank, device_name, access))
    return group.receive()


def _do_share(
    assigned: _Assignment, rank: int, device_name: AnyDevice | None, access: Access
) -> HfTsvError | None:
    """Open what the first process has pinned, and work on it; returns what went wrong."""
    merge, work = assigned.merge, assigned.work
    try:
        if not (work / journal.JOB).is_file():
            problem = f"{work.parent} is not the same folder on every machine."
            raise OutputError(problem, "Choose an output on storage that they share.")
        device = pick_device(device_name)
        sources = open_sources(merge.references, merge.base, access).within_reach(visible=False)
        merge = merge.within(merge.max_memory, sources)
    except HfTsvError as error:
        journal.note_failure(work)
        return error
    try:
        return _merge_share(replace(assigned, merge=merge), rank, sources, device, lambda _: None)
    finally:
        sources.close()


def _computed(
    run: Run, merge: Merge, work: Path, device: torch.device, group: Processes, *, resumed: bool
) -> Merged:
    """Write the weights that are not there yet, in all processes."""
    plan, sources = merge.plan, run.sources
    finished = _kept(plan, work).keys() if resumed else ()
    if resumed:
        logger.info("Resuming: %d of %d weights are done.", len(finished), len(plan.weights))
    left = [weight for weight in plan.weights if weight.label not in finished]
    indices = processes.shares([operations(weight) for weight in left], group.count)
    shares = [{left[i].label for i in share} for share in indices]
    tasks = counted(len(sources.inputs), "task")
    where = device.type if group.count == 1 else f"{device.type}, {group.count} processes"
    logger.info("%s %s of %s on %s.", merge.verb, counted(len(left), "weight"), tasks, where)
    assigned = _Assignment(merge, work.absolute(), shares)
    group.send(assigned)
    own = steps(weight for weight in left if weight.label in shares[0])
    with bar(merge.verb, own, visible=run.show) as advance:
        error = _merge_share(assigned, 0, sources, device, advance)
    group.agree(error)
    findings = Findings(len(sources.inputs), _all_noted(plan, work, group.count))
    _check_fingerprints(merge, sources, findings)
    return diagnosed(merge, sources, device, findings)


def _kept(plan: MergePlan, work: Path, count: int = 1) -> dict[str, Finding]:
    """Findings whose bytes are still in the files, by label; the journal forgets the others.

    A power failure may have lost some, and so may storage that machines share, where two of them
    write into one page.
    """
    specs, writer = plan.specs, ShardWriter(work / journal.FILES, plan.shards, create=False)
    try:
        there = {
            label: found
            for label, found in journal.read(work, Finding.from_dict, count).items()
            if all(digest(writer.read_back(n, specs[n])) == d for n, d in found.written.items())
        }
    finally:
        writer.abandon()
    journal.rewrite(work, map(asdict, there.values()))
    return there


def _all_noted(plan: MergePlan, work: Path, count: int) -> list[Finding]:
    """Findings of all processes in the order of the plan; bytes of several are read back."""
    noted = _kept(plan, work, count) if count > 1 else journal.read(work, Finding.from_dict)
    if missing := [weight.label for weight in plan.weights if weight.label not in noted]:
        problem = f"Weights of other processes are missing: {len(missing)}, such as {missing[0]}."
        raise LostProcessError(problem, processes.AGAIN)
    return [noted[weight.label] for weight in plan.weights]


def _merge_share(
    assigned: _Assignment,
    rank: int,
    sources: Sources,
    device: torch.device,
    advance: Callable[[int], None],
) -> HfTsvError | None:
    """Merge some weights into the files under construction; returns what went wrong."""
    merge, work, labels = assigned.merge, assigned.work, assigned.shares[rank]
    weights = [weight for weight in merge.plan.weights if weight.label in labels]

    def done(finding: Finding) -> None:
        notes.add(asdict(finding))
        advance(1)
        if (work / journal.FAILED).exists():
            raise LostProcessError("Another process failed.", "See its message.")

    try:
        with disk_errors(work), journal.Journal(work, rank) as notes:
            writer = ShardWriter(work / journal.FILES, merge.plan.shards, create=False)
            try:
                pipeline.merge_weights(merge, sources, weights, writer, device=device, done=done)
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


def _complete(folder: Path, done: Merged) -> None:
    """Write what makes the weights load: task head, config, processor, tokenizer."""
    plan, base, item = done.merge.plan, done.sources.base, done.sources.inputs[0]
    kind = done.merge.settings.out_format or base.format
    config = companions.output_config(base, {spec.dtype for spec in plan.specs.values()}, kind)
    if done.merge.task_head and item.head:
        writer = ShardWriter(folder, plan.shards, create=False)
        for name in item.head:
            writer.write(name, item.head_tensor(name).to(plan.specs[name].dtype.torch))
        writer.close()
        config |= companions.head_config(item.model_config, item.head)
    companions.write(base, folder, config, kind)


def _check_fingerprints(merge: Merge, sources: Sources, findings: Findings) -> None:
    """Refuse local folders of a recipe that do not hold what they held."""
    items = [*enumerate(sources.inputs), (-1, sources.base)]
    for (key, item), wanted in zip(items, merge.expected, strict=True):
        if wanted is not None and findings.fingerprint(key) not in (None, wanted):
            problem = f"{item} has changed since the recipe was written."
            raise CheckpointError(problem, "Restore the folder, or merge without the recipe.")
