"""`tsv_config.json`: the description of task factors, checked when it is read."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hf_tsv.checkpoints import layout, reference
from hf_tsv.checkpoints.names import FACTORS_CONFIG
from hf_tsv.checkpoints.reference import PinnedCheckpoint
from hf_tsv.checkpoints.storage.tensors import (
    DTYPE_NAMES,
    DTYPES,
    TensorInfo,
    TensorSpec,
    fingerprint,
)
from hf_tsv.linalg.updates import matrix_shape
from hf_tsv.system.errors import CheckpointError
from hf_tsv.system.version import __version__

FORMAT = "hf-tsv task factors"
ADAPTER_FORMAT = "hf-tsv peft adapter"
FORMAT_VERSION = 1
STORED = ("factors", "dense", "none")
PARTS = ("U", "S", "Vh")
REVISION = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class StoredWeight:
    """What is kept of the update of one weight.

    Args:
        stored (`str`): `factors`, `dense`, or `none`: the update is zero, or had no room.
        shape (`tuple[int, ...]`): of the weight.
        dtype (`torch.dtype`): of the weight in the fine-tuned checkpoint.
        rank (`int`): triplets kept; 0 unless stored as factors.
        numerical_rank (`int`): triplets there are above the rounding of the stored checkpoints;
            0 unless stored as factors.
        energy (`float`): share of the squared norm of the update that is kept, 0 to 1.
        norm (`float`): Frobenius norm of the update.
        bytes (`int`): of its tensors.
        base_sha256 (`str`): digest of the same weight in the base model.
    """

    stored: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rank: int
    numerical_rank: int
    energy: float
    norm: float
    bytes: int
    base_sha256: str

    def to_dict(self) -> dict[str, Any]:
        """The entry in the configuration file."""
        return {**vars(self), "shape": list(self.shape), "dtype": DTYPE_NAMES[self.dtype]}


@dataclass(frozen=True)
class Origin:
    """A checkpoint that factors were made from.

    Args:
        ref (`str`): repository id, or folder.
        revision (`str`, *optional*): commit sha; None for a folder.
        license (`str`, *optional*): as its card says.
    """

    ref: str
    revision: str | None = None
    license: str | None = None

    @staticmethod
    def of(pinned: PinnedCheckpoint) -> Origin:
        """The origin that a pinned checkpoint is."""
        return Origin(pinned.ref, pinned.revision, reference.card_license(pinned.card))


@dataclass(frozen=True)
class FactorsConfig:
    """The description beside the tensors.

    Args:
        base_model ([`Origin`]): W0.
        source ([`Origin`]): the fine-tuned checkpoint.
        rank_rule (`Mapping[str, Any]`): the one rule that applied, by name.
        factor_dtype (`torch.dtype`): of every stored update.
        compress_conv (`bool`): convolutions could be stored as factors.
        checkpoint_bytes (`int`): size of the tensors of the fine-tuned checkpoint.
        base_bytes (`int`): size of the same weights in the base model.
        update_error (`float`): ‖Δ − stored‖ / ‖Δ‖ over all weights.
        weights (`Mapping[str, StoredWeight]`): by canonical name.
        task_head (`tuple[str, ...]`): tensors of a task head, kept as they are.
        model_config (`Mapping[str, Any]`): config.json of the fine-tuned checkpoint.
        format (`str`): of the files this one describes.
        left_out (`tuple[str, ...]`): changed tensors that this format has no place for.
    """

    base_model: Origin
    source: Origin
    rank_rule: Mapping[str, Any]
    factor_dtype: torch.dtype
    compress_conv: bool
    checkpoint_bytes: int
    base_bytes: int
    factors_bytes: int
    update_error: float
    weights: Mapping[str, StoredWeight]
    task_head: tuple[str, ...]
    model_config: Mapping[str, Any]
    format: str = FORMAT
    left_out: tuple[str, ...] = ()

    def base_fingerprint(self) -> str:
        """sha256 that stands for all weights of the base the factors belong to."""
        return fingerprint({name: w.base_sha256 for name, w in self.weights.items()})

    def to_json(self) -> str:
        """Content of `tsv_config.json`."""
        base = {**vars(self.base_model), "fingerprint": self.base_fingerprint()}
        base.pop("license")
        content = {
            "format": self.format,
            "format_version": FORMAT_VERSION,
            "hf_tsv_version": __version__,
            "base_model": base,
            "source": vars(self.source),
            "rank_rule": dict(self.rank_rule),
            "factor_dtype": DTYPE_NAMES[self.factor_dtype],
            "compress_conv": self.compress_conv,
            "checkpoint_bytes": self.checkpoint_bytes,
            "base_bytes": self.base_bytes,
            "factors_bytes": self.factors_bytes,
            "update_error": self.update_error,
            "task_head": list(self.task_head),
            "left_out": list(self.left_out),
            "model_config": dict(self.model_config),
            "weights": {name: weight.to_dict() for name, weight in self.weights.items()},
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    @staticmethod
    def from_dict(content: Mapping[str, Any], owner: str) -> FactorsConfig:
        """Parse and check the content of `tsv_config.json`.

        Args:
            content (`Mapping[str, Any]`): the JSON object.
            owner (`str`): whose it is, for errors.

        Raises:
            [`CheckpointError`]: another format, a newer version, or a malformed entry.
        """
        _check_format(content, owner)
        entry = _Entry(content, owner)
        base = entry.object("base_model")
        weights = {
            name: _stored_weight(entry.object("weights").object(name))
            for name in entry.object("weights").content
        }
        config = FactorsConfig(
            base_model=_origin(base),
            source=_origin(entry.object("source"), licensed=True),
            rank_rule=entry.object("rank_rule").content,
            factor_dtype=_dtype(entry, "factor_dtype"),
            compress_conv=entry.truth("compress_conv"),
            checkpoint_bytes=entry.whole("checkpoint_bytes"),
            base_bytes=entry.whole("base_bytes"),
            factors_bytes=entry.whole("factors_bytes"),
            update_error=entry.number("update_error"),
            weights=weights,
            task_head=entry.texts("task_head"),
            model_config=entry.object("model_config", any_names=True).content,
            format=FORMAT,
            left_out=entry.texts("left_out"),
        )
        if config.factor_dtype == torch.float64:
            raise entry.malformed("factor_dtype")
        if not all(layout.TASK_HEAD.match(name) for name in config.task_head):
            raise entry.malformed("task_head")
        if config.checkpoint_bytes == 0:
            raise entry.malformed("checkpoint_bytes")
        if base.text("fingerprint") != config.base_fingerprint():
            raise entry.malformed("base_model.fingerprint")
        return config


def tensor_specs(
    weights: Mapping[str, StoredWeight], dtype: torch.dtype, head: Mapping[str, TensorInfo]
) -> dict[str, TensorSpec]:
    """Every tensor of a factor file, by stored name.

    Args:
        weights (`Mapping[str, StoredWeight]`): by canonical name.
        dtype (`torch.dtype`): of the updates.
        head (`Mapping[str, TensorInfo]`): tensors of a task head, kept in their own dtype.
    """
    specs: dict[str, TensorSpec] = {}
    for name, weight in weights.items():
        if weight.stored == "dense":
            specs[f"{name}.delta"] = TensorSpec(dtype, weight.shape)
        elif weight.stored == "factors":
            rows, columns = matrix_shape(weight.shape)
            shapes = ((rows, weight.rank), (weight.rank,), (weight.rank, columns))
            for part, shape in zip(PARTS, shapes, strict=True):
                specs[f"{name}.{part}"] = TensorSpec(dtype, shape)
    specs |= {f"{name}.value": TensorSpec(info.dtype, info.shape) for name, info in head.items()}
    return specs


def _check_format(content: Mapping[str, Any], owner: str) -> None:
    if content.get("format") == ADAPTER_FORMAT:
        raise CheckpointError(
            f"{owner} is a PEFT adapter.",
            "Load it with peft, or compress the checkpoint without --format peft.",
        )
    version = content.get("format_version")
    if content.get("format") != FORMAT or type(version) is not int or version < 1:
        raise CheckpointError(f"{owner}: {FACTORS_CONFIG} does not describe task factors.")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{owner} has format version {version} and this hf-tsv reads up to {FORMAT_VERSION}.",
            "Update hf-tsv.",
        )


def _stored_weight(entry: _Entry) -> StoredWeight:
    shape = entry.content.get("shape")
    if not isinstance(shape, list) or not all(type(n) is int and 0 < n < 2**31 for n in shape):
        raise entry.malformed("shape")
    weight = StoredWeight(
        stored=entry.text("stored"),
        shape=tuple(shape),
        dtype=_dtype(entry, "dtype"),
        rank=entry.whole("rank"),
        numerical_rank=entry.whole("numerical_rank"),
        energy=entry.number("energy", 1.0),
        norm=entry.number("norm"),
        bytes=entry.whole("bytes"),
        base_sha256=entry.text("base_sha256"),
    )
    if weight.stored not in STORED:
        raise entry.malformed("stored")
    low_rank = weight.stored == "factors"
    if low_rank and (len(shape) < 2 or not 0 < weight.rank <= min(matrix_shape(weight.shape))):
        raise entry.malformed("rank")
    if weight.rank and not low_rank:
        raise entry.malformed("rank")
    return weight


def _origin(entry: _Entry, *, licensed: bool = False) -> Origin:
    revision = entry.text("revision", optional=True)
    if revision is not None and not REVISION.fullmatch(revision):
        raise entry.malformed("revision")
    license = entry.text("license", optional=True) if licensed else None
    return Origin(entry.text("ref"), revision, license)


def _dtype(entry: _Entry, key: str) -> torch.dtype:
    dtype = DTYPES.get(entry.text(key))
    if dtype is None or not dtype.is_floating_point:
        raise entry.malformed(key)
    return dtype


@dataclass(frozen=True)
class _Entry:
    """An object of the configuration file, checked as it is read."""

    content: Mapping[str, Any]
    owner: str
    path: str = ""

    def malformed(self, key: str) -> CheckpointError:
        return CheckpointError(
            f"{self.owner}: {self.path}{key} in {FACTORS_CONFIG} is missing or malformed.",
            "Download or save the factors again.",
        )

    def object(self, key: str, *, any_names: bool = False) -> _Entry:
        value = self.content.get(key)
        if not isinstance(value, dict) or not (any_names or all(map(str.isprintable, value))):
            raise self.malformed(key)
        return _Entry(value, self.owner, f"{self.path}{key}.")

    def text(self, key: str, *, optional: bool = False) -> Any:
        value = self.content.get(key)
        if not isinstance(value, str) and not (optional and value is None):
            raise self.malformed(key)
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.content.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.malformed(key)
        return tuple(value)

    def truth(self, key: str) -> bool:
        value = self.content.get(key)
        if type(value) is not bool:
            raise self.malformed(key)
        return value

    def whole(self, key: str) -> int:
        value = self.content.get(key)
        if type(value) is not int or not 0 <= value < 2**63:
            raise self.malformed(key)
        return value

    def number(self, key: str, most: float = sys.float_info.max) -> float:
        value: Any = self.content.get(key)
        if type(value) not in (int, float) or not 0 <= value <= most:
            raise self.malformed(key)
        return float(value)
