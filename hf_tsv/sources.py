"""The checkpoints of a run: resolved once, opened by their headers, then read from local copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import constants

from hf_tsv import hub
from hf_tsv.checkpoints import base_model, companions
from hf_tsv.checkpoints.adapters import Adapter, is_adapter, open_adapter
from hf_tsv.checkpoints.files import HubFiles, LocalFiles
from hf_tsv.checkpoints.reader import Checkpoint, open_checkpoint
from hf_tsv.checkpoints.reference import PinnedCheckpoint, parse, pin
from hf_tsv.checkpoints.writer import check_free_space
from hf_tsv.errors import CheckpointError
from hf_tsv.factors import TaskFactors, is_factors, open_factors
from hf_tsv.parallel import in_parallel
from hf_tsv.progress import human_bytes, logger

Task = Checkpoint | TaskFactors
"""A fine-tune, whole or compressed."""


@dataclass(frozen=True)
class Sources:
    """A base model and fine-tunes of it, whole or compressed, all pinned.

    Args:
        base ([`Checkpoint`]): W0.
        inputs (`tuple[Checkpoint | TaskFactors, ...]`): the tasks.
        warnings (`tuple[str, ...]`): what the user should know of them.
    """

    base: Checkpoint
    inputs: tuple[Task, ...]
    warnings: tuple[str, ...] = ()

    def all(self) -> tuple[Task, ...]:
        """The tasks, then the base."""
        return (*self.inputs, self.base)

    def download_bytes(self) -> int:
        """What [`downloaded`] would fetch; files in the client's cache do not count."""
        return sum(repo.sizes[name] for repo, name in hub.missing(_wanted(self.all(), [self.base])))

    def downloaded(self, *, visible: bool) -> Sources:
        """The same checkpoints, read from the client's cache; fetches in parallel what is missing.

        Args:
            visible (`bool`): show one progress bar over everything.
        """
        *inputs, base = fetched(self.all(), with_companions=[self.base], visible=visible)
        assert isinstance(base, Checkpoint)  # it was one before
        inputs = [item.on(base) if isinstance(item, Adapter) else item for item in inputs]
        return replace(self, inputs=tuple(inputs), base=base)

    def close(self) -> None:
        """Close the files that were read."""
        for item in self.all():
            if isinstance(item.pinned.files, LocalFiles):
                item.pinned.files.close()


def _wanted(items: Sequence[Task], with_companions: Sequence[Task]) -> list[hub.Wanted]:
    """What has to be on disk of repositories: weights and config, and companion files of some."""
    wanted = []
    for item in items:
        if not isinstance(item.pinned.files, HubFiles):
            continue
        repo = item.pinned.files.repo
        names = list(item.needed_files)
        if "README.md" in repo.sizes:  # an offline run infers the base from it
            names.append("README.md")
        if any(item is other for other in with_companions):
            names += companions.present(item.pinned)
        wanted.append(hub.Wanted(repo, item.pinned.asked_revision, tuple(names)))
    return wanted


def fetched(items: Sequence[Task], *, with_companions: Sequence[Task], visible: bool) -> list[Task]:
    """The same items, read from this machine; fetches in parallel what the cache does not hold.

    Args:
        items (`Sequence[Checkpoint | TaskFactors]`): of the Hub, or of folders.
        with_companions (`Sequence[Checkpoint | TaskFactors]`): those whose processor and tokenizer
            files are needed too.
        visible (`bool`): show one progress bar over everything.
    """
    wanted = _wanted(items, with_companions)
    if size := sum(repo.sizes[name] for repo, name in hub.missing(wanted)):
        check_free_space(Path(wanted[0].repo.cache_dir or constants.HF_HUB_CACHE), size)
        logger.info("Downloading %s.", human_bytes(size))
    folders = iter(hub.download(wanted, visible=visible))
    return [
        item.reading_from(LocalFiles(next(folders)))
        if isinstance(item.pinned.files, HubFiles)
        else item
        for item in items
    ]


def open_sources(
    references: Sequence[str],
    base_reference: str | None,
    *,
    token: str | None = None,
    cache_dir: str | None = None,
    only_factors: bool = False,
) -> Sources:
    """Resolve every reference once and read every header, in parallel; writes nothing.

    Args:
        references (`Sequence[str]`): the fine-tunes, or task factors of them.
        base_reference (`str`, *optional*): default: the base they agree on.
        token (`str`, *optional*): default: the one the client is logged in with.
        cache_dir (`str`, *optional*): the client's cache.
        only_factors (`bool`): the tasks must be task factors.

    Raises:
        [`HfTsvError`]: one cannot be read, is no CLIP, or is the base itself.
    """

    def pinned(text: str) -> PinnedCheckpoint:
        return pin(parse(text), token=token, cache_dir=cache_dir)

    named = [*references, *([] if base_reference is None else [base_reference])]
    tasks = in_parallel(pinned, named)
    inputs = in_parallel(open_task, tasks)
    for item in inputs[: len(references)] if only_factors else ():
        if not isinstance(item, TaskFactors):
            what = "PEFT adapter" if isinstance(item, Adapter) else "checkpoint"
            raise CheckpointError(
                f"{item} is a {what}, not task factors.", "Make factors with `hf-tsv compress`."
            )
    opened_base: Task
    if base_reference is None:
        base = pinned(_inferred_base(inputs))
        opened_base = open_task(base)
    else:
        base, opened_base = tasks.pop(), inputs.pop()
    if isinstance(opened_base, TaskFactors):
        raise CheckpointError(
            f"The base model {opened_base} holds task factors.",
            "Name the checkpoint that the tasks were fine-tuned from.",
        )
    if isinstance(opened_base, Adapter):
        raise CheckpointError(
            f"The base model {opened_base} is an adapter.",
            "Name the model that the tasks were fine-tuned from.",
        )
    found = opened_base
    inputs = [item.on(found) if isinstance(item, Adapter) else item for item in inputs]
    warnings = _check_distinct(tasks, base)
    return Sources(opened_base, tuple(inputs), tuple(warnings))


def open_task(pinned: PinnedCheckpoint) -> Task:
    """Read the headers of a checkpoint, of an adapter, or of task factors."""
    if is_adapter(pinned):
        return open_adapter(pinned)
    return open_factors(pinned) if is_factors(pinned) else open_checkpoint(pinned)


def _inferred_base(inputs: Sequence[Task]) -> str:
    """Reference of the base model that cards, configs and factors agree on."""
    origins = {str(i): i.config.base_model for i in inputs if isinstance(i, TaskFactors)}
    said = {
        str(item): [origins[str(item)].ref]
        if str(item) in origins
        else base_model.named_by(item.pinned)
        for item in inputs
    }
    found, speakers = base_model.infer(said)
    logger.info("Base model: %s, named by %s.", found, ", ".join(speakers))
    revisions = {origin.revision for origin in origins.values()}
    if None in revisions:  # factors of a folder: the same one must be here
        if not Path(found).expanduser().is_dir():
            raise CheckpointError(
                f"{speakers[0]} was compressed against the folder {found}, which is not here.",
                "Name the same base model with --base-model.",
            )
        return found
    return f"hf://{found}@{revisions.pop()}" if len(revisions) == 1 else f"hf://{found}"


def pinned_entry(item: Task) -> dict[str, str | None]:
    """What a report says of a checkpoint."""
    return {"ref": item.pinned.ref, "revision": item.pinned.revision}


def distinct_names(pins: Sequence[PinnedCheckpoint]) -> list[str]:
    """Short names of checkpoints: the last part of each reference, more where needed.

    Args:
        pins (`Sequence[PinnedCheckpoint]`): of the checkpoints.
    """
    names = [Path(item.ref).name or item.ref for item in pins]
    for longer in (lambda item: item.ref, str):
        pairs = zip(names, pins, strict=True)
        names = [longer(item) if names.count(name) > 1 else name for name, item in pairs]
    return [
        f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def equals_base(name: str, base: str) -> CheckpointError:
    """The error for an input without an update."""
    return CheckpointError(
        f"{name} equals the base model {base}: it has no update.",
        "Leave it out, or name the right --base-model.",
    )


def _check_distinct(tasks: Sequence[PinnedCheckpoint], base: PinnedCheckpoint) -> list[str]:
    """An input that is the base is an error; one that is given twice a warning."""

    def identity(item: PinnedCheckpoint) -> tuple[str, str | None]:
        return (str(Path(item.ref).resolve()) if item.is_local else item.ref, item.revision)

    warnings = []
    seen = set()
    for item in tasks:
        if identity(item) == identity(base):
            raise equals_base(str(item), str(base))
        if identity(item) in seen:
            warnings.append(f"{item} is given twice; leave one out.")
        seen.add(identity(item))
    return warnings
