"""The verb `compress`: one fine-tuned checkpoint becomes low-rank task factors (TSV-Compress)."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch

from hf_tsv import cards, journal, plots, processes, stream
from hf_tsv.checkpoints import companions, layout
from hf_tsv.checkpoints.reference import parse, pin
from hf_tsv.compressed_files import (
    choose_ranks,
    model_class_of,
    write_adapter,
    write_factors,
)
from hf_tsv.delivery import Target, final_folder, push, waiting
from hf_tsv.errors import CheckpointError
from hf_tsv.factors import (
    ADAPTER_FORMAT,
    FACTORS_CONFIG,
    FORMAT,
    FactorsConfig,
    Origin,
    StoredWeight,
    TaskFactors,
    matrix_shape,
    open_factors,
)
from hf_tsv.findings import Seconds
from hf_tsv.folders import check_free_space
from hf_tsv.plan import check_fit, config_warnings
from hf_tsv.progress import bar, logger, visible_by_default
from hf_tsv.ranks import RankRule, budget_bytes
from hf_tsv.recipe import Settings
from hf_tsv.sources import DEFAULT_ACCESS, Access, Sources, equals_base, open_sources, pinned_entry
from hf_tsv.spectra import (
    Candidate,
    Job,
    Measured,
    Options,
    Spool,
    candidates_of,
    energy_curves,
    measure,
)

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
        exact_decompositions (`int`): that took a full SVD: where most triplets may be kept, or
            where those of a Gram matrix failed the check.
        timings (`dict[str, float]`): seconds `reading`, `waiting` for reads, `computing` and
            `writing`.
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
    exact_decompositions: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    device: str | None = None
    url: str | None = None
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return asdict(self)


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
    subfolder: str | None = None,
    stream: bool = False,
    report: bool = False,
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
        subfolder (`str`, *optional*): where the checkpoint lies in its repository or folder, unless
            it says so itself: `org/name/subfolder`.
        stream (`bool`): read tensors from the Hub when they are needed, without a copy on disk.
        report (`bool`): put table and picture of what is kept into the card.
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
        report=report,
    )
    owned = None
    if output is None:
        owned = Path(tempfile.mkdtemp(prefix="hf-tsv-"))
        output = owned / "factors"
    target = Target(Path(output), push_to, force, private, revision, create_pr, commit_message)
    try:
        done = run(
            fspath(checkpoint),
            None if base_model is None else fspath(base_model),
            options,
            target,
            device=device,
            access=Access.of(token, cache_dir, subfolder, stream=stream),
            progress=progress,
        )
    except BaseException:
        if owned is not None and not Path(output).exists():  # else the upload failed: kept
            shutil.rmtree(owned, ignore_errors=True)
        raise
    factors = open_factors(pin(parse(str(Path(output).expanduser().absolute()))))
    if owned is not None:
        done = replace(done, output=None)
        weakref.finalize(factors.pinned.files, shutil.rmtree, owned, ignore_errors=True)
    return replace(factors, report=done)


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
    subfolder: str | None = None,
    stream: bool = False,
    report: bool = False,
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
        subfolder (`str`, *optional*): where the checkpoint lies in its repository or folder, unless
            it says so itself: `org/name/subfolder`.
        stream (`bool`): read tensors from the Hub when they are needed, without a copy on disk.
        report (`bool`): put table and picture of what is kept into the card.
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
        report=report,
    )
    place = None if output is None else Path(output)
    target = Target(place, push_to, force, private, revision, create_pr, commit_message)
    return run(
        fspath(checkpoint),
        None if base_model is None else fspath(base_model),
        options,
        target,
        device=device,
        access=Access.of(token, cache_dir, subfolder, stream=stream),
        progress=progress,
    )


def run(
    checkpoint: str,
    base_model: str | None,
    options: Options,
    target: Target,
    *,
    device: str | None = None,
    access: Access = DEFAULT_ACCESS,
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
        access ([`Access`]): how checkpoints are reached.
        dry_run (`bool`): plan only; touches neither disk nor Hub.
        progress (`bool`, *optional*): show bars; default: on a terminal.
    """
    started = time.monotonic()
    processes.alone("compress")
    show = visible_by_default() if progress is None else progress
    target = target.checked(access.token, dry_run=dry_run)
    sources = open_sources([checkpoint], base_model, access)
    job = _prepare(sources, options)
    target.refuse_inputs([item.pinned for item in sources.all()])
    download_bytes = sources.download_bytes()
    report = _report(job, target, download_bytes)
    if dry_run:
        return replace(report, seconds=round(time.monotonic() - started, 3), dry_run=True)
    place = stream.pick_device(device)
    identity = job.to_json(place)
    final = final_folder(target, identity)
    check_free_space(final, _disk_bytes(job) - journal.begun_bytes(final))
    job = replace(job, sources=job.sources.within_reach(visible=show))
    try:
        with waiting(final):
            done = _construct(final, identity, job, target, place, show)
            url = push(final, target, access.token)
    finally:
        job.sources.close()
    config = done.config
    report = _measured_report(report, config)
    if config.factors_bytes >= config.checkpoint_bytes:
        report.warnings.append(_too_large(report))
        logger.warning(report.warnings[-1])
    return replace(
        report,
        output_bytes=done.output_bytes,
        exact_decompositions=done.exact,
        timings=done.seconds.rounded(),
        seconds=round(time.monotonic() - started, 3),
        device=place.type,
        url=url,
    )


def _prepare(sources: Sources, options: Options) -> Job:
    job = Job(sources, options, (), ())
    base, source = sources.base, job.source
    check_fit(base, [source])
    warnings = [*sources.warnings, *config_warnings(base, [source])]
    if options.format == "peft" and base.format == "open_clip":
        raise CheckpointError(
            f"The base model {base} is in OpenCLIP's format, which PEFT does not load.",
            "Leave --format out: task factors serve every format.",
        )
    if options.format == "peft" and not layout.is_clip(base.config):
        raise CheckpointError(
            f"The base model {base} is not CLIP, and adapters are made for CLIP only.",
            "Leave --format out: task factors serve every model.",
        )
    if options.format == "peft" and source.head:
        warnings.append(f"An adapter has no place for the task head {', '.join(source.head)}.")
    for warning in warnings:
        logger.warning(warning)
    return replace(job, candidates=candidates_of(job), warnings=tuple(warnings))


@dataclass(frozen=True)
class _Done:
    """What was written, how many full SVDs it took, and how long."""

    config: FactorsConfig
    output_bytes: int
    exact: int
    seconds: Seconds


def _construct(
    final: Path,
    identity: dict[str, Any],
    job: Job,
    target: Target,
    device: torch.device,
    show: bool,
) -> _Done:
    """Make the folder that is wanted, or the rest of it."""
    with journal.under_construction(
        final, identity, force=target.force, until_pushed=target.output is None
    ) as (work, resumed):
        candidates = {candidate.name: candidate for candidate in job.candidates}
        noted = journal.read(work, lambda entry: _noted(entry, candidates)).values()
        with Spool(work / journal.SPOOL, list(noted)) as spool:
            journal.rewrite(work, (item.to_entry() for item in spool.held))
            if resumed:
                logger.info("%d of %d weights are there already.", len(spool.held), len(candidates))
            with journal.Journal(work) as notes:
                return _compress_into(work / journal.FILES, job, target, spool, notes, device, show)


def _noted(entry: dict[str, Any], candidates: Mapping[str, Candidate]) -> Measured:
    return Measured.from_entry(entry, candidates[entry["label"]])


def _compress_into(
    folder: Path,
    job: Job,
    target: Target,
    spool: Spool,
    notes: journal.Journal,
    device: torch.device,
    show: bool,
) -> _Done:
    """Write a complete result into `folder`: tensors, description, card."""
    source, base, options = job.source, job.sources.base, job.options
    left = len(job.candidates) - len(spool.held)
    logger.info("Compressing %d weights of %s on %s.", left, source, device.type)
    with bar("Decomposing", left, visible=show) as advance:
        measured, seconds = measure(job, spool, notes, device, advance)
    if not any(item.norm for item in measured):
        raise equals_base(str(source), str(base))
    started = time.monotonic()
    ranks = choose_ranks(measured, job)
    write = write_factors if options.format == "factors" else write_adapter
    written = write(folder, job, spool, measured, ranks)
    seconds += Seconds(writing=time.monotonic() - started)
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
        model_config=companions.without_code(source.config),
        format=FORMAT if options.format == "factors" else ADAPTER_FORMAT,
        left_out=written.left_out,
    )
    (folder / FACTORS_CONFIG).write_text(config.to_json(), encoding="utf-8")
    kept = _kept(folder, config, measured) if options.report else ""
    if options.format == "factors":
        card = cards.factors_card(config, target.push_to, kept)
    else:
        card = cards.adapter_card(
            config, target.push_to, model_class_of(job), dense=options.dense, kept=kept
        )
    (folder / "README.md").write_text(card, encoding="utf-8")
    exact = sum(item.exact for item in measured)
    return _Done(config, written.file_bytes, exact, seconds)


def _kept(folder: Path, config: FactorsConfig, measured: Sequence[Measured]) -> str:
    """Draw what is kept, and say it for the card."""
    ranks = {name: item.rank for name, item in config.weights.items() if item.stored == "factors"}
    picture = None
    if ranks:
        picture = plots.attempted(lambda: plots.of_compression(energy_curves(measured), ranks))
    if picture is not None:
        (folder / picture.file).write_bytes(picture.png)
    return cards.kept_section(config, None if picture is None else picture.file)


def _disk_bytes(job: Job) -> int:
    """The spool at its largest, and the result at its largest."""
    spool = sum(item.limit * 4 * sum(matrix_shape(item.shape)) for item in job.candidates)
    return (
        spool + sum(_most_bytes(item, job.options.rule) for item in job.candidates) + job.head_bytes
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
        peak_memory_bytes=job.sources.waiting_bytes()
        + largest * (4 * 4 + torch.get_num_threads() * (4 + 4 * 8)),
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
