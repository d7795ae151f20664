"""Choices of a compression: which triplets are kept, and how they are stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from hf_tsv.checkpoints import layout
from hf_tsv.checkpoints.storage.dtypes import DTYPES_OF_TORCH, DType
from hf_tsv.recipes.settings import Dtype, Settings, share
from hf_tsv.system.checks import argument, check_counts, choice, size_in_bytes
from hf_tsv.system.errors import UsageError

FactorFormat = Literal["factors", "peft"]
DEFAULT_RANK_FRACTION = 0.1


@dataclass(frozen=True)
class RankRule:
    """Rule for the ranks, one of four; `rank_fraction` 0.1 if none is given.

    `rank_fraction` is a share of k = min(d_out, d_in), rounded down; `rank` the same number for
    every weight; `energy` a share of the squared norm, for the smallest sufficient rank; `budget`
    the bytes for everything: a number, `"35MB"`, or `"10%"` of the fine-tuned checkpoint.
    """

    rank_fraction: float | None = None
    rank: int | None = None
    energy: float | None = None
    budget: str | int | None = None

    def __post_init__(self) -> None:
        given = [name for name in RankRule.__annotations__ if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(
                f"{' and '.join(map(argument, given))} cannot be combined.", "Give one."
            )
        if not given:
            object.__setattr__(self, "rank_fraction", DEFAULT_RANK_FRACTION)
        for name in ("rank_fraction", "energy"):
            object.__setattr__(self, name, share(name, getattr(self, name)))
        check_counts(rank=self.rank)
        if self.budget is not None:
            self.budget_bytes(1)

    def budget_bytes(self, checkpoint_bytes: int) -> int:
        """Bytes that the budget stands for."""
        assert self.budget is not None
        return size_in_bytes(self.budget, checkpoint_bytes, name="budget")

    def to_dict(self) -> dict[str, Any]:
        """Value of the one rule that applies, by its name."""
        return {k: v for k, v in vars(self).items() if v is not None}

    def rank_before(self, k: int) -> int | None:
        """Rank where k = min(d_out, d_in), or None if it depends on the singular values."""
        if self.rank is not None:
            return min(self.rank, k)
        if self.rank_fraction is not None:
            return max(1, int(self.rank_fraction * k + 1e-9))
        return None


@dataclass(frozen=True)
class Options:
    """Options of a compression, as [`compress`] and [`export_peft`] have them."""

    rule: RankRule = field(default_factory=RankRule)
    dtype: Dtype = "float32"
    compress_conv: bool = False
    out_format: FactorFormat = "factors"
    dense: bool = True
    model_class: str | None = None
    max_shard_size: int | str = Settings.max_shard_size
    report: bool = False
    allow_other_base: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("dtype", get_args(Dtype)), ("out_format", get_args(FactorFormat))):
            object.__setattr__(self, name, choice(name, getattr(self, name), allowed))
        most = size_in_bytes(self.max_shard_size, name="max_shard_size")
        if self.out_format == "factors" and (not self.dense or self.model_class is not None):
            raise UsageError(
                "`dense=False` and `model_class=` apply to an adapter.", "Add `out_format=peft`."
            )
        if self.out_format == "peft" and self.compress_conv:
            raise UsageError(
                "A LoRA adapter stores the patch convolution whole.", "Omit `compress_conv=True`."
            )
        if self.out_format == "peft" and most != size_in_bytes(Settings.max_shard_size):
            raise UsageError("A LoRA adapter is a single file.", "Omit `max_shard_size=`.")
        if self.model_class is not None and self.model_class not in layout.MODEL_CLASSES:
            raise UsageError(
                f"There is no CLIP class {self.model_class!r}.",
                f"Choose one of {', '.join(layout.MODEL_CLASSES)}.",
            )

    @property
    def stored_dtype(self) -> DType:
        return DTYPES_OF_TORCH[self.dtype]
