"""The weights that may be stored as triplets, and what is known of each."""

from __future__ import annotations

import errno
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_tsv.checkpoints import layout
from hf_tsv.checkpoints.formats.task import Task, identity_entry
from hf_tsv.checkpoints.sources import Sources
from hf_tsv.checkpoints.storage.dtypes import DType
from hf_tsv.checkpoints.storage.tensors import Described, TensorSpec, byte_view
from hf_tsv.compression import peft
from hf_tsv.linalg import svd, updates
from hf_tsv.linalg.shapes import matrix_shape
from hf_tsv.linalg.updates import TaskSingularVectors
from hf_tsv.recipes.compressing import Options
from hf_tsv.recipes.settings import current_versions
from hf_tsv.system.errors import CheckpointError

DENSE = -1
"""Value in place of a rank for a weight whose update itself is stored."""


@dataclass(frozen=True)
class Candidate:
    """Limits of what may be kept of one weight, by its canonical name; known from its header.

    At most `limit` triplets may be kept; 0: only the update itself. `dense_bytes` is the size of
    that; None if it may not be kept. `dtype` is the type in the fine-tuned checkpoint.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    limit: int
    triplet_bytes: int
    dense_bytes: int | None

    @property
    def cost(self) -> float:
        """Operations of reading and decomposing it, approximately."""
        values = 2 * svd.PER_VALUE * math.prod(self.shape)
        if not self.limit:
            return values
        rows, columns = matrix_shape(self.shape)
        return values + svd.operations(rows, columns, self.limit)


@dataclass(frozen=True)
class Measured:
    """Weight after its decomposition, with digests of W0 and of the bytes of its vectors.

    `norm` is ‖Δ‖, Frobenius, and `base_norm` ‖W0‖; `singular_values` are those that may be kept,
    float64, descending; `numerical_rank` counts those above storage rounding. `place` is the offset
    of the vectors in the spool; `exact` ones are from a full SVD.
    """

    candidate: Candidate
    base_sha256: str
    norm: float
    singular_values: Tensor
    base_norm: float = 0.0
    numerical_rank: int = 0
    place: int = 0
    sha256: str = ""
    exact: bool = False

    def to_entry(self) -> dict[str, Any]:
        """Entry for a journal."""
        own = {key: value for key, value in vars(self).items() if key != "candidate"}
        values = self.singular_values.tolist()
        return {"label": self.candidate.name, **own, "singular_values": values}

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any], candidate: Candidate) -> Measured:
        """Weight from an entry of [`to_entry`]."""
        values = torch.tensor(entry["singular_values"], dtype=torch.float64)
        rest = {k: v for k, v in entry.items() if k != "label"}
        return cls(candidate, **{**rest, "singular_values": values})

    def energy(self, rank: int) -> float:
        """Share of the squared norm that the leading `rank` triplets keep."""
        if rank == DENSE or self.norm == 0:
            return 1.0
        return min(1.0, float(self.singular_values[:rank].square().sum()) / self.norm**2)


@dataclass(frozen=True)
class Compression:
    """Compression whose references are resolved and whose headers fit."""

    sources: Sources
    options: Options
    candidates: tuple[Candidate, ...]
    warnings: tuple[str, ...]

    @property
    def source(self) -> Task:
        """Fine-tuned checkpoint."""
        (item,) = self.sources.inputs
        if item.description is not None:
            raise CheckpointError(
                f"{item} holds task factors already.",
                "Compress the fine-tuned checkpoint; `hf-tsv reconstruct` makes one from factors.",
            )
        return item

    @property
    def model_class(self) -> str:
        """Name of the model class that an adapter is for."""
        return self.options.model_class or layout.saved_class(self.source.model_config)

    @property
    def checkpoint_bytes(self) -> int:
        """Size of all tensors of the fine-tuned checkpoint, in bytes."""
        held = (*self.source.tensors.values(), *self.source.head.values())
        return sum(TensorSpec(info.dtype, info.shape).nbytes for info in held)

    @property
    def base_bytes(self) -> int:
        """Size of the same weights in the base model, in bytes."""
        base = self.sources.base.tensors
        return sum(info.nbytes for name, info in base.items() if name in self.source.tensors)

    @property
    def head_bytes(self) -> int:
        """Size of the task head, which is stored unchanged, in bytes."""
        return sum(info.nbytes for info in self.source.head.values())

    def identity(self, device: torch.device) -> dict[str, Any]:
        """Everything that determines the bytes of the result."""
        return {
            "base_model": identity_entry(self.sources.base),
            "source": identity_entry(self.source),
            "options": asdict(self.options),
            "tensors": {c.name: [str(c.dtype), c.shape, c.limit] for c in self.candidates},
            "versions": current_versions(),
            "device": device.type,
        }

    def delta(self, name: str) -> Tensor:
        """Compute Δ of one weight."""
        w0 = self.sources.base.original([name])
        return updates.difference(self.source.exact(w0), w0.tensor)


def candidates_of(job: Compression) -> tuple[Candidate, ...]:
    """Candidates for all weights that base and fine-tuned checkpoint share."""
    make = _candidate if job.options.out_format == "factors" else _adapter_candidate
    held = job.source.tensors
    return tuple(
        make(name, held[name], job)
        for name, info in sorted(job.sources.base.tensors.items())
        if name in held and info.dtype.is_floating_point and info.nbytes
    )


def _candidate(name: str, info: Described, job: Compression) -> Candidate:
    options = job.options
    dense_bytes = math.prod(info.shape) * options.stored_dtype.itemsize
    only_dense = Candidate(name, info.shape, info.dtype, 0, 0, dense_bytes)
    if len(info.shape) != 2 and not (options.compress_conv and len(info.shape) == 4):
        return only_dense
    rows, columns = matrix_shape(info.shape)
    triplet_bytes = (rows + 1 + columns) * options.stored_dtype.itemsize
    most = min(rows, columns, (dense_bytes - 1) // triplet_bytes)  # eq. 10
    wanted = options.rule.rank_before(min(rows, columns))
    if most == 0:
        return only_dense
    limit = most if wanted is None else min(wanted, most)
    return Candidate(name, info.shape, info.dtype, limit, triplet_bytes, dense_bytes)


def _adapter_candidate(name: str, info: Described, job: Compression) -> Candidate:
    """Candidate for an adapter: any rank for a linear layer, else the value itself or nothing."""
    options = job.options
    if layout.name_in_class(name, job.model_class) is None:
        return Candidate(name, info.shape, info.dtype, 0, 0, 0)
    if peft.is_target(name):
        rows, columns = info.shape
        limit = options.rule.rank_before(min(rows, columns)) or min(rows, columns)
        triplet_bytes = (rows + columns) * options.stored_dtype.itemsize
        return Candidate(name, info.shape, info.dtype, limit, triplet_bytes, None)
    # The change of a bias is stored in the dtype of the pairs, anything else as it is.
    dtype = options.stored_dtype if peft.is_bias(name) else info.dtype
    nbytes = TensorSpec(dtype, info.shape).nbytes if options.dense else 0
    return Candidate(name, info.shape, info.dtype, 0, 0, nbytes)


class Spool:
    """File, created if absent, of singular vectors of all weights, until the ranks are known."""

    def __init__(self, file: Path, measured: Sequence[Measured] = ()) -> None:
        self._file = file.open("r+b" if file.exists() else "w+b")
        self.held = [item for item in measured if self._holds(item)]
        """Weights whose vectors are in the file; a power failure may have lost some."""
        self._end = max((item.place + _spooled_bytes(item) for item in self.held), default=0)

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _holds(self, item: Measured) -> bool:
        if not len(item.singular_values):
            return True
        try:
            rows = self._rows(item, len(item.singular_values))
        except OSError:
            return False
        return hashlib.sha256(byte_view(rows)).hexdigest() == item.sha256

    def put(self, item: Measured, vectors: TaskSingularVectors) -> Measured:
        """Append Uᵀ and Vh in float32, triplet by triplet, so that a prefix is a truncation."""
        start = self._end
        rows = torch.cat([vectors.U.mT, vectors.Vh], dim=1)
        data = byte_view(rows.to("cpu", torch.float32).contiguous())
        self._file.seek(start)
        self._file.write(data)
        self._file.flush()
        self._end += len(data)
        return replace(item, place=start, sha256=hashlib.sha256(data).hexdigest())

    def get(self, item: Measured, rank: int) -> TaskSingularVectors:
        """Leading triplets of one weight."""
        d_out = matrix_shape(item.candidate.shape)[0]
        rows = self._rows(item, rank)
        S = item.singular_values[:rank].float()
        return TaskSingularVectors(rows[:, :d_out].mT, S, rows[:, d_out:])

    def _rows(self, item: Measured, rank: int) -> Tensor:
        rows = torch.empty(rank, sum(matrix_shape(item.candidate.shape)))
        self._file.seek(item.place)
        if self._file.readinto(byte_view(rows)) < rows.nbytes:
            raise OSError(errno.EIO, "the file of singular vectors was cut short")
        return rows


def _spooled_bytes(item: Measured) -> int:
    return 4 * len(item.singular_values) * sum(matrix_shape(item.candidate.shape))
