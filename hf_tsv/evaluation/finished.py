"""Results of finished tasks, kept beside an unfinished output so that a stopped run can resume.

Beside the output `results` is `.results.hf-tsv-tasks`: a line for each task of each model, keyed
by a digest of everything that determines its result. Lines of other commands are not used, and the
file is removed when a command succeeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from hf_tsv.runs import journal
from hf_tsv.system.folders import disk_errors, locked, make_parents, remove_empty
from hf_tsv.system.progress import logger
from hf_tsv.system.text import counted


class Finished:
    """Results of tasks by their digests, appended to a file; without one nothing is kept."""

    def __init__(self, file: IO[str] | None = None) -> None:
        self._file = file
        self._results: dict[str, Any] = {}
        text = "" if file is None else file.read()
        for entry in journal.entries(text):
            with suppress(KeyError, TypeError):
                self._results[entry["key"]] = entry["result"]
        if file is not None and text and not text.endswith("\n"):
            file.write("\n")

    def __len__(self) -> int:
        return len(self._results)

    @property
    def kept(self) -> bool:
        return self._file is not None

    def get(self, key: str | None) -> dict[str, Any] | None:
        """Result for a digest, or None."""
        return None if key is None else self._results.get(key)

    def add(self, key: str | None, result: dict[str, Any]) -> None:
        if key is not None and self._file is not None:
            self._results[key] = result
            journal.append(self._file, {"key": key, "result": result})


@contextmanager
def finished_tasks(output: Path | None) -> Iterator[Finished]:
    """Open the finished results of an output folder, and remove them when the body succeeds."""
    if output is None:
        yield Finished()
        return
    path = output.parent / f".{output.name}.hf-tsv-tasks"
    with disk_errors(output):
        made = make_parents(output)
        with locked(path, output) as file:
            finished = Finished(file)
            try:
                yield finished
            except BaseException:
                if finished:
                    kept = f"Progress saved ({counted(len(finished), 'result')}) in {path}."
                    logger.warning("%s Run the same command again to resume.", kept)
                else:
                    path.unlink(missing_ok=True)
                    remove_empty(made)
                raise
            path.unlink(missing_ok=True)
