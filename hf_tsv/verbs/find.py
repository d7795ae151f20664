"""The verb `find`: fine-tunes of a base model on the Hub, and which of them can be merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from hf_tsv import hub
from hf_tsv.checkpoints.fit import check_fit
from hf_tsv.checkpoints.formats.task import Task, pinned_entry
from hf_tsv.checkpoints.formats.whole import Checkpoint
from hf_tsv.checkpoints.opening import format_of, open_base
from hf_tsv.checkpoints.reference import PinnedCheckpoint, parse, pin
from hf_tsv.checkpoints.sources import download_bytes, open_beside
from hf_tsv.hub import Listed
from hf_tsv.merging.plan import make_plan, resolved
from hf_tsv.recipes.finding import RELATIONS, Query, Relation, Sort
from hf_tsv.recipes.settings import Settings
from hf_tsv.reports.report import Report
from hf_tsv.system.errors import HfTsvError, RepoError, UsageError, public
from hf_tsv.system.progress import bar, visible_by_default
from hf_tsv.system.text import counted
from hf_tsv.system.threads import in_parallel

AT_A_TIME = 4  # models that are looked at in parallel
PROPERTIES: dict[Sort, str] = {"downloads": "downloads", "likes": "likes", "created": "createdAt"}


@dataclass(frozen=True, repr=False)
class FindReport(Report):
    """Fine-tunes, adapters and merges of a base model on the Hub.

    Args:
        base_model (`dict`): `ref` and `revision`.
        query (`dict`): `kinds`, `author`, `search`, `task`, `sort` and `limit`.
        models (`list[dict]`): of each `ref`, `relation` (`finetune`, `adapter` or `merge`), `task`,
            `license`, `downloads`, `likes`, `created`, `changed`, `private` and `gated` as the Hub
            lists them; `revision`, and `form` (`checkpoint`, `adapter`, `factors` or `mask`) as its
            files say; `mergeable`, or else the `reason` and `hint` of the error that a merge ends
            with; `download_bytes` of what a merge reads and the cache lacks, `dtypes` of its
            weights, names of what a merge leaves out (`left_out`), and `warnings`.
    """

    base_model: dict[str, str | None]
    query: dict[str, Any]
    models: list[dict[str, Any]]

    @property
    def mergeable(self) -> list[str]:
        """References that can be merged."""
        return [model["ref"] for model in self.models if model["mergeable"]]

    def headline(self) -> Iterator[str]:
        """Say of what and how many."""
        yield repr(self.base_model["ref"])
        yield f"{len(self.mergeable)} of {counted(len(self.models), 'model')} can be merged"


@public
def find(
    base_model: str | PathLike[str],
    *,
    kinds: str | Sequence[Relation] = RELATIONS,
    author: str | None = None,
    search: str | None = None,
    task: str | None = None,
    sort: Sort = "downloads",
    limit: int = 20,
    mergeable: bool = False,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    progress: bool | None = None,
) -> FindReport:
    """List fine-tunes of a base model on the Hub, and try of each whether it can be merged.

    Reads headers and small files, and opens each model by the code of a merge. A model that cannot
    be read is in the list, with the reason.

    Args:
        base_model (`str`): `org/name`, `org/name@revision` or `hf://…`.
        kinds (`Sequence[str]`): some of `finetune`, `adapter` and `merge`, the Hub's relations to
            a base model; default: all.
        author (`str`, *optional*): user or organisation.
        search (`str`, *optional*): part of the name.
        task (`str`, *optional*): pipeline tag, such as `image-classification`.
        sort (`str`): `downloads`, `likes` or `created`; the highest or newest is first.
        limit (`int`): most models to look at.
        mergeable (`bool`): leave out, of those looked at, what cannot be merged.
        token, cache_dir, progress: as in [`merge`].

    Returns:
        [`FindReport`]: the models, and the references of those that can be merged.

    Raises:
        [`HfTsvError`]: there is no such base model, or nothing was found.

    Example:
        >>> import hf_tsv
        >>> hf_tsv.find("openai/clip-vit-base-patch32").mergeable  # doctest: +SKIP
    """
    query = Query(kinds, author, search, task, sort, limit)  # type: ignore[arg-type]
    named = parse(fspath(base_model))
    if named.repo_id is None:
        problem = f"The base model {named.text} is a folder, and the Hub lists nothing under that."
        raise UsageError(problem, "Name it as on the Hub: org/name, or `hf://org/name`.")
    pinned = partial(pin, token=token, cache_dir=None if cache_dir is None else str(cache_dir))
    base = open_base(pinned(named))
    check_fit(base, ())
    found = _listed(named.repo_id, query, token)
    if not found:
        raise RepoError(
            f"The Hub lists no {query.said_of(named.repo_id)}.",
            "Check the spelling, upper and lower case included, or search with fewer filters. The"
            " Hub lists a model if `base_model:` in its card names this one.",
        )
    visible = visible_by_default() if progress is None else progress
    with bar("Reading headers", len(found), visible=visible) as advance:

        def looked(one: tuple[Relation, Listed]) -> dict[str, Any]:
            entry = _entry(*one, base, pinned)
            advance(1)
            return entry

        models = in_parallel(looked, found, threads=AT_A_TIME)
    models = [model for model in models if model["mergeable"] or not mergeable]
    if not models:
        problem = (
            f"{counted(len(found), 'model')} looked at, none of which can be merged with {base}."
        )
        raise RepoError(problem, "See why without `mergeable=True`, or raise `limit=`.")
    return FindReport(pinned_entry(base), asdict(query), models)


def _listed(base_id: str, query: Query, token: str | None) -> list[tuple[Relation, Listed]]:
    """Models by relation, each once; of all kinds together the first ones by their order."""
    asked: dict[str, Any] = {name: getattr(query, name) for name in ("author", "search", "task")}
    asked |= {"sort": PROPERTIES[query.sort], "limit": query.limit, "token": token}

    def listed(kind: Relation) -> list[tuple[Relation, Listed]]:
        return [(kind, one) for one in hub.derived(base_id, kind, **asked)]

    found = {one.repo_id: (kind, one) for kind, one in chain(*in_parallel(listed, query.kinds))}
    by = sorted(found.values(), key=lambda pair: getattr(pair[1], query.sort), reverse=True)
    return by[: query.limit]


def _entry(
    relation: Relation, found: Listed, base: Checkpoint, pinned: Callable[..., PinnedCheckpoint]
) -> dict[str, Any]:
    """Entry of one model: as the Hub lists it, and what a merge would say."""
    listed = asdict(found)
    entry: dict[str, Any] = {"ref": listed.pop("repo_id"), "relation": relation, **listed}
    entry |= {"revision": None, "form": None, "mergeable": False, "reason": None, "hint": None}
    entry |= {"download_bytes": 0, "dtypes": [], "left_out": [], "warnings": []}
    try:
        hub.check_repo_id(found.repo_id)
        there = pinned(parse(f"hf://{found.repo_id}"))
        entry |= {"revision": there.revision, "form": format_of(there).name}
        item = open_beside(there, base)
        plan = make_plan(base, [item], resolved(base, Settings()))
        entry |= {"dtypes": _dtypes(item), "left_out": list(item.left_out)}
        entry |= {"download_bytes": download_bytes([item]), "warnings": list(plan.warnings)}
        return {**entry, "mergeable": True}
    except HfTsvError as error:
        return {**entry, "reason": error.message, "hint": error.hint}


def _dtypes(item: Task) -> list[str]:
    """Types of the numbers that it stores."""
    infos = (info for name in item.tensors for info in item.parts(name))
    return sorted({info.dtype.name for info in infos if info.dtype.is_floating_point})
