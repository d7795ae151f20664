"""One life of a run: refused or told, then fetched, built in its folder, pushed and closed.

with underway(sources, target, progress) as run:  # refuses; a dry run ends in here
    run.check_space(identity, nbytes)
    run.fetch()
    with run.result(identity) as folder:          # held by this process until it is pushed
        ...                                       # build
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_tsv.checkpoints.sources import Sources
from hf_tsv.runs import journal
from hf_tsv.runs.target import Target, collect, final_folder, push, waiting
from hf_tsv.system.folders import check_free_space
from hf_tsv.system.progress import logger, visible_by_default


@dataclass
class Run:
    """A run that is under way.

    Its sources are on this machine once they are fetched. `download_bytes` are those that the cache
    does not hold; `url` is the commit or pull request on the Hub, once the result is pushed.
    """

    sources: Sources
    target: Target
    download_bytes: int
    show: bool
    url: str | None = None

    def check_space(self, identity: Mapping[str, Any], nbytes: int) -> None:
        """Refuse early when the disk has no space for the bytes of the result.

        The identity is everything that decides about the bytes; an earlier run of the same has
        reserved some space already.
        """
        folder = final_folder(self.target, identity)
        check_free_space(folder, nbytes - journal.begun_bytes(folder))

    def fetch(self) -> None:
        """Bring what is read onto this machine, or open connections to stream it."""
        self.sources = self.sources.within_reach(visible=self.show)

    @contextmanager
    def result(self, identity: Mapping[str, Any]) -> Iterator[Path]:
        """Hold the folder of the result while the body builds it, and push it then.

        The identity has also what was learned since the space was checked: the same command finds a
        result that waits for its upload by it.
        """
        folder = final_folder(self.target, identity)
        with waiting(folder):
            yield folder
            pushed = push(folder, self.target, self.sources.access.token, show=self.show)
            self.url = None if pushed is None else pushed.url
            if pushed is not None and not pushed.changed:
                logger.info("%s has all of these files already.", self.target.push_to)
        collect(self.target, pushed, self.sources.access.token)


@contextmanager
def underway(sources: Sources, target: Target, progress: bool | None) -> Iterator[Run]:
    """Refuse to replace an input, and close all that the body reads when it ends.

    Without `progress`, bars are shown on a terminal.
    """
    target.refuse_inputs([item.pinned for item in sources.all()])
    show = visible_by_default() if progress is None else progress
    run = Run(sources, target, sources.download_bytes(), show)
    try:
        yield run
    finally:
        run.sources.close()
