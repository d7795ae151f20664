"""The verb `compress`: one fine-tuned checkpoint becomes low-rank task factors (TSV-Compress)."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

import torch

from hf_tsv.checkpoints import layout
from hf_tsv.checkpoints.formats.description import FactorsConfig, StoredWeight
from hf_tsv.checkpoints.formats.task import pinned_entry
from hf_tsv.checkpoints.reference import card_datasets, parse, pin
from hf_tsv.checkpoints.sources import DEFAULT_ACCESS, Access, open_sources
from hf_tsv.compression.building import Compressed, built, most_bytes, prepare
from hf_tsv.compression.candidates import Compression, Measured
from hf_tsv.compression.measuring import energy_curves
from hf_tsv.linalg.choices import AnyDevice, AnyDtype
from hf_tsv.recipes.compressing import Options, RankRule
from hf_tsv.recipes.settings import Settings
from hf_tsv.reports import cards, compressed_cards, drawing, pictures
from hf_tsv.reports.compression import CompressReport
from hf_tsv.reports.kept import KeptSection
from hf_tsv.runs.lifecycle import underway
from hf_tsv.runs.target import Target
from hf_tsv.system import processes
from hf_tsv.system.device import pick_device
from hf_tsv.system.errors import CollectionError, public
from hf_tsv.system.progress import logger
from hf_tsv.verbs.factors import TaskFactors

TASK_COUNTS = (8, 14, 20)
"""Numbers of tasks that the paper reports."""


class Choices(TypedDict, total=False):
    """Arguments of [`compress`] by name, for the type of its result."""

    base_model: str | PathLike[str] | None
    output: str | Path | None
    push_to: str | None
    rank_fraction: float | None
    rank: int | None
    energy: float | None
    budget: str | int | None
    dtype: AnyDtype
    compress_conv: bool
    allow_other_base: bool
    max_shard_size: int | str
    device: AnyDevice | None
    force: bool
    private: bool | None
    revision: str | None
    create_pr: bool
    commit_message: str | None
    token: str | None
    cache_dir: str | Path | None
    subfolder: str | None
    stream: bool
    report: bool
    progress: bool | None


@overload
def compress(
    checkpoint: str | PathLike[str], *, dry_run: Literal[False] = False, **choices: Unpack[Choices]
) -> TaskFactors: ...
@overload
def compress(
    checkpoint: str | PathLike[str], *, dry_run: Literal[True], **choices: Unpack[Choices]
) -> CompressReport: ...
@overload
def compress(
    checkpoint: str | PathLike[str], *, dry_run: bool, **choices: Unpack[Choices]
) -> TaskFactors | CompressReport: ...


@public
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
    dtype: AnyDtype = "float32",
    compress_conv: bool = False,
    allow_other_base: bool = False,
    max_shard_size: int | str = Settings.max_shard_size,
    device: AnyDevice | None = None,
    force: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    collection: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    subfolder: str | None = None,
    stream: bool = False,
    report: bool = False,
    dry_run: bool = False,
    progress: bool | None = None,
) -> TaskFactors | CompressReport:
    """Compress a fine-tuned CLIP checkpoint into task factors (TSV-Compress, section 4.3).

    Args:
        checkpoint (`str`): `org/name`, `org/name@revision`, `hf://…` or a folder.
        base_model (`str`, *optional*): W0; default: the one the checkpoint's card names.
        output (`str` or `Path`, *optional*): folder to write; without it the factors live in a
            temporary folder until they are no longer used.
        rank_fraction (`float`, *optional*): share of k = min(d_out, d_in) kept; default 0.1.
        rank (`int`, *optional*): triplets kept of every weight instead.
        energy (`float`, *optional*): share of the squared singular values kept instead.
        budget (`str` or `int`, *optional*): bytes spent instead: `"10%"`, `"35MB"` or a number.
        dtype (`str` or `torch.dtype`): `float32`, `bfloat16` or `float16`.
        compress_conv (`bool`): decompose the patch convolution as well.
        report (`bool`): put table and picture of what is kept into the card.
        dry_run (`bool`): plan only; the result is the report.
        allow_other_base, push_to, max_shard_size, device, force, private, revision, create_pr,
            commit_message, collection, token, cache_dir, subfolder, stream, progress: as in
            [`merge`].

    Returns:
        [`TaskFactors`]: with a [`CompressReport`] as `report`; with `dry_run` the report alone.

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
        dtype,  # type: ignore[arg-type]
        compress_conv,
        max_shard_size=max_shard_size,
        report=report,
        allow_other_base=allow_other_base,
    )
    owned = None
    if output is None:
        owned = Path(tempfile.mkdtemp(prefix="hf-tsv-"))
        output = owned / "factors"
    place = Path(output)
    target = Target(place, push_to, force, private, revision, create_pr, commit_message, collection)
    try:
        done = run(
            fspath(checkpoint),
            None if base_model is None else fspath(base_model),
            options,
            target,
            device=device,
            access=Access.of(token, cache_dir, subfolder, stream=stream),
            dry_run=dry_run,
            progress=progress,
        )
    except BaseException as error:
        uploaded = isinstance(error, CollectionError)
        if owned is not None and (uploaded or not place.exists()):  # else the upload failed: kept
            shutil.rmtree(owned, ignore_errors=True)
        raise
    if owned is not None:
        done = replace(done, output=None)
    if dry_run:
        if owned is not None:
            owned.rmdir()
        return done
    factors = TaskFactors.opened(pin(parse(str(Path(output).expanduser().absolute()))), done)
    if owned is not None:
        weakref.finalize(factors.pinned.files, shutil.rmtree, owned, ignore_errors=True)
    return factors


def run(
    checkpoint: str,
    base_model: str | None,
    options: Options,
    target: Target,
    *,
    device: AnyDevice | None = None,
    access: Access = DEFAULT_ACCESS,
    dry_run: bool = False,
    progress: bool | None = None,
) -> CompressReport:
    """Compress in any format, as [`compress`] does; a dry run touches neither disk nor Hub."""
    started = time.monotonic()
    processes.alone("`hf-tsv compress`")
    target = target.checked(access.token, dry_run=dry_run)
    sources = open_sources([checkpoint], base_model, access)
    job = prepare(sources, options)
    with underway(sources, target, progress) as begun:
        report = _report(job, target, begun.download_bytes)
        if dry_run:
            return replace(report, seconds=round(time.monotonic() - started, 3), dry_run=True)
        place = pick_device(device)
        with built(begun, job, place) as (folder, done):
            _describe(folder, job, done)
    report = _measured_report(report, done)
    if done.config.factors_bytes >= done.config.checkpoint_bytes:
        report.warnings.append(_too_large(report))
        logger.warning(report.warnings[-1])
    seconds = round(time.monotonic() - started, 3)
    return replace(report, seconds=seconds, device=place.type, url=begun.url)


def _describe(folder: Path, job: Compression, done: Compressed) -> None:
    """Write the card, and the picture it shows."""
    config = done.config
    kept = _kept(folder, config, done.measured) if job.options.report else None
    said: Any = {
        "config": config,
        "full_model": layout.is_full_model(job.sources.base.tensors),
        "datasets": card_datasets(job.source.pinned.card),
        "kept": kept,
    }
    card: cards.Card
    if job.options.out_format == "factors":
        card = compressed_cards.FactorsCard(**said)
    else:
        dense = job.options.dense
        card = compressed_cards.AdapterCard(**said, model_class=job.model_class, dense=dense)
    (folder / "README.md").write_text(cards.render(card), encoding="utf-8")


def _kept(folder: Path, config: FactorsConfig, measured: Sequence[Measured]) -> KeptSection:
    """Draw what is kept, and sum it up for the card."""
    ranks = {name: item.rank for name, item in config.weights.items() if item.stored == "factors"}
    picture = None
    if ranks:
        picture = drawing.attempted(lambda: pictures.of_compression(energy_curves(measured), ranks))
    if picture is not None:
        (folder / picture.file).write_bytes(picture.png)
    return KeptSection.of(config, None if picture is None else picture.file)


def _report(job: Compression, target: Target, download_bytes: int) -> CompressReport:
    """Report before any weight is read, whose sizes are upper bounds."""
    options, source = job.options, job.source
    sizes = [most_bytes(item, options.rule) for item in job.candidates]
    most = sum(sizes) + (job.head_bytes if options.out_format == "factors" else 0)
    if options.rule.budget is not None:
        most = min(most, options.rule.budget_bytes(job.checkpoint_bytes))
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
        out_format=options.out_format,
        rank_rule=options.rule.to_dict(),
        dtype=options.dtype,
        factors_bytes=total,
        checkpoint_bytes=job.checkpoint_bytes,
        ratio=None if total is None else total / job.checkpoint_bytes,
        base_bytes=job.base_bytes,
        ratio_for_tasks=tasks_ratio(total, job.base_bytes, job.checkpoint_bytes),
        update_error=None,
        weights=weights,
        left_out=[],
        output_bytes=None,
        seconds=0.0,
        warnings=list(job.warnings),
        download_bytes=download_bytes,
        peak_memory_bytes=job.sources.waiting_bytes()
        + largest * (4 * 4 + torch.get_num_threads() * (4 + 4 * 8)),
    )


def _measured_report(report: CompressReport, done: Compressed) -> CompressReport:
    """Replace upper bounds of the report by what is written."""
    config, written = done.config, done.config.factors_bytes

    def entry(weight: StoredWeight) -> dict[str, Any]:
        content = weight.to_dict()
        return {k: content[k] for k in ("stored", "shape", "rank", "energy", "norm", "bytes")}

    return replace(
        report,
        factors_bytes=written,
        ratio=written / config.checkpoint_bytes,
        ratio_for_tasks=tasks_ratio(written, config.base_bytes, config.checkpoint_bytes),
        update_error=config.update_error,
        weights={name: entry(weight) for name, weight in config.weights.items()},
        left_out=list(config.left_out),
        output_bytes=done.output_bytes,
        exact_decompositions=sum(item.exact for item in done.measured),
        timings=done.seconds.rounded(),
    )


def _too_large(report: CompressReport) -> str:
    narrow = " or use `dtype=bfloat16`" if report.dtype == "float32" else ""
    return (
        f"The result is {report.ratio or 0:.0%} of the checkpoint's size;"
        f" keep less{narrow} to make it smaller."
    )


def tasks_ratio(
    factors_bytes: int | None, base_bytes: int, checkpoint_bytes: int
) -> dict[str, float]:
    """Size of base and factors of T such tasks, as a share of T checkpoints; none if not known.

    Example:
        >>> tasks_ratio(35, 350, 350)["8"]
        0.225
    """
    if factors_bytes is None:
        return {}
    return {str(T): (base_bytes + T * factors_bytes) / (T * checkpoint_bytes) for T in TASK_COUNTS}
