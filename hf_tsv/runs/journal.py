"""Outputs under construction and the journal of their finished weights, for resuming a run.

Beside the output `merged` stands `.merged.hf-tsv`: the job in `job.json`, the files in `files/`,
and in `done.N.jsonl` one line for each weight that process N has finished.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from hf_tsv.checkpoints.storage.writer import ShardPlan, ShardWriter, write_index
from hf_tsv.system import folders
from hf_tsv.system.errors import CheckpointError, LostFileError, OutputError, RecipeError
from hf_tsv.system.folders import disk_errors, locked, make_parents, remove_empty
from hf_tsv.system.progress import logger
from hf_tsv.system.text import counted

T = TypeVar("T")

JOB, FILES, FAILED, SPOOL = "job.json", "files", "failed", "vectors"
OURS = re.compile(rf"{JOB}|{FILES}(-old)?|{FAILED}|{SPOOL}|done\..+")
"""Pattern of the names that a folder under construction may contain."""

KEPT = "Progress saved (%s) in %s. Run the same command again to resume."


def journal_file(rank: int) -> str:
    """Name of the journal of one process, by its rank."""
    return f"done.{rank}.jsonl"


class Journal:
    """Finished weights of the process of a rank, recorded in the folder under construction."""

    def __init__(self, work: Path, rank: int = 0) -> None:
        self._file = (work / journal_file(rank)).open("a", encoding="utf-8")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, entry: Mapping[str, Any]) -> None:
        """Record one weight, named by `label`, after its last byte is written."""
        append(self._file, entry)


def append(file: IO[str], entry: Mapping[str, Any]) -> None:
    """Write one line to a journal."""
    file.write(json.dumps(entry) + "\n")
    file.flush()


def entries(text: str) -> Iterator[Any]:
    """Lines of a journal, without those that were cut off."""
    for line in text.splitlines(keepends=True):
        with suppress(ValueError):
            if line.endswith("\n"):
                yield json.loads(line)


def read(work: Path, parse: Callable[[dict[str, Any]], T], processes: int = 1) -> dict[str, T]:
    """Finished weights of all journals, parsed, by label; a line that was cut off is ignored.

    The journals of all processes are opened even where a listing of the folder does not show them
    yet.
    """
    found = {}
    names = {path.name for path in _journals(work)} | set(map(journal_file, range(processes)))
    for name in sorted(names):
        with suppress(FileNotFoundError):
            text = (work / name).read_text(encoding="utf-8", errors="replace")
            for entry in entries(text):
                with suppress(ValueError, TypeError, KeyError, AttributeError):
                    found[entry["label"]] = parse(entry)
    return found


def _journals(work: Path) -> list[Path]:
    return list(work.glob("done.*.jsonl"))


def rewrite(work: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Write all finished weights to the first journal, and remove the other journals."""
    new = work / "done.new"
    lines = (json.dumps(entry) + "\n" for entry in entries)
    new.write_text("".join(lines), encoding="utf-8")
    new.replace(work / journal_file(0))
    for path in _journals(work):
        if path.name != journal_file(0):
            path.unlink()


def begun_bytes(target: Path) -> int:
    """Disk space, in bytes, that an earlier run has reserved for the same output."""
    try:
        files = list(work_of(target).rglob("*"))
        return sum(512 * path.stat().st_blocks for path in files)  # holes in files take none
    except OSError:
        return 0


def work_of(target: Path) -> Path:
    """Folder in which an output is under construction."""
    return target.with_name(f".{target.name}.hf-tsv")


def note_failure(work: Path) -> None:
    """Make the other processes stop after their next weight."""
    with suppress(OSError):  # the folder itself may be the failure
        (work / FAILED).touch()


@contextmanager
def under_construction(
    target: Path,
    job: Mapping[str, Any],
    plan: ShardPlan | None = None,
    *,
    force: bool,
    until_pushed: bool = False,
    whole: Collection[str] = (),
) -> Iterator[tuple[Path, bool]]:
    """Make or resume a folder that becomes `target` when the body succeeds; a folder there goes.

    A run that stops keeps the folder, except after an error of an input or option, which would come
    again. The body gets the folder, and whether the run is resumed; with `until_pushed` the journal
    stays beside the result, so that the same job can resume from the finished result.

    `job` is everything that determines the result, and `plan` the layout of the weight files, if
    known in advance. `whole` names folders among the files in which everything is complete, and
    which a resumed run finds again. An [`OutputError`] says that another job began the folder
    (discarded with `force`), another process is writing it, or it holds files that hf-tsv did not
    make.
    """
    work = work_of(target)
    text = json.dumps(job, sort_keys=True, indent=1)
    with disk_errors(target):
        _refuse_strange(work)
        made = make_parents(target)
        work.mkdir(exist_ok=True)
        with locked(work / JOB, target) as file:
            try:
                if until_pushed:
                    _take_up(work, file, text, target)
                if not (force or until_pushed):
                    _refuse_existing(target)
                resumed = _begin(work, file, text, target, plan, whole, force=force)
                before = folders.identity(target)
                yield work, resumed
                folders.replace_folder(target, work / FILES, before)
            except _OthersError as error:
                remove_empty(made)
                raise OutputError(error.message, error.hint) from None
            except BaseException as error:
                lost = isinstance(error, LostFileError)
                again = lost or not isinstance(error, CheckpointError | RecipeError)
                if count := len(read(work, dict)) if again else 0:
                    logger.warning(KEPT, counted(count, "weight"), work)
                else:
                    shutil.rmtree(work, ignore_errors=True)
                    remove_empty(made)
                raise
            if not until_pushed:
                shutil.rmtree(work, ignore_errors=True)


def _refuse_strange(work: Path) -> None:
    """Refuse a folder of that name that hf-tsv did not make, because it would be cleared."""
    inside = work.iterdir() if work.is_dir() else ()
    if work.is_symlink() or not all(OURS.fullmatch(path.name) for path in inside):
        problem = f"{work} is in the way, and hf-tsv did not write it."
        raise OutputError(problem, "Move it, or choose another folder with `output=DIR`.")


def _refuse_existing(target: Path) -> None:
    """Refuse an output that has appeared since the checks before the run."""
    if target.exists() and any(target.iterdir()):
        hint = "Move it and run the same command again, or choose another `output=DIR`."
        raise OutputError(f"{target} was written by something else in the meantime.", hint)


def _take_up(work: Path, file: IO[str], text: str, target: Path) -> None:
    """Move a finished result that was not pushed back under construction, to be checked again."""
    if file.read() == text and target.is_dir() and not (work / FILES).exists():
        target.rename(work / FILES)
    file.seek(0)


class _OthersError(OutputError):
    """The folder belongs to another job, and must not be removed."""


def _begin(
    work: Path,
    file: IO[str],
    text: str,
    target: Path,
    plan: ShardPlan | None,
    kept: Collection[str],
    *,
    force: bool,
) -> bool:
    """Create the files, or find them begun by the same job; return True if so."""
    begun, files = file.read(), work / FILES
    try:
        json.loads(begun)
    except ValueError:  # the earlier run ended while it wrote this
        begun = ""
    sizes = {} if plan is None else plan.sizes
    whole = files.is_dir() and all(
        (files / name).is_file() and (files / name).stat().st_size == size
        for name, size in sizes.items()
    )
    if begun == text and whole:
        (work / FAILED).unlink(missing_ok=True)
        _clear(files, {*sizes, *kept})  # the other files may be incomplete
        if plan is not None:
            write_index(files, plan)
        return True
    if begun not in ("", text) and files.is_dir() and not force:
        hint = (
            f"Finish it with that run's settings, add `force=True` to start over, or delete {work}."
        )
        raise _OthersError(f"{target} holds an unfinished run with other inputs or settings.", hint)
    file.truncate(0)
    _clear(work, {JOB})
    files.mkdir()
    if plan is not None:
        ShardWriter(files, plan).abandon()
    file.seek(0)
    file.write(text)
    file.flush()
    return False


def _clear(folder: Path, kept: Collection[str]) -> None:
    """Remove everything from a folder except the named entries."""
    for path in folder.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
