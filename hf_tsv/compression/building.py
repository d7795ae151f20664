"""The folder of a compression: measured, written, and resumed after a stop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hf_tsv.checkpoints import companions, layout, places
from hf_tsv.checkpoints.fit import (
    OTHER_BASE,
    check_fit,
    config_warnings,
    other_base,
    refuse_other_base,
)
from hf_tsv.checkpoints.formats.description import ADAPTER_FORMAT, FORMAT, FactorsConfig, Origin
from hf_tsv.checkpoints.formats.task import equals_base
from hf_tsv.checkpoints.layout import brief
from hf_tsv.checkpoints.names import CONFIG_FILE, FACTORS_CONFIG
from hf_tsv.checkpoints.sources import Sources
from hf_tsv.compression.allocation import choose_ranks, refuse_small_budget
from hf_tsv.compression.candidates import Candidate, Compression, Measured, Spool, candidates_of
from hf_tsv.compression.files import Written, write_adapter, write_factors
from hf_tsv.compression.measuring import measure
from hf_tsv.linalg.shapes import matrix_shape
from hf_tsv.recipes.compressing import Options, RankRule
from hf_tsv.runs import journal
from hf_tsv.runs.lifecycle import Run
from hf_tsv.runs.reading import Seconds
from hf_tsv.system.errors import CheckpointError
from hf_tsv.system.progress import bar, logger
from hf_tsv.system.text import counted


def prepare(sources: Sources, options: Options) -> Compression:
    job = Compression(sources, options, (), ())
    base, source = sources.base, job.source
    for warning in sources.warnings:  # what they say may explain why it does not fit
        logger.warning(warning)
    check_fit(base, [source])
    warnings = config_warnings(base, [source])
    if options.out_format == "peft" and base.format == "open_clip":
        problem = f"The base model {base} is in OpenCLIP's format, which PEFT does not load."
        raise CheckpointError(problem, "Use `out_format=factors`, which serves every format.")
    if options.out_format == "peft" and not layout.is_clip(base.model_config):
        problem = f"The base model {base} is not CLIP, and adapters are made for CLIP only."
        raise CheckpointError(problem, "Use `out_format=factors`, which serves every model.")
    if options.out_format == "peft" and source.head:
        warnings.append(f"An adapter has no place for the task head {', '.join(source.head)}.")
    for warning in warnings:
        logger.warning(warning)
    return replace(job, candidates=candidates_of(job), warnings=(*sources.warnings, *warnings))


@dataclass(frozen=True)
class Compressed:
    """A compression whose weights are written; `output_bytes` is the size of their files."""

    config: FactorsConfig
    measured: list[Measured]
    output_bytes: int
    seconds: Seconds


@contextmanager
def built(run: Run, job: Compression, device: torch.device) -> Iterator[tuple[Path, Compressed]]:
    """Compress into a folder, or do the rest of it; the body describes it.

    The body is given the folder, which gets its place when the body succeeds, and what is in it.
    """
    identity = job.identity(device)
    run.check_space(identity, disk_bytes(job))
    run.fetch()
    job = replace(job, sources=run.sources)
    if not job.options.allow_other_base:
        refuse_other_base(run.sources.base, run.sources.inputs)
    refuse_small_budget(job)
    with (
        run.result(identity) as final,
        journal.under_construction(
            final, identity, force=run.target.force, until_pushed=run.target.output is None
        ) as (work, resumed),
    ):
        yield work / journal.FILES, compressed(job, work, device, resumed=resumed, show=run.show)


def compressed(
    job: Compression, work: Path, device: torch.device, *, resumed: bool, show: bool
) -> Compressed:
    """Write tensors and description into the files of a folder under construction."""
    folder, source = work / journal.FILES, job.source
    candidates = {candidate.name: candidate for candidate in job.candidates}
    noted = journal.read(work, lambda entry: _noted(entry, candidates)).values()
    with Spool(work / journal.SPOOL, list(noted)) as spool:
        journal.rewrite(work, (item.to_entry() for item in spool.held))
        if resumed:
            logger.info("Resuming: %d of %d weights are done.", len(spool.held), len(candidates))
        held = {item.candidate.name for item in spool.held}
        left = [(brief(n), item.cost) for n, item in candidates.items() if n not in held]
        told = counted(len(left), "weight"), source, device.type
        logger.info("Compressing %s of %s on %s.", *told)
        with journal.Journal(work) as notes, bar("Decomposing", left, visible=show) as advance:
            measured, seconds = measure(job, spool, notes, device, advance)
        if not any(item.norm for item in measured):
            raise equals_base(str(source), str(job.sources.base))
        _refuse_far(job, measured)
        started = time.monotonic()
        write = write_factors if job.options.out_format == "factors" else write_adapter
        written = write(folder, job, spool, measured, choose_ranks(measured, job))
    seconds += Seconds(writing=time.monotonic() - started)
    config = _config(job, measured, written)
    places.note(config.base_fingerprint(), job.sources.base.pinned)
    (folder / FACTORS_CONFIG).write_text(config.to_json(), encoding="utf-8")
    if config.format == FORMAT:
        (folder / CONFIG_FILE).write_text(config.model_json(), encoding="utf-8")
    return Compressed(config, measured, written.file_bytes, seconds)


def _refuse_far(job: Compression, measured: Sequence[Measured]) -> None:
    """Refuse an update that is too large for a fine-tune of this base model."""
    changed = [item for item in measured if item.norm]
    norm = math.hypot(*(item.norm for item in changed))
    base_norm = math.hypot(*(item.base_norm for item in changed))
    may_be = job.options.allow_other_base or not job.source.is_whole
    if norm >= OTHER_BASE * base_norm > 0 and not may_be:
        raise other_base(job.source, job.sources.base, norm / base_norm)


def _noted(entry: dict[str, Any], candidates: Mapping[str, Candidate]) -> Measured:
    return Measured.from_entry(entry, candidates[entry["label"]])


def _config(job: Compression, measured: Sequence[Measured], written: Written) -> FactorsConfig:
    """Describe what is written."""
    source, base, options = job.source, job.sources.base, job.options
    total = sum(item.norm**2 for item in measured)
    lost = sum((1 - item.energy) * item.norm**2 for item in written.weights.values())
    return FactorsConfig(
        base_model=Origin.of(base.pinned),
        source=Origin.of(source.pinned),
        rank_rule=options.rule.to_dict(),
        factor_dtype=options.stored_dtype,
        compress_conv=options.compress_conv,
        checkpoint_bytes=job.checkpoint_bytes,
        base_bytes=job.base_bytes,
        factors_bytes=written.tensor_bytes,
        update_error=math.sqrt((lost + written.rounding) / total),
        weights=written.weights,
        task_head=tuple(source.head) if options.out_format == "factors" else (),
        model_config=companions.without_code(source.model_config),
        format=FORMAT if options.out_format == "factors" else ADAPTER_FORMAT,
        left_out=written.left_out,
    )


def disk_bytes(job: Compression) -> int:
    """The spool at its largest, and the result at its largest."""
    spool = sum(item.limit * 4 * sum(matrix_shape(item.shape)) for item in job.candidates)
    result = sum(most_bytes(item, job.options.rule) for item in job.candidates)
    return spool + result + job.head_bytes


def most_bytes(item: Candidate, rule: RankRule) -> int:
    """Bytes of a weight if nothing of it is frozen or of lower rank."""
    factors = item.limit * item.triplet_bytes
    wanted = rule.rank_before(min(matrix_shape(item.shape)))
    fits = wanted is not None and wanted <= item.limit
    return factors if fits else max(factors, item.dense_bytes or 0)
