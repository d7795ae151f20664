"""The verb `sweep`: accuracy of each fine-tune with a share of its singular values."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_tsv.checkpoints.formats.task import equals_base
from hf_tsv.checkpoints.reference import at_revision
from hf_tsv.checkpoints.sources import Access, open_sources
from hf_tsv.evaluation.data import load, refuse_not_installed
from hf_tsv.evaluation.job import (
    checked_folder,
    chosen,
    in_one_line,
    noted,
    nothing_measured,
    refuse_no_fine_tune,
)  # fmt: skip
from hf_tsv.evaluation.zero_shot import accuracies
from hf_tsv.linalg import products
from hf_tsv.linalg.choices import AnyDevice
from hf_tsv.linalg.shapes import rank_at
from hf_tsv.linalg.svd import SVD, truncated_svd
from hf_tsv.models.building import ZERO_SHOT
from hf_tsv.models.loading import load_model, pipeline
from hf_tsv.recipes.images import EvaluationTask
from hf_tsv.recipes.settings import current_versions, share
from hf_tsv.reports.report import Report
from hf_tsv.runs.reading import named
from hf_tsv.system import processes
from hf_tsv.system.checks import check_counts
from hf_tsv.system.device import pick_device
from hf_tsv.system.errors import UsageError, public
from hf_tsv.system.progress import visible_by_default
from hf_tsv.verbs import pictures

RESULTS_FILE = "sweep.json"
FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True, repr=False)
class SweepReport(Report):
    """Accuracy of fine-tunes with shares of their singular values.

    Args:
        fractions (`list[float]`): shares of k = min(d_out, d_in) kept of every matrix.
        mean (`list[float]`): top-1, 0 to 1, at each of them, mean over the tasks.
        full (`float`): top-1 of the fine-tunes themselves, mean over the tasks.
        stored (`list[float]`): at each share, stored numbers over the numbers of the update.
        tasks (`dict[str, dict]`): results by task: `dataset`, `split`, `images`, `reference`,
            `base_model`, `full`, `accuracies` and `stored`.
        errors (`dict[str, str]`): error of each task that could not be measured.
        limit (`int`, *optional*): number of images per task, if not all.
        device (`str`): type of the device that computed.
        seconds (`float`): wall time.
        versions (`dict[str, str]`): versions of hf-tsv and torch.
    """

    fractions: list[float]
    mean: list[float]
    full: float
    stored: list[float]
    tasks: dict[str, dict[str, Any]]
    errors: dict[str, str]
    limit: int | None
    device: str
    seconds: float
    versions: dict[str, str] = field(default_factory=current_versions)

    def table(self) -> list[list[str | float]]:
        """Accuracy of each task and of all, at every share and whole."""
        found = {name: [*task["accuracies"], task["full"]] for name, task in self.tasks.items()}
        found["mean"] = [*self.mean, self.full]
        rows: list[list[str | float]] = [["task", *map("{:.0%}".format, self.fractions), "whole"]]
        return rows + [[name, *map("{:.1%}".format, values)] for name, values in found.items()]


@public
def sweep(
    tasks: Mapping[str, str] | Sequence[str | EvaluationTask] = (),
    references: Mapping[str, str | PathLike[str]] | None = None,
    *,
    rank_fraction: float | Sequence[float] = FRACTIONS,
    suite: str | None = None,
    base_model: str | PathLike[str] | None = None,
    output: str | Path | None = None,
    force: bool = False,
    limit: int | None = None,
    batch_size: int = 64,
    device: AnyDevice | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    progress: bool | None = None,
) -> SweepReport:
    """Measure low-rank approximations of every fine-tune on its own task (figures 2, 11, 12, 17).

    Every matrix of an update is decomposed once. For each share of the singular values the model is
    rebuilt in memory and classifies the same images. Parameters that are not matrices stay whole.

    Args:
        tasks, suite, limit, batch_size: as in [`evaluate`].
        references (`Mapping[str, str]`, *optional*): the fine-tune of each task; default: those of
            the suite.
        rank_fraction (`float` or `Sequence[float]`): shares of k = min(d_out, d_in).
        base_model (`str`, *optional*): W0; default: that of the suite, else the one named in
            the fine-tunes' cards.
        output (`str` or `Path`, *optional*): folder to write `sweep.json` to, and with matplotlib
            the picture `sweep.png`.
        force, device, token, cache_dir, progress: as in [`merge`].

    Returns:
        [`SweepReport`]: results of the tasks, and the errors of those that failed.

    Raises:
        [`HfTsvError`]: a share is not in (0, 1], a fine-tune is missing, or every task failed.

    Example:
        >>> import hf_tsv
        >>> hf_tsv.sweep({"dtd": "tanganke/dtd"}, {"dtd": "org/clip-dtd"})  # doctest: +SKIP
    """
    started = time.monotonic()
    processes.alone("`hf-tsv sweep`")
    refuse_not_installed("A sweep")
    for value in np.atleast_1d(rank_fraction):
        share("rank_fraction", value)
    fractions = sorted(set(map(float, np.atleast_1d(rank_fraction))))
    if not fractions:
        raise UsageError("`rank_fraction=` is empty.", "Give numbers above 0 and up to 1.")
    wanted = chosen(tasks, suite, references, base_model)
    refuse_no_fine_tune(wanted)
    check_counts(limit=limit, batch_size=batch_size)
    folder = checked_folder(output, RESULTS_FILE, force=force)
    show = visible_by_default() if progress is None else progress
    access = Access.of(token, cache_dir)
    run = _Run(fractions, wanted.base_model, access, pick_device(device), limit, batch_size, show)
    results: dict[str, dict[str, Any]] = {}
    errors: dict[str, str] = {}
    for task in wanted.tasks:
        with noted(errors, task.name, alone=len(wanted.tasks) == 1), in_one_line(task.name):
            results[task.name] = run.measured(task, wanted.fine_tunes[task.name])
    if not results:
        raise nothing_measured(errors)
    found = list(results.values())

    def means(what: str) -> list[float]:
        return [sum(c) / len(c) for c in zip(*(entry[what] for entry in found), strict=True)]

    report = SweepReport(
        fractions=fractions,
        mean=means("accuracies"),
        full=sum(entry["full"] for entry in found) / len(found),
        stored=means("stored"),
        tasks=results,
        errors=errors,
        limit=limit,
        device=run.device.type,
        seconds=round(time.monotonic() - started, 3),
    )
    if folder is not None:
        report.write(folder, RESULTS_FILE, lambda: [pictures.of_sweep(report.to_dict())])
    return report


@dataclass(frozen=True)
class _Matrix:
    """Decomposed update, with the parameter it belongs to and W0."""

    parameter: Tensor
    base: Tensor
    svd: SVD

    def put(self, fraction: float | None, fine_tuned: Tensor) -> None:
        """Set the parameter to W0 plus a share of the update; None for the fine-tuned value."""
        if fraction is None:
            self.parameter.copy_(fine_tuned)
            return
        r = self.rank(fraction)
        update = (self.svd.U[:, :r] * self.svd.S[:r]) @ self.svd.Vh[:r]
        self.parameter.copy_(self.base + update.to(self.base))

    def rank(self, fraction: float) -> int:
        """Number of triplets for a share, ⌊fraction · k⌋, at least 1."""
        return rank_at(fraction, self.base.shape)

    def stored(self, fraction: float) -> int:
        """Numbers that a share of the update takes: as factors, or whole if that is less."""
        rows, columns = self.base.shape
        return min(self.rank(fraction) * (rows + columns + 1), rows * columns)


@dataclass(frozen=True)
class _Run:
    """Settings that every task of a sweep shares."""

    fractions: Sequence[float]
    base_model: str | None
    access: Access
    device: torch.device
    limit: int | None
    batch_size: int
    show: bool

    def measured(self, task: EvaluationTask, reference: str) -> dict[str, Any]:
        """Accuracy of one fine-tune with every share of its singular values."""
        images = load(task, limit=self.limit, token=self.access.token)
        sources = open_sources([reference], self.base_model, self.access)
        base = at_revision(sources.base.pinned.ref, sources.base.pinned.revision)
        known: Any = {"token": self.access.token, "cache_dir": self.access.cache_dir}
        known |= {"dtype": torch.float32, "progress": self.show}
        place = str(self.device)
        pipe: Any = pipeline(ZERO_SHOT, reference, base_model=base, device=place, **known)
        w0 = load_model(base, kind=ZERO_SHOT, **known).state_dict()
        stored, matrices = self._decomposed(pipe.model, w0, reference, base)
        whole = [matrix.parameter.clone() for matrix in matrices]

        def put(fraction: float | None) -> None:
            for matrix, fine_tuned in zip(matrices, whole, strict=True):
                matrix.put(fraction, fine_tuned)

        variants: list[Callable[[], None]] = [partial(put, f) for f in (None, *self.fractions)]
        full, *rest = accuracies(
            pipe, variants, task, images, batch_size=self.batch_size, show=self.show
        )
        return {
            "dataset": task.dataset,
            "split": images.split,
            "images": len(images.rows),
            "reference": reference,
            "base_model": base,
            "full": full,
            "accuracies": rest,
            "stored": stored,
        }

    def _decomposed(
        self, model: Any, w0: Mapping[str, Tensor], reference: str, base_ref: str
    ) -> tuple[list[float], list[_Matrix]]:
        """Decomposed matrices that changed, and the share of numbers stored at each fraction."""
        matrices, dense = [], 0
        for name, parameter in model.named_parameters():
            base = w0[name].to(self.device)
            if torch.equal(parameter.data, base):
                continue
            if parameter.dim() != 2:
                dense += parameter.numel()
                continue
            delta = parameter.data.double() - base.double()
            rank = rank_at(max(self.fractions), delta.shape)
            with named(name, [reference]), products.threads(1):
                svd = truncated_svd(products.in_working_precision(delta), rank)
            matrices.append(_Matrix(parameter.data, base, svd))
        total = dense + sum(matrix.base.numel() for matrix in matrices)
        if not total:
            raise equals_base(reference, base_ref)
        stored = [
            (dense + sum(matrix.stored(fraction) for matrix in matrices)) / total
            for fraction in self.fractions
        ]
        return stored, matrices
