"""The checkpoints of a run: resolved once, opened by their headers, then read from local copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from hf_tsv import hub
from hf_tsv.checkpoints import base_model, companions
from hf_tsv.checkpoints.adapters import Adapter, is_adapter, open_adapter
from hf_tsv.checkpoints.ahead import AHEAD_BYTES, AheadFiles, Connections
from hf_tsv.checkpoints.files import HubFiles, LocalFiles
from hf_tsv.checkpoints.masks import Masked, is_masked, open_masked
from hf_tsv.checkpoints.reader import Checkpoint, open_checkpoint
from hf_tsv.checkpoints.reference import (
    PinnedCheckpoint,
    Reference,
    at_revision,
    local_kind,
    parse,
    pin,
)
from hf_tsv.errors import CheckpointError, HfTsvError, RepoError
from hf_tsv.factors import TaskFactors, is_factors, open_factors
from hf_tsv.folders import check_free_space
from hf_tsv.parallel import in_parallel
from hf_tsv.progress import human_bytes, logger

Task = Checkpoint | TaskFactors
"""A fine-tune, whole or compressed."""


@dataclass(frozen=True)
class Access:
    """How checkpoints are reached.

    Args:
        token (`str`, *optional*): default: the one the Hub client is logged in with.
        cache_dir (`str`, *optional*): default: the Hub client's cache.
        subfolder (`str`, *optional*): of the tasks, where their reference has none.
        stream (`bool`): read tensors from the Hub when they are needed, without a copy on disk.
    """

    token: str | None = field(default=None, repr=False)
    cache_dir: str | None = None
    subfolder: str | None = None
    stream: bool = False

    @staticmethod
    def of(
        token: str | None,
        cache_dir: str | Path | None,
        subfolder: str | None = None,
        *,
        stream: bool = False,
    ) -> Access:
        """The same, of the arguments that users give."""
        return Access(token, None if cache_dir is None else str(cache_dir), subfolder, stream)


DEFAULT_ACCESS = Access()


@dataclass(frozen=True)
class Sources:
    """A base model and fine-tunes of it, whole or compressed, all pinned.

    Args:
        base ([`Checkpoint`]): W0.
        inputs (`tuple[Checkpoint | TaskFactors, ...]`): the tasks.
        access ([`Access`]): how they were reached.
        warnings (`tuple[str, ...]`): what the user should know of them.
    """

    base: Checkpoint
    inputs: tuple[Task, ...]
    access: Access = DEFAULT_ACCESS
    warnings: tuple[str, ...] = ()

    def all(self) -> tuple[Task, ...]:
        """The tasks, then the base."""
        return (*self.inputs, self.base)

    def download_bytes(self) -> int:
        """What a run fetches from the Hub; files in the client's cache do not count."""
        if self.access.stream:
            far = (item for item in self.all() if _far(item))
            return sum(
                info.nbytes for item in far for name in item.tensors for info in item.parts(name)
            )
        return sum(repo.sizes[name] for repo, name in hub.missing(_wanted(self.all(), [self.base])))

    def waiting_bytes(self) -> int:
        """Memory of what is fetched before it is read."""
        return AHEAD_BYTES if self.access.stream and any(map(_far, self.all())) else 0

    def within_reach(self, *, visible: bool) -> Sources:
        """The same checkpoints, read from the client's cache, or from the Hub if asked to stream.

        Fetches in parallel what the cache lacks; to stream, opens connections.

        Args:
            visible (`bool`): show one progress bar over everything that is downloaded.
        """
        items = _streamed(self.all()) if self.access.stream else self.all()
        *inputs, base = fetched(items, with_companions=[items[-1]], visible=visible)
        assert isinstance(base, Checkpoint)  # it was one before
        inputs = [item.on(base) if isinstance(item, Adapter | Masked) else item for item in inputs]
        return replace(self, inputs=tuple(inputs), base=base)

    def close(self) -> None:
        """Close the files that were read, and connections."""
        for item in self.all():
            item.pinned.files.close()


def _far(item: Task) -> bool:
    """Whether anything that a run reads of it has to be fetched."""
    files = item.pinned.files
    if type(files) is HubFiles:
        return bool(hub.uncached(files.repo, [files.path(name) for name in item.needed_files]))
    return isinstance(files, AheadFiles)


def _streamed(items: Sequence[Task]) -> Sequence[Task]:
    """The same items; those that the cache does not hold are read from the Hub."""
    far = [_far(item) for item in items]
    if not any(far):
        return items
    connections = Connections()
    result: list[Task] = []
    for item, is_far in zip(items, far, strict=True):
        files = item.pinned.files
        if is_far and isinstance(files, HubFiles):
            share = AHEAD_BYTES // sum(far)
            ahead = AheadFiles(files.repo, files.subfolder, connections, share)
            result.append(item.reading_from(ahead))
        else:
            result.append(item)
    return result


def _wanted(items: Sequence[Task], with_companions: Sequence[Task]) -> list[hub.Wanted]:
    """What has to be on disk of repositories: weights and config, and companion files of some."""
    wanted = []
    for item in items:
        if type(item.pinned.files) is not HubFiles:  # those that are streamed stay where they are
            continue
        repo = item.pinned.files.repo
        names = [item.pinned.files.path(name) for name in item.needed_files]
        if "README.md" in repo.sizes:  # an offline run infers the base from it
            names.append("README.md")
        if any(item is other for other in with_companions):
            names += map(item.pinned.files.path, companions.present(item.pinned))
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
        item.reading_from(LocalFiles(next(folders) / item.pinned.files.subfolder))
        if type(item.pinned.files) is HubFiles
        else item
        for item in items
    ]


def open_sources(
    references: Sequence[str],
    base_reference: str | None,
    access: Access = DEFAULT_ACCESS,
    *,
    only_factors: bool = False,
) -> Sources:
    """Resolve every reference once and read every header, in parallel; writes nothing.

    Args:
        references (`Sequence[str]`): the fine-tunes, or task factors of them.
        base_reference (`str`, *optional*): default: the base they agree on.
        access ([`Access`]): how they are reached.
        only_factors (`bool`): the tasks must be task factors.

    Raises:
        [`HfTsvError`]: one cannot be read, is no CLIP, or is the base itself.
    """

    def pinned(reference: Reference) -> PinnedCheckpoint:
        return pin(reference, token=access.token, cache_dir=access.cache_dir)

    named = [parse(text, access.subfolder) for text in references]
    named += [] if base_reference is None else [parse(base_reference)]
    tasks = in_parallel(pinned, named)
    inputs = in_parallel(open_task, tasks)
    for item in inputs[: len(references)] if only_factors else ():
        if not isinstance(item, TaskFactors):
            what = {Adapter: "PEFT adapter", Masked: "mask"}.get(type(item), "checkpoint")
            hint = "Make factors with `hf-tsv compress`."
            if isinstance(item, Masked):
                hint = f"`hf-tsv merge {item} -o DIR` makes a whole checkpoint of it."
            raise CheckpointError(f"{item} is a {what}, not task factors.", hint)
    opened_base: Task
    if base_reference is None:
        base = pinned(parse(_inferred_base(inputs, pinned)))
        opened_base = open_task(base)
    else:
        base, opened_base = tasks.pop(), inputs.pop()
    if isinstance(opened_base, TaskFactors):
        raise CheckpointError(
            f"The base model {opened_base} holds task factors.",
            "Name the checkpoint that the tasks were fine-tuned from.",
        )
    if isinstance(opened_base, Adapter | Masked):
        what = "an adapter" if isinstance(opened_base, Adapter) else "a mask"
        raise CheckpointError(
            f"The base model {opened_base} is {what}.",
            "Name the model that the tasks were fine-tuned from.",
        )
    found = opened_base
    inputs = [item.on(found) if isinstance(item, Adapter | Masked) else item for item in inputs]
    warnings = _check_distinct(tasks, base)
    return Sources(opened_base, tuple(inputs), access, tuple(warnings))


def open_task(pinned: PinnedCheckpoint) -> Task:
    """Read the headers of a checkpoint, of an adapter, or of task factors.

    Where pickles cannot be read, the conversion to safetensors that the Hub offers as a pull
    request is.
    """
    try:
        return _opened(pinned)
    except CheckpointError as error:
        converted = _conversion(pinned)
        if converted is None:
            if isinstance(pinned.files, LocalFiles) and not pinned.is_local:
                cached = next(p for p in pinned.files.root.parents if p.name == "snapshots").parent
                error.hint = f"Run once with a connection; if it stays, delete {cached} first."
            raise
        logger.warning("%s Its conversion %s is read.", error.message, converted)
        return _opened(converted)


def _conversion(pinned: PinnedCheckpoint) -> PinnedCheckpoint | None:
    names = pinned.files.names()
    pickled = any(name.endswith(".bin") for name in names)
    if not pickled or any(name.endswith(".safetensors") for name in names):
        return None
    if not isinstance(pinned.files, HubFiles):
        return None
    repo = pinned.files.repo
    try:
        revision = hub.conversion(repo)
        if revision is None:
            return None
        reference = Reference(pinned.ref, repo.repo_id, revision, pinned.files.subfolder)
        return pin(reference, token=repo.token, cache_dir=repo.cache_dir)
    except RepoError:  # what is wrong with the pickle says more
        return None


def _opened(pinned: PinnedCheckpoint) -> Task:
    if is_masked(pinned):
        return open_masked(pinned)
    if is_adapter(pinned):
        return open_adapter(pinned)
    return open_factors(pinned) if is_factors(pinned) else open_checkpoint(pinned)


def _inferred_base(inputs: Sequence[Task], pinned: Callable[[Reference], PinnedCheckpoint]) -> str:
    """Reference of the base model that cards, configs and factors agree on."""

    def parents(name: str) -> list[str]:
        try:
            return base_model.named_by(pinned(parse(f"hf://{name}")))
        except HfTsvError:  # gone, private, or a folder elsewhere: it says nothing
            return []

    origins: dict[str, tuple[str, str | None]] = {}
    for item in inputs:
        if isinstance(item, TaskFactors):
            origins[str(item)] = (item.config.base_model.ref, item.config.base_model.revision)
        elif isinstance(item, Masked):
            origins[str(item)] = (item.base_ref, item.base_revision)
    said = {
        str(item): [origins[str(item)][0]]
        if str(item) in origins
        else base_model.named_by(item.pinned)
        for item in inputs
    }
    found, speakers = base_model.infer(said, parents)
    logger.info("Base model: %s, named by %s.", found, ", ".join(speakers))
    revisions = {revision for ref, revision in origins.values() if ref == found}
    if None in revisions:  # factors of a folder: the same one must be here
        if local_kind(found) != "folder":
            raise CheckpointError(
                f"{speakers[0]} was made with the folder {found}, which is not here.",
                "Name the same base model with --base-model.",
            )
        return found
    revision = revisions.pop() if len(revisions) == 1 else None
    return f"hf://{at_revision(found, revision)}"


def config_of(item: Task) -> Mapping[str, Any]:
    """The config.json of a task."""
    return item.config.model_config if isinstance(item, TaskFactors) else item.config


def pinned_entry(item: Task) -> dict[str, str | None]:
    """What a report says of a checkpoint."""
    return {"ref": item.pinned.ref, "revision": item.pinned.revision}


def identity_entry(item: Task) -> dict[str, Any]:
    """Which commit; or which folder, and the sizes of its files and when they were changed.

    Unlike the time of modification, that of change cannot be set: a copy that keeps the one is
    noticed by the other.
    """
    entry: dict[str, Any] = {**pinned_entry(item)}
    if isinstance(item.pinned.files, LocalFiles) and item.pinned.is_local:
        root = item.pinned.files.root
        stats = {name: (root / name).stat() for name in item.needed_files}
        entry["files"] = {
            name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats.items()
        }
    return entry


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
