"""The description of a merge: resolved, planned and checked before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_tsv.checkpoints import companions
from hf_tsv.checkpoints.formats import heads
from hf_tsv.checkpoints.formats.task import Task, distinct_names, equals_base, identity_entry
from hf_tsv.checkpoints.sources import DEFAULT_ACCESS, Access, Sources, open_sources
from hf_tsv.merging.costs import Parallelism, fitting, noted_bytes
from hf_tsv.merging.diagnosis import diagnoses
from hf_tsv.merging.findings import Findings
from hf_tsv.merging.plan import MergePlan, make_plan, resolved
from hf_tsv.recipes.recipe import PinnedInput, Recipe, pinned_text
from hf_tsv.recipes.settings import Settings, versions_of
from hf_tsv.system import memory
from hf_tsv.system.checks import check_number, size_in_bytes
from hf_tsv.system.errors import RecipeError
from hf_tsv.system.progress import logger

if TYPE_CHECKING:
    from hf_tsv.recipes.learning import Adaptation, AlphaSearch


LIBRARIES = 64_000_000
"""Bytes of the libraries that are loaded when the first weight is computed."""


@dataclass(frozen=True)
class Job:
    """A merge whose references are resolved and whose headers fit.

    Args:
        sources ([`Sources`]): base model and tasks.
        scales (`tuple[float, ...]`): factor of each task's update.
        settings ([`Settings`]): how to merge.
        plan ([`MergePlan`]): which weight gets which treatment.
        warnings (`list[str]`): so far.
        expected (`tuple[str | None, ...]`): fingerprints of local folders in a recipe; base last.
        recipe_device (`str`, *optional*): type of device in a recipe.
        head ([`Task`], *optional*): whose task head the output gets.
        verb (`str`): what is done, for the bar.
        max_memory (`int`, *optional*): bytes each process may use.
        parallelism ([`Parallelism`]): what fits into them.
        measure (`bool`): find who disturbs whom.
        known (`Any`): result of the method's pass over all weights before the first is merged.
        coefficients (`dict[str, tuple[float, ...]]`): of each task by weight, for the method ada.
        adaptation ([`Adaptation`], *optional*): how they are learned, or were.
        tuning ([`AlphaSearch`], *optional*): how α was chosen.
    """

    sources: Sources
    scales: tuple[float, ...]
    settings: Settings
    plan: MergePlan
    warnings: list[str]
    expected: tuple[str | None, ...]
    recipe_device: str | None = None
    head: Task | None = None
    verb: str = "Merging"
    max_memory: int | None = None
    parallelism: Parallelism = field(default_factory=Parallelism)
    measure: bool = False
    known: Any = None
    coefficients: dict[str, tuple[float, ...]] = field(default_factory=dict)
    adaptation: Adaptation | None = None
    tuning: AlphaSearch | None = None

    def within(self, max_memory: int | str | None) -> Job:
        """The same job with as much parallelism as memory allows."""
        if max_memory is not None:
            max_memory = size_in_bytes(max_memory, name="max_memory (--max-memory)")
        used = memory.resident() + LIBRARIES + self.sources.waiting_bytes()
        used += noted_bytes(self.plan.weights)
        threads = torch.get_num_threads()
        found = fitting(self.plan.weights, threads, max_memory, used, measure=self.measure)
        return replace(self, max_memory=max_memory, parallelism=found)

    def to_json(self, device: torch.device) -> dict[str, Any]:
        """Everything that decides about the bytes of the result."""
        return {
            "verb": self.verb,
            "base_model": identity_entry(self.sources.base),
            "inputs": [identity_entry(item) for item in self.sources.inputs],
            "weights": self.scales,
            "settings": asdict(self.settings),
            "tensors": {n: [str(t.dtype), t.shape] for n, t in self.plan.specs.items()},
            "versions": versions_of(self.settings.row),
            "device": device.type,
            "measure": self.measure,
            "coefficients": self.coefficients,
        }


def prepare(
    checkpoints: Sequence[str],
    base_ref: str | None,
    scales: Sequence[float] | None,
    settings: Settings,
    access: Access = DEFAULT_ACCESS,
    warnings: Sequence[str] = (),
    *,
    writes: bool = True,
    only_factors: bool = False,
) -> Job:
    """Resolve every reference once, read every header, and plan.

    Args:
        checkpoints (`Sequence[str]`): the tasks.
        base_ref (`str`, *optional*): default: the base they agree on.
        scales (`Sequence[float]`, *optional*): factor of each task's update.
        settings ([`Settings`]): how to merge.
        access ([`Access`]): how checkpoints are reached.
        warnings (`Sequence[str]`): so far.
        writes (`bool`): a checkpoint is to be written, which needs a processor.
        only_factors (`bool`): the tasks must be task factors.
    """
    if not checkpoints:
        raise RecipeError("There is nothing to merge.", "Name at least one checkpoint.")
    scales = [1.0] * len(checkpoints) if scales is None else list(scales)
    if len(scales) != len(checkpoints):
        raise RecipeError(
            f"There are {len(scales)} weights for {len(checkpoints)} checkpoints.",
            "Give one weight for each checkpoint.",
        )
    for scale in scales:
        check_number("A weight", scale)
    if not any(scales):
        raise RecipeError("Every weight is 0.", "Give at least one task a weight.")
    sources = open_sources(checkpoints, base_ref, access, only_factors=only_factors)
    settings = resolved(sources.base, settings)
    plan = make_plan(sources.base, sources.inputs, settings)
    missing = companions.warnings(sources.base) if writes else []
    found = [*warnings, *sources.warnings, *plan.warnings, *missing]
    for warning in found:
        logger.warning(warning)
    expected = (None,) * (len(checkpoints) + 1)
    return Job(sources, tuple(map(float, scales)), settings, plan, found, expected)


def refuse_unchanged(job: Job) -> None:
    """Find inputs that equal the base before the first decomposition: smallest weights first."""
    base = job.sources.base
    names = (n for w in job.plan.weights if w.treatment != "copied" for n in w.names)
    by_size = sorted(names, key=lambda name: base.tensors[name].nbytes)
    for item in job.sources.inputs:
        held = (name for name in by_size if name in item.tensors)
        if not any(item.differs(base.original([name])) for name in held):
            raise equals_base(str(item), str(base))


def warned(job: Job, findings: Findings) -> list[str]:
    """Tell what is odd about the inputs."""
    found = diagnoses(job.sources.inputs, job.scales, job.plan, findings)
    for diagnosis in found:
        logger.warning(diagnosis.text)
    return [diagnosis.text for diagnosis in found]


def job_of_recipe(recipe: Recipe, access: Access) -> Job:
    for item in (*recipe.inputs, recipe.base_model):
        if item.revision is None and not Path(item.ref).expanduser().is_dir():
            raise RecipeError(
                f"The recipe was made from the folder {item.ref}, which is not here.",
                "Run it where that folder is, or restore it.",
            )
    job = prepare(
        [pinned_text(item) for item in recipe.inputs],
        pinned_text(recipe.base_model),
        [item.weight for item in recipe.inputs],
        recipe.settings,
        access,
        warnings=_version_warnings(recipe),
    )
    merged = {w.label for w in job.plan.weights if w.treatment in ("decomposed", "averaged")}
    if unknown := sorted(map(str, recipe.coefficients.keys() - merged)):
        raise RecipeError(
            f"The recipe has coefficients of {unknown[0]}, which is no weight that is merged.",
            "Use the recipe as it was written.",
        )
    expected = tuple(item.fingerprint for item in (*recipe.inputs, recipe.base_model))
    return replace(
        job,
        expected=expected,
        recipe_device=recipe.device,
        coefficients=recipe.coefficients,
        adaptation=recipe.adaptation,
    )


def _version_warnings(recipe: Recipe) -> list[str]:
    here = versions_of(recipe.settings.row)
    different = [
        f"{name} {version} (here {here[name]})"
        for name, version in recipe.versions.items()
        if here.get(name, version) != version
    ]
    if not different:
        return []
    return [f"The recipe was made with {', '.join(different)}: the bytes may differ."]


def recipe_of(job: Job, findings: Findings, device: torch.device) -> Recipe:
    def pinned(item: Task, key: int, scale: float) -> PinnedInput:
        fingerprint = findings.fingerprint(key) if item.pinned.is_local else None
        return PinnedInput(item.pinned.ref, item.pinned.revision, fingerprint, scale)

    inputs = tuple(
        pinned(item, i, scale)
        for i, (item, scale) in enumerate(zip(job.sources.inputs, job.scales, strict=True))
    )
    return Recipe(
        pinned(job.sources.base, -1, 1.0),
        inputs,
        job.settings,
        device.type,
        versions_of(job.settings.row),
        coefficients=job.coefficients,
        adaptation=job.adaptation,
    )


def kept_heads(job: Job) -> dict[str, Task]:
    """The tasks whose heads are written, by file."""
    if not job.settings.keep_heads:
        return {}
    inputs = job.sources.inputs
    files = heads.file_names(distinct_names([item.pinned for item in inputs]))
    return {file: item for file, item in zip(files, inputs, strict=True) if item.head}


def refuse_no_heads(job: Job) -> None:
    """Refuse to keep heads where there are none."""
    if job.settings.keep_heads and not kept_heads(job):
        raise RecipeError(
            "No checkpoint has a task head to keep.",
            "Leave --keep-heads out; zero-shot classification needs none.",
        )
