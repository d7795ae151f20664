"""Tasks that are finished, kept beside an output that is not, so that a run that stopped goes on.

Beside the output `results` lies `.results.hf-tsv-tasks`: a line for each task of each model, under
a digest of everything that decides about its result. What another command has left there is not
used, and goes when one of them ends well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from hf_tsv.folders import disk_errors, make_parents, remove_empty
from hf_tsv.journal import locked
from hf_tsv.progress import logger


class Finished:
    """Results of tasks by their digests.

    Args:
        file (`IO[str]`, *optional*): to append to; without one nothing is kept.
    """

    def __init__(self, file: IO[str] | None = None) -> None:
        self._file = file
        self._results: dict[str, Any] = {}
        text = "" if file is None else file.read()
        for line in text.splitlines(keepends=True):
            with suppress(ValueError, KeyError, TypeError):  # a line that was cut off
                entry = json.loads(line)
                self._results[entry["key"]] = entry["result"]
        if file is not None and text and not text.endswith("\n"):
            file.write("\n")

    def __len__(self) -> int:
        return len(self._results)

    @property
    def kept(self) -> bool:
        """Whether there is a file."""
        return self._file is not None

    def get(self, key: str | None) -> dict[str, Any] | None:
        """The result under a digest, if there is one."""
        return None if key is None else self._results.get(key)

    def add(self, key: str | None, result: dict[str, Any]) -> None:
        """Keep the result of a task, where results are kept."""
        if key is not None and self._file is not None:
            self._results[key] = result
            self._file.write(json.dumps({"key": key, "result": result}) + "\n")
            self._file.flush()


@contextmanager
def finished_tasks(output: Path | None) -> Iterator[Finished]:
    """What is finished of an output; forgotten when the body ends well.

    Args:
        output (`Path`, *optional*): the folder to be; without one nothing is kept.

    Raises:
        [`OutputError`]: another process is at it, or its place cannot be written.
    """
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
                    logger.warning(
                        "%d finished results are kept in %s; the same command goes on from there.",
                        len(finished),
                        path,
                    )
                else:
                    path.unlink(missing_ok=True)
                    remove_empty(made)
                raise
            path.unlink(missing_ok=True)
