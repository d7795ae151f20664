"""Candidates for compression and their singular vectors, weight by weight."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from hf_tsv import adapter, linalg, stream, tsv
from hf_tsv.checkpoints import layout
from hf_tsv.checkpoints.reader import Checkpoint, byte_view, digest
from hf_tsv.errors import CheckpointError, RecipeError
from hf_tsv.factors import (
    TaskFactors,
    matrix_shape,
)
from hf_tsv.findings import Seconds
from hf_tsv.journal import Journal
from hf_tsv.memory import reused, share_one_heap
from hf_tsv.ranks import DENSE, RankRule
from hf_tsv.recipe import Dtype, Settings, check_shard_size, current_versions
from hf_tsv.sources import Sources, identity_entry
from hf_tsv.tsv import TaskSingularVectors

Format = Literal["factors", "peft"]

CURVE_POINTS = 49
"""Points of a curve in a picture."""


@dataclass(frozen=True)
class Options:
    """Options of a compression.

    Args:
        rule ([`RankRule`]): rule for the triplets to keep.
        factor_dtype (`str`): type of the stored updates.
        compress_conv (`bool`): decompose the patch convolution too, one row per output channel.
        format (`str`): `factors`, or `peft` for a LoRA adapter.
        dense (`bool`): store all tensors in a LoRA adapter, not only matrices of linear layers.
        model_class (`str`, *optional*): the class a LoRA adapter is for; default: that of the
            fine-tuned checkpoint.
        max_shard_size (`int` or `str`): largest size of a file in bytes, or a text like `"5GB"`.
        report (`bool`): add a table and a picture of what is kept to the card.
    """

    rule: RankRule = field(default_factory=RankRule)
    factor_dtype: Dtype = "float32"
    compress_conv: bool = False
    format: Format = "factors"
    dense: bool = True
    model_class: str | None = None
    max_shard_size: int | str = Settings.max_shard_size
    report: bool = False

    def __post_init__(self) -> None:
        for name, kinds in (("factor_dtype", get_args(Dtype)), ("format", get_args(Format))):
            if getattr(self, name) not in kinds:
                raise RecipeError(
                    f"{name} is {getattr(self, name)!r}.", f"Choose one of {', '.join(kinds)}."
                )
        check_shard_size(self.max_shard_size)
        adapter_only = not self.dense or self.model_class is not None
        if self.format == "factors" and adapter_only:
            raise RecipeError(
                "dense=False and model_class (--no-dense, --model-class) are about an adapter.",
                "Add --format peft.",
            )
        if self.format == "peft" and self.compress_conv:
            raise RecipeError(
                "A LoRA adapter stores the patch convolution whole.", "Leave --compress-conv out."
            )
        if self.format == "peft" and self.max_shard_size != Settings.max_shard_size:
            raise RecipeError("A LoRA adapter is a single file.", "Leave --max-shard-size out.")
        if self.model_class is not None and self.model_class not in layout.MODEL_CLASSES:
            raise RecipeError(
                f"There is no CLIP class {self.model_class!r}.",
                f"Choose one of {', '.join(layout.MODEL_CLASSES)}.",
            )

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the stored updates."""
        dtype: torch.dtype = getattr(torch, self.factor_dtype)
        return dtype


@dataclass(frozen=True)
class Candidate:
    """Limits of what may be kept of one weight, known from its header.

    Args:
        name (`str`): canonical name.
        shape (`tuple[int, ...]`): shape of the weight.
        dtype (`torch.dtype`): type in the fine-tuned checkpoint.
        limit (`int`): most triplets that may be kept; 0: only the update itself.
        triplet_bytes (`int`): size of one triplet.
        dense_bytes (`int`, *optional*): size of the update itself; None if it may not be kept.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    limit: int
    triplet_bytes: int
    dense_bytes: int | None


@dataclass(frozen=True)
class Measured:
    """Weight after its decomposition.

    Args:
        candidate ([`Candidate`]): limits from its header.
        base_sha256 (`str`): digest of W0.
        norm (`float`): ‖Δ‖, Frobenius.
        singular_values (`Tensor`): those that may be kept, float64, descending.
        numerical_rank (`int`): number of singular values above storage rounding.
        place (`int`): offset of its vectors in the spool.
        sha256 (`str`): digest of the bytes there.
        exact (`bool`): whether they are from a full SVD.
    """

    candidate: Candidate
    base_sha256: str
    norm: float
    singular_values: Tensor
    numerical_rank: int = 0
    place: int = 0
    sha256: str = ""
    exact: bool = False

    def to_entry(self) -> dict[str, Any]:
        """Entry for a journal."""
        return {
            "label": self.candidate.name,
            "base_sha256": self.base_sha256,
            "norm": self.norm,
            "singular_values": self.singular_values.tolist(),
            "numerical_rank": self.numerical_rank,
            "place": self.place,
            "sha256": self.sha256,
            "exact": self.exact,
        }

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any], candidate: Candidate) -> Measured:
        """Weight from an entry of [`to_entry`].

        Args:
            entry (`Mapping[str, Any]`): entry of a journal.
            candidate ([`Candidate`]): limits of the weight.
        """
        values = torch.tensor(entry["singular_values"], dtype=torch.float64)
        rest = {k: v for k, v in entry.items() if k != "label"}
        return cls(candidate, **{**rest, "singular_values": values})

    def energy(self, rank: int) -> float:
        """Share of the squared norm that the leading `rank` triplets keep."""
        if rank == DENSE or self.norm == 0:
            return 1.0
        return min(1.0, float(self.singular_values[:rank].square().sum()) / self.norm**2)


def energy_curves(measured: Sequence[Measured]) -> dict[str, tuple[list[float], list[float]]]:
    """Energy in the leading triplets by kind of layer, up to the rank known for all its weights.

    Args:
        measured (`Sequence[Measured]`): every weight.

    Returns:
        `dict[str, tuple[list[float], list[float]]]`: shares of k, and of the squared norm.
    """
    kinds: dict[str, list[Measured]] = defaultdict(list)
    for item in measured:
        if len(item.singular_values):
            kinds[layout.block_and_kind(item.candidate.name)[1]].append(item)
    curves = {}
    for kind, items in kinds.items():
        sides = [min(matrix_shape(item.candidate.shape)) for item in items]
        pairs = list(zip(items, sides, strict=True))
        at = np.linspace(0, min(len(item.singular_values) / k for item, k in pairs), CURVE_POINTS)
        energy = np.zeros(CURVE_POINTS)
        for item, k in pairs:
            up_to = np.cumsum([0.0, *item.singular_values.square().tolist()])
            energy += np.interp(at * k, np.arange(len(up_to)), up_to)
        curves[kind] = (at.tolist(), (energy / sum(item.norm**2 for item in items)).tolist())
    return curves


@dataclass(frozen=True)
class Job:
    """Compression whose references are resolved and whose headers fit."""

    sources: Sources
    options: Options
    candidates: tuple[Candidate, ...]
    warnings: tuple[str, ...]

    @property
    def source(self) -> Checkpoint:
        """Fine-tuned checkpoint."""
        (item,) = self.sources.inputs
        if isinstance(item, TaskFactors):
            raise CheckpointError(
                f"{item} holds task factors already.",
                "Compress the fine-tuned checkpoint; `hf-tsv reconstruct` makes one of factors.",
            )
        return item

    @property
    def checkpoint_bytes(self) -> int:
        """Size of all tensors of the fine-tuned checkpoint, in bytes."""
        held = (*self.source.tensors.values(), *self.source.head.values())
        return sum(info.nbytes for info in held)

    @property
    def base_bytes(self) -> int:
        """Size of the same weights in the base model, in bytes."""
        base = self.sources.base.tensors
        return sum(info.nbytes for name, info in base.items() if name in self.source.tensors)

    @property
    def head_bytes(self) -> int:
        """Size of the task head, which is stored unchanged, in bytes."""
        return sum(info.nbytes for info in self.source.head.values())

    def to_json(self, device: torch.device) -> dict[str, Any]:
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
        return tsv.difference(self.source.read(name), self.sources.base.read(name))


def candidates_of(job: Job) -> tuple[Candidate, ...]:
    """Candidates for all weights that base and fine-tuned checkpoint share."""
    base, source, options = job.sources.base, job.source, job.options
    make = _candidate if options.format == "factors" else _adapter_candidate
    return tuple(
        make(name, source, options)
        for name, info in sorted(base.tensors.items())
        if name in source.tensors and info.dtype.is_floating_point and info.nbytes
    )


def _candidate(name: str, source: Checkpoint, options: Options) -> Candidate:
    info = source.tensors[name]
    dense_bytes = math.prod(info.shape) * options.dtype.itemsize
    only_dense = Candidate(name, info.shape, info.dtype, 0, 0, dense_bytes)
    if len(info.shape) != 2 and not (options.compress_conv and len(info.shape) == 4):
        return only_dense
    rows, columns = matrix_shape(info.shape)
    triplet_bytes = (rows + 1 + columns) * options.dtype.itemsize
    most = min(rows, columns, (dense_bytes - 1) // triplet_bytes)  # eq. 10
    wanted = options.rule.rank_before(min(rows, columns))
    if most == 0:
        return only_dense
    limit = most if wanted is None else min(wanted, most)
    return Candidate(name, info.shape, info.dtype, limit, triplet_bytes, dense_bytes)


def _adapter_candidate(name: str, source: Checkpoint, options: Options) -> Candidate:
    """Candidate for an adapter: any rank for a linear layer, else the value itself or nothing."""
    info = source.tensors[name]
    if layout.name_in_class(name, options.model_class or layout.saved_class(source.config)) is None:
        return Candidate(name, info.shape, info.dtype, 0, 0, 0)
    if adapter.is_target(name):
        rows, columns = info.shape
        k = min(rows, columns)
        limit = options.rule.rank_before(k) or k
        triplet_bytes = (rows + columns) * options.dtype.itemsize
        return Candidate(name, info.shape, info.dtype, limit, triplet_bytes, None)
    nbytes = info.nbytes
    if adapter.is_bias(name):  # its change is stored, in the dtype of the pairs
        nbytes = math.prod(info.shape) * options.dtype.itemsize
    return Candidate(name, info.shape, info.dtype, 0, 0, nbytes if options.dense else 0)


class Spool:
    """File of singular vectors of all weights, until the ranks to keep are known.

    Args:
        file (`Path`): path of the file, created if absent.
        measured (`Sequence[Measured]`): weights whose vectors it may hold already.
    """

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
        """Append Uᵀ and Vh in float32, triplet by triplet, so that a prefix is a truncation.

        Args:
            item ([`Measured`]): the weight.
            vectors ([`TaskSingularVectors`]): all triplets that may be kept of it.

        Returns:
            [`Measured`]: the weight with the place and digest of its vectors.
        """
        start = self._end
        rows = torch.cat([vectors.U.mT, vectors.Vh], dim=1)
        data = byte_view(rows.to("cpu", torch.float32).contiguous())
        self._file.seek(start)
        self._file.write(data)
        self._file.flush()
        self._end += len(data)
        return replace(item, place=start, sha256=hashlib.sha256(data).hexdigest())

    def get(self, item: Measured, rank: int) -> TaskSingularVectors:
        """Leading triplets of one weight.

        Args:
            item ([`Measured`]): the weight.
            rank (`int`): number of triplets.
        """
        d_out = matrix_shape(item.candidate.shape)[0]
        rows = self._rows(item, rank)
        S = item.singular_values[:rank].float()
        return TaskSingularVectors(rows[:, :d_out].mT, S, rows[:, d_out:])

    def _rows(self, item: Measured, rank: int) -> Tensor:
        rows = torch.empty(rank, sum(matrix_shape(item.candidate.shape)))
        view, done = byte_view(rows), 0
        while done < len(view):
            got = os.preadv(self._file.fileno(), [view[done:]], item.place + done)
            if not got:
                raise OSError(errno.EIO, "the file of singular vectors was cut short")
            done += got
        return rows


def _spooled_bytes(item: Measured) -> int:
    return 4 * len(item.singular_values) * sum(matrix_shape(item.candidate.shape))


def measure(
    job: Job, spool: Spool, notes: Journal, device: torch.device, advance: Any
) -> tuple[list[Measured], Seconds]:
    """Decompose every weight once, one per thread, while the next one is read.

    Args:
        job ([`Job`]): compression to do.
        spool ([`Spool`]): file for the singular vectors; weights it holds are not decomposed again.
        notes ([`Journal`]): journal for everything else.
        device (`torch.device`): device that computes.
        advance (`Callable[[int], None]`): called after each weight.

    Returns:
        `tuple[list[Measured], Seconds]`: every weight, and the time of reading and decomposing
        them.
    """
    started, waited = time.monotonic(), 0.0
    share_one_heap()
    measured = {item.candidate.name: item for item in spool.held}
    left = [candidate for candidate in job.candidates if candidate.name not in measured]
    for item in (job.sources.base, job.source):
        stream.expect(item, (candidate.name for candidate in left))
    workers = torch.get_num_threads()
    sizes = [4 * math.prod(candidate.shape) for candidate in left]
    reading_seconds: list[float] = []
    pending: deque[Future[tuple[Measured, TaskSingularVectors | None]]] = deque()

    def finish() -> None:
        item, vectors = pending.popleft().result()
        if vectors is not None:
            item = spool.put(item, vectors)
        notes.add(item.to_entry())
        measured[item.candidate.name] = item
        advance(1)

    with (
        reused(),
        linalg.threads(),
        ThreadPoolExecutor(1, "hf-tsv-read") as reading,
        ThreadPoolExecutor(workers, "hf-tsv-compute") as computing,
    ):
        try:
            load = lambda item: _load(item, job)  # noqa: E731
            loads = stream.read_ahead(reading, load, left, sizes)
            while True:
                asked = time.monotonic()
                loaded = next(loads, None)
                if loaded is None:
                    break
                waited += time.monotonic() - asked
                reading_seconds.append(loaded.seconds)
                pending.append(computing.submit(_decompose, loaded, job.source, device))
                del loaded
                if len(pending) >= workers:
                    finish()
            while pending:
                finish()
        except BaseException:
            stream.stop_fetching([job.sources.base, job.source])
            raise
        finally:
            reading.shutdown(cancel_futures=True)
            computing.shutdown(cancel_futures=True)
    computed = time.monotonic() - started - waited
    in_order = [measured[candidate.name] for candidate in job.candidates]
    return in_order, Seconds(sum(reading_seconds), waited, computed)


@dataclass(frozen=True)
class _Loaded:
    """Update of one weight, its norm and storage noise, the digest of W0, and the seconds of
    reading."""

    candidate: Candidate
    delta: Tensor
    norm: float
    base_sha256: str
    floor: float
    seconds: float


def _load(candidate: Candidate, job: Job) -> _Loaded:
    started = time.monotonic()
    w0, w1 = job.sources.base.read(candidate.name), job.source.read(candidate.name)
    rows, columns = matrix_shape(candidate.shape)
    w0, w1 = w0.reshape(rows, columns), w1.reshape(rows, columns)
    delta, _ = stream.update_of(candidate.name, job.source, w1, w0)
    norm = linalg.frobenius_norm(delta)
    norm = norm if norm**2 else 0.0  # no stored type has numbers so small
    floor = tsv.storage_noise(w0, w1, norm, overwrite=True) if candidate.limit else 0.0
    sha256 = digest(w0.reshape(candidate.shape))
    return _Loaded(candidate, delta, norm, sha256, floor, time.monotonic() - started)


def _decompose(
    loaded: _Loaded, source: Checkpoint, device: torch.device
) -> tuple[Measured, TaskSingularVectors | None]:
    """Leading triplets of one weight, as many as may be kept; None if none may."""
    candidate, delta, norm = loaded.candidate, loaded.delta, loaded.norm
    item = Measured(candidate, loaded.base_sha256, norm, torch.empty(0))
    if not norm or not candidate.limit:
        return item, None
    delta = delta.to(device)
    k = min(delta.shape)
    whole = 2 * candidate.limit > k  # then one full SVD has all of them
    wanted = k if whole else candidate.limit
    with stream.named(candidate.name, [source]):
        svd = linalg.truncated_svd(
            delta, wanted, loaded.floor, "exact" if whole else "fast", spectrum=True
        )
    kept = TaskSingularVectors(svd.U, svd.S, svd.Vh).truncated(candidate.limit)
    item = replace(
        item,
        singular_values=kept.S.cpu().double(),
        numerical_rank=svd.numerical_rank,
        exact=svd.exact,
    )
    return item, kept
