"""An output under construction: what is finished of it, so that a run that stopped can go on.

Beside the output `merged` stands `.merged.hf-tsv`: the job in `job.json`, the files in `files/`,
and in `done.N.jsonl` one line for each weight that process N has written.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from hf_tsv.checkpoints.reader import digest
from hf_tsv.checkpoints.writer import (
    ShardPlan,
    ShardWriter,
    TensorSpec,
    disk_errors,
    identity,
    make_parents,
    remove_empty,
    replace_folder,
)
from hf_tsv.errors import CheckpointError, OutputError
from hf_tsv.findings import Finding
from hf_tsv.progress import logger

JOB, FILES, FAILED = "job.json", "files", "failed"


def journal_file(rank: int) -> str:
    """Name of the journal of one process."""
    return f"done.{rank}.jsonl"


class Journal:
    """Finished weights of one process.

    Args:
        work (`Path`): the folder under construction.
        rank (`int`): of the process.
    """

    def __init__(self, work: Path, rank: int = 0) -> None:
        self._file = (work / journal_file(rank)).open("a", encoding="utf-8")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, finding: Finding) -> None:
        """Note one weight, after its last byte is written."""
        self._file.write(json.dumps(finding.to_dict()) + "\n")
        self._file.flush()


def read(work: Path, processes: int = 1) -> dict[str, Finding]:
    """Weights that the journals name; a line that was cut off does not count.

    Args:
        work (`Path`): the folder under construction.
        processes (`int`): whose journals there must be, though a listing may not show them yet.
    """
    found = {}
    names = {path.name for path in _journals(work)} | set(map(journal_file, range(processes)))
    for name in sorted(names):
        with suppress(FileNotFoundError):
            text = (work / name).read_text(encoding="utf-8", errors="replace")
            for line in text.splitlines(keepends=True):
                with suppress(ValueError, TypeError, KeyError, AttributeError):
                    if line.endswith("\n"):
                        finding = Finding.from_dict(json.loads(line))
                        found[finding.label] = finding
    return found


def _journals(work: Path) -> list[Path]:
    return list(work.glob("done.*.jsonl"))


def still_there(
    findings: Iterable[Finding], writer: ShardWriter, specs: Mapping[str, TensorSpec]
) -> list[Finding]:
    """Those whose bytes stand in the files: after a power failure they may not."""
    return [
        found
        for found in findings
        if all(digest(writer.read_back(n, specs[n])) == d for n, d in found.written.items())
    ]


def rewrite(work: Path, findings: Sequence[Finding]) -> None:
    """Let one journal hold these weights, and no other any."""
    new = work / "done.new"
    lines = (json.dumps(finding.to_dict()) + "\n" for finding in findings)
    new.write_text("".join(lines), encoding="utf-8")
    new.replace(work / journal_file(0))
    for path in _journals(work):
        if path.name != journal_file(0):
            path.unlink()


def begun_bytes(target: Path | None) -> int:
    """Bytes that an earlier run has reserved for the same output."""
    try:
        files = [] if target is None else list((_work_of(target) / FILES).iterdir())
        return sum(512 * path.stat().st_blocks for path in files)  # not the holes
    except OSError:
        return 0


def _work_of(target: Path) -> Path:
    return target.parent / f".{target.name}.hf-tsv"


def note_failure(work: Path) -> None:
    """Let the other processes stop after their next weight."""
    with suppress(OSError):  # the folder may be what is wrong
        (work / FAILED).touch()


@contextmanager
def under_construction(
    target: Path,
    job: Mapping[str, Any],
    plan: ShardPlan,
    *,
    force: bool,
    keep: bool = True,
) -> Iterator[tuple[Path, bool]]:
    """A folder that becomes `target` when the body ends well, and goes on where it stopped.

    A run that stops leaves it, whatever the reason, unless it is an input that will fail again.

    Args:
        target (`Path`): final place; an existing folder there is replaced.
        job (`Mapping[str, Any]`): everything that decides about the result.
        plan ([`ShardPlan`]): its files.
        force (`bool`): forget what another job has begun.
        keep (`bool`): leave the beginning of a run that stops; else nobody would find it again.

    Yields:
        `tuple[Path, bool]`: the folder under construction, and whether it holds a beginning.

    Raises:
        [`OutputError`]: another job began it, or another process is at it.
    """
    work = _work_of(target)
    text = json.dumps(job, sort_keys=True, indent=1)
    with disk_errors(target):
        before, made = identity(target), make_parents(target)
        work.mkdir(exist_ok=True)
        with locked(work / JOB, target) as file:
            try:
                resumed = _begin(work, file, text, target, plan, force=force)
                yield work, resumed
                replace_folder(target, work / FILES, before)
            except _OthersError as error:
                remove_empty(made)
                raise OutputError(error.message, error.hint) from None
            except BaseException as error:
                in_vain = not keep or isinstance(error, CheckpointError)
                if count := 0 if in_vain else len(read(work)):
                    logger.warning(
                        "%d finished weights are kept in %s; the same command goes on from there.",
                        count,
                        work,
                    )
                else:
                    shutil.rmtree(work, ignore_errors=True)
                    remove_empty(made)
                raise
            shutil.rmtree(work, ignore_errors=True)


class _OthersError(OutputError):
    """What stands there is not ours to remove."""


def _begin(
    work: Path, file: IO[str], text: str, target: Path, plan: ShardPlan, *, force: bool
) -> bool:
    """Make the files, or find them begun by the same job."""
    begun, files = file.read(), work / FILES
    if not _is_json(begun):  # the run ended while it began
        begun = ""
    whole = files.is_dir() and all(
        (files / name).is_file() and (files / name).stat().st_size == size
        for name, size in plan.sizes.items()
    )
    if begun == text and whole:
        (work / FAILED).unlink(missing_ok=True)
        return True
    if begun not in ("", text) and files.is_dir() and not force:
        raise _OthersError(
            f"Another run has begun {target} with other inputs or settings.",
            f"Finish it with the same command, add --force to start over, or remove {work}.",
        )
    file.truncate(0)
    for path in work.iterdir():
        if path.name != JOB:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    files.mkdir()
    ShardWriter(files, plan).abandon()
    file.seek(0)
    file.write(text)
    file.flush()
    return False


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


@contextmanager
def _unless_unknown() -> Iterator[None]:
    """Some network file systems have no locks."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise


@contextmanager
def locked(path: Path, target: Path) -> Iterator[IO[str]]:
    """A file held by one process at a time, where the system can do that.

    Args:
        path (`Path`): of the file, made if it is not there; read it, or append.
        target (`Path`): of the work, for the error.

    Raises:
        [`OutputError`]: another process holds it.
    """
    with path.open("a+", encoding="utf-8", errors="replace") as file:
        try:
            import fcntl

            with _unless_unknown():
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                raise BlockingIOError  # finished in this moment
        except ImportError:
            pass  # Windows
        except BlockingIOError:
            raise OutputError(
                f"Another process is writing {target}.", "Wait for it, or choose another -o."
            ) from None
        file.seek(0)
        yield file
