"""The report of `hf_tsv.merge`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_tsv.merging import scaling
from hf_tsv.reports.report import Report

if TYPE_CHECKING:
    from hf_tsv.merging.findings import Findings
    from hf_tsv.merging.work import Merge


@dataclass(frozen=True, repr=False)
class MergeReport(Report):
    """Results of a merge, or with `dry_run` those it would have.

    Args:
        output (`str`, *optional*): the folder written, if it is kept.
        base_model (`dict[str, str | None]`): `ref` and `revision` of W0.
        inputs (`list[dict[str, str | None]]`): the same of every task.
        weights (`dict[str, int]`): tensors `decomposed`, `averaged`, `copied`, and if there are any
            `summed` or `combined` entry by entry.
        output_bytes (`int`): size of the weight files.
        seconds (`float`): wall time.
        warnings (`list[str]`): what the user should know.
        method (`str`): see [`Settings`].
        settings (`dict`): every choice, see [`Settings`].
        treatments (`dict[str, dict]`): per weight its treatment, rank and reason, and if they are
            not 1 the `alpha_factor` and the `task_factors` that `scale` gives it.
        scales (`list[float]`): factor of each task's update.
        selected (`list[str]`): lines on the weights that are scaled or kept from the base.
        left_out (`dict[str, list[str]]`): task heads not kept, by checkpoint.
        heads (`dict[str, str]`): files of the task heads that are kept, and of which checkpoint.
        masks (`dict[str, str]`): folders of the TALL-masks, and of which checkpoint.
        mask_bytes (`int`): of all of them; before the weights are read, at most.
        tuning (`dict`, *optional*): the best `method`, `alpha` and `slope` of a search; all its
            `trials` with their `mean` and `accuracies` by task, and the `best_of_each` method; the
            number of `images` and the `splits`; with one method and slope also lists of `alphas`
            and `mean`. Of a dry run, the trials to make.
        adaptation (`dict`, *optional*): how the coefficients in `treatments` were learned, and on
            which images; for the method `ada`.
        download_bytes (`int`): fetched from the Hub; what the cache held does not count.
        expected_seconds (`float`, *optional*): of a dry run: rough time of the computation on this
            machine's CPU, within a factor of about two.
        exact_decompositions (`int`): that took a full SVD: all with `precision="exact"`, else those
            that failed the check.
        peak_memory_bytes (`int`): estimate, on top of the interpreter and its libraries.
        timings (`dict[str, float]`): seconds `reading`, `waiting` for reads and writes,
            `computing` and `writing`, over all weights; those of each are in `treatments`.
        device (`str`, *optional*): type of device computed on.
        url (`str`, *optional*): commit or pull request on the Hub.
        dry_run (`bool`): nothing was written.
    """

    output: str | None
    base_model: dict[str, str | None]
    inputs: list[dict[str, str | None]]
    weights: dict[str, int]
    output_bytes: int
    seconds: float
    warnings: list[str]
    method: str
    treatments: dict[str, dict[str, Any]]
    left_out: dict[str, list[str]]
    heads: dict[str, str]
    masks: dict[str, str]
    mask_bytes: int
    download_bytes: int
    peak_memory_bytes: int
    settings: dict[str, Any] = field(default_factory=dict)
    scales: list[float] = field(default_factory=list)
    selected: list[str] = field(default_factory=list)
    tuning: dict[str, Any] | None = None
    adaptation: dict[str, Any] | None = None
    expected_seconds: float | None = None
    exact_decompositions: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    device: str | None = None
    url: str | None = None
    dry_run: bool = False


def treatments(merge: Merge, findings: Findings) -> dict[str, dict[str, Any]]:
    """Tell of each weight what was done with it, as far as findings say; else what is planned."""
    found = {finding.label: finding for finding in findings.weights}
    told: dict[str, dict[str, Any]] = {}
    for weight in merge.plan.weights:
        here = found.get(weight.label)
        entry: dict[str, Any] = {"treatment": weight.treatment}
        if here and here.frozen:
            entry = {"treatment": "copied", "reason": scaling.frozen_reason(weight, merge.scales)}
        elif weight.treatment == "decomposed":
            entry["rank"] = weight.rank
            if here and here.ranks:
                entry["ranks"] = list(here.ranks)
        elif weight.reason:
            entry["reason"] = weight.reason
        entry |= scaling.entry(weight)
        if weight.label in merge.coefficients and not weight.is_kept:
            entry["coefficients"] = list(merge.coefficients[weight.label])
        if here:
            entry["seconds"] = here.seconds.rounded()
        told[weight.label] = entry
    return told
