"""The report of `hf_tsv.compress`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_tsv.reports.report import Report


@dataclass(frozen=True, repr=False)
class CompressReport(Report):
    """Results of a compression, or with `dry_run` those it would have.

    Args:
        output (`str`, *optional*): folder written, if it is kept.
        base_model (`dict[str, str | None]`): `ref` and `revision` of W0.
        source (`dict[str, str | None]`): the same of the fine-tuned checkpoint.
        out_format (`str`): `factors` or `peft`.
        rank_rule (`dict[str, Any]`): the rule that applied, by name.
        dtype (`str`): of the stored updates.
        factors_bytes (`int`): of all stored tensors, headers aside; with `dry_run` at most that,
            None where it depends on the weights.
        checkpoint_bytes (`int`): of the tensors of the fine-tuned checkpoint.
        ratio (`float`): the first over the second.
        base_bytes (`int`): of the same weights in the base model.
        ratio_for_tasks (`dict[str, float]`): base and factors of T such tasks over T checkpoints.
        update_error (`float`): ‖Δ − stored‖ / ‖Δ‖ over all weights; None with `dry_run`.
        weights (`dict[str, dict]`): per weight how it is stored, rank, energy kept, bytes.
        left_out (`list[str]`): changed tensors that the format has no place for.
        output_bytes (`int`): size of the weight files, headers included.
        exact_decompositions (`int`): number of full SVDs: where most triplets may be kept, or
            where those of a Gram matrix failed the check.
        seconds, warnings, download_bytes, peak_memory_bytes, timings, device, url, dry_run: as in
            [`MergeReport`].
    """

    output: str | None
    base_model: dict[str, str | None]
    source: dict[str, str | None]
    out_format: str
    rank_rule: dict[str, Any]
    dtype: str
    factors_bytes: int | None
    checkpoint_bytes: int
    ratio: float | None
    base_bytes: int
    ratio_for_tasks: dict[str, float]
    update_error: float | None
    weights: dict[str, dict[str, Any]]
    left_out: list[str]
    output_bytes: int | None
    seconds: float
    warnings: list[str]
    download_bytes: int
    peak_memory_bytes: int
    exact_decompositions: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    device: str | None = None
    url: str | None = None
    dry_run: bool = False

    @property
    def report(self) -> CompressReport:
        """Itself, so that a plan has its report where [`TaskFactors`] have theirs."""
        return self
