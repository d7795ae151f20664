"""References to checkpoints as users write them, and the exact commits they stand for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from huggingface_hub import parse_hf_uri
from huggingface_hub.errors import HfUriError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from hf_tsv import hub
from hf_tsv.checkpoints.names import CONFIGS
from hf_tsv.checkpoints.storage.files import Files, HubFiles, LocalFiles, inside_folder
from hf_tsv.hub import WEIGHT_SUFFIXES
from hf_tsv.system.errors import CheckpointError, RepoError
from hf_tsv.system.folders import local_kind
from hf_tsv.system.untrusted import parse_json, parse_yaml

LONGEST_SUBFOLDER = 1000
MODULES = "modules.json"  # of sentence-transformers
CARD_BYTES = 1_000_000  # of a card are read; its front matter has to end within them
# Revisions that are written unquoted; in others a slash would begin a subfolder.
PULL_REQUEST = re.compile(r"refs/(pr|convert)/\w+")
DATASET = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


@dataclass(frozen=True)
class Reference:
    """A checkpoint as named by the user: a Hub repository, or a local folder without `repo_id`.

    `text` is the user's, without the revision; `subfolder` is empty for all of the repository.
    """

    text: str
    repo_id: str | None = None
    revision: str | None = None
    subfolder: str = ""

    @property
    def is_local(self) -> bool:
        """Tell whether this is a folder on this machine."""
        return self.repo_id is None


@dataclass(frozen=True)
class PinnedCheckpoint:
    """Reference that is resolved once, so that everything is read from the same commit.

    `ref` is a repository id with its subfolder if any, or a folder; `revision` a commit, None for
    a folder; `card` the front matter of the model card.
    """

    ref: str
    revision: str | None
    files: Files
    card: dict[str, Any]
    asked_revision: str | None = None

    @property
    def is_local(self) -> bool:
        """Tell whether this is a folder on this machine."""
        return self.revision is None

    @property
    def name(self) -> str:
        """Reference as it may be published: a repository, or a folder without its path."""
        if not self.is_local:
            return self.ref
        path = Path(self.ref).expanduser()
        return path.name if path.name not in ("", "..") else path.resolve().name or "folder"

    def __str__(self) -> str:
        return at_revision(self.ref, self.asked_revision)


def at_revision(ref: str, revision: str | None) -> str:
    """Reference to a folder, or to a repository and its revision, in the form that [`parse`] reads.

    Example:
        >>> at_revision("org/clip/vision", "v1")
        'org/clip@v1/vision'
    """
    if revision is None:
        return ref
    if not PULL_REQUEST.fullmatch(revision):
        revision = quote(revision, safe="")  # a branch may have a slash in its name
    repo_id = repo_id_of(ref)
    return f"{repo_id}@{revision}{ref[len(repo_id) :]}"


def repo_id_of(ref: str) -> str:
    """Repository of a reference on the Hub: `org/clip` of `org/clip/vision`."""
    return "/".join(ref.split("/")[:2])


def parse(text: str, subfolder: str | None = None) -> Reference:
    """Read `org/name`, `org/name@revision/subfolder`, `hf://org/name@revision`, or a folder.

    An existing folder wins over a repository of the same name, as in transformers; a subfolder in
    the text over the one given.

    Raises:
        [`RepoError`]: the text is none of these.

    Example:
        >>> parse("org/clip-a@v1")
        Reference(text='org/clip-a', repo_id='org/clip-a', revision='v1', subfolder='')
    """
    if subfolder:  # transformers' default is the empty string
        if not _is_subfolder(subfolder):
            hint = "Give a path inside the repository, such as `subfolder=vision`."
            raise RepoError(f"{subfolder!r} is not a subfolder.", hint)
        subfolder = str(PurePosixPath(subfolder))
    try:
        text.encode()
    except UnicodeEncodeError:
        hint = "Write org/name, or rename the folder: recipes are UTF-8."
        raise CheckpointError(f"{text!r} is not valid text.", hint) from None
    kind = local_kind(text)
    if kind == "folder":
        text = str(Path(text) / subfolder) if subfolder else text
        if local_kind(text) != "folder":
            raise CheckpointError(f"There is no folder {text!r}.", "Check `subfolder=`.")
        return Reference(text)
    if kind == "file":
        raise CheckpointError(f"{text} is a file.", f"Give its folder: {Path(text).parent}")
    if text.startswith((".", "/", "~")) or not text.strip():
        raise CheckpointError(f"There is no folder {text!r}.", "Check the path.")
    try:
        uri = parse_hf_uri(text if text.startswith(("hf://", "https://")) else f"hf://{text}")
        validate_repo_id(uri.id)
    except (HfUriError, HFValidationError) as error:
        said = getattr(error, "msg", error)
        raise RepoError(
            f"{text!r} is neither a folder nor a repository: {str(said).strip(' .')}.",
            "Write org/name, org/name@revision, hf://org/name, or the path of an existing folder.",
        ) from None
    inside = str(PurePosixPath(path)) if (path := uri.path_in_repo.strip("/")) else ""
    if uri.type != "model" or (inside and not _is_subfolder(inside)):
        raise RepoError(
            f"{text!r} does not name a model repository.",
            "Write org/name, org/name@revision, or org/name@revision/subfolder;"
            " for a local folder check the path.",
        )
    inside = inside or subfolder or ""
    return Reference("/".join(filter(None, [uri.id, inside])), uri.id, uri.revision, inside)


def _is_subfolder(text: str) -> bool:
    """Tell whether a text is a path inside a repository, and not of a weight file."""
    short = len(text) < LONGEST_SUBFOLDER
    return short and inside_folder(text) and "@" not in text and not text.endswith(WEIGHT_SUFFIXES)


def pin(
    reference: Reference, *, token: str | None = None, cache_dir: str | None = None
) -> PinnedCheckpoint:
    """Resolve a reference to a commit and its list of files, once; writes nothing.

    Raises:
        [`RepoError`]: unknown, private or gated repository, or unknown revision.
    """
    text = reference.text
    if reference.repo_id is None:
        here = LocalFiles(Path(text).expanduser())
        card = _local_card(here)
        if inner := _module_folder(here):
            text, here = str(Path(text, inner)), here.within(inner)
        return PinnedCheckpoint(text, None, here, card)
    repo_id, revision, inside = reference.repo_id, reference.revision, reference.subfolder
    access = {"token": token, "cache_dir": cache_dir}
    repo = hub.snapshot(repo_id, revision, inside, configs=CONFIGS, **access)
    root = HubFiles(repo) if repo.folder is None else LocalFiles(repo.folder)
    files: Files = root.within(inside)
    if inside and not files.names():
        hint = "Check the name of the subfolder; for a local folder check the path."
        raise RepoError(f"{repo_id} has no files in {inside}/.", hint)
    card = repo.card if repo.folder is None else _local_card(LocalFiles(repo.folder))
    if inner := _module_folder(files):
        text, files = f"{text}/{inner}", files.within(inner)
    return PinnedCheckpoint(text, repo.revision, files, card, revision)


def _module_folder(files: Files) -> str:
    """Folder in which sentence-transformers keeps the model, by its modules.json; else empty."""
    size = files.size(MODULES)
    if size is None or size > CARD_BYTES or any(files.size(name) is not None for name in CONFIGS):
        return ""
    try:
        modules = parse_json(files.read(MODULES))
    except (OverflowError, ValueError):
        return ""
    paths = (
        [m.get("path") for m in modules if isinstance(m, dict)] if isinstance(modules, list) else []
    )
    there = (path for path in paths if isinstance(path, str) and path and inside_folder(path))
    own = (path for path in there if not files.is_elsewhere(path))  # else its files would be copied
    return next((path for path in own if files.within(path).size("config.json") is not None), "")


def _local_card(files: LocalFiles) -> dict[str, Any]:
    """Front matter of a folder's README.md; a damaged card does not prevent a merge."""
    size = files.size("README.md")
    if size is None:
        return {}
    try:
        text = files.read("README.md", 0, min(size, CARD_BYTES)).decode("utf-8", errors="replace")
        first, *lines = text.splitlines()
        block = lines[: [line.rstrip() for line in lines].index("---")]
        data = parse_yaml("\n".join(block)) if first.rstrip() == "---" else None
    except (CheckpointError, OverflowError, ValueError):  # the latter for front matter without end
        return {}
    return data if isinstance(data, dict) else {}


def task_name(ref: str) -> str:
    """Short name of a task: the last part of its reference, without `-tsv`.

    Example:
        >>> task_name("me/clip-sun397-tsv@main")
        'clip-sun397'
    """
    path = Path(ref)
    name = path.resolve().name if path.exists() else Path(ref.partition("@")[0]).name
    return name.removesuffix("-tsv") or name


def card_license(card: Mapping[str, Any]) -> str | None:
    """Licence in the front matter of a card, if it is one identifier."""
    value = card.get("license")
    return value if isinstance(value, str) else None


def listed(names: str | PathLike[str] | Sequence[str | PathLike[str]] | None) -> list[str]:
    """Names as text; a single one is a list of one, None an empty one."""
    return [fspath(n) for n in ([names] if isinstance(names, str | PathLike) else names or ())]


def card_datasets(card: Mapping[str, Any]) -> tuple[str, ...]:
    """Repositories of the datasets in the front matter of a card."""
    value = card.get("datasets")
    names = value if isinstance(value, list) else [value]
    return tuple(n for n in names if isinstance(n, str) and DATASET.fullmatch(n))


def without_folders(text: str, refs: Iterable[str]) -> str:
    """Text in which the folders of this machine are names only, as it may be published.

    Example:
        >>> without_folders("/home/me/a is given twice.", ["/home/me/a"])
        'a is given twice.'
    """
    for ref in sorted(refs, key=len, reverse=True):
        text = text.replace(ref, Path(ref).name or ref)
    return text
