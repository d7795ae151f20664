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

from hf_tsv.checkpoints import companions, layout
from hf_tsv.checkpoints.fit import check_fit, config_warnings
from hf_tsv.checkpoints.formats.description import ADAPTER_FORMAT, FORMAT, FactorsConfig, Origin
from hf_tsv.checkpoints.formats.task import equals_base
from hf_tsv.checkpoints.names import CONFIG_FILE, FACTORS_CONFIG
from hf_tsv.checkpoints.sources import Sources
from hf_tsv.compression.allocation import choose_ranks
from hf_tsv.compression.candidates import Candidate, Compression, Measured, Spool, candidates_of
from hf_tsv.compression.files import Written, write_adapter, write_factors
from hf_tsv.compression.measuring import measure
from hf_tsv.linalg.updates import matrix_shape
from hf_tsv.recipes.compressing import Options, RankRule
from hf_tsv.runs import journal
from hf_tsv.runs.lifecycle import Run
from hf_tsv.runs.reading import Seconds
from hf_tsv.system.errors import CheckpointError
from hf_tsv.system.progress import bar, logger


def prepare(sources: Sources, options: Options) -> Compression:
    job = Compression(sources, options, (), ())
    base, source = sources.base, job.source
    check_fit(base, [source])
    warnings = [*sources.warnings, *config_warnings(base, [source])]
    if options.format == "peft" and base.format == "open_clip":
        problem = f"The base model {base} is in OpenCLIP's format, which PEFT does not load."
        raise CheckpointError(problem, "Leave --format out: task factors serve every format.")
    if options.format == "peft" and not layout.is_clip(base.model_config):
        problem = f"The base model {base} is not CLIP, and adapters are made for CLIP only."
        raise CheckpointError(problem, "Leave --format out: task factors serve every model.")
    if options.format == "peft" and source.head:
        warnings.append(f"An adapter has no place for the task head {', '.join(source.head)}.")
    for warning in warnings:
        logger.warning(warning)
    return replace(job, candidates=candidates_of(job), warnings=tuple(warnings))


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
    with (
        run.result(identity) as final,
        journal.under_construction(
            final, identity, force=run.target.force, until_pushed=run.target.output is None
        ) as (work, resumed),
    ):
        yield work / journal.FILES, _compressed(job, work, device, resumed=resumed, show=run.show)


def _compressed(
    job: Compression, work: Path, device: torch.device, *, resumed: bool, show: bool
) -> Compressed:
    """Write tensors and description."""
    folder, source = work / journal.FILES, job.source
    candidates = {candidate.name: candidate for candidate in job.candidates}
    noted = journal.read(work, lambda entry: _noted(entry, candidates)).values()
    with Spool(work / journal.SPOOL, list(noted)) as spool:
        journal.rewrite(work, (item.to_entry() for item in spool.held))
        if resumed:
            logger.info("%d of %d weights are there already.", len(spool.held), len(candidates))
        left = len(candidates) - len(spool.held)
        logger.info("Compressing %d weights of %s on %s.", left, source, device.type)
        with journal.Journal(work) as notes, bar("Decomposing", left, visible=show) as advance:
            measured, seconds = measure(job, spool, notes, device, advance)
        if not any(item.norm for item in measured):
            raise equals_base(str(source), str(job.sources.base))
        started = time.monotonic()
        write = write_factors if job.options.format == "factors" else write_adapter
        written = write(folder, job, spool, measured, choose_ranks(measured, job))
    seconds += Seconds(writing=time.monotonic() - started)
    config = _config(job, measured, written)
    (folder / FACTORS_CONFIG).write_text(config.to_json(), encoding="utf-8")
    if config.format == FORMAT:
        (folder / CONFIG_FILE).write_text(config.model_json(), encoding="utf-8")
    return Compressed(config, measured, written.file_bytes, seconds)


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
        factor_dtype=options.dtype,
        compress_conv=options.compress_conv,
        checkpoint_bytes=job.checkpoint_bytes,
        base_bytes=job.base_bytes,
        factors_bytes=written.tensor_bytes,
        update_error=math.sqrt((lost + written.rounding) / total),
        weights=written.weights,
        task_head=tuple(source.head) if options.format == "factors" else (),
        model_config=companions.without_code(source.model_config),
        format=FORMAT if options.format == "factors" else ADAPTER_FORMAT,
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
