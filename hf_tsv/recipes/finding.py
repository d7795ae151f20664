"""Choices of a search for fine-tunes on the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from hf_tsv.system.checks import check_counts, choice
from hf_tsv.system.errors import UsageError
from hf_tsv.system.text import one_of

Relation = Literal["finetune", "adapter", "merge"]
RELATIONS: tuple[Relation, ...] = get_args(Relation)
Sort = Literal["downloads", "likes", "created"]

NOUNS = {"finetune": "fine-tune", "adapter": "adapter", "merge": "merge"}


@dataclass(frozen=True)
class Query:
    """Models to look for, and how many to look at.

    Args:
        kinds (`tuple[str, ...]`): relations to the base model: `finetune`, `adapter`, `merge`.
        author (`str`, *optional*): user or organisation.
        search (`str`, *optional*): part of the name.
        task (`str`, *optional*): pipeline tag, such as `image-classification`.
        sort (`str`): `downloads`, `likes` or `created`; the highest or newest is first.
        limit (`int`): most models to look at.
    """

    kinds: tuple[Relation, ...] = RELATIONS
    author: str | None = None
    search: str | None = None
    task: str | None = None
    sort: Sort = "downloads"
    limit: int = 20

    def __post_init__(self) -> None:
        check_counts(limit=self.limit)
        kinds: Sequence[str] = self.kinds
        kinds = kinds.split(",") if isinstance(kinds, str) else kinds
        found = [choice("kinds", kind, RELATIONS) for kind in kinds]
        if not found:
            raise UsageError("`kinds=` names none.", f"Choose some of {', '.join(RELATIONS)}.")
        object.__setattr__(self, "kinds", tuple(dict.fromkeys(found)))
        object.__setattr__(self, "sort", choice("sort", self.sort, get_args(Sort)))

    def said_of(self, base: str) -> str:
        """Words for what is looked for, of a base model."""
        kinds = one_of([NOUNS[kind] for kind in self.kinds])
        filters = {"by": self.author, "with": self.search, "for the task": self.task}
        given = [f"{word} {value!r}" for word, value in filters.items() if value]
        return " ".join([f"{kinds} of {base}", *given])
