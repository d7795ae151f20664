"""The report of `hf_tsv.interference`."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, ClassVar

from hf_tsv.checkpoints.reference import without_folders
from hf_tsv.reports.report import Report
from hf_tsv.runs.publishing import without_paths


@dataclass(frozen=True, repr=False)
class InterferenceReport(Report):
    """Measure of task interference.

    Args:
        tasks (`list[dict]`): of every task its name, `ref` and `revision`, `norm` of its update and
            `relative_norm` to that of the base weights it changed, `effective_rank` (of factors:
            of the triplets they keep) and `energy` in the triplets used, means over its decomposed
            weights by squared norm, and its `share` of what all pairs of tasks interfere.
        base_model (`dict[str, str | None]`): `ref` and `revision` of W0.
        total (`float`): singular task interference, sum over all decomposed weights.
        total_after (`float`): the same after orthogonalisation.
        pairs (`list[list[float]]`): of every two tasks alone, sum over all weights, T × T.
        weights (`dict[str, dict]`): per decomposed weight `sti`, `sti_after`, `rank`, `pairs`,
            `shape`, and `ranks`: the triplets used of each task, fewer where its update has no
            more.
        blocks (`dict[str, dict]`): `sti` and `sti_after` per block of a tower.
        kinds (`dict[str, dict]`): the same per kind of layer.
        spectra (`dict[str, list]`): at every `rank_share` of k, of each task its `singular_values`
            (root mean square over its weights, 1 at the first) and the `energy` kept up to there.
        diagnoses (`list[dict]`): what is odd about the inputs: `kind`, `text`, `value`, the
            `threshold` from which it is said, and `tasks`, by place.
        warnings (`list[str]`): what the user should know, these included.
        seconds (`float`): wall time; beside a merge, of its computation.
        timings (`dict[str, float]`): seconds `reading`, `waiting` for reads and writes,
            `computing` and `writing`, over all weights.
        device (`str`): type of device computed on.
    """

    HEAT: ClassVar[bool] = True

    tasks: list[dict[str, Any]]
    base_model: dict[str, str | None]
    total: float
    total_after: float
    pairs: list[list[float]]
    weights: dict[str, dict[str, Any]]
    blocks: dict[str, dict[str, float]]
    kinds: dict[str, dict[str, float]]
    spectra: dict[str, list[Any]]
    diagnoses: list[dict[str, Any]]
    warnings: list[str]
    seconds: float
    timings: dict[str, float]
    device: str

    def to_json(self) -> str:
        """Content of `interference.json`."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def table(self) -> list[list[str | float]]:
        """Interference of every two tasks."""
        names: list[str | float] = [task["name"] for task in self.tasks]
        return [["", *names], *([n, *row] for n, row in zip(names, self.pairs, strict=True))]

    @property
    def per_pair(self) -> float:
        """Mean interference of two tasks alone in one weight, comparable between merges."""
        count = len(self.tasks) * (len(self.tasks) - 1) * len(self.weights)
        return sum(map(sum, self.pairs)) / count if count else 0.0

    def public(self) -> InterferenceReport:
        """The same with the names of local folders instead of their paths, to be published."""
        entries = [*self.tasks, self.base_model]
        folders = [entry["ref"] for entry in entries if entry["revision"] is None]

        def said(text: str) -> str:
            return without_folders(text, folders)

        return replace(
            self,
            tasks=[without_paths(task) for task in self.tasks],
            base_model=without_paths(self.base_model),
            diagnoses=[{**found, "text": said(found["text"])} for found in self.diagnoses],
            warnings=[said(text) for text in self.warnings],
        )

    def extremes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Pairs of tasks that interfere most and least, of those that take part."""
        some = [i for i, task in enumerate(self.tasks) if task["effective_rank"]]
        pairs = combinations(some if len(some) > 1 else range(len(self.tasks)), 2)
        ranked = sorted(pairs, key=lambda pair: self.pairs[pair[0]][pair[1]])
        return ranked[-1], ranked[0]
