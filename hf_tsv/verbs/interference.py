"""The verb `interference`: which tasks interfere, in which layers, before anything is merged."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_tsv.checkpoints.fit import refuse_other_base
from hf_tsv.checkpoints.formats.task import Task, distinct_names, pinned_entry
from hf_tsv.checkpoints.layout import block_and_kind
from hf_tsv.checkpoints.names import REPORT_FILE, REPORT_PAGE
from hf_tsv.checkpoints.reference import at_revision, listed
from hf_tsv.checkpoints.sources import Access
from hf_tsv.linalg.choices import AnyDevice
from hf_tsv.merging.costs import steps
from hf_tsv.merging.findings import Finding, Findings
from hf_tsv.merging.pipeline import merge_weights
from hf_tsv.merging.plan import MergePlan
from hf_tsv.merging.work import Merge, Merged, diagnosed, prepare, refuse_unchanged
from hf_tsv.methods.interference import RANK_SHARES
from hf_tsv.recipes.settings import Qkv, Settings, refuse_one_alone
from hf_tsv.reports import drawing
from hf_tsv.reports.interference import InterferenceReport
from hf_tsv.reports.page import interference_page
from hf_tsv.reports.pictures import of_interference
from hf_tsv.runs.lifecycle import Run, underway
from hf_tsv.runs.target import Target
from hf_tsv.system import processes
from hf_tsv.system.device import pick_device
from hf_tsv.system.errors import RecipeError, public
from hf_tsv.system.folders import absolute, check_output_folder, whole_folder
from hf_tsv.system.progress import bar, logger
from hf_tsv.system.text import counted


@public
def interference(
    checkpoints: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    base_model: str | PathLike[str] | None = None,
    output: str | Path | None = None,
    force: bool = False,
    rank: int | None = None,
    rank_fraction: float | None = None,
    exclude: str | Sequence[str] = Settings.exclude,
    qkv: Qkv | None = Settings.qkv,
    allow_other_base: bool = False,
    device: AnyDevice | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    subfolder: str | None = None,
    stream: bool = False,
    max_memory: int | str | None = None,
    progress: bool | None = None,
) -> InterferenceReport:
    """Measure which tasks interfere in a merge, layer by layer (section 3.2).

    Args:
        checkpoints (`Sequence[str]`): `org/name`, `org/name@revision`, `hf://…` or folders, of
            whole checkpoints or of task factors.
        base_model (`str`, *optional*): W0; default: the one the checkpoints' cards agree on.
        output (`str` or `Path`, *optional*): folder to write the report to: `interference.json`,
            pictures, and all of it in one page, `interference.html`.
        force (`bool`): replace a folder that holds an earlier report.
        rank (`int`, *optional*): triplets kept of each task; default ⌊k/T⌋.
        rank_fraction (`float`, *optional*): the same as a share of k.
        exclude (`Sequence[str]`): globs of weights that a merge would average.
        qkv (`str`, *optional*): `split` or `fused` attention projections; default: as the base
            stores them.
        allow_other_base, device, token, cache_dir, subfolder, stream, max_memory, progress: as in
            [`merge`].

    Returns:
        [`InterferenceReport`]: all of it.

    Raises:
        [`HfTsvError`]: with the reason and what to do.

    Example:
        >>> import hf_tsv
        >>> hf_tsv.interference(["org/clip-a", "org/clip-b"]).total  # doctest: +SKIP
    """
    processes.alone("`hf-tsv interference`")
    started = time.monotonic()
    globs = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    settings = Settings(rank=rank, rank_fraction=rank_fraction, exclude=globs, qkv=qkv)
    references = listed(checkpoints)
    refuse_one_alone(references)
    folder = None if output is None else absolute(Path(output))
    if folder is not None:
        check_output_folder(folder, [REPORT_PAGE], force=force)
    base_ref = None if base_model is None else fspath(base_model)
    access = Access.of(token, cache_dir, subfolder, stream=stream)
    work, sources = prepare(references, base_ref, None, settings, access, writes=False)
    refuse_nothing_decomposed(work.plan, sources.inputs)
    with underway(sources, Target(folder), progress) as run:
        work = replace(work, measure=True, allow_other_base=allow_other_base).within(
            max_memory, sources
        )
        place = pick_device(device)
        run.fetch()
        refuse_unchanged(work.plan, run.sources)
        if not allow_other_base:
            refuse_other_base(run.sources.base, run.sources.inputs)
        measured = _measured(run, work, place)
    report = summary(measured, time.monotonic() - started)
    if folder is not None:
        with whole_folder(folder) as staging:
            write_report(staging, report.public(), settings)
    return report


def _measured(run: Run, work: Merge, device: torch.device) -> Merged:
    """Merge every weight, and write none."""
    weights, noted, tasks = work.plan.weights, list[Finding](), len(run.sources.inputs)
    told = counted(len(weights), "weight"), counted(tasks, "task"), device.type
    logger.info("Measuring %s of %s on %s.", *told)
    with bar("Measuring", steps(weights), visible=run.show) as advance:

        def done(finding: Finding) -> None:
            noted.append(finding)
            advance(1)

        merge_weights(work, run.sources, weights, None, device=device, done=done)
    return diagnosed(work, run.sources, device, Findings(tasks, noted))


def refuse_nothing_decomposed(plan: MergePlan, inputs: Sequence[Task]) -> None:
    """Refuse to report on a merge in which no weight is decomposed, or of one task alone."""
    refuse_one_alone(inputs)
    if all(weight.treatment != "decomposed" for weight in plan.weights):
        why = Counter(weight.reason for weight in plan.weights if weight.reason)
        raise RecipeError(
            f"No weight would be decomposed ({why.most_common(1)[0][0]}), so there is no"
            " interference to report on.",
            "Use a narrower `exclude=`, or name fewer tasks.",
        )


def write_report(folder: Path, report: InterferenceReport, settings: Settings) -> None:
    """Write a report into a folder as JSON, pictures and a page."""
    base, *refs = (at_revision(e["ref"], e["revision"]) for e in (report.base_model, *report.tasks))
    words = ["hf-tsv", "interference", *refs, "--base-model", base]
    words += ["--rank", str(settings.rank)] if settings.rank else []
    words += ["--rank-fraction", str(settings.rank_fraction)] if settings.rank_fraction else []
    words += ["--qkv", settings.qkv] if settings.qkv else []
    globs = () if settings.exclude == Settings.exclude else settings.exclude
    words += [word for glob in globs for word in ("--exclude", glob)]
    pictures = drawing.attempted(lambda: of_interference(report)) or []
    for picture in pictures:
        (folder / picture.file).write_bytes(picture.png)
    (folder / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
    (folder / REPORT_PAGE).write_text(
        interference_page(report, pictures, shlex.join(words)), encoding="utf-8"
    )


def summary(done: Merged, seconds: float) -> InterferenceReport:
    """Report on a merge whose interference was measured in so many seconds."""
    findings = done.findings
    measured = {w.label: w for w in findings.weights if w.interference is not None}
    planned = {weight.label: weight for weight in done.merge.plan.weights}
    pairs = torch.zeros(findings.inputs, findings.inputs, dtype=torch.float64)
    weights: dict[str, dict[str, Any]] = {}
    blocks: dict[str, dict[str, float]] = {}
    kinds: dict[str, dict[str, float]] = {}
    for label, weight in measured.items():
        own = weight.interference
        assert own is not None
        index = torch.tensor(weight.tasks)
        here = torch.zeros_like(pairs)
        here[index[:, None], index] = torch.tensor(own.pairs, dtype=torch.float64)
        pairs += here
        used = dict(zip(weight.tasks, weight.ranks, strict=True))
        weights[label] = {
            "sti": own.sti,
            "sti_after": own.sti_after,
            "shape": list(planned[label].shape),
            "rank": planned[label].rank,
            "ranks": [used.get(task, 0) for task in range(findings.inputs)],
            "pairs": here.tolist(),
        }
        block, kind = block_and_kind(label)
        for part in (blocks.setdefault(block, {}), kinds.setdefault(kind, {})):
            for name in ("sti", "sti_after"):
                part[name] = part.get(name, 0.0) + weights[label][name]
    return InterferenceReport(
        tasks=_tasks(done, pairs),
        base_model=pinned_entry(done.sources.base),
        total=sum(entry["sti"] for entry in weights.values()),
        total_after=sum(entry["sti_after"] for entry in weights.values()),
        pairs=pairs.tolist(),
        weights=weights,
        blocks=blocks,
        kinds=kinds,
        spectra=_spectra(list(measured.values()), findings.inputs),
        diagnoses=[asdict(found) for found in done.diagnoses],
        warnings=done.warnings,
        seconds=round(seconds, 3),
        timings=findings.seconds.rounded(),
        device=done.device.type,
    )


def _spectra(weights: Sequence[Finding], tasks: int) -> dict[str, list[Any]]:
    """Spectrum of each task over all weights, as shares of its largest σ and of its whole energy.

    The triplets that factors do not keep count as energy, and are not known.
    """
    sigmas, energies = np.zeros((2, tasks, len(RANK_SHARES)))
    whole = np.zeros((tasks, 1))
    for weight in weights:
        assert weight.interference is not None
        own = list(weight.tasks)
        sigmas[own] += np.square(weight.interference.spectra)
        energies[own] += weight.interference.energies
        whole[own, 0] += np.square(np.multiply(weight.norms, weight.factors))
    tiny = np.finfo(float).tiny
    return {
        "rank_share": list(RANK_SHARES),
        "singular_values": np.sqrt(sigmas / np.maximum(sigmas[:, :1], tiny)).tolist(),
        "energy": np.minimum(energies / np.maximum(whole, tiny), 1.0).tolist(),
    }


def _tasks(done: Merged, pairs: Tensor) -> list[dict[str, Any]]:
    """Entries of the report on each task."""
    whole = float(pairs.sum()) or 1.0
    entries = []
    inputs, findings = done.sources.inputs, done.findings
    named = zip(inputs, distinct_names([item.pinned for item in inputs]), strict=True)
    for i, ((item, name), norm) in enumerate(zip(named, findings.norms(), strict=True)):
        own, base_norm = findings.changed(i)
        energy = kept = effective = 0.0
        for weight in findings.weights:
            if weight.interference is not None and i in weight.tasks:
                place = weight.tasks.index(i)
                square = (weight.norms[place] * weight.factors[place]) ** 2
                energy += square
                kept += weight.interference.kept[place]
                effective += square * weight.interference.effective_ranks[place]
        entries.append(
            {
                "name": name,
                **pinned_entry(item),
                "norm": norm,
                "relative_norm": own / base_norm if base_norm else 0.0,
                "effective_rank": effective / energy if energy else 0.0,
                "energy": min(1.0, kept / energy) if energy else 0.0,
                "share": float(pairs[i].sum()) / whole,
            }
        )
    return entries
