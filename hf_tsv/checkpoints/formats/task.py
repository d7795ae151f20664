"""A fine-tune of a base model, in whatever form it is stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from hf_tsv.checkpoints import layout
from hf_tsv.checkpoints.base_model import SaidBase, said_by
from hf_tsv.checkpoints.formats.description import FactorsConfig
from hf_tsv.checkpoints.names import CONFIG_FILE, Format
from hf_tsv.checkpoints.reference import PinnedCheckpoint
from hf_tsv.checkpoints.storage.dtypes import DType
from hf_tsv.checkpoints.storage.files import Files
from hf_tsv.checkpoints.storage.tensors import Described, TensorInfo, read_tensor
from hf_tsv.system.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hf_tsv.checkpoints.formats.change import Change, Original

T = TypeVar("T", bound="Task")


@dataclass(frozen=True)
class Task(ABC):
    """A fine-tune of a base model, in whatever form it is stored.

    A new form is a subclass in a file of its own, with [`parts`] and [`weight`], and a row of
    `FORMATS`. The other methods have answers that are right for weights stored whole.
    """

    kind: ClassVar[str]  # a noun for people
    says: ClassVar[str]  # the same as a predicate: `is a mask`
    is_whole: ClassVar[bool] = False  # every weight is stored itself: none needs the base model
    is_adapter: ClassVar[bool] = False  # an adapter of another library, of low rank by nature
    has_few_triplets: ClassVar[bool] = False  # known to be of low rank: nobody needs to be told
    loads_as_model: ClassVar[bool] = True  # `load_model` makes a transformers model of it
    loading: ClassVar[str] = "Load it with transformers' AutoModel."  # advice where it makes none
    for_factors: ClassVar[str] = "Make factors with `hf-tsv compress`."  # `{}` is its name
    config_file: ClassVar[str] = CONFIG_FILE  # its description

    pinned: PinnedCheckpoint
    model_config: Mapping[str, Any]  # config.json of the fine-tuned model
    tensors: Mapping[str, Described]  # type and shape of its weights, by canonical name
    weight_files: tuple[str, ...]  # files of its tensors, index included
    head: Mapping[str, TensorInfo] = field(default_factory=dict)  # its task head, by stored name
    format: Format = "transformers"  # which a merge with it as the base has too
    extras: tuple[str, ...] = ()  # stored names of buffers, which no merge needs

    def __str__(self) -> str:
        return str(self.pinned)

    @property
    def needed_files(self) -> tuple[str, ...]:
        """Names of the files that a run reads."""
        return (self.config_file, *self.weight_files)

    @abstractmethod
    def parts(self, name: str) -> list[TensorInfo]:
        """Tensors of its files that reading one weight, or its change, reads."""

    @abstractmethod
    def weight(self, w0: Original) -> Tensor:
        """Compute W0 + Δ of one weight, not stacked, as it is stored, in memory of its own."""

    def exact(self, w0: Original) -> Tensor:
        """Compute W0 + Δ of one weight before it is rounded to a type it is not stored in."""
        return self.weight(w0)

    def change(
        self, w0: Original, *, decomposed: bool = False, digests: dict[str, str] | None = None
    ) -> Change | None:
        """Find the change of a weight, or of several that are stacked; None: there is none.

        Args:
            w0 ([`Original`]): the same weights of the base model.
            decomposed (`bool`): wanted by its singular vectors, so its noise floor is too.
            digests (`dict[str, str]`, *optional*): gets the digest of each tensor read.

        Raises:
            [`CheckpointError`]: a file is damaged, of another base model, or the change overflows.
        """
        from hf_tsv.checkpoints.formats.change import Change, stacked, update_of
        from hf_tsv.linalg import updates

        w1 = stacked([self.exact(part) for part in w0.parts()], w0.names, w0.device, digests)
        found = update_of(w0.label, self, w1, w0.tensor, noisy=decomposed)
        if not found.largest:
            return None
        evidence = updates.evidence_of_rounded_base(w1, w0.tensor, found.update)
        return Change(found.update, found.norm, found.floor, evidence)

    def differs(self, w0: Original) -> bool:
        """Tell whether it changed a weight at all."""
        from hf_tsv.linalg import updates

        return bool(updates.difference(self.exact(w0), w0.tensor).any())

    def head_tensor(self, name: str) -> Tensor:
        """Read one tensor of the task head, as stored, by its name in the fine-tuned checkpoint."""
        return read_tensor(self.pinned.files, self.head[name], name, str(self))

    def says_base(self) -> SaidBase:
        """Base models that it names."""
        return said_by(self.pinned)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names, as stored, of the tensors that a merge omits."""
        return (*self.head, *self.extras)

    @property
    def description(self) -> FactorsConfig | None:
        """How it was compressed; None: it was not."""
        return None

    @property
    def model_class(self) -> str | None:
        """Class of transformers that it was saved as; None: that of the base model."""
        return layout.saved_class(self.model_config)

    @property
    def rounded_to(self) -> torch.dtype | None:
        """Coarsest type that W0 + Δ was rounded to; None: Δ itself, or its factors, are stored."""
        return coarsest(info.dtype for info in self.tensors.values())

    def missing_energy(self, name: str, rank: int | None) -> tuple[float, float]:
        """Squared norm that is missing of the leading triplets of a change, and all of it.

        Both are known from headers, and zero where everything is stored. By default the triplets
        are all those above rounding.
        """
        return 0.0, 0.0

    def completed(self: T, base: Task) -> T:
        """Make the same task, with what its own files do not say taken from the base model."""
        return self

    def reading_from(self: T, files: Files) -> T:
        """Make the same task, read from a copy of its files."""
        return replace(self, pinned=replace(self.pinned, files=files))


def coarsest(dtypes: Iterable[DType]) -> torch.dtype | None:
    """Find the coarsest of these types that is a floating-point type; None: none is."""
    import torch

    floating = {dtype.torch for dtype in dtypes if dtype.is_floating_point}
    return max(floating, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def pinned_entry(item: Task) -> dict[str, str | None]:
    """Entry of a checkpoint in a report."""
    return {"ref": item.pinned.ref, "revision": item.pinned.revision}


def published_entry(item: Task) -> dict[str, str | None]:
    """Entry of a checkpoint in a file that others may read: of a folder the name alone."""
    return {"ref": item.pinned.name, "revision": item.pinned.revision}


def identity_entry(item: Task) -> dict[str, Any]:
    """Commit of a checkpoint; or its folder, with the sizes of its files and their times of change.

    Unlike the time of modification, that of change cannot be set: a copy that keeps the one is
    noticed by the other.
    """
    entry: dict[str, Any] = {**pinned_entry(item)}
    root = item.pinned.files.folder
    if root is not None and item.pinned.is_local:
        stats = {name: (root / name).stat() for name in item.needed_files}
        entry["files"] = {
            name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats.items()
        }
    return entry


def distinct_names(pins: Sequence[PinnedCheckpoint]) -> list[str]:
    """Short names of checkpoints: the last part of each reference, more where needed."""
    names = [Path(item.name).name for item in pins]
    for longer in (_longer_name, lambda item: _longer_name(item) if item.is_local else str(item)):
        pairs = zip(names, pins, strict=True)
        names = [longer(item) if names.count(name) > 1 else name for name, item in pairs]
    return [
        f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def _longer_name(item: PinnedCheckpoint) -> str:
    """A repository, or a folder with the name of the folder around it."""
    path = Path(item.ref).expanduser().absolute()
    return "/".join(path.parts[-2:]) if item.is_local else item.ref


def equals_base(name: str, base: str) -> CheckpointError:
    """The error for an input without an update."""
    hint = "Drop it, or name the right base with `base_model=REF`."
    return CheckpointError(f"{name} equals the base model {base}: it has no update.", hint)
