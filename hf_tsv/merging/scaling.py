"""Factors of weights in a plan: of α and of each task; and lines that tell of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from hf_tsv.checkpoints.formats.task import Task, distinct_names
from hf_tsv.checkpoints.layout import BLOCK
from hf_tsv.merging.plan import KEPT, MergePlan, Weight
from hf_tsv.recipes.scaling import Factor, factor_in, matches
from hf_tsv.recipes.settings import Settings
from hf_tsv.system.errors import UsageError
from hf_tsv.system.text import counted


def scaled(
    plan: MergePlan, inputs: Sequence[Task], settings: Settings, factors: Sequence[Factor]
) -> MergePlan:
    """The plan with the factors of each weight, and with warnings of globs that match none.

    Raises:
        [`UsageError`]: weights that are merged as one have different factors.
    """
    weights = tuple(_scaled(weight, settings.scale, factors) for weight in plan.weights)
    plan = replace(plan, weights=weights)
    warnings = [
        f"`scale={task + ':' if task else ''}{glob}` matches no merged weight."
        for task, glob, _, count in _scales(plan, inputs, settings, factors)
        if not count
    ]
    names = [name for weight in weights for name in weight.names]
    warnings += [
        f"`keep_base={glob}` matches no weight."
        for glob in settings.keep_base
        if not any(matches(name, [glob]) for name in names)
    ]
    scaled_anyway = settings.layer_scale == "lines"
    if (settings.alpha or scaled_anyway) and not any(
        _is_changed(weight, factors) for weight in weights
    ):
        warnings.append("No update is left to merge: the result is the base model.")
    return replace(plan, warnings=(*plan.warnings, *warnings))


def by_block(plan: MergePlan, slope: float) -> dict[str, float]:
    """Factors by glob of the blocks that are merged: from 1 − s in the first to 1 + s in the last.

    Blocks are counted in each tower; that of a tower with one has the factor 1, as has everything
    outside of blocks.
    """
    blocks = {block: None for weight in plan.weights if (block := _block(weight))}
    merged = {_block(weight) for weight in plan.weights if weight.treatment != "copied"}
    last = {tower: max(n for t, n in blocks if t == tower) for tower, _ in blocks}
    found = {
        f"{tower}_model.encoder.layers.{n}.*": round(1 + slope * (2 * n / last[tower] - 1), 10)
        for tower, n in sorted(blocks)
        if (tower, n) in merged and last[tower]
    }
    return {glob: factor for glob, factor in found.items() if factor != 1}


def refuse_no_blocks(plan: MergePlan, slopes: Sequence[float]) -> None:
    """Refuse slopes other than 0 where nothing is merged in a block, as CLIPs name them."""
    merged = (weight for weight in plan.weights if weight.treatment != "copied")
    if any(slopes) and not any(map(_block, merged)):
        problem = "`slopes=` scales blocks (vision_model.encoder.layers.N), and none is merged."
        raise UsageError(problem, "Omit `slopes=`.")


def _block(weight: Weight) -> tuple[str, int] | None:
    """Tower and number of the block that a weight is in."""
    found = BLOCK.match(weight.label)
    return (found[1], int(found[2])) if found else None


def told(
    plan: MergePlan, inputs: Sequence[Task], settings: Settings, factors: Sequence[Factor]
) -> list[str]:
    """Lines on the weights that are scaled or kept, one for each glob."""
    lines = [
        f"{counted(count, 'weight')}{' of ' + task if task else ''} scaled by {factor:g} ({glob})"
        for task, glob, factor, count in _scales(plan, inputs, settings, factors)
        if count
    ]
    kept = [name for weight in plan.weights if weight.is_kept for name in weight.names]
    for glob in settings.keep_base:
        if count := sum(matches(name, [glob]) for name in kept):
            lines.append(f"{counted(count, 'weight')} {KEPT} ({glob})")
    return lines


def _scaled(weight: Weight, of_alpha: Mapping[str, float], factors: Sequence[Factor]) -> Weight:
    if weight.treatment == "copied":
        return weight
    own = tuple(factor_in(weight.names, one.scale) for one in factors)
    alpha = factor_in(weight.names, of_alpha)
    return replace(weight, alpha_factor=alpha, task_factors=own if set(own) != {1.0} else ())


def _is_changed(weight: Weight, factors: Sequence[Factor]) -> bool:
    if weight.treatment == "copied" or not weight.alpha_factor:
        return False
    return any(factors[i].weight * weight.factor_of(i) for i in weight.inputs)


def _scales(
    plan: MergePlan, inputs: Sequence[Task], settings: Settings, factors: Sequence[Factor]
) -> Iterator[tuple[str, str, float, int]]:
    """Task, glob, factor and number of merged weights of every entry; α has no task."""
    merged = [weight for weight in plan.weights if weight.treatment != "copied"]
    entries: list[tuple[str, range, Mapping[str, float]]]
    entries = [("", range(len(inputs)), settings.scale)]
    tasks = distinct_names([item.pinned for item in inputs])
    entries += [(name, range(i, i + 1), factors[i].scale) for i, name in enumerate(tasks)]
    for task, places, scale in entries:
        held = [n for w in merged if set(places) & set(w.inputs) for n in w.names]
        for glob, factor in scale.items():
            yield task, glob, factor, sum(matches(name, [glob]) for name in held)


def frozen_reason(weight: Weight, scales: Sequence[float]) -> str:
    """Reason why a weight was copied that was planned to change."""
    if all(scales[i] * weight.factor_of(i) for i in weight.inputs):
        return "equal to the base in every checkpoint"
    return "equal to the base in every checkpoint whose factor is not 0"


def entry(weight: Weight) -> dict[str, object]:
    """Factors of a weight for a report, if any is not 1."""
    found: dict[str, object] = {}
    if weight.alpha_factor != 1:
        found["alpha_factor"] = weight.alpha_factor
    if weight.task_factors:
        found["task_factors"] = list(weight.task_factors)
    return found
