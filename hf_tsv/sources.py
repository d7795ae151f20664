"""The checkpoints of a run: resolved once, opened by their headers, then read from local copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import constants

from hf_tsv import hub
from hf_tsv.checkpoints import base_model, companions
from hf_tsv.checkpoints.files import HubFiles, LocalFiles
from hf_tsv.checkpoints.reader import Checkpoint, open_checkpoint
from hf_tsv.checkpoints.reference import PinnedCheckpoint, parse, pin
from hf_tsv.checkpoints.writer import check_free_space
from hf_tsv.errors import CheckpointError
from hf_tsv.parallel import in_parallel
from hf_tsv.progress import human_bytes, logger


@dataclass(frozen=True)
class Sources:
    """A base model and fine-tunes of it, all pinned.

    Args:
        base ([`Checkpoint`]): W0.
        inputs (`tuple[Checkpoint, ...]`): the tasks.
        warnings (`tuple[str, ...]`): what the user should know of them.
    """

    base: Checkpoint
    inputs: tuple[Checkpoint, ...]
    warnings: tuple[str, ...] = ()

    def all(self) -> tuple[Checkpoint, ...]:
        """The tasks, then the base."""
        return (*self.inputs, self.base)

    def download_bytes(self) -> int:
        """What [`downloaded`] would fetch; files in the client's cache do not count."""
        return sum(repo.sizes[name] for repo, name in hub.missing(self._wanted()))

    def downloaded(self, *, visible: bool) -> Sources:
        """The same checkpoints, read from the client's cache; fetches in parallel what is missing.

        Args:
            visible (`bool`): show one progress bar over everything.
        """
        wanted = self._wanted()
        if size := self.download_bytes():
            check_free_space(Path(wanted[0].repo.cache_dir or constants.HF_HUB_CACHE), size)
            logger.info("Downloading %s.", human_bytes(size))
        folders = iter(hub.download(wanted, visible=visible))

        def local(item: Checkpoint) -> Checkpoint:
            if not isinstance(item.pinned.files, HubFiles):
                return item
            return item.reading_from(LocalFiles(next(folders)))

        inputs = tuple(local(item) for item in self.inputs)
        return replace(self, inputs=inputs, base=local(self.base))

    def close(self) -> None:
        """Close the files that were read."""
        for item in self.all():
            if isinstance(item.pinned.files, LocalFiles):
                item.pinned.files.close()

    def _wanted(self) -> list[hub.Wanted]:
        """What has to be on disk: weights and config of all, companion files of the base."""
        wanted = []
        for item in self.all():
            if not isinstance(item.pinned.files, HubFiles):
                continue
            repo = item.pinned.files.repo
            names = ["config.json", *item.weight_files]
            if "README.md" in repo.sizes:  # an offline run infers the base from it
                names.append("README.md")
            if item is self.base:
                names += companions.present(item)
            wanted.append(hub.Wanted(repo, item.pinned.asked_revision, tuple(names)))
        return wanted


def open_sources(
    references: Sequence[str],
    base_reference: str | None,
    *,
    token: str | None = None,
    cache_dir: str | None = None,
) -> Sources:
    """Resolve every reference once and read every header, in parallel; writes nothing.

    Args:
        references (`Sequence[str]`): the fine-tunes.
        base_reference (`str`, *optional*): default: the base they agree on.
        token (`str`, *optional*): default: the one the client is logged in with.
        cache_dir (`str`, *optional*): the client's cache.

    Raises:
        [`HfTsvError`]: one cannot be read, is no CLIP, or is the base itself.
    """
    named = [*references, *([] if base_reference is None else [base_reference])]
    parsed = [parse(text) for text in named]
    pinned = in_parallel(lambda ref: pin(ref, token=token, cache_dir=cache_dir), parsed)
    if base_reference is None:
        found, speakers = base_model.infer(pinned)
        logger.info("Base model: %s, named by %s.", found, ", ".join(speakers))
        pinned.append(pin(parse(f"hf://{found}"), token=token, cache_dir=cache_dir))
    *tasks, base = pinned
    warnings = _check_distinct(tasks, base)
    *inputs, opened_base = in_parallel(open_checkpoint, [*tasks, base])
    return Sources(opened_base, tuple(inputs), tuple(warnings))


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
