"""The verb `push`: upload of a finished folder, at once or after an upload that failed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from hf_tsv import hub
from hf_tsv.checkpoints import names
from hf_tsv.checkpoints.formats.adapter_names import CONFIG_FILE as ADAPTER_CONFIG
from hf_tsv.checkpoints.formats.factors import open_factors
from hf_tsv.checkpoints.formats.routing import class_embeddings, open_routing
from hf_tsv.checkpoints.formats.whole import open_checkpoint
from hf_tsv.checkpoints.names import FACTORS_CONFIG, MARKERS, RECIPE_FILE
from hf_tsv.checkpoints.reference import PinnedCheckpoint
from hf_tsv.checkpoints.storage.files import LocalFiles, read_json
from hf_tsv.checkpoints.storage.headers import read_header
from hf_tsv.recipes.recipe import Recipe
from hf_tsv.reports.report import Report
from hf_tsv.runs import journal
from hf_tsv.runs import target as target_
from hf_tsv.runs.publishing import published
from hf_tsv.runs.target import Target, waiting
from hf_tsv.system.errors import CheckpointError, OutputError, public
from hf_tsv.system.folders import UNDER_CONSTRUCTION, absolute
from hf_tsv.system.progress import visible_by_default
from hf_tsv.system.text import counted


@dataclass(frozen=True, repr=False)
class PushReport(Report):
    """Summary of an upload.

    Args:
        folder (`str`): uploaded folder.
        repo_id (`str`): repository it was uploaded to.
        files (`dict[str, int]`): bytes of each file; `bytes` has their sum.
        changed (`bool`): whether the repository changed; not if it had all files already.
        seconds (`float`): wall time.
        url (`str`, *optional*): commit or pull request on the Hub.
        dry_run (`bool`): whether the upload was only checked.
    """

    folder: str
    repo_id: str
    files: dict[str, int]
    bytes: int
    seconds: float
    url: str | None = None
    changed: bool = True
    dry_run: bool = False


@public
def push(
    folder: str | PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    collection: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
) -> PushReport:
    """Upload a finished folder that hf-tsv wrote, as one commit.

    A folder that only waited for its upload is removed afterwards, others stay. Weights of an
    earlier upload are replaced. Large files that the repository already has, as after an
    interrupted upload, are not sent again.

    Args:
        folder (`str`): output of a merge, a compression or a reconstruction.
        repo_id (`str`): repository to upload to; created if needed.
        private, revision, create_pr, commit_message, collection, token, progress: as in [`merge`].
        dry_run (`bool`): check the folder and the rights only.

    Returns:
        [`PushReport`]: summary of the upload.

    Raises:
        [`HfTsvError`]: the folder is unfinished or damaged, or the upload failed.

    Example:
        >>> import hf_tsv
        >>> hf_tsv.push("merged", "me/clip-abc")  # doctest: +SKIP
    """
    started = time.monotonic()
    show = visible_by_default() if progress is None else progress
    place = absolute(Path(fspath(folder)))
    inputs = _check_finished(place)
    target = Target(None, repo_id, False, private, revision, create_pr, commit_message, collection)
    target = target.checked(token, dry_run=dry_run)
    target.refuse_inputs(inputs)
    files = hub.files_to_push(place, MARKERS)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    done = None
    if dry_run:
        published(files, str(target.push_to))  # says what names folders of this machine
    else:
        with waiting(place):
            done = target_.push(place, target, token, show=show)
        target_.collect(target, done, token)
    return PushReport(
        folder=str(place),
        repo_id=str(target.push_to),
        files=sizes,
        bytes=sum(sizes.values()),
        seconds=round(time.monotonic() - started, 3),
        url=None if done is None else done.url,
        changed=done is not None and done.changed,
        dry_run=dry_run,
    )


def _check_finished(folder: Path) -> list[PinnedCheckpoint]:
    """Refuse a folder that is no complete output of hf-tsv; return its Hub inputs."""
    work = journal.work_of(folder)
    if any(UNDER_CONSTRUCTION.fullmatch(name) for name in (folder.name, folder.parent.name)):
        raise OutputError(
            f"{folder} is not finished.", "Run the command that began it again to resume."
        )
    if not folder.is_dir() and work.is_dir():
        raise OutputError(
            f"{folder} is not finished.", "Run the command that began it again to resume."
        )
    if not folder.is_dir():
        raise OutputError(f"There is no folder {folder}.", "Check the path.")
    files = LocalFiles(folder)
    if not any(files.size(marker) is not None for marker in MARKERS):
        raise OutputError(
            f"{folder} was not written by hf-tsv (it has none of {', '.join(MARKERS)}).",
            "Name the output of a merge, a compression or a reconstruction.",
        )
    pinned = PinnedCheckpoint(str(folder), None, files, {})
    with closing(files):
        try:
            _check_weights(pinned, folder)
            return [
                replace(pinned, ref=str(entry["ref"]), revision=str(entry["revision"]))
                for entry in _made_from(pinned, files)
                if entry.get("revision") is not None
            ]
        except CheckpointError as error:
            error.hint = "Nothing was uploaded; run the command that wrote the folder again."
            raise


def _check_weights(pinned: PinnedCheckpoint, folder: Path) -> None:
    """Read every header, which reveals missing files and files that are cut short."""
    for path in sorted(folder.rglob("*.safetensors")):
        read_header(pinned.files, path.relative_to(folder).as_posix(), str(pinned))
    if pinned.files.size(ADAPTER_CONFIG) is not None:
        read_header(pinned.files, names.ADAPTER_FILE, str(pinned))
    elif pinned.files.size(FACTORS_CONFIG) is not None:
        open_factors(pinned)
    elif open_checkpoint(pinned).config_name is None:
        raise CheckpointError(f"{folder} has no {names.CONFIG_FILE}.")


def _check_beside(folder: Path, recipe: Recipe, owner: str) -> None:
    """Refuse a merge that has lost heads, masks or factors beside its weights."""
    if recipe.settings.keep_heads and not list(folder.glob("heads/*.safetensors")):
        raise CheckpointError(f"{owner} has lost its task heads.")
    pinned = PinnedCheckpoint(str(folder), None, LocalFiles(folder), {})
    routing = open_routing(pinned)
    if routing is not None:
        class_embeddings(pinned, routing)
    for task in () if routing is None else routing.tasks:
        if task.folder is None:
            continue
        there = pinned.files.within(task.folder)
        if there.size(FACTORS_CONFIG) is None:
            raise CheckpointError(f"{owner} has lost the factors of the task {task.name}.")
        open_factors(replace(pinned, ref=f"{pinned.ref}/{task.folder}", files=there))
    masks = len(list(folder.glob("masks/*/mask.safetensors")))
    if recipe.settings.row.beside and masks < len(recipe.inputs):
        raise CheckpointError(
            f"{owner} has masks of only {masks} of {counted(len(recipe.inputs), 'task')}."
        )


def _made_from(pinned: PinnedCheckpoint, files: LocalFiles) -> list[Mapping[str, Any]]:
    """Inputs that the folder says it was made from."""
    owner = str(pinned)
    if files.size(RECIPE_FILE) is not None:
        text = files.read(RECIPE_FILE).decode(errors="replace")
        recipe = Recipe.from_yaml(text, f"{owner}/{RECIPE_FILE}")
        _check_beside(files.root, recipe, owner)
        return [vars(item) for item in (*recipe.inputs, recipe.base_model) if item is not None]
    factors = files.size(FACTORS_CONFIG) is not None
    content = read_json(files, FACTORS_CONFIG if factors else names.RECONSTRUCTION_FILE, owner)
    entries = [content.get(key) for key in ("source" if factors else "factors", "base_model")]
    return [entry for entry in entries if isinstance(entry, dict) and "ref" in entry]
