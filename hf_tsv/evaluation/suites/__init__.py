"""Task suites of papers, with the results that others publish on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_tsv.recipes.images import EvaluationTask
from hf_tsv.system.errors import UsageError

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Published:
    """Results that others publish on a suite; none of them was measured by hf-tsv.

    `origin` is an arXiv number or a repository at a commit; `fine_tunes` were merged, and are
    `comparable` if the suite names the same ones. `rows` has by method the `accuracy`, 0 to 1, mean
    over the tasks, and `normalised` where the source has it.
    """

    source: str
    origin: str
    fine_tunes: str
    comparable: bool
    rows: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Suite:
    """Tasks in a paper's order, their base model and fine-tunes, and published results."""

    name: str
    base_model: str
    tasks: tuple[EvaluationTask, ...]
    references: dict[str, str]
    published: tuple[Published, ...]


def named(name: str) -> Suite:
    """Read a suite by its vision tower and number of tasks.

    Example:
        >>> named("vit-b-32-8").base_model
        'openai/clip-vit-base-patch32'
    """
    content = _read("suites.yaml")
    suites = {
        f"{model}-{count}": (entry, count)
        for model, entry in content["models"].items()
        for count in entry["published"]
    }
    if name not in suites:
        raise UsageError(f"There is no suite {name!r}.", f"The suites are: {', '.join(suites)}.")
    entry, count = suites[name]
    tasks, chosen = _read("tasks.yaml"), content["tasks"][:count]
    return Suite(
        name,
        entry["base_model"],
        tuple(_task(task, tasks[task]) for task in chosen),
        {task: entry["fine_tunes"].replace("{}", task) for task in chosen},
        tuple(_published(content["sources"][s], r) for s, r in entry["published"][count].items()),
    )


def _read(file: str) -> Any:
    return yaml.safe_load((FOLDER / file).read_text(encoding="utf-8"))


def _task(name: str, entry: dict[str, Any]) -> EvaluationTask:
    lists = {key: tuple(entry[key]) for key in ("templates", "classes")}
    return EvaluationTask(name, **{**entry, **lists})


def _published(source: dict[str, Any], rows: dict[str, Any]) -> Published:
    return Published(**source, rows={method: _row(value) for method, value in rows.items()})


def _row(value: float | list[float]) -> dict[str, float]:
    values = value if isinstance(value, list) else [value]
    shares = (round(number / 100, 6) for number in values)
    return dict(zip(("accuracy", "normalised"), shares, strict=False))
