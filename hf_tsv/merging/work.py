"""The description of a merge: resolved, planned and checked before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from hf_tsv.checkpoints import companions, places
from hf_tsv.checkpoints.fit import OTHER_BASE, other_base
from hf_tsv.checkpoints.formats import heads
from hf_tsv.checkpoints.formats.task import Task, distinct_names, equals_base, identity_entry
from hf_tsv.checkpoints.sources import DEFAULT_ACCESS, Access, Sources, open_sources
from hf_tsv.merging.costs import Parallelism, fitting, noted_bytes, peak_memory
from hf_tsv.merging.diagnosis import Diagnosis, diagnoses
from hf_tsv.merging.findings import Findings
from hf_tsv.merging.plan import MergePlan, Weight, make_plan, resolved
from hf_tsv.merging.scaling import scaled
from hf_tsv.methods.layer_scales import Layers
from hf_tsv.recipes.recipe import PinnedInput, Recipe, pinned_text
from hf_tsv.recipes.scaling import Factor, Weights, factors_of
from hf_tsv.recipes.settings import Settings, versions_of
from hf_tsv.system import memory
from hf_tsv.system.checks import size_in_bytes
from hf_tsv.system.errors import RecipeError, UsageError
from hf_tsv.system.progress import logger

if TYPE_CHECKING:
    from hf_tsv.recipes.learning import Adaptation
    from hf_tsv.recipes.searching import Search


LIBRARIES = 64_000_000
"""Bytes of the libraries that are loaded when the first weight is computed."""


@dataclass(frozen=True)
class Merge:
    """A merge to do, or a reconstruction: all of it but the open files, so it can be sent.

    Args:
        references (`tuple[str, ...]`): the tasks, pinned; so is `base`.
        factors (`tuple[Factor, ...]`): factor of each task's update.
        warnings (`tuple[str, ...]`): warnings so far.
        expected (`tuple[str | None, ...]`): fingerprints of local folders in a recipe; base last.
        recipe_device (`str`, *optional*): type of device in a recipe.
        verb (`str`): what is done, for the bar.
        task_head (`bool`): the output gets the task head of the only input.
        max_memory (`int`, *optional*): bytes each process may use; `parallelism` fits into them.
        measure (`bool`): measure task interference.
        known (`Any`): result of the method's pass over all weights before the first is merged.
        coefficients (`dict[str, tuple[float, ...]]`): factor of each task by weight, for the method
            ada; `adaptation` says how they are learned, or were.
        tuning ([`Search`], *optional*): how method, α and slope are chosen, or were.
        allow_other_base (`bool`): merge even what seems to be fine-tuned from another model.
        layers ([`Layers`], *optional*): factors of layers by depth, once they are measured.
    """

    references: tuple[str, ...]
    base: str
    factors: tuple[Factor, ...]
    settings: Settings
    plan: MergePlan
    warnings: tuple[str, ...]
    expected: tuple[str | None, ...]
    recipe_device: str | None = None
    verb: str = "Merging"
    task_head: bool = False
    max_memory: int | None = None
    parallelism: Parallelism = field(default_factory=Parallelism)
    measure: bool = False
    known: Any = None
    coefficients: dict[str, tuple[float, ...]] = field(default_factory=dict)
    adaptation: Adaptation | None = None
    tuning: Search | None = None
    allow_other_base: bool = False
    layers: Layers | None = None

    def alpha_of(self, weight: Weight, alpha: float | None = None) -> float:
        """Factor of the merged update of one weight, for the α of the settings or another."""
        alpha = self.settings.alpha if alpha is None else alpha
        alpha = alpha if self.layers is None else self.layers.factor(weight.label, alpha)
        return alpha * weight.alpha_factor

    @property
    def scales(self) -> tuple[float, ...]:
        """Factor of each task's update in all weights."""
        return tuple(one.weight for one in self.factors)

    def within(self, max_memory: int | str | None, sources: Sources) -> Merge:
        """The same merge with as much parallelism as the memory of this process allows."""
        if max_memory is not None:
            max_memory = size_in_bytes(max_memory, name="max_memory")
        used = memory.resident() + LIBRARIES + sources.waiting_bytes()
        used += noted_bytes(self.plan.weights)
        threads = torch.get_num_threads()
        found = fitting(self.plan.weights, threads, max_memory, used, measure=self.measure)
        return replace(self, max_memory=max_memory, parallelism=found)

    def peak_memory(self, sources: Sources) -> int:
        """Bytes in use at most, about, on top of the interpreter and its libraries."""
        weights = self.plan.weights
        computing = peak_memory(weights, self.parallelism, measure=self.measure)
        return sources.waiting_bytes() + noted_bytes(weights) + computing

    def warned(self, text: str) -> Merge:
        """The same merge with one more warning, which is logged."""
        logger.warning(text)
        return replace(self, warnings=(*self.warnings, text))

    def identity(self, sources: Sources, device: torch.device) -> dict[str, Any]:
        """Everything that decides about the bytes of the result."""
        return {
            "verb": self.verb,
            "base_model": identity_entry(sources.base),
            "inputs": [identity_entry(item) for item in sources.inputs],
            "weights": [asdict(one) for one in self.factors],
            "settings": asdict(self.settings),
            "tensors": {n: [str(t.dtype), t.shape] for n, t in self.plan.specs.items()},
            "versions": versions_of(self.settings.row),
            "device": device.type,
            "measure": self.measure,
            "coefficients": self.coefficients,
        }


@dataclass(frozen=True)
class Merged:
    """A merge whose weights are computed, with what was learned before the first of them."""

    merge: Merge
    sources: Sources
    device: torch.device
    findings: Findings
    diagnoses: tuple[Diagnosis, ...]

    @property
    def warnings(self) -> list[str]:
        """Warnings of before the first weight, then of what the weights showed."""
        return [*self.merge.warnings, *(found.text for found in self.diagnoses)]

    def published(self, text: str) -> str:
        """A text that others may read: with the names of local folders instead of their paths."""
        for item in self.sources.all():
            if item.pinned.is_local and "/" in item.pinned.ref:
                text = text.replace(item.pinned.ref, item.pinned.name)
        return text


def diagnosed(merge: Merge, sources: Sources, device: torch.device, findings: Findings) -> Merged:
    """The merge with what its weights showed; tells what is odd about the inputs."""
    found = diagnoses(sources.base, sources.inputs, merge.scales, merge.plan, findings)
    for diagnosis in found:
        for item in (sources.inputs[i] for i in diagnosis.tasks if _is_other_base(diagnosis)):
            if item.is_whole and not merge.allow_other_base:
                raise other_base(item, sources.base, diagnosis.value)
    for diagnosis in found:
        logger.warning(diagnosis.text)
    return Merged(merge, sources, device, findings, tuple(found))


def _is_other_base(diagnosis: Diagnosis) -> bool:
    return diagnosis.kind == "other-base" and diagnosis.value >= OTHER_BASE


def prepare(
    checkpoints: Sequence[str],
    base_ref: str | None,
    weights: Weights | Sequence[Factor] | None,
    settings: Settings,
    access: Access = DEFAULT_ACCESS,
    warnings: Sequence[str] = (),
    *,
    writes: bool = True,
    only_factors: bool = False,
) -> tuple[Merge, Sources]:
    """Resolve every reference once, read every header, and plan.

    Args:
        base_ref (`str`, *optional*): default: the base they agree on.
        weights (`Sequence` or `Mapping`, *optional*): factor of each task's update, in order or by
            name; default: 1. The settings may name tasks in `scale` too.
        writes (`bool`): a checkpoint is to be written, which needs a processor.
        only_factors (`bool`): the tasks must be task factors.
    """
    if settings.layer_scale == "lines" and len(checkpoints) == 1:
        problem = "`layer_scale=lines` scales what is merged of several tasks, and there is one."
        raise UsageError(problem, "Omit it, or name more checkpoints.")
    scale, factors = factors_of(checkpoints, weights, settings.scale)
    sources = open_sources(checkpoints, base_ref, access, only_factors=only_factors)
    for warning in sources.warnings:  # what they say may explain why the plan is refused
        logger.warning(warning)
    settings = replace(resolved(sources.base, settings), scale=scale)
    plan = _planned(sources, settings, factors)
    missing = companions.warnings(sources.base) if writes else []
    if len(checkpoints) == 1 and sources.inputs[0].is_whole and settings.alpha == 1:
        logger.info("%s is the only checkpoint: it is not merged with another.", *sources.inputs)
    later = [*warnings, *_alpha_warnings(settings), *plan.warnings, *missing]
    for warning in later:
        logger.warning(warning)
    merge = Merge(
        references=tuple(pinned_text(item.pinned) for item in sources.inputs),
        base=pinned_text(sources.base.pinned),
        factors=tuple(factors),
        settings=settings,
        plan=plan,
        warnings=(*sources.warnings, *later),
        expected=(None,) * (len(checkpoints) + 1),
    )
    return merge, sources


def replanned(merge: Merge, sources: Sources, settings: Settings) -> Merge:
    """The same merge with other settings, and warnings of its own plan, which are not told."""
    plan = _planned(sources, settings, merge.factors)
    others = (warning for warning in merge.warnings if warning not in merge.plan.warnings)
    merge = replace(merge, settings=settings, plan=plan, warnings=(*others, *plan.warnings))
    return merge.within(merge.max_memory, sources)


def _planned(sources: Sources, settings: Settings, factors: Sequence[Factor]) -> MergePlan:
    plan = make_plan(sources.base, sources.inputs, settings)
    return scaled(plan, sources.inputs, settings, factors)


def _alpha_warnings(settings: Settings) -> list[str]:
    """Warnings about values of α that work, and are rarely meant; LiNeS adds α to a factor."""
    alpha = settings.alpha
    if settings.layer_scale == "lines":
        return []
    if alpha == 0:
        return ["α is 0: the result is the base model."]
    return [f"α is {alpha:g}: the updates are subtracted."] if alpha < 0 else []


def with_own_alpha(merge: Merge, inputs: Sequence[Task]) -> Merge:
    """The same merge with the method's default of α for adapters, if all inputs are some."""
    alpha = merge.settings.row.alpha_of_adapters
    if alpha is None or not all(item.is_adapter for item in inputs):
        return merge
    logger.info("All inputs are adapters: α is %g.", alpha)
    return replace(merge, settings=replace(merge.settings, alpha=alpha))


def refuse_unchanged(plan: MergePlan, sources: Sources) -> None:
    """Find inputs that equal the base before the first decomposition: smallest weights first."""
    base = sources.base
    names = (n for w in plan.weights if w.treatment != "copied" or w.is_kept for n in w.names)
    by_size = sorted(names, key=lambda name: base.tensors[name].nbytes)
    for item in sources.inputs:
        held = (name for name in by_size if name in item.tensors)
        if not any(item.differs(base.original([name])) for name in held):
            raise equals_base(str(item), str(base))


def of_recipe(recipe: Recipe, access: Access) -> tuple[Merge, Sources]:
    """Prepare the merge that a recipe describes, whose folders are where it says."""
    base = recipe.base_model
    merge, sources = prepare(
        [pinned_text(item) for item in recipe.inputs],
        None if base is None else pinned_text(base),
        [Factor(item.weight, item.scale) for item in recipe.inputs],
        recipe.settings,
        access,
        warnings=_version_warnings(recipe),
    )
    merged = {
        w.label
        for w in merge.plan.weights
        if w.treatment in ("decomposed", "averaged") or w.is_kept
    }
    if unknown := sorted(map(str, recipe.coefficients.keys() - merged)):
        problem = f"The recipe has coefficients of {unknown[0]}, which is not a merged weight."
        raise RecipeError(problem, "Use the recipe as it was written.")
    merge = replace(
        merge,
        expected=(
            *(item.fingerprint for item in recipe.inputs),
            None if base is None else base.fingerprint,
        ),
        allow_other_base=recipe.allow_other_base,
        recipe_device=recipe.device,
        coefficients=recipe.coefficients,
        adaptation=recipe.adaptation,
    )
    return merge, sources


def _version_warnings(recipe: Recipe) -> list[str]:
    here = versions_of(recipe.settings.row)
    different = ", ".join(
        f"{name} {version} (here {here[name]})"
        for name, version in recipe.versions.items()
        if here.get(name, version) != version
    )
    return [f"The recipe was made with {different}: the bytes may differ."] if different else []


def recipe_of(done: Merged) -> Recipe:
    """The recipe that repeats a merge; this machine remembers where its local folders are."""
    merge, sources = done.merge, done.sources

    def pinned(item: Task, key: int, factor: Factor) -> PinnedInput:
        fingerprint = done.findings.fingerprint(key) if item.pinned.is_local else None
        places.note(fingerprint, item.pinned)
        own = factor.weight, dict(factor.scale)
        return PinnedInput(item.pinned.name, item.pinned.revision, fingerprint, *own)

    return Recipe(
        pinned(sources.base, -1, Factor()),
        tuple(pinned(item, i, merge.factors[i]) for i, item in enumerate(sources.inputs)),
        merge.settings,
        done.device.type,
        versions_of(merge.settings.row),
        coefficients=merge.coefficients,
        adaptation=merge.adaptation,
        allow_other_base=merge.allow_other_base and any(map(_is_other_base, done.diagnoses)),
    )


def kept_heads(settings: Settings, inputs: Sequence[Task]) -> dict[str, Task]:
    """The tasks whose heads are written, by file."""
    if not settings.keep_heads:
        return {}
    files = heads.file_names(distinct_names([item.pinned for item in inputs]))
    return {file: item for file, item in zip(files, inputs, strict=True) if item.head}


def refuse_no_heads(settings: Settings, inputs: Sequence[Task]) -> None:
    """Refuse to keep heads where there are none."""
    if settings.keep_heads and not kept_heads(settings, inputs):
        hint = "Omit `keep_heads=True`; zero-shot classification needs none."
        raise RecipeError("No checkpoint has a task head to keep.", hint)
