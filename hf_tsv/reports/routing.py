"""The report of `hf_tsv.route`, and the card of a merge that routes images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from huggingface_hub import ModelCardData

from hf_tsv.reports.cards import FEATURES, ZERO_SHOT, Card, CardInput, common_license, descent
from hf_tsv.reports.report import Report
from hf_tsv.routing.rule import Rule, short


@dataclass(frozen=True, repr=False)
class RouteReport(Report):
    """Results of [`route`], or with `dry_run` those it would have.

    Args:
        output (`str`, *optional*): folder written, if it is kept.
        base_model (`dict[str, str | None]`): `ref` and `revision` of W0.
        inputs (`list[dict[str, str | None]]`): the same of every task.
        tasks (`dict[str, dict]`): by name the `folder` of its factors, or the repository of
            `factors` that are not copied; their `bytes`, with `dry_run` at most that; and the
            number of its `classes`, None if they are not known.
        rule (`dict[str, Any]`): `layers`, `temperature`, `threshold`, `max_tasks` and
            `label_temperature`.
        merged_bytes (`int`): size of the merged checkpoint's weights.
        output_bytes (`int`): size of those and of the factors in folders.
        elsewhere_bytes (`int`): size of the factors that are not copied.
        checkpoints_bytes (`int`): size of as many whole checkpoints.
        ratio (`float`): the two before over the last.
        seconds, warnings, download_bytes, peak_memory_bytes, timings, device, url, dry_run: as in
            [`MergeReport`].
    """

    output: str | None
    base_model: dict[str, str | None]
    inputs: list[dict[str, str | None]]
    tasks: dict[str, dict[str, Any]]
    rule: dict[str, Any]
    merged_bytes: int
    output_bytes: int
    elsewhere_bytes: int
    checkpoints_bytes: int
    ratio: float
    seconds: float
    warnings: list[str]
    download_bytes: int
    peak_memory_bytes: int
    timings: dict[str, float] = field(default_factory=dict)
    device: str | None = None
    url: str | None = None
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class RoutedCard(Card):
    """Card of a merge that routes images.

    `tasks` has the folder and the bytes of the factors by task, in the order of `inputs`; `dtypes`
    are those of the factors.
    """

    template: ClassVar[str] = "routed.md.jinja"
    base: CardInput
    inputs: Sequence[CardInput]
    tasks: Mapping[str, Mapping[str, Any]]
    rule: Rule
    full_model: bool
    merged_bytes: int
    output_bytes: int
    elsewhere_bytes: int
    checkpoints_bytes: int
    classifiers: bool
    dtypes: Sequence[str]
    warnings: Sequence[str] = ()

    @property
    def front_matter(self) -> ModelCardData:
        """Metadata for the Hub: it descends from all checkpoints that are there."""
        return ModelCardData(
            **descent(self.base, self.inputs),
            library_name="transformers",
            pipeline_tag=(FEATURES, ZERO_SHOT)[self.full_model],
            tags=["merge", "routing", "task-singular-vectors", "hf-tsv", "clip"],
            license=self.license,
        )

    @property
    def license(self) -> str | None:
        return common_license(self.inputs)

    @property
    def model_class(self) -> str:
        return "CLIPModel" if self.full_model else "CLIPVisionModel"

    @property
    def ratio(self) -> float:
        """Size as a share of that of the checkpoints."""
        return (self.output_bytes + self.elsewhere_bytes) / self.checkpoints_bytes

    @property
    def label_tasks(self) -> Sequence[str]:
        """Names of the tasks whose class names are known."""
        return [name for name, task in self.tasks.items() if task["classes"]]

    @property
    def layers(self) -> Sequence[str]:
        """Short names of the layers that are looked at."""
        return [short(layer) for layer in self.rule.layers]
