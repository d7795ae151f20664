"""Factors of tasks beside a merge, in a folder each: copied, or made of whole checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from hf_tsv.checkpoints.formats.description import FactorsConfig
from hf_tsv.checkpoints.formats.factors import open_factors
from hf_tsv.checkpoints.formats.routing import RoutedTask
from hf_tsv.checkpoints.formats.task import Task
from hf_tsv.checkpoints.names import CONFIG_FILE, FACTORS_CONFIG, TASKS_FOLDER
from hf_tsv.checkpoints.reference import PinnedCheckpoint
from hf_tsv.checkpoints.sources import Sources
from hf_tsv.checkpoints.storage.files import LocalFiles
from hf_tsv.compression.building import compressed, most_bytes
from hf_tsv.compression.candidates import Compression, candidates_of
from hf_tsv.recipes.compressing import Options
from hf_tsv.runs import journal
from hf_tsv.system.errors import CheckpointError


def job_of(item: Task, sources: Sources, options: Options) -> Compression | None:
    """Compression of a fine-tune; None for task factors, which are copied."""
    if item.description is not None:
        return None
    job = Compression(replace(sources, inputs=(item,)), options, (), ())
    return replace(job, candidates=candidates_of(job))


def held(item: Task, job: Compression | None) -> set[str]:
    """Weights that are stored as factors, or may be."""
    if item.description is not None:
        return factors_of(item.description)
    return {c.name for c in job.candidates if c.limit} if job else set()


def factors_of(config: FactorsConfig) -> set[str]:
    return {name for name, weight in config.weights.items() if weight.stored == "factors"}


def most_bytes_of(item: Task, job: Compression | None) -> int:
    """Size of a task's factors, at most."""
    if item.description is not None:
        return item.description.factors_bytes
    return sum(most_bytes(c, job.options.rule) for c in job.candidates) if job else 0


def written(
    folder: Path,
    sources: Sources,
    tasks: Sequence[RoutedTask],
    options: Options,
    device: torch.device,
    *,
    show: bool,
) -> list[FactorsConfig]:
    """Write or copy the factors of every task, and return their descriptions.

    Those that a stopped run has finished stay.
    """
    ours = {task.folder for task in tasks}
    for path in (folder / TASKS_FOLDER).glob("*"):  # of a run with other options
        if path.relative_to(folder).as_posix() not in ours:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    stored = []
    for task, item in zip(tasks, sources.inputs, strict=True):
        config = item.description
        if config is None or task.folder is not None:
            place = folder / str(task.folder)
            config = _finished(place, item, options)
            if config is None:
                config = _write_task(place, job_of(item, sources, options), item, device, show=show)
        stored.append(config)
    return stored


def _finished(place: Path, item: Task, options: Options) -> FactorsConfig | None:
    """Description of the factors of a task that are there already, with the same options."""
    if not (place / FACTORS_CONFIG).exists():
        return None
    try:
        config = open_factors(PinnedCheckpoint(str(place), None, LocalFiles(place), {})).config
    except CheckpointError:  # it has been damaged since
        return None
    made = (config.rank_rule, config.factor_dtype) == (options.rule.to_dict(), options.stored_dtype)
    return config if made or item.description is not None else None


def _write_task(
    place: Path, job: Compression | None, item: Task, device: torch.device, *, show: bool
) -> FactorsConfig:
    """Write or copy the factors of a task; their folder gets its name when it is whole."""
    work = place.with_name(f".{place.name}")
    for old in (work, place):  # of a run that was stopped
        shutil.rmtree(old, ignore_errors=True)
    files = work / journal.FILES
    files.mkdir(parents=True)
    if job is None:
        _copy(item, files)
        config = cast(FactorsConfig, item.description)
    else:
        config = compressed(job, work, device, resumed=False, show=show).config
    (files / CONFIG_FILE).write_text(config.model_json(), encoding="utf-8")
    files.rename(place)
    shutil.rmtree(work)
    return config


def _copy(item: Task, place: Path) -> None:
    """Copy the files of task factors, after a check that they are in their folder."""
    files = item.pinned.files
    for name in item.needed_files:
        if files.is_elsewhere(name) or files.folder is None:
            problem = f"{item}: {name} is a link to a file outside of its folder."
            raise CheckpointError(problem, "Put the file itself there.")
        shutil.copyfile(files.folder / name, place / name)
