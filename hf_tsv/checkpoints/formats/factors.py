"""A compressed task on disk: low-rank factors and dense updates, beside their description.

The format is specified in docs/task-factors.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from hf_tsv.checkpoints.base_model import SaidBase
from hf_tsv.checkpoints.formats.description import PARTS, FactorsConfig, StoredWeight, tensor_specs
from hf_tsv.checkpoints.formats.task import Task, coarsest
from hf_tsv.checkpoints.names import FACTORS_CONFIG, FACTORS_FILE
from hf_tsv.checkpoints.reference import PinnedCheckpoint, at_revision
from hf_tsv.checkpoints.storage.files import read_json
from hf_tsv.checkpoints.storage.headers import read_headers
from hf_tsv.checkpoints.storage.tensors import TensorInfo, digest, read_tensor
from hf_tsv.system.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hf_tsv.checkpoints.formats.change import Change, Original
    from hf_tsv.linalg.updates import Update


@dataclass(frozen=True)
class Factors(Task):
    """A compressed task: a handle on its files, which are read one weight at a time.

    Args:
        config ([`FactorsConfig`]): base, source, and how it was compressed.
        stored (`Mapping[str, TensorInfo]`): places of the tensors.
    """

    kind: ClassVar[str] = "task factors"
    says: ClassVar[str] = "holds task factors"
    has_few_triplets: ClassVar[bool] = True
    loading: ClassVar[str] = "`hf-tsv reconstruct` it, then load it with transformers' AutoModel."
    config_file: ClassVar[str] = FACTORS_CONFIG

    tensors: Mapping[str, StoredWeight]
    config: FactorsConfig = field(kw_only=True)
    stored: Mapping[str, TensorInfo] = field(kw_only=True)

    def says_base(self) -> SaidBase:
        """Base model that they were made with."""
        origin = self.config.base_model
        content = self.config.base_fingerprint()
        return SaidBase((origin.ref,), True, origin.revision, content)

    @property
    def description(self) -> FactorsConfig:
        """How it was compressed."""
        return self.config

    @property
    def model_class(self) -> str | None:
        """Class of a task head; None: that of the base model."""
        return "CLIPForImageClassification" if self.head else None

    @property
    def rounded_to(self) -> torch.dtype | None:
        """None, since Δ itself is stored."""
        return None

    def parts(self, name: str) -> list[TensorInfo]:
        """Tensors of its files that reading the update of one weight reads."""
        stored = self.config.weights[name].stored
        ends = {"factors": PARTS, "dense": ("delta",)}.get(stored, ())
        return [self.stored[f"{name}.{end}"] for end in ends]

    def weight(self, w0: Original) -> Tensor:
        """Compute W0 + Δ of one weight, in the type of W0.

        Raises:
            [`CheckpointError`]: the base model is another one, or the sum does not fit its type.
        """
        from hf_tsv.linalg import products, updates

        self.check_base(w0.name, w0.digest(), w0.base)
        update, base = self.update(w0.name), w0.tensor.cpu()
        if update is None:
            return base.clone()
        weight = (products.in_working_precision(base) + updates.dense(update)).to(base.dtype)
        if not weight.isfinite().all():
            said = f"{w0.name} does not fit into {base.dtype} with its update."
            raise CheckpointError(f"{self}: {said}")
        return weight

    def change(
        self, w0: Original, *, decomposed: bool = False, digests: dict[str, str] | None = None
    ) -> Change | None:
        """Read what is stored of the update of a weight, see [`Task.change`]."""
        from torch import Tensor

        from hf_tsv.checkpoints.formats.change import Change, refuse_huge

        for part in w0.parts():
            self.check_base(part.name, part.digest(), w0.base)
        update = self._stacked_update(w0, digests)
        if update is None:
            return None
        refuse_huge(w0.label, self, update)
        update, floor = update.to(w0.device), 0.0
        if decomposed and isinstance(update, Tensor):
            floor = self._stored_noise(w0, update)
        return Change(update, math.hypot(*(self.tensors[name].norm for name in w0.names)), floor)

    def differs(self, w0: Original) -> bool:
        """Tell whether an update is stored, without reading it."""
        return self.tensors[w0.name].stored != "none"

    def missing_energy(self, name: str, rank: int | None) -> tuple[float, float]:
        """Squared norm that is missing of the leading triplets, and all of it."""
        kept = self.tensors[name]
        needed = kept.numerical_rank if rank is None else min(rank, kept.numerical_rank)
        there = kept.stored == "dense" or (kept.stored == "factors" and kept.rank >= needed)
        return 0.0 if there else (1 - kept.energy) * kept.norm**2, kept.norm**2

    def update(self, name: str, digests: dict[str, str] | None = None) -> Update | None:
        """Read the stored part of the update of one weight, with the digest of every tensor read.

        Returns:
            `TaskSingularVectors`, `Tensor` or `None`: the triplets of a matrix; Δ of anything else;
            None where nothing is stored.

        Raises:
            [`CheckpointError`]: NaN or Inf, or singular values that are negative or not sorted.
        """
        weight = self.config.weights[name]
        if weight.stored == "none":
            return None
        if weight.stored == "dense":
            return self._read(f"{name}.delta", digests)
        from hf_tsv.linalg.updates import TaskSingularVectors

        vectors = TaskSingularVectors(*(self._read(f"{name}.{part}", digests) for part in PARTS))
        S = vectors.S.double()
        if (S < 0).any() or (S[1:] > S[:-1]).any():
            what = "negative" if (S < 0).any() else "not sorted"
            hint = "The factors are damaged; compress the checkpoint again."
            raise CheckpointError(f"{self}: the singular values of {name} are {what}.", hint)
        if len(weight.shape) == 2:
            return vectors
        return vectors.matrix().float().reshape(weight.shape)  # Δ as a dense one is: float32

    def head_tensor(self, name: str) -> Tensor:
        """One tensor of the task head, as stored, by its name in the fine-tuned checkpoint."""
        return self._read(f"{name}.value", None)

    def check_base(self, name: str, base_digest: str, base: str) -> None:
        """Refuse a base model whose weight `name` is not the one the factors were made from."""
        if self.config.weights[name].base_sha256 == base_digest:
            return
        origin = self.config.base_model
        made_from = at_revision(origin.ref, origin.revision and origin.revision[:12])
        raise CheckpointError(
            f"{self} belongs to the base model {made_from}, and {name} of {base} differs from it.",
            "Use that base model, or compress the fine-tune again with this one.",
        )

    def _stacked_update(self, w0: Original, digests: dict[str, str] | None) -> Update | None:
        """The stored update of a weight; of stacked ones as one dense matrix."""
        import torch

        from hf_tsv.linalg import updates

        found = {name: self.update(name, digests) for name in w0.names}
        if len(found) == 1 or all(update is None for update in found.values()):
            return found[w0.names[0]]
        parts = (
            torch.zeros(self.tensors[name].shape) if u is None else updates.dense(u).float()
            for name, u in found.items()
        )
        return torch.cat(list(parts))

    def _stored_noise(self, w0: Original, update: Tensor) -> float:
        """Rounding in an update stored whole: of the checkpoint it was made from, and its own."""
        from hf_tsv.linalg.products import in_working_precision
        from hf_tsv.linalg.updates import rounding_noise, storage_noise

        dtype = coarsest(self.tensors[name].dtype for name in w0.names)
        W0, delta = map(in_working_precision, (w0.tensor, update))
        w1 = (W0 + delta).to(dtype)
        return storage_noise(w0.tensor, w1) + rounding_noise(update, self.config.factor_dtype.torch)

    def _read(self, name: str, digests: dict[str, str] | None) -> Tensor:
        tensor = read_tensor(self.pinned.files, self.stored[name], name, str(self))
        if digests is not None:
            digests[name] = digest(tensor)
        return tensor


def open_factors(pinned: PinnedCheckpoint) -> Factors:
    """Read the configuration and all headers of task factors, and nothing else.

    Raises:
        [`CheckpointError`]: newer format, malformed configuration, or tensors that do not match it.
    """
    owner = str(pinned)
    config = FactorsConfig.from_dict(read_json(pinned.files, FACTORS_CONFIG, owner), owner)
    stored, files = read_headers(pinned.files, FACTORS_FILE, owner)
    _check_tensors(config, stored, owner)
    head = {name: stored[f"{name}.value"] for name in config.task_head}
    return Factors(
        pinned, config.model_config, config.weights, files, head, config=config, stored=stored
    )


def _check_tensors(config: FactorsConfig, stored: Mapping[str, TensorInfo], owner: str) -> None:
    """Refuse tensors that are not as they are described."""

    def damaged(what: str) -> CheckpointError:
        return CheckpointError(f"{owner}: {what}.", "Download or save them again.")

    expected = tensor_specs(config.weights, config.factor_dtype, {})
    values = [f"{name}.value" for name in config.task_head]
    for name in (*expected, *values):
        found, spec = stored.get(name), expected.get(name)
        if found is None:
            raise damaged(f"{name} is missing from the factor files")
        if spec is not None and (found.shape, found.dtype) != (spec.shape, spec.dtype):
            raise damaged(
                f"{name} is {found.dtype.name} {list(found.shape)};"
                f" {FACTORS_CONFIG} says {spec.dtype.name} {list(spec.shape)}"
            )
    if extra := sorted(stored.keys() - {*expected, *values}):
        raise CheckpointError(f"{owner}: {FACTORS_CONFIG} does not mention {extra[0]}.")
    for name, weight in config.weights.items():
        parts = tensor_specs({name: weight}, config.factor_dtype, {})
        if weight.bytes != sum(part.nbytes for part in parts.values()):
            raise damaged(f"weights.{name}.bytes in {FACTORS_CONFIG} is not what it takes")
    if config.factors_bytes != sum(info.nbytes for info in stored.values()):
        raise damaged(f"factors_bytes in {FACTORS_CONFIG} is not the size of its tensors")
