"""Output folders: checked before the work, and afterwards complete or absent."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from hf_tsv.system.errors import OutputError
from hf_tsv.system.text import first_line, human_bytes

UNDER_CONSTRUCTION = re.compile(r"\..+\.hf-tsv(-[0-9a-f]{8}(-old)?)?")
"""Pattern of the names of temporary folders in which a result is assembled."""


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn failures of the file system into an [`OutputError`] that names `folder`."""
    try:
        yield
    except OSError as error:
        hint = "Choose another folder with `output=DIR`."
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "Free some space or choose another disk with `output=DIR`."
        why = error.strerror or first_line(error)
        raise OutputError(f"Cannot write to {folder}: {why}.", hint) from None


def absolute(output: Path) -> Path:
    """Make a path of the user's absolute; it may begin with `~`, and the name of a known user."""
    try:
        return output.expanduser().absolute()
    except RuntimeError as error:
        raise OutputError(f"{output}: {first_line(error)}.", "Write the full path.") from None


def check_free_space(folder: Path, needed: int) -> None:
    """Refuse early when the disk of a folder, which may be absent, has too few bytes left."""
    with disk_errors(folder):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        total, _, free = shutil.disk_usage(existing)
    if not total and needed > 0:  # what the system shows as files, such as /proc
        problem = f"Cannot write to {folder}: {existing} takes no new folder."
        raise OutputError(problem, "Choose another folder with `output=DIR`.")
    if free < needed:
        raise OutputError(
            f"Not enough space for {folder}: {human_bytes(needed)} needed,"
            f" {human_bytes(free)} free.",
            "Free some space or choose another disk with `output=DIR`.",
        )


def check_output_folder(folder: Path, markers: Sequence[str], *, force: bool) -> None:
    """Refuse an output folder that would overwrite something; it may be absent or empty.

    Every folder that hf-tsv wrote has a file with a name from `markers`. Only such a folder is
    replaced, if the user asked for it with `force`.
    """
    with disk_errors(folder):
        if UNDER_CONSTRUCTION.fullmatch(folder.name):
            problem = f"{folder} is a name that hf-tsv uses for unfinished runs."
            raise OutputError(problem, "Choose another name with `output=DIR`.")
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            problem = f"{folder} exists and is not a folder."
            raise OutputError(problem, "Choose another one with `output=DIR`.")
        current = folder.exists() and folder.samefile(Path.cwd())
        if current or os.path.ismount(folder):
            what = "the current folder" if current else "a mount point"
            problem = f"{folder} is {what} and cannot be replaced by the result."
            raise OutputError(problem, "Name a new folder inside it: `output=DIR`.")
        parent = next(path for path in folder.absolute().parents if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            problem = f"Cannot write to {folder}: {parent} is not a folder that you can write to."
            raise OutputError(problem, "Choose another folder with `output=DIR`.")
        if not folder.exists() or not any(folder.iterdir()):
            return
        if not force:
            problem = f"The output folder {folder} exists."
            raise OutputError(problem, "Choose another one with `output=DIR`, or add `force=True`.")
        if not any((folder / marker).is_file() for marker in markers):
            raise OutputError(
                f"{folder} was not written by hf-tsv (it has no {' or '.join(markers)}), so"
                " `force=True` does not replace it.",
                "Delete it yourself, or choose another one with `output=DIR`.",
            )


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Make a temporary sibling folder that replaces `target`, or goes when the body fails."""
    staging = target.parent / f".{target.name}.hf-tsv-{secrets.token_hex(4)}"
    with disk_errors(target):
        before, made = identity(target), make_parents(target)
        staging.mkdir()
        try:
            yield staging
            replace_folder(target, staging, before)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            remove_empty(made)
            raise


def replace_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files into a folder, all of them or none, each in its place in this order.

    Each is written whole beside its place before the first one gets there. Where one replaces
    another, it keeps its mode.
    """
    places = {folder / name: content for name, content in contents.items()}
    new = {path: path.with_name(f".{path.name}.hf-tsv") for path in places}
    before: dict[Path, bytes | None] = {}
    made: list[Path] = []
    with disk_errors(folder):
        try:
            for path, content in places.items():
                made += make_parents(path)
                new[path].write_bytes(content)
                if path.exists():
                    shutil.copymode(path, new[path])
            for path in places:
                before[path] = path.read_bytes() if path.exists() else None
                new[path].replace(path)
        except BaseException:
            for path, old in before.items():
                if old is None:
                    path.unlink(missing_ok=True)
                else:
                    path.write_bytes(old)
            raise
        finally:
            for path in new.values():
                path.unlink(missing_ok=True)
            remove_empty(made)


def make_parents(folder: Path) -> list[Path]:
    """Make the parent folders of a folder, and return the new ones, innermost first."""
    made = [path for path in folder.parents if not path.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    return made


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, unless something was put into them."""
    for path in folders:
        with suppress(OSError):
            path.rmdir()


def identity(folder: Path) -> object:
    """Value that changes when a folder appears, is replaced, or gains or loses an entry."""
    try:
        stat = folder.lstat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns


def replace_folder(target: Path, new: Path, before: object) -> None:
    """Put a finished folder in its place; until then the old folder, if any, stays there.

    The new one is on the same file system. An [`OutputError`] says that the target is no longer as
    it was when the work began; `before` is its [`identity`] then.
    """
    if identity(target) != before:
        hint = "Move it and run the same command again, or choose another `output=DIR`."
        raise OutputError(f"{target} was changed by something else in the meantime.", hint)
    _flush(new)
    if not target.exists():
        new.rename(target)
        _flush_folder(target.parent)
        return
    old = new
    if not _exchange(new, target):
        old = new.with_name(new.name + "-old")
        target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            old.rename(target)
            raise
    _flush_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Flush everything in a folder to the disk before the folder gets its final name."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            _flush_folder(path)
        else:
            _synchronise(path)


def _flush_folder(folder: Path) -> None:
    """Flush a folder's entries, where the system can open and flush folders."""
    with suppress(OSError):
        _synchronise(folder)


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; return False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:  # not Linux
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if not rename(here, os.fsencode(first), here, os.fsencode(second), exchange):
        return True
    error = ctypes.get_errno()
    if error in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):  # not this kernel or file system
        return False
    raise OSError(error, os.strerror(error))


def local_kind(text: str) -> str | None:
    """Kind of path that a text is here: "folder", "file", or None if it cannot be read."""
    try:
        path = Path(text).expanduser()
        return "folder" if text and path.is_dir() else "file" if path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # too long, no permission, an unknown ~user
        return None


@contextmanager
def locked(path: Path, target: Path) -> Iterator[IO[str]]:
    """Open a file, made if absent, to read or append, and lock it where the system has locks.

    An [`OutputError`], which names the target, says that another process holds the lock.
    """
    with path.open("a+", encoding="utf-8", errors="replace") as file:
        try:
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:  # network file systems may have no locks
                if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                    raise
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                raise BlockingIOError  # the holder has finished and removed it just now
        except ImportError:
            pass  # Windows
        except BlockingIOError:
            problem = f"Another process is writing {target}."
            raise OutputError(problem, "Wait for it, or choose another output.") from None
        file.seek(0)
        yield file
