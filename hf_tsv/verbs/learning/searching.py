"""Search for method, α and slope on labelled images: one merge for all trials of a method."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_tsv.checkpoints import companions
from hf_tsv.checkpoints.sources import Sources, open_sources
from hf_tsv.evaluation.data import LabelledImages, load, refuse_not_installed
from hf_tsv.evaluation.finished import Finished
from hf_tsv.evaluation.job import in_one_line
from hf_tsv.evaluation.zero_shot import accuracies
from hf_tsv.linalg.choices import AnyDevice
from hf_tsv.merging.building import built
from hf_tsv.merging.plan import Weight
from hf_tsv.merging.scaling import by_block
from hf_tsv.merging.work import Merge, Merged, replanned
from hf_tsv.models.building import ZERO_SHOT
from hf_tsv.models.loading import load_model, pipeline
from hf_tsv.recipes.images import EvaluationTask
from hf_tsv.recipes.scaling import factor_in
from hf_tsv.recipes.searching import Search, Trial, is_test, named, refused_split
from hf_tsv.runs.lifecycle import underway
from hf_tsv.runs.target import Target
from hf_tsv.system.device import pick_device
from hf_tsv.system.processes import Processes
from hf_tsv.system.progress import logger
from hf_tsv.system.text import counted

VISION = ("vision_model.", "visual_projection.", "logit_scale")
"""Beginnings of the names of weights that no text is embedded with."""


def tuned(
    work: Merge,
    wanted: Search,
    sources: Sources,
    finished: Finished,
    device: AnyDevice | None,
    group: Processes,
    progress: bool | None,
) -> Merge:
    """The same merge with the settings of the best trial.

    Images are loaded first, so that a wrong name fails at once. Then each method merges once, with
    α = 1 and in float32, and all its trials are scored from that.

    Raises:
        [`HfTsvError`]: a dataset cannot be read, or has test images.
    """
    refuse_not_installed("Choosing α")
    data = [_loaded(task, wanted.limit, sources.access.token) for task in wanted.tasks]
    trials, merges = (counted(len(wanted.points), "trial"), counted(len(wanted.by_method), "merge"))
    logger.info("Searching: %s from %s.", trials, merges)
    results: list[Trial] = []
    for points in wanted.by_method.values():
        one = _OfMethod(work, wanted, points, sources, pick_device(device), finished)
        results += one.scored(data, group, progress)
    done = replace(wanted, images=tuple(len(one.rows) for one in data), results=tuple(results))
    best = done.best
    if best.alpha == 0 and work.settings.layer_scale != "lines":
        logger.warning("α = 0 is best: the result is the base model.")
    said = named(best, alone=done.varies_alpha_alone)
    logger.info("%s is best: %.2f%% on validation images.", said, 100 * best.mean)
    scale = dict(work.settings.scale)
    for glob, factor in by_block(work.plan, best.slope).items():
        scale[glob] = scale.get(glob, 1.0) * factor
    settings = replace(work.settings, method=best.method, alpha=best.alpha, scale=scale)
    chosen = replanned(work, sources, settings)
    for warning in chosen.warnings:
        if warning not in work.warnings:
            logger.warning(warning)
    return replace(chosen, tuning=done)


def _loaded(task: EvaluationTask, limit: int | None, token: str | None) -> LabelledImages:
    """Images of a task; those of a folder are no test images, unless it has only that split."""
    images = load(task, limit=limit, token=token)
    if is_test(images.split) and len(images.splits) > 1:
        raise refused_split(task)
    return images


@dataclass(frozen=True)
class _OfMethod:
    """The trials of one method.

    `work` is the merge of any method, and `sources` are opened, but not fetched.
    """

    work: Merge
    wanted: Search
    points: Sequence[Trial]
    sources: Sources
    device: torch.device
    finished: Finished

    def scored(
        self, data: Sequence[LabelledImages], group: Processes, progress: bool | None
    ) -> list[Trial]:
        """The trials with their accuracies; what an earlier run has found is not made again."""
        method = self.points[0].method
        settings = replace(
            self.work.settings, method=method, alpha=1.0, dtype="float32",
            out_format="transformers", keep_heads=False,
        )  # fmt: skip
        once = replace(replanned(self.work, self.sources, settings), measure=False, tuning=None)
        tasks = list(zip(self.wanted.tasks, data, strict=True))
        keys = {task.name: self._key(once, task, images) for task, images in tasks}
        found: dict[str, list[float]] = {}
        for name, key in keys.items():
            if (result := self.finished.get(key)) is not None:
                logger.info("Resuming: %s with %s is done.", name, method)
                found[name] = result["accuracies"]
        left = [(task, images) for task, images in tasks if task.name not in found]
        if left:
            access = replace(self.sources.access, subfolder=None)  # what is pinned names it
            sources = open_sources(self.work.references, self.work.base, access)
            with (
                underway(sources, Target(), progress) as run,
                built(run, once, self.device, group) as (folder, merged),
            ):
                scoring = _Scoring.of(folder, merged, self.points)
                for task, images in left:
                    with in_one_line(task.name):
                        values = scoring.accuracies(task, images, self.wanted.batch_size, run.show)
                    self.finished.add(keys[task.name], {"accuracies": values})
                    found[task.name] = values
        return [
            replace(point, accuracies={task.name: found[task.name][i] for task, _ in tasks})
            for i, point in enumerate(self.points)
        ]

    def _key(self, once: Merge, task: EvaluationTask, images: LabelledImages) -> str:
        """Digest of everything that determines the accuracies of the trials on a task."""
        points = [(point.alpha, point.slope) for point in self.points]
        identity = once.identity(self.sources, self.device)
        pinned = self.sources.base.pinned
        files = companions.present(pinned) if pinned.is_local else ()
        texts = [(n, hashlib.sha256(_content(pinned.files.folder, n)).hexdigest()) for n in files]
        said = [identity, texts, points, asdict(task), images.identity]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _content(folder: Path | None, name: str) -> bytes:
    assert folder is not None  # of what is local
    return (folder / name).read_bytes()


@dataclass(frozen=True)
class _Scoring:
    """A model with the trials of a method that are put into it in turn.

    `changed` are the weights that a trial sets, with W0 and the W1 of the merge with α = 1, and
    `shares` of every trial how far it goes from the one to the other in each.
    """

    pipe: Any
    changed: Sequence[tuple[str, Tensor, Tensor, Tensor]]
    shares: Sequence[Sequence[float]]

    @staticmethod
    def of(folder: Path, once: Merged, points: Sequence[Trial]) -> _Scoring:
        """The same of a merge with α = 1 in a folder."""
        merge, device, reached = once.merge, once.device, once.sources.access
        access: Any = {"token": reached.token, "cache_dir": reached.cache_dir, "progress": False}
        pipe = pipeline(
            ZERO_SHOT, folder, base_model=merge.base, dtype=torch.float32, device=str(device),
            **access,
        )  # fmt: skip
        base = load_model(merge.base, kind=ZERO_SHOT, dtype=torch.float32, **access).state_dict()
        model: Any = pipe.model
        changed = [
            (name, parameter.data, w0, parameter.data.clone())
            for name, parameter in model.named_parameters()
            if not torch.equal(parameter.data, w0 := base[name].to(device))
        ]
        weights = {name: weight for weight in merge.plan.weights for name in weight.names}
        scales = {point.slope: by_block(merge.plan, point.slope) for point in points}
        shares = [
            [
                _share(merge, weights.get(name), point.alpha, scales[point.slope])
                for name, *_ in changed
            ]
            for point in points
        ]
        return _Scoring(pipe, changed, shares)

    def accuracies(
        self, task: EvaluationTask, images: LabelledImages, batch_size: int, show: bool
    ) -> list[float]:
        """Top-1 accuracy of every trial on one task, 0 to 1."""
        puts = [partial(self._put, shares) for shares in self.shares]
        same = all(name.startswith(VISION) for name, *_ in self.changed)
        return accuracies(
            self.pipe, puts, task, images, batch_size=batch_size, show=show, same_text=same
        )

    def _put(self, shares: Sequence[float]) -> None:
        """Put W0 + f (W1 − W0) into each weight."""
        for (_, parameter, w0, w1), share in zip(self.changed, shares, strict=True):
            torch.lerp(w0, w1, share, out=parameter)


def _share(once: Merge, weight: Weight | None, alpha: float, scale: Mapping[str, float]) -> float:
    """Factor of W1 − W0 in a weight: α and the slope, or what α means where layers have factors."""
    if weight is None:
        return alpha
    return once.alpha_of(weight, alpha) * factor_in(weight.names, scale) / once.alpha_of(weight)
