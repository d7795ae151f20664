"""Output folders: checked before the work, whole or not there after it."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hf_tsv.errors import OutputError
from hf_tsv.progress import first_line, human_bytes

UNDER_CONSTRUCTION = re.compile(r"\..+\.hf-tsv(-[0-9a-f]{8}(-old)?)?")
"""Names of folders that runs work in."""


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn failures of the file system into an [`OutputError`] that names `folder`."""
    try:
        yield
    except OSError as error:
        hint = "Choose another folder with -o."
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "Free some space or choose another disk with -o."
        why = error.strerror or first_line(error)
        raise OutputError(f"Cannot write to {folder}: {why}.", hint) from None


def absolute(output: Path) -> Path:
    """The folder that a user means.

    Args:
        output (`Path`): as given; may begin with `~`.

    Raises:
        [`OutputError`]: there is no such user.
    """
    try:
        return output.expanduser().absolute()
    except RuntimeError as error:
        raise OutputError(f"{output}: {error}", "Write the path out.") from None


def check_free_space(folder: Path, needed: int) -> None:
    """Refuse early when a disk has less than `needed` bytes left.

    Args:
        folder (`Path`): where the output will be; need not exist yet.
        needed (`int`): bytes.
    """
    with disk_errors(folder):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"No space for {folder}: {human_bytes(needed)} are needed and {human_bytes(free)} are"
            " free.",
            "Free some space or choose another disk with -o.",
        )


def check_output_folder(folder: Path, markers: Sequence[str], *, force: bool) -> None:
    """Refuse an output folder that would overwrite something.

    Args:
        folder (`Path`): wanted output; may not exist, or be empty.
        markers (`Sequence[str]`): files of which an earlier output of ours holds one; only such a
            folder is replaced.
        force (`bool`): the user asked to replace it.
    """
    with disk_errors(folder):
        _check_output_folder(folder, markers, force=force)


def _check_output_folder(folder: Path, markers: Sequence[str], *, force: bool) -> None:
    if UNDER_CONSTRUCTION.fullmatch(folder.name):
        raise OutputError(
            f"{folder} is named like what a run works in.", "Choose another name with -o."
        )
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"{folder} exists and is not a folder.", "Choose another one with -o.")
    current = folder.exists() and folder.samefile(Path.cwd())
    if current or os.path.ismount(folder):
        what = "the current folder" if current else "a mount point"
        raise OutputError(
            f"{folder} is {what} and cannot be replaced by the result.",
            "Name a new folder inside it with -o.",
        )
    parent = next(path for path in folder.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"Cannot write to {folder}: {parent} takes no new folder.",
            "Choose another folder with -o.",
        )
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not force:
        raise OutputError(
            f"The output folder {folder} exists.", "Choose another one with -o, or add --force."
        )
    if not any((folder / marker).is_file() for marker in markers):
        raise OutputError(
            f"{folder} was not written by hf-tsv (it has no {' or '.join(markers)}), so --force"
            " does not replace it.",
            "Remove it yourself or choose another one with -o.",
        )


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling folder that becomes `target` when the body ends well, and else nothing.

    Args:
        target (`Path`): final place; an existing folder there is replaced.

    Yields:
        `Path`: the folder to write into.
    """
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


def make_parents(folder: Path) -> list[Path]:
    """Make the folders above one, and say which, the innermost first."""
    made = [path for path in folder.parents if not path.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    return made


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, unless something was put into them."""
    for path in folders:
        with suppress(OSError):
            path.rmdir()


def identity(folder: Path) -> object:
    """Changes when a folder appears, is replaced, or gets or loses an entry."""
    try:
        stat = folder.lstat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns


def replace_folder(target: Path, new: Path, before: object) -> None:
    """Put a finished folder in its place: before it is the old one there, or none, then the new.

    Args:
        target (`Path`): the place; a folder there is removed.
        new (`Path`): the finished folder, on the same file system.
        before (`object`): [`identity`] of the target when the work began.

    Raises:
        [`OutputError`]: the target is not what it was.
    """
    if identity(target) != before:
        raise OutputError(
            f"{target} was changed by something else in the meantime.",
            "Move it away and give the same command again, or choose another folder with -o.",
        )
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
    """Have everything in a folder on the disk before it gets its name."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            _flush_folder(path)
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    """Some systems do not open folders, and some file systems do not flush them."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders change places in one step; False where the system cannot do that."""
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
