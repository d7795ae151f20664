"""The checkpoints of a run: resolved once, opened by their headers, then read from local copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import constants

from hf_tsv import hub
from hf_tsv.checkpoints import base_model, companions
from hf_tsv.checkpoints.formats.adapters import Adapter
from hf_tsv.checkpoints.formats.factors import Factors
from hf_tsv.checkpoints.formats.masks import Masked
from hf_tsv.checkpoints.formats.task import Task, equals_base
from hf_tsv.checkpoints.formats.whole import Checkpoint
from hf_tsv.checkpoints.opening import open_task
from hf_tsv.checkpoints.reference import PinnedCheckpoint, Reference, at_revision, parse, pin
from hf_tsv.checkpoints.storage.ahead import AHEAD_BYTES, AheadFiles, Connections
from hf_tsv.checkpoints.storage.files import HubFiles, LocalFiles
from hf_tsv.system.errors import CheckpointError, HfTsvError
from hf_tsv.system.folders import check_free_space, local_kind
from hf_tsv.system.progress import logger
from hf_tsv.system.text import human_bytes
from hf_tsv.system.threads import in_parallel


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
        inputs (`tuple[Checkpoint | Factors, ...]`): the tasks.
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
        items (`Sequence[Checkpoint | Factors]`): of the Hub, or of folders.
        with_companions (`Sequence[Checkpoint | Factors]`): those whose processor and tokenizer
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
        if not isinstance(item, Factors):
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
    if isinstance(opened_base, Factors):
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


def _inferred_base(inputs: Sequence[Task], pinned: Callable[[Reference], PinnedCheckpoint]) -> str:
    """Reference of the base model that cards, configs and factors agree on."""

    def parents(name: str) -> list[str]:
        try:
            return base_model.named_by(pinned(parse(f"hf://{name}")))
        except HfTsvError:  # gone, private, or a folder elsewhere: it says nothing
            return []

    origins: dict[str, tuple[str, str | None]] = {}
    for item in inputs:
        if isinstance(item, Factors):
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
