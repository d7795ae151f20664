"""Choice of α on labelled validation images: one merge, evaluated at many α."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_tsv.checkpoints.sources import Access
from hf_tsv.evaluation.data import LabelledImages, load, refuse_not_installed
from hf_tsv.evaluation.job import in_one_line
from hf_tsv.evaluation.zero_shot import accuracies
from hf_tsv.linalg.choices import AnyDevice
from hf_tsv.merging.building import built
from hf_tsv.merging.plan import Weight
from hf_tsv.merging.work import Merge, Merged, prepare
from hf_tsv.models.building import ZERO_SHOT
from hf_tsv.models.loading import load_model, pipeline
from hf_tsv.recipes.learning import AlphaSearch
from hf_tsv.runs.lifecycle import underway
from hf_tsv.runs.target import Target
from hf_tsv.system.processes import Processes
from hf_tsv.system.progress import logger


def search(
    wanted: AlphaSearch, data: Sequence[LabelledImages], folder: Path, once: Merged, *, show: bool
) -> AlphaSearch:
    """Evaluate W0 + α (W1 − W0) at every α, where W1 is the merge with α = 1, in float32.

    The folder holds W1, and `data` images of each task. The result is `wanted` with its results.

    Raises:
        [`HfTsvError`]: a dataset cannot be read, or the base model is no whole CLIP.
    """
    base, device, reached = once.merge.base, once.device, once.sources.access
    access: Any = {"token": reached.token, "cache_dir": reached.cache_dir, "progress": False}
    pipe = pipeline(
        ZERO_SHOT, folder, base_model=base, dtype=torch.float32, device=str(device), **access
    )
    w0 = load_model(base, kind=ZERO_SHOT, dtype=torch.float32, **access).state_dict()
    model: Any = pipe.model
    weights = {name: weight for weight in once.merge.plan.weights for name in weight.names}
    changed = [
        (weights.get(name), parameter.data, w0[name].to(device), parameter.data.clone())
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter.data, w0[name].to(device))
    ]
    variants = [partial(_put, changed, once.merge, alpha) for alpha in wanted.alphas]
    found = {}
    for task, images in zip(wanted.tasks, data, strict=True):
        with in_one_line(task.name):
            found[task.name] = tuple(
                accuracies(pipe, variants, task, images, batch_size=wanted.batch_size, show=show)
            )
    done = replace(wanted, images=tuple(len(images.rows) for images in data), accuracies=found)
    if done.alpha == 0 and once.merge.settings.layer_scale != "lines":
        logger.warning("α = 0 is best: the result is the base model.")
    logger.info("α = %g is best: %.2f%% on validation images.", done.alpha, 100 * max(done.means))
    return done


def _put(
    changed: Sequence[tuple[Weight | None, Tensor, Tensor, Tensor]], once: Merge, alpha: float
) -> None:
    """Put W0 + α M into each weight, or what α means where layers have factors of their own."""
    for weight, parameter, w0, w1 in changed:
        share = alpha
        if weight is not None:
            share = once.alpha_of(weight, alpha) / once.alpha_of(weight)
        torch.lerp(w0, w1, share, out=parameter)


def tuned(
    work: Merge,
    wanted: AlphaSearch,
    access: Access,
    device: AnyDevice | None,
    group: Processes,
    progress: bool | None,
) -> Merge:
    """The same merge with the best α: merges once with α = 1, in float32, and scores every α.

    Images are loaded before, so that a wrong name fails at once.
    """
    refuse_not_installed("Choosing α")
    images = [load(task, limit=wanted.limit, token=access.token) for task in wanted.tasks]
    settings = replace(
        work.settings, alpha=1.0, dtype="float32", out_format="transformers", keep_heads=False
    )
    once, sources = prepare(
        work.references, work.base, work.factors, settings, replace(access, subfolder=None),
        writes=False,
    )  # fmt: skip
    once = replace(once, allow_other_base=work.allow_other_base)
    once = once.within(work.max_memory, sources)
    with (
        underway(sources, Target(), progress) as run,
        built(run, once, device, group) as (folder, done),
    ):
        found = search(wanted, images, folder, done, show=run.show)
    return replace(work, settings=replace(work.settings, alpha=found.alpha), tuning=found)
