"""Fields that a person filled in, as words of a command."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from hf_tsv.ui.commands import CommandError

BETWEEN = re.compile(r"[\s,]+")
MOST_LISTED = 100
ON_HUB = "hf://"
PATHS = ("/", ".", "~")  # beginnings of paths of the server


@dataclass(frozen=True)
class Form:
    """Fields of the page.

    Args:
        base (`str`): base model.
        ticked (`tuple[str, ...]`): fine-tunes that were chosen from the list.
        pasted (`str`): further references, between spaces, commas or lines.
        method (`str`): merging method; empty: the default.
        alpha (`str`): scale of the merged update, as written; empty: that of the method.
        only_hub (`bool`): whether folders of this machine are no checkpoints.
    """

    base: str
    ticked: tuple[str, ...] = ()
    pasted: str = ""
    method: str = ""
    alpha: str = ""
    only_hub: bool = False

    @property
    def checkpoints(self) -> list[str]:
        """References, each once, in the order in which they are shown."""
        pasted = [ref for ref in BETWEEN.split(self.pasted) if ref]
        return list(dict.fromkeys([*self.ticked, *pasted]))

    def find(self, author: str, search: str, limit: float) -> list[str]:
        """Words of the command that lists fine-tunes of the base, up to `MOST_LISTED`."""
        most = str(min(int(limit), MOST_LISTED))
        words = ["find", self._reference(self._named_base()), "--limit", most, "--json"]
        words += [f"--author={author.strip()}"] if author.strip() else []
        words += [f"--search={search.strip()}"] if search.strip() else []
        return words

    def merge(self, folder: str) -> list[str]:
        """Words of the command that merges.

        Raises:
            [`CommandError`]: nothing is chosen, or a reference is none.
        """
        return ["merge", *self._inputs(), *self._choices(), "-o", folder]

    def interference(self, folder: str) -> list[str]:
        """Words of the command that measures interference."""
        return ["interference", *self._inputs(), "-o", folder]

    def shown(self, repo_id: str, *, private: bool) -> str:
        """Command that does the same in a terminal, and uploads if a repository is named."""
        if not self.checkpoints:
            return ""
        words = ["hf-tsv", "merge", *self.checkpoints]
        words += ["--base-model", self.base.strip()] if self.base.strip() else []
        words += [*self._choices(), "-o", "merged"]
        if repo_id.strip():
            words += ["--push-to", repo_id.strip(), *(["--private"] if private else [])]
        return shlex.join(words)

    def _inputs(self) -> list[str]:
        if not self.checkpoints:
            raise CommandError("No checkpoint is chosen.", "Tick some, or paste their names.")
        refs = [self._reference(ref) for ref in self.checkpoints]
        base = self._named_base() if self.only_hub else self.base.strip()  # none is looked for here
        return [*refs, *(["--base-model", self._reference(base)] if base else [])]

    def _choices(self) -> list[str]:
        words = ["--method", self.method] if self.method else []
        return [*words, *([f"--alpha={self.alpha.strip()}"] if self.alpha.strip() else [])]

    def _named_base(self) -> str:
        if not self.base.strip():
            raise CommandError("No base model is named.", "Name one: org/name.")
        return self.base.strip()

    def _reference(self, ref: str) -> str:
        """A reference as a command takes it: no option, and of the Hub where only that is meant."""
        if ref.startswith("-") or (self.only_hub and ref.startswith(PATHS)):
            raise CommandError(f"{ref} is no name of a checkpoint.", "Write org/name.")
        return ref if not self.only_hub or ref.startswith(ON_HUB) else f"{ON_HUB}{ref}"
