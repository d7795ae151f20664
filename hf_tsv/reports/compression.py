"""The report of `hf_tsv.compress`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class CompressReport:
    """What a compression did, or with `dry_run` would do.

    Args:
        output (`str`, *optional*): the folder written, if it is kept.
        base_model (`dict[str, str | None]`): `ref` and `revision` of W0.
        source (`dict[str, str | None]`): the same of the fine-tuned checkpoint.
        format (`str`): `factors` or `peft`.
        rank_rule (`dict[str, Any]`): the rule that applied, by name.
        factor_dtype (`str`): of the stored updates.
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
        seconds (`float`): wall time.
        warnings (`list[str]`): what the user should know.
        download_bytes (`int`): fetched from the Hub; what the cache held does not count.
        peak_memory_bytes (`int`): estimate, on top of the interpreter and its libraries.
        exact_decompositions (`int`): that took a full SVD: where most triplets may be kept, or
            where those of a Gram matrix failed the check.
        timings (`dict[str, float]`): seconds `reading`, `waiting` for reads, `computing` and
            `writing`.
        device (`str`, *optional*): type of device computed on.
        url (`str`, *optional*): commit or pull request on the Hub.
        dry_run (`bool`): nothing was written.
    """

    output: str | None
    base_model: dict[str, str | None]
    source: dict[str, str | None]
    format: str
    rank_rule: dict[str, Any]
    factor_dtype: str
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

    def to_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return asdict(self)
