"""Writing a checkpoint shard by shard: reserve the space, fill in any order, rename when whole."""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from hf_tsv.checkpoints.headers import index_of
from hf_tsv.checkpoints.open_clip import Part
from hf_tsv.checkpoints.reader import SINGLE_FILE, byte_view
from hf_tsv.checkpoints.tensors import DTYPE_NAMES
from hf_tsv.errors import OutputError
from hf_tsv.memory import empty
from hf_tsv.progress import human_bytes

# The library sorts by dtype, in this order, and then by name.
DTYPE_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")


@dataclass(frozen=True)
class TensorSpec:
    """What will be written: dtype and shape of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ShardPlan:
    """All output files, known to the byte before any tensor is computed.

    Args:
        headers (`Mapping[str, bytes]`): header of each file, its length prefix included.
        places (`Mapping[str, tuple[str, int]]`): file and offset of each tensor.
        sizes (`Mapping[str, int]`): bytes of each file.
        index (`str`, *optional*): content of the index, when there are several shards.
        index_file (`str`): its name.
        transposed (`frozenset[str]`): tensors that are stored the other way round.
    """

    headers: Mapping[str, bytes]
    places: Mapping[str, tuple[str, int]]
    sizes: Mapping[str, int]
    index: str | None
    index_file: str
    transposed: frozenset[str] = frozenset()

    @property
    def total_bytes(self) -> int:
        """Bytes of all weight files together, headers included, index not."""
        return sum(self.sizes.values())


def plan_shards(
    specs: Mapping[str, TensorSpec],
    max_shard_size: int | str = "5GB",
    single: str = SINGLE_FILE,
    placed: Mapping[str, Part] | None = None,
) -> ShardPlan:
    """Lay out tensors in files, as `save_pretrained` would and byte for byte as `save_file`.

    Args:
        specs (`Mapping[str, TensorSpec]`): by name.
        max_shard_size (`int` or `str`): bytes of a file, or `"5GB"`.
        single (`str`): file name; shards get a number before the suffix.
        placed (`Mapping[str, Part]`, *optional*): the stored tensor that each is a part of;
            default: each is stored under its own name.
    """
    if placed is not None:
        return _plan_parts(specs, max_shard_size, single, placed)
    # not the library's function for torch, which takes a second to load more of torch
    split = split_state_dict_into_shards_factory(
        {name: specs[name] for name in sorted(specs)},
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern=single.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=max_shard_size,
    )
    headers: dict[str, bytes] = {}
    places: dict[str, tuple[str, int]] = {}
    sizes: dict[str, int] = {}
    for file, names in split.filename_to_tensors.items():
        header, offsets, sizes[file] = _header({name: specs[name] for name in names})
        headers[file] = header
        places.update({name: (file, offset) for name, offset in offsets.items()})
    index = None
    if split.is_sharded:
        content = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        index = json.dumps(content, indent=2, sort_keys=True) + "\n"
    return ShardPlan(headers, places, sizes, index, index_of(single))


def _plan_parts(
    specs: Mapping[str, TensorSpec],
    max_shard_size: int | str,
    single: str,
    placed: Mapping[str, Part],
) -> ShardPlan:
    """Lay out the stored tensors, and find each part in them."""
    stored: dict[str, TensorSpec] = {}
    for name, part in placed.items():
        shape = specs[name].shape[::-1] if part.transposed else specs[name].shape
        whole = (part.of * shape[0], *shape[1:]) if part.of > 1 else shape
        stored[part.stored] = TensorSpec(specs[name].dtype, whole)
    plan = plan_shards(stored, max_shard_size, single)
    places = {}
    for name, part in placed.items():
        file, offset = plan.places[part.stored]
        places[name] = (file, offset + part.index * specs[name].nbytes)
    transposed = frozenset(name for name, part in placed.items() if part.transposed)
    return replace(plan, places=places, transposed=transposed)


def _header(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int], int]:
    """Header bytes, offset of each tensor and size of one file, in the library's own order."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    relative: dict[str, int] = {}
    for name in sorted(specs, key=lambda n: (DTYPE_ORDER.index(DTYPE_NAMES[specs[n].dtype]), n)):
        spec = specs[name]
        entries[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        relative[name] = position
        position += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: start + offset for name, offset in relative.items()}, start + position


class ShardWriter:
    """Files of a [`ShardPlan`] in a folder, filled tensor by tensor in any order.

    Raises `OSError` where the disk does; [`whole_folder`] makes it an [`OutputError`].

    Args:
        folder (`Path`): where they lie.
        plan ([`ShardPlan`]): what they hold.
        create (`bool`): make them and their index; else they are there, from another writer.
    """

    def __init__(self, folder: Path, plan: ShardPlan, *, create: bool = True) -> None:
        self._plan = plan
        self._descriptors: dict[str, int] = {}
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0)
        try:
            for file, header in plan.headers.items():
                descriptor = os.open(folder / file, flags, 0o666)
                self._descriptors[file] = descriptor
                if create:
                    _reserve(descriptor, plan.sizes[file])
                    _write_all(descriptor, memoryview(header), 0)
            if create:
                write_index(folder, plan)
        except BaseException:
            self.abandon()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place.

        Args:
            name (`str`): as in the plan.
            tensor (`Tensor`): of the planned dtype and shape, on any device.
        """
        file, offset = self._plan.places[name]
        stored = tensor.detach().cpu()
        if name in self._plan.transposed:
            stored = stored.mT
        data = byte_view(stored.contiguous())
        _write_all(self._descriptors[file], data, offset)

    def read_back(self, name: str, spec: TensorSpec) -> Tensor:
        """What stands in the place of one tensor.

        Args:
            name (`str`): as in the plan.
            spec ([`TensorSpec`]): its dtype and shape.
        """
        file, offset = self._plan.places[name]
        raw = empty(spec.nbytes, dtype=torch.uint8)
        view, done = byte_view(raw), 0
        while done < spec.nbytes and (
            got := os.preadv(self._descriptors[file], [view[done:]], offset + done)
        ):
            done += got
        if name in self._plan.transposed:
            return raw.view(spec.dtype).reshape(spec.shape[::-1]).mT.contiguous()
        return raw.view(spec.dtype).reshape(spec.shape)

    def close(self) -> None:
        """Flush to disk and close."""
        for descriptor in self._descriptors.values():
            os.fsync(descriptor)
        self.abandon()

    def abandon(self) -> None:
        """Close without flushing."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def write_index(folder: Path, plan: ShardPlan) -> None:
    """Write the index of the shards, if there are several."""
    if plan.index is not None:
        (folder / plan.index_file).write_text(plan.index)


def _reserve(descriptor: int, size: int) -> None:
    """Take the space now, so that a full disk is noticed before the first decomposition."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.ftruncate(descriptor, size)  # file systems that cannot reserve


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(descriptor, data, offset)
        data, offset = data[done:], offset + done


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn failures of the file system into an [`OutputError`] that names `folder`."""
    try:
        yield
    except OSError as error:
        hint = "Choose another folder with -o."
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "Free some space or choose another disk with -o."
        raise OutputError(f"Cannot write to {folder}: {error.strerror}.", hint) from None


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
            "Choose another folder with -o.",
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
