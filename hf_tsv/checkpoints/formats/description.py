"""`tsv_config.json`: the description of task factors, checked when it is read."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_tsv.checkpoints import layout, reference
from hf_tsv.checkpoints.names import FACTORS_CONFIG
from hf_tsv.checkpoints.reference import PinnedCheckpoint
from hf_tsv.checkpoints.storage import tensors
from hf_tsv.checkpoints.storage.dtypes import DTYPES, DType
from hf_tsv.checkpoints.storage.tensors import TensorInfo, TensorSpec
from hf_tsv.linalg.shapes import matrix_shape
from hf_tsv.system.errors import CheckpointError
from hf_tsv.system.version import __version__

FORMAT = "hf-tsv task factors"
ADAPTER_FORMAT = "hf-tsv peft adapter"
FORMAT_VERSION = 1
STORED = ("factors", "dense", "none")
FACTOR_TYPES = ("F32", "F16", "BF16")
PARTS = ("U", "S", "Vh")
REVISION = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class StoredWeight:
    """The stored part of the update of one weight.

    Both ranks are 0 unless it is stored as factors.
    """

    stored: str  # `factors`, `dense`, or `none`: the update is zero, or had no room
    shape: tuple[int, ...]
    dtype: DType  # of the weight in the fine-tuned checkpoint
    rank: int  # triplets kept
    numerical_rank: int  # triplets above the rounding of the stored checkpoints
    energy: float  # share of the squared norm of the update that is kept, 0 to 1
    norm: float  # Frobenius norm of the update
    bytes: int  # size of its tensors
    base_sha256: str  # digest of the same weight in the base model

    def to_dict(self) -> dict[str, Any]:
        """The entry in the configuration file."""
        return {**vars(self), "shape": list(self.shape), "dtype": self.dtype.name}


@dataclass(frozen=True)
class Origin:
    """A checkpoint that factors were made from."""

    ref: str  # repository id, or the name of a folder without its path
    revision: str | None = None  # commit; None for a folder
    license: str | None = None  # as its card states

    @staticmethod
    def of(pinned: PinnedCheckpoint) -> Origin:
        """A pinned checkpoint as an origin."""
        return Origin(pinned.name, pinned.revision, reference.card_license(pinned.card))


@dataclass(frozen=True, kw_only=True)
class FactorsConfig:
    """The description beside the tensors, in the order of the file."""

    base_model: Origin
    source: Origin  # the fine-tuned checkpoint
    rank_rule: Mapping[str, Any]  # the one rule that applied, by name
    factor_dtype: DType  # of every stored update
    compress_conv: bool  # convolutions could be stored as factors
    checkpoint_bytes: int  # size of the tensors of the fine-tuned checkpoint
    base_bytes: int  # size of the same weights in the base model
    factors_bytes: int  # size of the tensors that are stored
    update_error: float  # ‖Δ − stored‖ / ‖Δ‖ over all weights
    task_head: tuple[str, ...]  # its tensors, kept as they are
    left_out: tuple[str, ...] = ()  # changed tensors that this format has no place for
    model_config: Mapping[str, Any]  # config.json of the fine-tuned checkpoint
    weights: Mapping[str, StoredWeight]  # stored parts by canonical name
    format: str = FORMAT  # of the files this one describes

    def base_fingerprint(self) -> str:
        """sha256 that stands for all weights of the base the factors belong to."""
        return tensors.fingerprint({name: w.base_sha256 for name, w in self.weights.items()})

    def to_json(self) -> str:
        """Content of `tsv_config.json`."""
        base = {**vars(self.base_model), "fingerprint": self.base_fingerprint()}
        base.pop("license")
        content = {
            "format": self.format,
            "format_version": FORMAT_VERSION,
            "hf_tsv_version": __version__,
            **vars(self),  # in the order of the fields
            "base_model": base,
            "source": vars(self.source),
            "factor_dtype": self.factor_dtype.name,
            "weights": {name: weight.to_dict() for name, weight in self.weights.items()},
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def model_json(self) -> str:
        """Content of `config.json`, by which the Hub counts downloads of factors."""
        return json.dumps(self.model_config, indent=2, ensure_ascii=False) + "\n"

    @staticmethod
    def from_dict(content: Mapping[str, Any], owner: str) -> FactorsConfig:
        """Parse and check the content of `tsv_config.json`, whose owner errors name.

        Raises:
            [`CheckpointError`]: another format, a newer version, or a malformed entry.
        """
        _check_format(content, owner)
        entry = Entry(content, owner)
        base, weights = entry.object("base_model"), entry.object("weights")
        config = FactorsConfig(
            base_model=origin_of(base),
            source=origin_of(entry.object("source"), licensed=True),
            rank_rule=entry.object("rank_rule").content,
            factor_dtype=DTYPES[entry.get("factor_dtype", lambda value: value in FACTOR_TYPES)],
            compress_conv=entry.get("compress_conv", lambda value: type(value) is bool),
            checkpoint_bytes=entry.get("checkpoint_bytes", lambda v: _is_whole(v) and v > 0),
            base_bytes=entry.get("base_bytes", _is_whole),
            factors_bytes=entry.get("factors_bytes", _is_whole),
            update_error=float(entry.get("update_error", _is_number)),
            task_head=tuple(entry.get("task_head", _are_of_a_head)),
            left_out=tuple(entry.get("left_out", _are_texts)),
            model_config=entry.get("model_config", lambda value: isinstance(value, dict)),
            weights={name: _stored_weight(weights.object(name)) for name in weights.content},
        )
        base.get("fingerprint", lambda value: value == config.base_fingerprint())
        return config


def tensor_specs(
    weights: Mapping[str, StoredWeight], dtype: DType, head: Mapping[str, TensorInfo]
) -> dict[str, TensorSpec]:
    """Every tensor of a factor file, by stored name; those of a task head keep their dtype."""
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
        hint = "Load it with peft, or compress the checkpoint to task factors."
        raise CheckpointError(f"{owner} is a PEFT adapter.", hint)
    version = content.get("format_version")
    if content.get("format") != FORMAT or type(version) is not int or version < 1:
        raise CheckpointError(f"{owner}: {FACTORS_CONFIG} does not describe task factors.")
    if version > FORMAT_VERSION:
        said = f"has format version {version} and this hf-tsv reads up to {FORMAT_VERSION}."
        raise CheckpointError(f"{owner} {said}", "Update hf-tsv.")


def _stored_weight(entry: Entry) -> StoredWeight:
    weight = StoredWeight(
        stored=entry.get("stored", lambda value: value in STORED),
        shape=tuple(entry.get("shape", _is_shape)),
        dtype=DTYPES[entry.get("dtype", lambda value: value in (*FACTOR_TYPES, "F64"))],
        rank=entry.get("rank", _is_whole),
        numerical_rank=entry.get("numerical_rank", _is_whole),
        energy=float(entry.get("energy", lambda value: _is_number(value) and value <= 1)),
        norm=float(entry.get("norm", _is_number)),
        bytes=entry.get("bytes", _is_whole),
        base_sha256=entry.get("base_sha256", _is_text),
    )
    low_rank = weight.stored == "factors"
    most = min(matrix_shape(weight.shape)) if low_rank and len(weight.shape) > 1 else 0
    entry.get("rank", lambda rank: int(low_rank) <= rank <= most)
    return weight


def origin_of(entry: Entry, *, licensed: bool = False) -> Origin:
    """Origin of an entry: its reference and commit."""
    ref = entry.get("ref", _is_text)
    revision = entry.get("revision", lambda v: v is None or (_is_text(v) and REVISION.fullmatch(v)))
    license = entry.get("license", lambda v: v is None or _is_text(v)) if licensed else None
    return Origin(ref, revision, license)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_of_a_head(value: Any) -> bool:
    return _are_texts(value) and all(map(layout.TASK_HEAD.match, value))


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= sys.float_info.max


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 < n < 2**31 for n in value)


@dataclass(frozen=True)
class Entry:
    """An object of a configuration file, checked as it is read; `again` is the hint of errors."""

    content: Mapping[str, Any]
    owner: str
    path: str = ""
    file: str = FACTORS_CONFIG
    again: str = "Download or save the factors again."

    def get(self, key: str, fits: Callable[[Any], object]) -> Any:
        """Value of a key that fits."""
        value = self.content.get(key)
        if not fits(value):
            said = f"{self.path}{key} in {self.file} is missing or malformed."
            raise CheckpointError(f"{self.owner}: {said}", self.again)
        return value

    def object(self, key: str) -> Entry:
        """Object of a key, whose own keys are printable."""
        value = self.get(key, lambda v: isinstance(v, dict) and all(map(str.isprintable, v)))
        return replace(self, content=value, path=f"{self.path}{key}.")
