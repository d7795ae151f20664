"""The verb `compress`: one fine-tuned checkpoint becomes low-rank task factors (TSV-Compress)."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hf_tsv import adapter, cards, linalg, stream, tsv
from hf_tsv.checkpoints import layout
from hf_tsv.checkpoints.reader import Checkpoint, byte_view, digest
from hf_tsv.checkpoints.reference import parse, pin
from hf_tsv.checkpoints.writer import (
    ShardWriter,
    TensorSpec,
    check_free_space,
    plan_shards,
    whole_folder,
)
from hf_tsv.delivery import Target, final_folder, push
from hf_tsv.errors import CheckpointError, RecipeError
from hf_tsv.factors import (
    ADAPTER_FORMAT,
    FACTORS_CONFIG,
    FACTORS_FILE,
    FORMAT,
    FactorsConfig,
    Origin,
    StoredWeight,
    TaskFactors,
    matrix_shape,
    open_factors,
    tensor_specs,
)
from hf_tsv.memory import give_back_large_blocks
from hf_tsv.plan import check_fit, config_warnings
from hf_tsv.progress import bar, human_bytes, logger, visible_by_default
from hf_tsv.ranks import DENSE, Choice, RankRule, allocate, budget_bytes, rank_of_energy
from hf_tsv.recipe import Dtype, Settings, check_shard_size
from hf_tsv.sources import Sources, equals_base, open_sources, pinned_entry
from hf_tsv.tsv import TaskSingularVectors

Format = Literal["factors", "peft"]
ADAPTER_FILE = "adapter_model.safetensors"
TASK_COUNTS = (8, 14, 20)
"""Numbers of tasks that the paper reports."""


@dataclass(frozen=True)
class CompressReport:
    """What a compression did, or with `dry_run` would do.

    Args:
        output (`str`, *optional*): the folder written, if it is kept.
        base_model (`dict[str, str | None]`): `ref` and `revision` of W0.
        source (`dict[str, str | None]`): the same of the fine-tuned checkpoint.
        format (`str`): `factors` or `peft`.
        rank_rule (`dict[str, Any]`): the rule that applied, by name.
        factor_dtype (`str`): of the stored updates.
        factors_bytes (`int`): of all stored tensors, headers aside; with `dry_run` at most that,
            None where it depends on the weights.
        checkpoint_bytes (`int`): of the tensors of the fine-tuned checkpoint.
        ratio (`float`): the first over the second.
        base_bytes (`int`): of the same weights in the base model.
        ratio_for_tasks (`dict[str, float]`): base and factors of T such tasks over T checkpoints.
        update_error (`float`): ‖Δ − stored‖ / ‖Δ‖ over all weights; None with `dry_run`.
        weights (`dict[str, dict]`): per weight how it is stored, rank, energy kept, bytes.
        left_out (`list[str]`): changed tensors that the format has no place for.
        output_bytes (`int`): size of the weight files, headers included.
        seconds (`float`): wall time.
        warnings (`list[str]`): what the user should know.
        download_bytes (`int`): fetched from the Hub; what the cache held does not count.
        peak_memory_bytes (`int`): estimate, on top of the interpreter and its libraries.
        device (`str`, *optional*): type of device computed on.
        url (`str`, *optional*): commit or pull request on the Hub.
        dry_run (`bool`): nothing was written.
    """

    output: str | None
    base_model: dict[str, str | None]
    source: dict[str, str | None]
    format: str
    rank_rule: dict[str, Any]
    factor_dtype: str
    factors_bytes: int | None
    checkpoint_bytes: int
    ratio: float | None
    base_bytes: int
    ratio_for_tasks: dict[str, float]
    update_error: float | None
    weights: dict[str, dict[str, Any]]
    left_out: list[str]
    output_bytes: int | None
    seconds: float
    warnings: list[str]
    download_bytes: int
    peak_memory_bytes: int
    device: str | None = None
    url: str | None = None
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return asdict(self)


@dataclass(frozen=True)
class Options:
    """How to compress.

    Args:
        rule ([`RankRule`]): which triplets are kept.
        factor_dtype (`str`): of the stored updates.
        compress_conv (`bool`): decompose the patch convolution too, one row an output channel.
        format (`str`): `factors`, or `peft` for a LoRA adapter.
        dense (`bool`): a LoRA adapter also gets what is no matrix of a linear layer.
        model_class (`str`, *optional*): the class a LoRA adapter is for; default: that of the
            fine-tuned checkpoint.
        max_shard_size (`int` or `str`): bytes of a file, or `"5GB"`.
    """

    rule: RankRule = field(default_factory=RankRule)
    factor_dtype: Dtype = "float32"
    compress_conv: bool = False
    format: Format = "factors"
    dense: bool = True
    model_class: str | None = None
    max_shard_size: int | str = Settings.max_shard_size

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
        """Of the stored updates."""
        dtype: torch.dtype = getattr(torch, self.factor_dtype)
        return dtype


@dataclass(frozen=True)
class Candidate:
    """What may be kept of one weight, known from its header.

    Args:
        name (`str`): canonical name.
        shape (`tuple[int, ...]`): of the weight.
        dtype (`torch.dtype`): in the fine-tuned checkpoint.
        limit (`int`): most triplets that may be kept; 0: only the update itself.
        triplet_bytes (`int`): of one triplet.
        dense_bytes (`int`, *optional*): of the update itself; None if that is no option.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    limit: int
    triplet_bytes: int
    dense_bytes: int | None


@dataclass(frozen=True)
class Measured:
    """One weight after its decomposition.

    Args:
        candidate ([`Candidate`]): from its header.
        base_sha256 (`str`): digest of W0.
        norm (`float`): ‖Δ‖, Frobenius.
        singular_values (`Tensor`): those that may be kept, float64, descending.
        numerical_rank (`int`): how many there are above storage rounding.
        place (`int`): where the spool holds its vectors.
    """

    candidate: Candidate
    base_sha256: str
    norm: float
    singular_values: Tensor
    numerical_rank: int = 0
    place: int = 0

    def energy(self, rank: int) -> float:
        """Share of the squared norm that is kept."""
        if rank == DENSE or self.norm == 0:
            return 1.0
        return min(1.0, float(self.singular_values[:rank].square().sum()) / self.norm**2)


@dataclass(frozen=True)
class Job:
    """A compression whose references are resolved and whose headers fit."""

    sources: Sources
    options: Options
    candidates: tuple[Candidate, ...]
    warnings: tuple[str, ...]

    @property
    def source(self) -> Checkpoint:
        """The fine-tuned checkpoint."""
        (item,) = self.sources.inputs
        if isinstance(item, TaskFactors):
            raise CheckpointError(
                f"{item} holds task factors already.",
                "Compress the fine-tuned checkpoint; `hf-tsv reconstruct` makes one of factors.",
            )
        return item

    @property
    def checkpoint_bytes(self) -> int:
        """Size of all tensors of the fine-tuned checkpoint."""
        held = (*self.source.tensors.values(), *self.source.head.values())
        return sum(info.nbytes for info in held)

    @property
    def base_bytes(self) -> int:
        """Size of the same weights in the base model."""
        base = self.sources.base.tensors
        return sum(info.nbytes for name, info in base.items() if name in self.source.tensors)

    @property
    def head_bytes(self) -> int:
        """Size of the task head, which is kept as it is."""
        return sum(info.nbytes for info in self.source.head.values())

    def delta(self, name: str) -> Tensor:
        """Δ of one weight."""
        return tsv.difference(self.source.read(name), self.sources.base.read(name))


def compress(
    checkpoint: str | PathLike[str],
    *,
    base_model: str | PathLike[str] | None = None,
    output: str | Path | None = None,
    push_to: str | None = None,
    rank_fraction: float | None = None,
    rank: int | None = None,
    energy: float | None = None,
    budget: str | int | None = None,
    factor_dtype: str = "float32",
    compress_conv: bool = False,
    max_shard_size: int | str = Settings.max_shard_size,
    device: str | None = None,
    force: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    progress: bool | None = None,
) -> TaskFactors:
    """Compress a fine-tuned CLIP checkpoint into task factors (TSV-Compress, section 4.3).

    Args:
        checkpoint (`str`): `org/name`, `org/name@revision`, `hf://…` or a folder.
        base_model (`str`, *optional*): W0; default: the one the checkpoint's card names.
        output (`str` or `Path`, *optional*): folder to write; without it the factors live in a
            temporary folder until they are no longer used.
        push_to (`str`, *optional*): repository to upload to.
        rank_fraction (`float`, *optional*): share of k = min(d_out, d_in) kept; default 0.1.
        rank (`int`, *optional*): triplets kept of every weight instead.
        energy (`float`, *optional*): share of the squared singular values kept instead.
        budget (`str` or `int`, *optional*): bytes spent instead: `"10%"`, `"35MB"` or a number.
        factor_dtype (`str`): `float32`, `bfloat16` or `float16`.
        compress_conv (`bool`): decompose the patch convolution as well.
        max_shard_size (`int` or `str`): bytes of an output file, or `"5GB"`.
        device (`str`, *optional*): default: the one accelerate chooses.
        force (`bool`): replace an output folder that hf-tsv wrote.
        private (`bool`, *optional*): make a new repository private.
        revision (`str`, *optional*): branch to push to.
        create_pr (`bool`): push as a pull request.
        commit_message (`str`, *optional*): of the upload.
        token (`str`, *optional*): default: the one the Hub client is logged in with.
        cache_dir (`str` or `Path`, *optional*): default: the Hub client's cache.
        progress (`bool`, *optional*): show bars; default: on a terminal.

    Returns:
        [`TaskFactors`]: with a [`CompressReport`] as `report`.

    Raises:
        [`HfTsvError`]: with the reason and what to do; nothing is written or pushed then.

    Example:
        >>> import hf_tsv
        >>> factors = hf_tsv.compress("org/clip-a", rank_fraction=0.1)  # doctest: +SKIP
        >>> factors.report.ratio  # doctest: +SKIP
        0.13
    """
    options = Options(
        RankRule(rank_fraction, rank, energy, budget),
        factor_dtype,  # type: ignore[arg-type]
        compress_conv,
        max_shard_size=max_shard_size,
    )
    owned = None
    if output is None:
        owned = Path(tempfile.mkdtemp(prefix="hf-tsv-"))
        output = owned / "factors"
    target = Target(Path(output), push_to, force, private, revision, create_pr, commit_message)
    try:
        report = run(
            fspath(checkpoint),
            None if base_model is None else fspath(base_model),
            options,
            target,
            device=device,
            token=token,
            cache_dir=None if cache_dir is None else str(cache_dir),
            progress=progress,
        )
    except BaseException:
        if owned is not None and not Path(output).exists():  # else the upload failed: kept
            shutil.rmtree(owned, ignore_errors=True)
        raise
    factors = open_factors(pin(parse(str(Path(output).expanduser().absolute()))))
    if owned is not None:
        report = replace(report, output=None)
        weakref.finalize(factors.pinned.files, shutil.rmtree, owned, ignore_errors=True)
    return replace(factors, report=report)


def export_peft(
    checkpoint: str | PathLike[str],
    *,
    base_model: str | PathLike[str] | None = None,
    output: str | Path | None = None,
    push_to: str | None = None,
    rank_fraction: float | None = None,
    rank: int | None = None,
    energy: float | None = None,
    budget: str | int | None = None,
    factor_dtype: str = "float32",
    dense: bool = True,
    model_class: str | None = None,
    device: str | None = None,
    force: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    progress: bool | None = None,
) -> CompressReport:
    """Compress a fine-tuned CLIP checkpoint into a LoRA adapter that PEFT loads without hf-tsv.

    Args:
        checkpoint (`str`): `org/name`, `org/name@revision`, `hf://…` or a folder.
        base_model (`str`, *optional*): W0; default: the one the checkpoint's card names.
        output (`str` or `Path`, *optional*): folder to write.
        push_to (`str`, *optional*): repository to upload to.
        rank_fraction (`float`, *optional*): share of k = min(d_out, d_in) kept; default 0.1.
        rank (`int`, *optional*): triplets kept of every weight instead.
        energy (`float`, *optional*): share of the squared singular values kept instead.
        budget (`str` or `int`, *optional*): bytes spent instead: `"10%"`, `"35MB"` or a number.
        factor_dtype (`str`): `float32`, `bfloat16` or `float16`.
        dense (`bool`): store what is no matrix of a linear layer too; without it stock PEFT can
            combine the adapter with others.
        model_class (`str`, *optional*): the class it will be loaded into; default: that of the
            checkpoint.
        device (`str`, *optional*): default: the one accelerate chooses.
        force (`bool`): replace an output folder that hf-tsv wrote.
        private (`bool`, *optional*): make a new repository private.
        revision (`str`, *optional*): branch to push to.
        create_pr (`bool`): push as a pull request.
        commit_message (`str`, *optional*): of the upload.
        token (`str`, *optional*): default: the one the Hub client is logged in with.
        cache_dir (`str` or `Path`, *optional*): default: the Hub client's cache.
        progress (`bool`, *optional*): show bars; default: on a terminal.

    Returns:
        [`CompressReport`]: what was done; `left_out` names what an adapter has no place for.

    Raises:
        [`HfTsvError`]: with the reason and what to do; nothing is written or pushed then.

    Example:
        >>> import hf_tsv
        >>> hf_tsv.export_peft("org/clip-a", output="lora", rank=16)  # doctest: +SKIP
    """
    options = Options(
        RankRule(rank_fraction, rank, energy, budget),
        factor_dtype,  # type: ignore[arg-type]
        format="peft",
        dense=dense,
        model_class=model_class,
    )
    place = None if output is None else Path(output)
    target = Target(place, push_to, force, private, revision, create_pr, commit_message)
    return run(
        fspath(checkpoint),
        None if base_model is None else fspath(base_model),
        options,
        target,
        device=device,
        token=token,
        cache_dir=None if cache_dir is None else str(cache_dir),
        progress=progress,
    )


def run(
    checkpoint: str,
    base_model: str | None,
    options: Options,
    target: Target,
    *,
    device: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
) -> CompressReport:
    """Compress in any format; see [`compress`].

    Args:
        checkpoint (`str`): the fine-tune.
        base_model (`str`, *optional*): W0.
        options ([`Options`]): how to compress.
        target ([`Target`]): where the result goes.
        device (`str`, *optional*): default: the one accelerate chooses.
        token (`str`, *optional*): default: the one the Hub client is logged in with.
        cache_dir (`str`, *optional*): default: the Hub client's cache.
        dry_run (`bool`): plan only; touches neither disk nor Hub.
        progress (`bool`, *optional*): show bars; default: on a terminal.
    """
    started = time.monotonic()
    show = visible_by_default() if progress is None else progress
    target = target.checked(token, dry_run=dry_run)
    sources = open_sources([checkpoint], base_model, token=token, cache_dir=cache_dir)
    job = _prepare(sources, options)
    target.refuse_inputs([item.pinned for item in sources.all()])
    download_bytes = sources.download_bytes()
    report = _report(job, target, download_bytes)
    if dry_run:
        return replace(report, seconds=round(time.monotonic() - started, 3), dry_run=True)
    place = stream.pick_device(device)
    check_free_space(target.output or Path(tempfile.gettempdir()), _disk_bytes(job))
    job = replace(job, sources=sources.downloaded(visible=show))
    try:
        with final_folder(target) as final:
            with whole_folder(final) as staging:
                config, output_bytes = _compress_into(staging, job, target, place, show)
            url = push(final, target, token)
    finally:
        job.sources.close()
    report = _measured_report(report, config)
    if config.factors_bytes >= config.checkpoint_bytes:
        report.warnings.append(_too_large(report))
        logger.warning(report.warnings[-1])
    return replace(
        report,
        output_bytes=output_bytes,
        seconds=round(time.monotonic() - started, 3),
        device=place.type,
        url=url,
    )


def _prepare(sources: Sources, options: Options) -> Job:
    job = Job(sources, options, (), ())
    base, source = sources.base, job.source
    check_fit(base, [source])
    names = [
        name
        for name, info in sorted(base.tensors.items())
        if name in source.tensors and info.dtype.is_floating_point and info.nbytes
    ]
    make = _candidate if options.format == "factors" else _adapter_candidate
    candidates = tuple(make(name, source, options) for name in names)
    warnings = [*sources.warnings, *config_warnings(base, [source])]
    if options.format == "peft" and source.head:
        warnings.append(f"An adapter has no place for the task head {', '.join(source.head)}.")
    for warning in warnings:
        logger.warning(warning)
    return Job(sources, options, candidates, tuple(warnings))


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
    """A linear layer has any rank; everything else is stored as its value, or not at all."""
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


@dataclass(frozen=True)
class Written:
    """What went into the weight files.

    Args:
        weights (`Mapping[str, StoredWeight]`): by canonical name.
        rounding (`float`): squared error of rounding to the factor dtype.
        tensor_bytes (`int`): of all tensors, headers aside.
        file_bytes (`int`): of the files.
        left_out (`tuple[str, ...]`): changed tensors that the format has no place for.
    """

    weights: Mapping[str, StoredWeight]
    rounding: float
    tensor_bytes: int
    file_bytes: int
    left_out: tuple[str, ...] = ()


def _compress_into(
    folder: Path, job: Job, target: Target, device: torch.device, show: bool
) -> tuple[FactorsConfig, int]:
    """Write a complete result into `folder`: tensors, description, card."""
    source, base, options = job.source, job.sources.base, job.options
    logger.info("Compressing %d weights of %s on %s.", len(job.candidates), source, device.type)
    with Spool(folder) as spool:
        with bar("Decomposing", len(job.candidates), visible=show) as advance:
            measured = measure(job, spool, device, advance)
        if not any(item.norm for item in measured):
            raise equals_base(str(source), str(base))
        ranks = _ranks(measured, job)
        write = _write_factors if options.format == "factors" else _write_adapter
        written = write(folder, job, spool, measured, ranks)
    total = sum(item.norm**2 for item in measured)
    lost = sum((1 - item.energy) * item.norm**2 for item in written.weights.values())
    config = FactorsConfig(
        base_model=Origin.of(base.pinned),
        source=Origin.of(source.pinned),
        rank_rule=options.rule.to_dict(),
        factor_dtype=options.dtype,
        compress_conv=options.compress_conv,
        checkpoint_bytes=job.checkpoint_bytes,
        base_bytes=job.base_bytes,
        factors_bytes=written.tensor_bytes,
        update_error=math.sqrt((lost + written.rounding) / total),
        weights=written.weights,
        task_head=tuple(source.head) if options.format == "factors" else (),
        model_config={k: v for k, v in source.config.items() if k != "auto_map"},
        format=FORMAT if options.format == "factors" else ADAPTER_FORMAT,
        left_out=written.left_out,
    )
    (folder / FACTORS_CONFIG).write_text(config.to_json(), encoding="utf-8")
    if options.format == "factors":
        card = cards.factors_card(config, target.push_to)
    else:
        card = cards.adapter_card(config, target.push_to, _model_class(job), dense=options.dense)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return config, written.file_bytes


def _write_factors(
    folder: Path, job: Job, spool: Spool, measured: Sequence[Measured], ranks: Sequence[int]
) -> Written:
    head = job.source.head
    weights = {
        item.candidate.name: _stored(item, rank) for item, rank in zip(measured, ranks, strict=True)
    }
    specs = tensor_specs(weights, job.options.dtype, head)
    plan = plan_shards(specs, job.options.max_shard_size, FACTORS_FILE)
    rounding = 0.0
    writer = ShardWriter(folder, plan)
    try:
        for item in measured:
            rounding += _write_update(writer, job, spool, item, weights[item.candidate.name])
        for name in head:
            writer.write(f"{name}.value", job.source.read(name))
        writer.close()
    finally:
        writer.abandon()
    tensor_bytes = sum(item.bytes for item in weights.values()) + job.head_bytes
    return Written(weights, rounding, tensor_bytes, plan.total_bytes)


def _write_adapter(
    folder: Path, job: Job, spool: Spool, measured: Sequence[Measured], ranks: Sequence[int]
) -> Written:
    dtype, base = job.options.dtype, job.sources.base
    by_name = {item.candidate.name: item for item in measured}
    kept = {
        item.candidate.name: rank
        for item, rank in zip(measured, ranks, strict=True)
        if item.candidate.limit
    }
    plan = _plan_adapter(job, measured, kept)
    specs: dict[str, TensorSpec] = {}
    for name, module in plan.pairs.items():
        (d_out, d_in), r = base.tensors[name].shape, max(1, kept[name])
        key_a, key_b = adapter.pair_keys(module)
        specs |= {key_a: TensorSpec(dtype, (r, d_in)), key_b: TensorSpec(dtype, (d_out, r))}
    for name, key in plan.biases.items():
        specs[key] = TensorSpec(dtype, base.tensors[name].shape)
    values = {name: _holder(job, name) for name in plan.values}
    for name, key in plan.values.items():
        info = values[name].tensors[name]
        specs[key] = TensorSpec(info.dtype, info.shape)
    shards = plan_shards(specs, 2**62, ADAPTER_FILE)  # PEFT reads a single file
    rounding = 0.0
    writer = ShardWriter(folder, shards)
    try:
        for name, module in plan.pairs.items():
            vectors = spool.get(by_name[name], kept[name])
            pair = adapter.lora_pair(vectors)
            A, B = (cast(factor, dtype, name) for factor in pair)
            for key, factor in zip(adapter.pair_keys(module), (A, B), strict=True):
                writer.write(key, factor)
            if dtype != torch.float32:
                rounding += _squared(vectors.matrix() - B.double() @ A.double())
        for name, key in plan.biases.items():
            delta = job.delta(name) if name in job.source.tensors else base.read(name).float() * 0
            rounded = cast(delta, dtype, name)
            writer.write(key, rounded)
            rounding += _squared(delta.double() - rounded)
        for name, key in plan.values.items():
            writer.write(key, values[name].read(name))
        writer.close()
    finally:
        writer.abandon()
    (folder / "adapter_config.json").write_text(json.dumps(plan.config, indent=2) + "\n")
    keys = {name: list(adapter.pair_keys(module)) for name, module in plan.pairs.items()}
    keys |= {name: [key] for name, key in (plan.biases | plan.values).items()}
    weights = {}
    for name, item in by_name.items():
        whole = name in keys and name not in kept and item.norm > 0
        weight = _stored(item, DENSE if whole else kept.get(name, 0))
        stored_bytes = sum(specs[key].nbytes for key in keys.get(name, ()))
        weights[name] = replace(weight, bytes=stored_bytes)
    left_out = (*plan.left_out, *job.source.head)
    return Written(
        weights, rounding, sum(spec.nbytes for spec in specs.values()), shards.total_bytes, left_out
    )


def _plan_adapter(
    job: Job, measured: Sequence[Measured], ranks: Mapping[str, int]
) -> adapter.Adapter:
    base = job.sources.base
    return adapter.plan_adapter(
        ranks,
        {item.candidate.name for item in measured if item.norm},
        [name for name, info in base.tensors.items() if info.dtype.is_floating_point],
        _model_class(job),
        dense=job.options.dense,
        base_model=base.pinned.ref,
        revision=base.pinned.revision,
    )


def _model_class(job: Job) -> str:
    """The class an adapter is for."""
    return job.options.model_class or layout.saved_class(job.source.config)


def _holder(job: Job, name: str) -> Checkpoint:
    """The checkpoint that has the fine-tuned value of a weight: the base where it is unchanged."""
    return job.source if name in job.source.tensors else job.sources.base


class Spool:
    """Singular vectors of all weights on disk, until it is known how many of each are kept.

    Args:
        folder (`Path`): where the file lies; it has no name there.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed by __exit__)
        self._end = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, vectors: TaskSingularVectors) -> int:
        """Keep Uᵀ and Vh in float32; triplet after triplet, so that a prefix is a truncation."""
        start = self._end
        rows = torch.cat([vectors.U.mT, vectors.Vh], dim=1)
        data = byte_view(rows.to("cpu", torch.float32).contiguous())
        self._file.seek(start)
        self._file.write(data)
        self._end += len(data)
        return start

    def get(self, item: Measured, rank: int) -> TaskSingularVectors:
        """The leading triplets of one weight.

        Args:
            item ([`Measured`]): the weight.
            rank (`int`): how many.
        """
        d_out, d_in = matrix_shape(item.candidate.shape)
        rows = torch.empty(rank, d_out + d_in)
        self._file.flush()
        done = os.preadv(self._file.fileno(), [byte_view(rows)], item.place)
        if done != rows.nbytes:
            raise OSError(5, "the temporary file was cut short")
        S = item.singular_values[:rank].float()
        return TaskSingularVectors(rows[:, :d_out].mT, S, rows[:, d_out:])


def measure(job: Job, spool: Spool, device: torch.device, advance: Any) -> list[Measured]:
    """Decompose every weight once; the next one is read meanwhile.

    Args:
        job ([`Job`]): what to compress.
        spool ([`Spool`]): takes the singular vectors.
        device (`torch.device`): where to compute.
        advance (`Callable[[int], None]`): told after each weight.
    """
    give_back_large_blocks()
    measured = []
    with ThreadPoolExecutor(1, "hf-tsv-read") as reading:
        try:
            load = lambda item: _load(item, job)  # noqa: E731
            for candidate, delta, base_sha256, floor in stream.read_ahead(
                reading, load, job.candidates
            ):
                norm = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
                item = Measured(candidate, base_sha256, norm, torch.empty(0))
                if norm and candidate.limit:
                    item = _decompose(item, delta.to(device), floor, spool)
                measured.append(item)
                advance(1)
        finally:
            reading.shutdown(cancel_futures=True)
    return measured


def _load(candidate: Candidate, job: Job) -> tuple[Candidate, Tensor, str, float]:
    w0, w1 = job.sources.base.read(candidate.name), job.source.read(candidate.name)
    rows, columns = matrix_shape(candidate.shape)
    w0, w1 = w0.reshape(rows, columns), w1.reshape(rows, columns)
    delta = stream.update_of(candidate.name, job.source, w1, w0)
    floor = tsv.storage_noise(w0, w1) if candidate.limit else 0.0
    return candidate, delta, digest(w0.reshape(candidate.shape)), floor


def _decompose(item: Measured, delta: Tensor, floor: float, spool: Spool) -> Measured:
    vectors = tsv.decompose(delta, min(delta.shape), floor)
    kept = vectors.truncated(item.candidate.limit)
    return replace(
        item,
        singular_values=kept.S.cpu().double(),
        numerical_rank=vectors.rank,
        place=spool.put(kept),
    )


def _ranks(measured: Sequence[Measured], job: Job) -> list[int]:
    """Rank of every weight by the rule, or [`DENSE`]."""
    rule = job.options.rule
    if rule.budget is not None:
        return _within_budget(measured, job, budget_bytes(rule.budget, job.checkpoint_bytes))
    return [_rank(item, rule) for item in measured]


def _rank(item: Measured, rule: RankRule) -> int:
    if item.norm == 0:
        return 0
    limit, kept = item.candidate.limit, len(item.singular_values)
    if limit == 0:
        return DENSE
    if rule.energy is not None and kept:
        rank = rank_of_energy(item.singular_values.square(), item.norm**2, rule.energy)
        short = item.energy(rank) < rule.energy
    else:
        rank = kept
        wanted = rule.rank_before(min(matrix_shape(item.candidate.shape)))
        short = wanted is not None and wanted > limit
    # What is missing is worth storing only if it is more than the rounding of the checkpoints.
    return DENSE if short and item.numerical_rank > kept else rank


def _within_budget(measured: Sequence[Measured], job: Job, budget: int) -> list[int]:
    ranks = [_rank(item, job.options.rule) for item in measured]
    fixed, paid = _fixed_bytes(measured, job)
    if fixed > budget:
        raise RecipeError(
            f"The budget is {human_bytes(budget)}, and what is stored whole (biases, norms, …)"
            f" alone takes {human_bytes(fixed)}.",
            f"Give a larger --budget{_smaller(job.options)}.",
        )
    free = [i for i, item in enumerate(measured) if item.norm and item.candidate.limit]
    held = [min(paid, len(measured[i].singular_values)) for i in free]
    choices = [_choice(measured[i], already) for i, already in zip(free, held, strict=True)]
    chosen = allocate(choices, budget - fixed)
    for i, already, rank in zip(free, held, chosen, strict=True):
        ranks[i] = DENSE if rank == DENSE else already + rank
    return ranks


def _smaller(options: Options) -> str:
    """Options that would make what is stored whole smaller, for a hint."""
    adapter_only = options.format == "peft"
    flags = [
        *(["--factor-dtype bfloat16"] if options.factor_dtype == "float32" else []),
        *(["--compress-conv"] if not (adapter_only or options.compress_conv) else []),
        *(["--no-dense"] if adapter_only and options.dense else []),
    ]
    return "".join(f", or {flag}" for flag in flags)


def _choice(item: Measured, held: int) -> Choice:
    """What may be stored of a weight beyond the triplets that are paid for."""
    energies = item.singular_values.square()
    # The update itself is no choice where all it has more is the rounding of the checkpoints.
    more = item.numerical_rank > len(energies)
    return Choice(
        energies[held:],
        item.norm**2 - float(energies[:held].sum()),
        item.candidate.triplet_bytes,
        item.candidate.dense_bytes if more else None,
    )


def _fixed_bytes(measured: Sequence[Measured], job: Job) -> tuple[int, int]:
    """Bytes of everything that has no rank to choose, and the triplets of a matrix among them."""
    if job.options.format == "factors":
        whole = (m.candidate for m in measured if m.norm and not m.candidate.limit)
        return job.head_bytes + sum(candidate.dense_bytes or 0 for candidate in whole), 0
    largest = {m.candidate.name: m.numerical_rank for m in measured if m.candidate.limit}
    plan = _plan_adapter(job, measured, largest)
    base = job.sources.base.tensors
    values = sum(_holder(job, name).tensors[name].nbytes for name in plan.values)
    if not plan.biases:
        return values, 0
    biases = sum(math.prod(base[name].shape) for name in plan.biases) * job.options.dtype.itemsize
    pairs = (m.candidate.triplet_bytes for m in measured if m.candidate.name in plan.pairs)
    return values + biases + sum(pairs), 1  # a bias needs a pair beside it


def _stored(item: Measured, rank: int) -> StoredWeight:
    candidate = item.candidate
    stored = "dense" if rank == DENSE else "factors" if rank else "none"
    sizes = {"dense": candidate.dense_bytes or 0, "factors": rank * candidate.triplet_bytes}
    return StoredWeight(
        stored=stored,
        shape=candidate.shape,
        dtype=candidate.dtype,
        rank=max(rank, 0),
        numerical_rank=item.numerical_rank if stored == "factors" else 0,
        energy=item.energy(rank),
        norm=item.norm,
        bytes=sizes.get(stored, 0),
        base_sha256=item.base_sha256,
    )


def _write_update(
    writer: ShardWriter, job: Job, spool: Spool, item: Measured, weight: StoredWeight
) -> float:
    """Write the update of one weight; returns the squared error of rounding it."""
    name, dtype = item.candidate.name, job.options.dtype
    if weight.stored == "none":
        return 0.0
    if weight.stored == "dense":
        delta = job.delta(name)
        rounded = cast(delta, dtype, name)
        writer.write(f"{name}.delta", rounded)
        return _squared(linalg.in_working_precision(delta) - rounded)
    vectors = spool.get(item, weight.rank)
    stored = TaskSingularVectors(
        *(cast(part, dtype, name) for part in (vectors.U, vectors.S, vectors.Vh))
    )
    for part in ("U", "S", "Vh"):
        writer.write(f"{name}.{part}", getattr(stored, part))
    return 0.0 if dtype == torch.float32 else _squared(vectors.matrix() - stored.matrix())


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """An update in the dtype it is stored in.

    Raises:
        [`CheckpointError`]: a value is too large for it.
    """
    rounded = tensor.to(dtype)
    if not rounded.isfinite().all():
        raise CheckpointError(
            f"The update of {name} does not fit into {str(dtype).removeprefix('torch.')}.",
            "Use --factor-dtype bfloat16, whose range is that of float32.",
        )
    return rounded


def _squared(error: Tensor) -> float:
    return float(torch.linalg.vector_norm(error, dtype=torch.float64)) ** 2


def _disk_bytes(job: Job) -> int:
    """The spool at its largest, and the result at its largest."""
    spool = sum(item.limit * 4 * sum(matrix_shape(item.shape)) for item in job.candidates)
    return (
        spool
        + sum(_most_bytes(item, job.options.rule) for item in job.candidates)
        + (job.head_bytes)
    )


def _most_bytes(item: Candidate, rule: RankRule) -> int:
    """Bytes of a weight if nothing of it is frozen or of lower rank."""
    factors = item.limit * item.triplet_bytes
    wanted = rule.rank_before(min(matrix_shape(item.shape)))
    fits = wanted is not None and wanted <= item.limit
    return factors if fits else max(factors, item.dense_bytes or 0)


def _report(job: Job, target: Target, download_bytes: int) -> CompressReport:
    """What is known before any weight is read: the sizes are upper bounds."""
    options, source = job.options, job.source
    sizes = [_most_bytes(item, options.rule) for item in job.candidates]
    most = sum(sizes) + (job.head_bytes if options.format == "factors" else 0)
    if options.rule.budget is not None:
        most = min(most, budget_bytes(options.rule.budget, job.checkpoint_bytes))
    total = None if options.rule.energy is not None else most
    known = options.rule.energy is None and options.rule.budget is None
    weights = {
        item.name: {
            "stored": "factors" if item.limit else "dense" if item.dense_bytes else "none",
            "shape": list(item.shape),
            **({"rank": item.limit, "bytes": size} if known else {"most_rank": item.limit}),
        }
        for item, size in zip(job.candidates, sizes, strict=True)
    }
    largest = max((math.prod(item.shape) for item in job.candidates), default=0)
    return CompressReport(
        output=None if target.output is None else str(target.output),
        base_model=pinned_entry(job.sources.base),
        source=pinned_entry(source),
        format=options.format,
        rank_rule=options.rule.to_dict(),
        factor_dtype=options.factor_dtype,
        factors_bytes=total,
        checkpoint_bytes=job.checkpoint_bytes,
        ratio=None if total is None else total / job.checkpoint_bytes,
        base_bytes=job.base_bytes,
        ratio_for_tasks={}
        if total is None
        else tasks_ratio(total, job.base_bytes, job.checkpoint_bytes),
        update_error=None,
        weights=weights,
        left_out=[],
        output_bytes=None,
        seconds=0.0,
        warnings=list(job.warnings),
        download_bytes=download_bytes,
        peak_memory_bytes=largest * (2 * 2 * 4 + 6 * 8),
    )


def _measured_report(report: CompressReport, config: FactorsConfig) -> CompressReport:
    def entry(weight: StoredWeight) -> dict[str, Any]:
        content = weight.to_dict()
        return {k: content[k] for k in ("stored", "shape", "rank", "energy", "norm", "bytes")}

    return replace(
        report,
        factors_bytes=config.factors_bytes,
        ratio=config.factors_bytes / config.checkpoint_bytes,
        ratio_for_tasks=tasks_ratio(
            config.factors_bytes, config.base_bytes, config.checkpoint_bytes
        ),
        update_error=config.update_error,
        weights={name: entry(weight) for name, weight in config.weights.items()},
        left_out=list(config.left_out),
    )


def _too_large(report: CompressReport) -> str:
    narrow = " or --factor-dtype bfloat16" if report.factor_dtype == "float32" else ""
    return (
        f"The result is {100 * (report.ratio or 0):.0f} % of the checkpoint's size;"
        f" keep less{narrow} to make it smaller."
    )


def tasks_ratio(factors_bytes: int, base_bytes: int, checkpoint_bytes: int) -> dict[str, float]:
    """Base and factors of T such tasks, over T checkpoints.

    Example:
        >>> tasks_ratio(35, 350, 350)["8"]
        0.225
    """
    return {str(T): (base_bytes + T * factors_bytes) / (T * checkpoint_bytes) for T in TASK_COUNTS}
