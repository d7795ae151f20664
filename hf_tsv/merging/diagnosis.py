"""Warnings about the inputs of a merge, each with its measured value and threshold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

import torch

from hf_tsv.checkpoints.formats.task import Task
from hf_tsv.merging.findings import Findings
from hf_tsv.merging.plan import MergePlan
from hf_tsv.system.text import counted

SAME_UPDATE = 0.999
"""Cosine from which on two updates count as one checkpoint under two names."""

FAR_ABOVE = 3.0
"""Ratio of an update's norm to the median of the others, from which on it drowns them. Published
tests of TSV-Merge with one task scaled up fell from 92.4 to 80.2 % normalised accuracy.
"""

COMPARABLE = 0.3
"""‖Δ‖ / ‖W0‖ from which an input is no fine-tune of this base; fine-tunes have 0.005 to 0.05."""

LOW_RANK = 0.5
"""Share of an update's squared norm in weights of few triplets, from which on it is low-rank."""

FEW = 0.125
"""Largest number of triplets above a checkpoint's rounding, as a share of k, that counts as few.
Rounding to 16 bits alone hides more than half of a full fine-tune's."""

MOSTLY_ROUNDING = 0.1
"""Ratio of the stored checkpoint's rounding to ‖Δ‖, from which on a warning is given."""

ROUNDED_BASE = 0.6
"""Least coefficient of the base's rounding in an update, 1 if the base was rounded after the
fine-tune was made of it and 0 if not, from which on a warning is given; not from 1.4 on, where the
update itself grows with the weights."""

RELIABLE = 0.1
"""Largest standard error of that coefficient that tells the two apart. Simulated updates (Gaussian,
heavy-tailed, low-rank, sparse, decayed, proportional to W0) had 0 ± 0.25 and 1 ± 0.25 below it."""

ROUNDING = 0.29
"""Standard deviation of rounding to a grid, 1/√12, in units of its step."""

TOWERS = {"vision_model.": "vision", "text_model.": "text"}


@dataclass(frozen=True)
class Diagnosis:
    """Warning about some inputs, with the measured value and the threshold that it passes.

    The kind is `same-update`, `large-norm`, `low-rank`, `other-base`, `frozen-tower`, `rounding`,
    `rounded-base`, `output-rounding` or `shared-directions`; the text is a sentence with the names
    and what to do.
    """

    kind: str
    text: str
    value: float
    threshold: float
    tasks: tuple[int, ...] = ()


def diagnoses(
    base: Task, inputs: Sequence[Task], scales: Sequence[float], plan: MergePlan, findings: Findings
) -> list[Diagnosis]:
    """Warnings about the inputs of a merge, whose updates have the factors `scales`."""
    return [
        *_same_updates(inputs, findings),
        *_large_norms(inputs, scales, findings),
        *_other_bases(inputs, findings),
        *_low_ranks(inputs, plan, findings),
        *_frozen_towers(inputs, scales, plan, findings),
        *_rounding(inputs, findings),
        *_rounded_bases(base, inputs, findings),
        *_output_rounding(plan, findings),
    ]


def _same_updates(inputs: Sequence[Task], findings: Findings) -> Iterator[Diagnosis]:
    cosines, shared, told = findings.cosines(), findings.shared, False
    for i, j in combinations(range(len(inputs)), 2):
        cosine = float(cosines[i, j])
        if abs(cosine) < SAME_UPDATE or str(inputs[i]) == str(inputs[j]):
            continue
        if cosine < 0:
            what = "are opposite updates and cancel out"
        elif shared:
            what = "are the same update, which is merged once"
        else:
            what = "are nearly the same update, and what distinguishes them is amplified"
        text = f"{inputs[i]} and {inputs[j]} {what} (cosine {cosine:.4f}); leave one out."
        yield Diagnosis("same-update", text, cosine, SAME_UPDATE, (i, j))
        told = True
    if shared and not told:
        text = f"Tasks share directions in {counted(shared, 'weight')}: these are merged once."
        yield Diagnosis("shared-directions", text, shared, 1)


def _large_norms(
    inputs: Sequence[Task], scales: Sequence[float], findings: Findings
) -> Iterator[Diagnosis]:
    sizes = findings.merged_norms()
    for i, norm in enumerate(sizes):
        usual = median([other for j, other in enumerate(sizes) if j != i and other] or [norm])
        if usual and norm >= FAR_ABOVE * usual:
            text = (
                f"The update of {inputs[i]} is {norm / usual:.1f} times as large as those of the"
                " other tasks and drowns them; give it a smaller weight,"
                f" {scales[i] * usual / norm:.2g} say."
            )
            yield Diagnosis("large-norm", text, norm / usual, FAR_ABOVE, (i,))


def _other_bases(inputs: Sequence[Task], findings: Findings) -> Iterator[Diagnosis]:
    for i, item in enumerate(inputs):
        norm, base_norm = findings.changed(i)
        if base_norm and norm >= COMPARABLE * base_norm:
            text = (
                f"{item} is {norm / base_norm:.2g} of the base model's norm away from it: probably"
                " a fine-tune of another model. Name that one with `base_model=REF`."
            )
            yield Diagnosis("other-base", text, norm / base_norm, COMPARABLE, (i,))


def _low_ranks(inputs: Sequence[Task], plan: MergePlan, findings: Findings) -> Iterator[Diagnosis]:
    """Warnings about low-rank updates of those that are not known to be."""
    planned = {weight.label: weight for weight in plan.weights}
    for i, item in enumerate(inputs):
        # Known to be one; or rounding hides triplets, and their number says nothing of the rank.
        if item.has_few_triplets or _rounded(item, i, findings)[0] >= MOSTLY_ROUNDING:
            continue
        low, total, most = 0.0, 0.0, 0
        for found in findings.weights:
            if not found.ranks or i not in found.tasks:
                continue
            weight, place = planned[found.label], found.tasks.index(i)
            energy, rank = found.norms[place] ** 2, found.ranks[place]
            total += energy
            if rank <= min(weight.rank - 1, FEW * min(weight.shape)):
                low += energy
                most = max(most, rank)
        if total and low >= LOW_RANK * total:
            text = (
                f"The update of {item} has at most {most} triplets above the rounding of its"
                f" checkpoint in weights with {low / total:.0%} of its energy: a low-rank (LoRA)"
                " fine-tune. No more than these are used."
            )
            yield Diagnosis("low-rank", text, low / total, LOW_RANK, (i,))


def _frozen_towers(
    inputs: Sequence[Task], scales: Sequence[float], plan: MergePlan, findings: Findings
) -> Iterator[Diagnosis]:
    """Warnings about towers that a task left unchanged and others changed."""
    planned = {weight.label: weight for weight in plan.weights}
    for prefix, tower in TOWERS.items():
        weights = [w for w in findings.weights if w.label.startswith(prefix)]
        changed = {task for weight in weights for task in weight.tasks}
        for i, item in enumerate(inputs):
            own = [planned[w.label] for w in weights if i in planned[w.label].inputs]
            known = all(weight.factor_of(i) and not weight.is_kept for weight in own)
            if changed and i not in changed and own and known and scales[i]:
                text = f"{item} left the {tower} tower as it was, which others changed."
                yield Diagnosis("frozen-tower", text, 0.0, 0.0, (i,))


def _rounding(inputs: Sequence[Task], findings: Findings) -> Iterator[Diagnosis]:
    for i, item in enumerate(inputs):
        share, dtype = _rounded(item, i, findings)
        if share >= MOSTLY_ROUNDING:
            text = (
                f"About {min(share, 1):.0%} of the update of {item} is rounding to {dtype}; use a"
                " checkpoint in float32 if there is one."
            )
            yield Diagnosis("rounding", text, share, MOSTLY_ROUNDING, (i,))


def _rounded_bases(base: Task, inputs: Sequence[Task], findings: Findings) -> Iterator[Diagnosis]:
    """Warnings about fine-tunes of a finer base than the one given, whose rounding they hold."""
    for i, item in enumerate(inputs):
        coefficient, error = findings.rounded_base(i)
        share, dtype = _rounded(base, i, findings)
        is_rounded = abs(coefficient - 1) <= 1 - ROUNDED_BASE and error <= RELIABLE
        if is_rounded and share >= MOSTLY_ROUNDING:
            text = (
                f"The base model {base} looks like a copy, rounded to {dtype}, of the one that"
                f" {item} was fine-tuned from: about {min(share, 1):.0%} of its update is that"
                " rounding. Name the original with `base_model=REF`."
            )
            yield Diagnosis("rounded-base", text, share, MOSTLY_ROUNDING, (i,))


def _output_rounding(plan: MergePlan, findings: Findings) -> Iterator[Diagnosis]:
    """Warning about a merged update that is small beside the steps of the type it is written in."""
    share, kinds = findings.lost, {spec.dtype for spec in plan.specs.values()}
    if share >= MOSTLY_ROUNDING:
        narrow = " and ".join(sorted(kind.in_torch for kind in kinds if kind.itemsize == 2))
        text = (
            f"About {min(share, 1):.0%} of the merged update is lost by rounding to {narrow}; write"
            " it with `dtype=float32`."
        )
        yield Diagnosis("output-rounding", text, share, MOSTLY_ROUNDING)


def _rounded(item: Task, task: int, findings: Findings) -> tuple[float, str]:
    """Ratio of a checkpoint's rounding to the ‖Δ‖ of a task, and the coarsest type it is in."""
    norm, base_norm = findings.changed(task)
    dtype = item.rounded_to
    if dtype is None or not norm:
        return 0.0, ""
    share = ROUNDING * torch.finfo(dtype).eps * base_norm / norm
    return share, str(dtype).removeprefix("torch.")
