"""The checkpoints of a run: resolved once, opened by their headers, then read from local copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from huggingface_hub import constants

from hf_tsv import hub
from hf_tsv.checkpoints import base_model, companions, places
from hf_tsv.checkpoints.base_model import SaidBase
from hf_tsv.checkpoints.formats.task import Task, equals_base
from hf_tsv.checkpoints.formats.whole import Checkpoint
from hf_tsv.checkpoints.names import CLASSES_FILE, ROUTING_FILE
from hf_tsv.checkpoints.opening import format_of, open_base, open_task, without_base
from hf_tsv.checkpoints.reference import PinnedCheckpoint, Reference, at_revision, parse, pin
from hf_tsv.checkpoints.storage.ahead import AHEAD_BYTES, AheadFiles, Connections
from hf_tsv.checkpoints.storage.files import Files, LocalFiles
from hf_tsv.system.errors import CheckpointError, HfTsvError, UsageError
from hf_tsv.system.folders import check_free_space, local_kind
from hf_tsv.system.progress import logger
from hf_tsv.system.text import human_bytes
from hf_tsv.system.threads import Once, in_parallel


@dataclass(frozen=True)
class Access:
    """How checkpoints are reached; by default with the Hub client's own token and cache."""

    token: str | None = field(default=None, repr=False)
    cache_dir: str | None = None
    subfolder: str | None = None  # of the tasks, where their reference has none
    stream: bool = False  # read from the Hub when needed, without a copy on disk

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

LEVELS = 3  # folders above a task in which the folder of its base model is looked for


@dataclass(frozen=True)
class Sources:
    """A base model and fine-tunes of it, all pinned, and oddities that the user should know of."""

    base: Checkpoint
    inputs: tuple[Task, ...]
    access: Access = DEFAULT_ACCESS
    warnings: tuple[str, ...] = ()

    def all(self) -> tuple[Task, ...]:
        """The tasks, then the base."""
        return (*self.inputs, self.base)

    def download_bytes(self) -> int:
        """Size of what a run fetches from the Hub; files in the client's cache do not count."""
        if self.access.stream:
            far = filter(_far, self.all())
            parts = (item.parts(name) for item in far for name in item.tensors)
            return sum(info.nbytes for infos in parts for info in infos)
        return download_bytes(self.all(), companions_of=[self.base])

    def waiting_bytes(self) -> int:
        """Memory of what is fetched before it is read."""
        return AHEAD_BYTES if self.access.stream and any(map(_far, self.all())) else 0

    def within_reach(self, *, visible: bool) -> Sources:
        """The same checkpoints, read from the client's cache, or from the Hub if asked to stream.

        Fetches in parallel what the cache lacks; to stream, opens connections.
        """
        found = self._read_from(_streamed(self.all())) if self.access.stream else self
        return found._read_from(fetched(found.all(), companions_of=[found.base], visible=visible))

    def _read_from(self, files: Sequence[Files]) -> Sources:
        *theirs, ours = files
        pairs = zip(self.inputs, theirs, strict=True)
        inputs = tuple(item.reading_from(found) for item, found in pairs)
        return replace(self, inputs=inputs, base=self.base.reading_from(ours))

    def close(self) -> None:
        """Close the files that were read, and connections."""
        for item in self.all():
            item.pinned.files.close()


def _far(item: Task) -> bool:
    """Whether anything that a run reads of it has to be fetched."""
    return bool(item.pinned.files.uncached(item.needed_files))


def _streamed(items: Sequence[Task]) -> list[Files]:
    """Files of items; those of which the cache lacks some are read from the Hub."""
    far = [_far(item) for item in items]
    result = [item.pinned.files for item in items]
    connections = Connections() if any(far) else None
    for i, files in enumerate(result):
        if connections is not None and far[i] and files.downloads is not None:
            share = AHEAD_BYTES // sum(far)
            result[i] = AheadFiles(files.downloads, files.subfolder, connections, share)
    return result


def _wanted(items: Sequence[Task], companions_of: Sequence[Task]) -> list[hub.Wanted]:
    """Files of repositories that have to be on disk: weights, config, and some's companions."""
    wanted = []
    for item in items:
        files = item.pinned.files
        if (repo := files.downloads) is None:  # a folder, or what is streamed
            continue
        names = list(map(files.path, item.needed_files))
        if "README.md" in repo.sizes:  # an offline run infers the base from it
            names.append("README.md")
        if files.size(ROUTING_FILE) is not None:  # without it, an offline run would not route
            names.append(files.path(ROUTING_FILE))
            if files.size(CLASSES_FILE) is not None:
                names.append(files.path(CLASSES_FILE))
        if any(item is other for other in companions_of):
            names += map(files.path, companions.present(item.pinned))
        wanted.append(hub.Wanted(repo, item.pinned.asked_revision, tuple(names)))
    return wanted


def download_bytes(items: Sequence[Task], *, companions_of: Sequence[Task] = ()) -> int:
    """Size of the files of items, and of some's companions, that the cache lacks."""
    return sum(repo.sizes[name] for repo, name in hub.missing(_wanted(items, companions_of)))


def fetched(items: Sequence[Task], *, companions_of: Sequence[Task], visible: bool) -> list[Files]:
    """Files of items on this machine; fetches in parallel, with one bar, what the cache lacks.

    Of some, `companions_of`, processor and tokenizer are needed too.
    """
    wanted = _wanted(items, companions_of)
    if size := sum(repo.sizes[name] for repo, name in hub.missing(wanted)):
        check_free_space(Path(wanted[0].repo.cache_dir or constants.HF_HUB_CACHE), size)
        logger.info("Downloading %s.", human_bytes(size))
    folders = iter(hub.download(wanted, visible=visible))
    return [
        files if files.downloads is None else LocalFiles(next(folders) / files.subfolder)
        for files in (item.pinned.files for item in items)
    ]


def open_sources(
    references: Sequence[str],
    base_reference: str | None,
    access: Access = DEFAULT_ACCESS,
    *,
    only_factors: bool = False,
) -> Sources:
    """Resolve every reference once and read every header, in parallel; writes nothing.

    The base model is by default the one that the tasks agree on. With `only_factors` all tasks
    must be task factors.

    Raises:
        [`HfTsvError`]: one cannot be read, is no CLIP, or is the base itself.
    """
    pinned = partial(pin, token=access.token, cache_dir=access.cache_dir)
    named = [parse(text, access.subfolder) for text in references]
    named += [] if base_reference is None else [parse(base_reference)]
    tasks = in_parallel(pinned, named)
    opened: list[Task | None] = [None] * len(references)
    if base_reference is None:
        opened = in_parallel(_alone, tasks)
        if only_factors:
            _refuse_others(tasks, opened)
        base_pin = pinned(parse(_inferred_base(tasks, opened, pinned)))
    else:
        base_pin = tasks.pop()
    base = Once(lambda: open_base(base_pin))
    rest = [pin for pin, item in zip(tasks, opened, strict=True) if item is None]
    calls: list[Callable[[], Task]] = [*(partial(open_task, pin, base) for pin in rest), base]
    found = iter(in_parallel(lambda call: call(), calls))
    inputs = tuple(next(found) if item is None else item for item in opened)
    inputs = tuple(item.completed(base()) for item in inputs)
    if only_factors:
        _refuse_others(tasks, inputs)
    _refuse_twice(tasks, base_pin)
    warnings: list[str] = []
    if base_reference is not None:
        said = {str(item): item.says_base() for item in inputs}
        names = {item: one.names for item, one in said.items() if not one.made_with}
        warnings = base_model.contradicted(names, base_pin, _parents(pinned))
    return Sources(base(), inputs, access, tuple(warnings))


def open_beside(pinned: PinnedCheckpoint, base: Checkpoint) -> Task:
    """Open a fine-tune as [`open_sources`] does, with a base model that is open already."""
    item = open_task(pinned, lambda: base).completed(base)
    _refuse_twice([pinned], base.pinned)
    return item


def _alone(pinned: PinnedCheckpoint) -> Task | None:
    """Open a fine-tune, unless that needs the base model."""
    return None if format_of(pinned).needs_base else open_task(pinned, without_base)


def _refuse_others(pins: Sequence[PinnedCheckpoint], opened: Sequence[Task | None]) -> None:
    """Refuse all but task factors."""
    for pinned, item in zip(pins, opened, strict=True):
        if item is None or item.description is None:
            form = format_of(pinned).task
            raise CheckpointError(
                f"{pinned} is a {form.kind}, not task factors.", form.for_factors.format(pinned)
            )


def _inferred_base(
    tasks: Sequence[PinnedCheckpoint],
    opened: Sequence[Task | None],
    pinned: Callable[[Reference], PinnedCheckpoint],
) -> str:
    """Reference of the base model that cards, configs and factors agree on."""

    def said_by(pair: tuple[PinnedCheckpoint, Task | None]) -> SaidBase:
        task, item = pair
        return format_of(task).says_base(task) if item is None else item.says_base()

    said = in_parallel(said_by, zip(tasks, opened, strict=True))
    names = {str(task): one.names for task, one in zip(tasks, said, strict=True)}
    found, speakers = base_model.infer(names, _parents(pinned))
    revisions = {one.revision for one in said if one.made_with and found in one.names}
    if None in revisions:  # factors of a folder: the same one must be here, or beside them
        near = [Path(task.ref).absolute() for task in tasks if task.is_local]
        beside = [str(up / found) for path in near for up in path.parents[:LEVELS]]
        known = [places.noted(one.fingerprint) for one in said]
        there = [place for place in (*known, found, *beside) if local_kind(place) == "folder"]
        if not there:
            problem = f"{speakers[0]} was made with the folder {found}, which is not here."
            raise CheckpointError(problem, "Name the same base model with `base_model=REF`.")
        found = there[0]
    logger.info("Base model: %s, named by %s.", found, ", ".join(speakers))
    if None in revisions:
        return found
    revision = revisions.pop() if len(revisions) == 1 else None
    return f"hf://{at_revision(found, revision)}"


def _parents(pinned: Callable[[Reference], PinnedCheckpoint]) -> Callable[[str], list[str]]:
    """Look-up of the base models that a repository names."""

    def parents(name: str) -> list[str]:
        try:
            return base_model.named_by(pinned(parse(f"hf://{name}")))
        except HfTsvError:  # gone, private, or a folder elsewhere: it says nothing
            return []

    return parents


def _refuse_twice(tasks: Sequence[PinnedCheckpoint], base: PinnedCheckpoint) -> None:
    """Refuse an input that is the base, or that is given twice."""

    def identity(item: PinnedCheckpoint) -> tuple[str, str | None]:
        return (str(Path(item.ref).resolve()) if item.is_local else item.ref, item.revision)

    seen = set()
    for item in tasks:
        if identity(item) == identity(base):
            raise equals_base(str(item), str(base))
        if identity(item) in seen:
            hint = "Omit one; a larger weight counts a task more."
            raise UsageError(f"{item} is given twice.", hint)
        seen.add(identity(item))
