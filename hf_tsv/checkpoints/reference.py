"""What a user writes for a checkpoint, and the exact commit it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import parse_hf_uri
from huggingface_hub.errors import HfUriError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from hf_tsv import hub
from hf_tsv.checkpoints.files import Files, HubFiles, LocalFiles
from hf_tsv.errors import CheckpointError, RepoError


@dataclass(frozen=True)
class Reference:
    """A checkpoint as named by the user: a Hub repository or a local folder.

    Args:
        text (`str`): what the user wrote, without the revision.
        repo_id (`str`, *optional*): `org/name`, for a repository.
        revision (`str`, *optional*): branch, tag, pull request or sha the user asked for.
    """

    text: str
    repo_id: str | None = None
    revision: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether this is a folder on this machine."""
        return self.repo_id is None


@dataclass(frozen=True)
class PinnedCheckpoint:
    """A reference resolved once: everything is read at this commit.

    Args:
        ref (`str`): repository id or folder.
        revision (`str`, *optional*): commit sha; None for a folder.
        files (`Files`): where its files are read.
        card (`dict[str, Any]`): front matter of its model card.
        asked_revision (`str`, *optional*): the revision the user named.
    """

    ref: str
    revision: str | None
    files: Files
    card: dict[str, Any]
    asked_revision: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether this is a folder on this machine."""
        return self.revision is None

    def __str__(self) -> str:
        return self.ref if self.asked_revision is None else f"{self.ref}@{self.asked_revision}"


def parse(text: str) -> Reference:
    """Read `org/name`, `org/name@revision`, `hf://org/name@revision`, or a folder.

    An existing folder wins over a repository of the same name, as in transformers.

    Raises:
        [`RepoError`]: it is none of these.

    Example:
        >>> parse("org/clip-a@v1")
        Reference(text='org/clip-a', repo_id='org/clip-a', revision='v1')
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CheckpointError(
            f"{text!r} is not valid text.",
            "Write org/name, or rename the folder: recipes are UTF-8.",
        ) from None
    kind = _local_kind(text)
    if kind == "folder":
        return Reference(text)
    if kind == "file":
        raise CheckpointError(f"{text} is a file.", "Give the folder that holds config.json.")
    if text.startswith((".", "/", "~")) or not text.strip():
        raise CheckpointError(f"There is no folder {text!r}.", "Check the path.")
    try:
        uri = parse_hf_uri(text if text.startswith(("hf://", "https://")) else f"hf://{text}")
        validate_repo_id(uri.id)
    except (HfUriError, HFValidationError) as error:
        raise RepoError(
            f"{text!r} is neither a folder nor a repository: {getattr(error, 'msg', error)}",
            "Write org/name, org/name@revision, hf://org/name, or the path of an existing folder.",
        ) from None
    if uri.type != "model" or uri.path_in_repo:
        raise RepoError(
            f"{text!r} does not name a model repository.",
            "Write org/name or org/name@revision; for a local folder check the path.",
        )
    return Reference(uri.id, uri.id, uri.revision)


def _local_kind(text: str) -> str | None:
    """What a text is on this machine: "folder", "file", or None for nothing that can be read."""
    try:
        path = Path(text).expanduser()
        return "folder" if text and path.is_dir() else "file" if path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # too long, no permission, an unknown ~user
        return None


def pin(
    reference: Reference, *, token: str | None = None, cache_dir: str | None = None
) -> PinnedCheckpoint:
    """Resolve a reference to a commit and its list of files, once; writes nothing.

    Raises:
        [`RepoError`]: unknown, private or gated repository, or unknown revision.
    """
    if reference.repo_id is None:
        local = LocalFiles(Path(reference.text).expanduser())
        return PinnedCheckpoint(reference.text, None, local, _local_card(local))
    repo = hub.snapshot(reference.repo_id, reference.revision, token=token, cache_dir=cache_dir)
    if repo.folder is not None:
        cached = LocalFiles(repo.folder)
        return PinnedCheckpoint(
            reference.text, repo.revision, cached, _local_card(cached), reference.revision
        )
    return PinnedCheckpoint(
        reference.text, repo.revision, HubFiles(repo), repo.card, reference.revision
    )


def _local_card(files: LocalFiles) -> dict[str, Any]:
    """Front matter of a folder's README.md; a damaged card is no reason not to merge."""
    from huggingface_hub import ModelCard

    if files.size("README.md") is None:
        return {}
    try:
        text = files.read("README.md").decode("utf-8", errors="replace")
        if not text.startswith("---"):
            return {}
        return hub.card_dict(ModelCard(text, ignore_metadata_errors=True).data)
    except Exception:  # YAML and the client raise a dozen types on strange cards
        return {}
