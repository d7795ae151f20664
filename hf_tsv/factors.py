"""What a compressed task is on disk: low-rank factors and dense updates, beside their description.

The format is specified in docs/task-factors.md.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_tsv import __version__, cards
from hf_tsv.checkpoints import layout
from hf_tsv.checkpoints.files import Files, HubFiles, LocalFiles, read_json
from hf_tsv.checkpoints.headers import read_headers
from hf_tsv.checkpoints.reader import digest, fingerprint, read_tensor
from hf_tsv.checkpoints.reference import PinnedCheckpoint, at_revision, parse, pin
from hf_tsv.checkpoints.tensors import DTYPE_NAMES, DTYPES, TensorInfo
from hf_tsv.checkpoints.writer import TensorSpec
from hf_tsv.delivery import Target, upload
from hf_tsv.errors import CheckpointError
from hf_tsv.folders import whole_folder
from hf_tsv.hub import Wanted, download
from hf_tsv.plots import COMPRESSION
from hf_tsv.progress import visible_by_default
from hf_tsv.tsv import TaskSingularVectors, Update

if TYPE_CHECKING:
    from hf_tsv.compression import CompressReport

FACTORS_CONFIG = "tsv_config.json"
FACTORS_FILE = "task_factors.safetensors"
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
        return Origin(pinned.ref, pinned.revision, cards.card_license(pinned.card))


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


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a weight seen as a matrix: a convolution has one row an output channel.

    Example:
        >>> matrix_shape((768, 3, 32, 32))
        (768, 3072)
    """
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


@dataclass(frozen=True)
class TaskFactors:
    """A compressed task: a handle on its files, which are read one weight at a time.

    Args:
        pinned ([`PinnedCheckpoint`]): which commit or folder.
        config ([`FactorsConfig`]): base, source, and what is stored of each weight.
        stored (`Mapping[str, TensorInfo]`): where the tensors lie.
        weight_files (`tuple[str, ...]`): the files they lie in, index included.
        report ([`CompressReport`], *optional*): of the compression that made them just now.

    Example:
        >>> factors = TaskFactors.from_pretrained("me/clip-sun397-tsv")  # doctest: +SKIP
        >>> factors.update("visual_projection.weight").rank  # doctest: +SKIP
        51
    """

    pinned: PinnedCheckpoint
    config: FactorsConfig
    stored: Mapping[str, TensorInfo]
    weight_files: tuple[str, ...]
    report: CompressReport | None = None

    def __str__(self) -> str:
        return str(self.pinned)

    @classmethod
    def from_pretrained(
        cls,
        reference: str | Path,
        *,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        progress: bool | None = None,
    ) -> TaskFactors:
        """Open factors from the Hub (downloaded into the client's cache) or from a folder.

        Args:
            reference (`str` or `Path`): `org/name`, `org/name@revision`, `hf://…` or a folder.
            token (`str`, *optional*): default: the one the Hub client is logged in with.
            cache_dir (`str` or `Path`, *optional*): default: the Hub client's cache.
            progress (`bool`, *optional*): show a bar; default: on a terminal.

        Raises:
            [`HfTsvError`]: unknown repository, no factors, or damaged ones.
        """
        cache = None if cache_dir is None else str(cache_dir)
        pinned = pin(parse(str(reference)), token=token, cache_dir=cache)
        if not is_factors(pinned):
            raise CheckpointError(
                f"{pinned} has no {FACTORS_CONFIG}, so it holds no task factors.",
                "Make some with `hf-tsv compress`.",
            )
        factors = open_factors(pinned)
        if not isinstance(pinned.files, HubFiles):
            return factors
        names = tuple(map(pinned.files.path, factors.needed_files))
        wanted = Wanted(pinned.files.repo, pinned.asked_revision, names)
        show = visible_by_default() if progress is None else progress
        (folder,) = download([wanted], visible=show)
        return factors.reading_from(LocalFiles(folder / pinned.files.subfolder))

    def save_pretrained(self, folder: str | Path, *, force: bool = False) -> None:
        """Write the files and their card into a folder that appears whole.

        Args:
            folder (`str` or `Path`): must not exist, or be empty.
            force (`bool`): replace a folder that hf-tsv wrote.
        """
        target = Target(Path(folder), force=force).checked(None, dry_run=False)
        target.refuse_inputs([self.pinned])
        assert target.output is not None  # checked above
        self._copy(target.output, None)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        token: str | None = None,
    ) -> str:
        """Upload the files and their card as one commit.

        Args:
            repo_id (`str`): `org/name`; created if needed.
            private (`bool`, *optional*): make a new repository private.
            revision (`str`, *optional*): branch to push to.
            create_pr (`bool`): push as a pull request.
            commit_message (`str`, *optional*): of the upload.
            token (`str`, *optional*): default: the one the Hub client is logged in with.

        Returns:
            `str`: address of the commit or pull request.
        """
        target = Target(None, repo_id, False, private, revision, create_pr, commit_message)
        target = target.checked(token, dry_run=False)
        for origin in (self.config.source, self.config.base_model):
            if origin.revision is not None:
                made_from = replace(self.pinned, ref=origin.ref, revision=origin.revision)
                target.refuse_inputs([replace(made_from, asked_revision=None)])
        with tempfile.TemporaryDirectory(prefix="hf-tsv-") as parent:
            folder = Path(parent) / "factors"
            self._copy(folder, target.push_to)
            return upload(folder, target, token)

    def _copy(self, folder: Path, repo_id: str | None) -> None:
        if not isinstance(self.pinned.files, LocalFiles):
            raise CheckpointError(f"{self} is not downloaded.", "Use TaskFactors.from_pretrained.")
        with whole_folder(folder) as staging:
            for name in self.needed_files:
                shutil.copyfile(self.pinned.files.root / name, staging / name)
            files, kept = self.pinned.files, ""
            if files.size(COMPRESSION) is not None and not files.is_elsewhere(COMPRESSION):
                shutil.copyfile(files.root / COMPRESSION, staging / COMPRESSION)
                kept = cards.kept_section(self.config, COMPRESSION)
            card = cards.factors_card(self.config, repo_id, kept)
            (staging / "README.md").write_text(card, encoding="utf-8")

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

    def reading_from(self, files: Files) -> TaskFactors:
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


def open_factors(pinned: PinnedCheckpoint) -> TaskFactors:
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
    return TaskFactors(pinned, config, stored, files)


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
