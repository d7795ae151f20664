"""What a compressed task is on disk: low-rank factors and dense updates, beside their description.

The format is specified in docs/task-factors.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from hf_tsv.checkpoints.formats.description import PARTS, FactorsConfig, StoredWeight, tensor_specs
from hf_tsv.checkpoints.names import FACTORS_CONFIG, FACTORS_FILE
from hf_tsv.checkpoints.reference import PinnedCheckpoint, at_revision
from hf_tsv.checkpoints.storage.files import Files, read_json
from hf_tsv.checkpoints.storage.headers import read_headers
from hf_tsv.checkpoints.storage.tensors import (
    DTYPE_NAMES,
    TensorInfo,
    TensorSpec,
    digest,
    read_tensor,
)
from hf_tsv.linalg.updates import TaskSingularVectors, Update
from hf_tsv.system.errors import CheckpointError


@dataclass(frozen=True)
class Factors:
    """A compressed task: a handle on its files, which are read one weight at a time.

    Args:
        pinned ([`PinnedCheckpoint`]): which commit or folder.
        config ([`FactorsConfig`]): base, source, and what is stored of each weight.
        stored (`Mapping[str, TensorInfo]`): where the tensors lie.
        weight_files (`tuple[str, ...]`): the files they lie in, index included.
    """

    pinned: PinnedCheckpoint
    config: FactorsConfig
    stored: Mapping[str, TensorInfo]
    weight_files: tuple[str, ...]

    def __str__(self) -> str:
        return str(self.pinned)

    @property
    def tensors(self) -> Mapping[str, StoredWeight]:
        """The weights it has updates of, by canonical name."""
        return self.config.weights

    @property
    def head(self) -> dict[str, TensorInfo]:
        """Tensors of a task head, by the name they have in the fine-tuned checkpoint."""
        return {name: self.stored[f"{name}.value"] for name in self.config.task_head}

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names that a merge leaves out."""
        return self.config.task_head

    @property
    def needed_files(self) -> tuple[str, ...]:
        """What a run reads of it."""
        return (FACTORS_CONFIG, *self.weight_files)

    def parts(self, name: str) -> list[TensorInfo]:
        """What reading the update of one weight reads of its files."""
        stored = self.config.weights[name].stored
        ends = {"factors": PARTS, "dense": ("delta",)}.get(stored, ())
        return [self.stored[f"{name}.{end}"] for end in ends]

    def reading_from(self, files: Files) -> Factors:
        """The same factors, read from a copy of their files."""
        return replace(self, pinned=replace(self.pinned, files=files))

    def update(self, name: str, digests: dict[str, str] | None = None) -> Update | None:
        """What is stored of the update of one weight.

        Args:
            name (`str`): canonical name.
            digests (`dict[str, str]`, *optional*): gets the digest of every tensor read.

        Returns:
            `TaskSingularVectors`, `Tensor` or `None`: of a matrix its triplets; of anything else
            Δ; None where nothing is stored.

        Raises:
            [`CheckpointError`]: NaN or Inf, or singular values that are negative or not sorted.
        """
        weight = self.config.weights[name]
        if weight.stored == "none":
            return None
        if weight.stored == "dense":
            return self._read(f"{name}.delta", digests)
        vectors = TaskSingularVectors(*(self._read(f"{name}.{part}", digests) for part in PARTS))
        S = vectors.S.double()
        if (S < 0).any() or (S[1:] > S[:-1]).any():
            what = "negative" if (S < 0).any() else "not sorted"
            raise CheckpointError(
                f"{self}: the singular values of {name} are {what}.",
                "The factors are damaged; compress the checkpoint again.",
            )
        if len(weight.shape) == 2:
            return vectors
        return vectors.matrix().float().reshape(weight.shape)  # Δ as a dense one is: float32

    def read(self, name: str) -> Tensor:
        """One tensor of the task head, as stored.

        Args:
            name (`str`): as in the fine-tuned checkpoint.
        """
        return self._read(f"{name}.value", None)

    def check_base(self, name: str, base_digest: str, base: str) -> None:
        """Refuse a base model that is not the one the factors were made from.

        Args:
            name (`str`): canonical name of a weight.
            base_digest (`str`): of this weight in the base model at hand.
            base (`str`): its name, for the error.

        Raises:
            [`CheckpointError`]: the weight differs.
        """
        if self.config.weights[name].base_sha256 == base_digest:
            return
        origin = self.config.base_model
        made_from = at_revision(origin.ref, origin.revision and origin.revision[:12])
        raise CheckpointError(
            f"{self} belongs to the base model {made_from}, and {name} of {base} differs from it.",
            "Use that base model, or compress the fine-tune again with this one.",
        )

    def _read(self, name: str, digests: dict[str, str] | None) -> Tensor:
        tensor = read_tensor(self.pinned.files, self.stored[name], name, str(self))
        if digests is not None:
            digests[name] = digest(tensor)
        return tensor


def is_factors(pinned: PinnedCheckpoint) -> bool:
    """Whether a repository or folder holds task factors."""
    return pinned.files.size(FACTORS_CONFIG) is not None


def open_factors(pinned: PinnedCheckpoint) -> Factors:
    """Read the configuration and all headers of task factors, and nothing else.

    Raises:
        [`CheckpointError`]: newer format, malformed configuration, or tensors that do not match it.
    """
    owner = str(pinned)
    config = FactorsConfig.from_dict(read_json(pinned.files, FACTORS_CONFIG, owner), owner)
    stored, files = read_headers(pinned.files, FACTORS_FILE, owner)
    values = {f"{name}.value": stored.get(f"{name}.value") for name in config.task_head}
    expected: dict[str, TensorSpec | TensorInfo | None] = dict(
        tensor_specs(config.weights, config.factor_dtype, {})
    )
    expected.update(values)
    for name, spec in expected.items():
        if name not in stored or spec is None:
            raise CheckpointError(
                f"{owner}: {name} is missing from the factor files.", "Download or save them again."
            )
        found = stored[name]
        if (found.shape, found.dtype) != (spec.shape, spec.dtype):
            raise CheckpointError(
                f"{owner}: {name} is {DTYPE_NAMES[found.dtype]} {list(found.shape)};"
                f" {FACTORS_CONFIG} says {DTYPE_NAMES[spec.dtype]} {list(spec.shape)}.",
                "Download or save them again.",
            )
    if extra := sorted(stored.keys() - expected.keys()):
        raise CheckpointError(f"{owner}: {FACTORS_CONFIG} does not mention {extra[0]}.")
    for name, weight in config.weights.items():
        parts = tensor_specs({name: weight}, config.factor_dtype, {})
        if weight.bytes != sum(part.nbytes for part in parts.values()):
            raise CheckpointError(
                f"{owner}: weights.{name}.bytes in {FACTORS_CONFIG} is not what it takes.",
                "Download or save them again.",
            )
    if config.factors_bytes != sum(info.nbytes for info in stored.values()):
        raise CheckpointError(
            f"{owner}: factors_bytes in {FACTORS_CONFIG} is not the size of its tensors.",
            "Download or save them again.",
        )
    return Factors(pinned, config, stored, files)
