"""Runs of one seed through the command line of hf-tsv; each result is kept."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_tsv.methods import catalogue

VALIDATION_IMAGES = 100
"""Number of images per task on which α is chosen."""

ALPHAS = "0.1:0.5:0.1,0.7:1.9:0.3"
ADAPTATION = ("--steps", 100, "--learning-rate", 0.005)
"""Options for a third of the default steps at a larger rate, with about the same total movement."""

MORE_ALPHAS = {"orthogonal": "2.2:3.1:0.3", "dc": "2.2:3.1:0.3"}
"""Further α, where the best is large: `orthogonal` averages all vectors in square matrices, and
`dc` keeps few entries of each task."""

METHODS = (
    "task-arithmetic",
    "ties",
    "consensus",
    "low-rank",
    "orthogonal",
    "iso-c",
    "iso-cts",
    "dc",
    "wudi",
    "tsv",
)
"""Methods whose α is chosen on validation images."""

STEPS = {
    "lines": ("--layer-scale", "lines"),
    "larv": ("--layer-scale", "larv"),
    "calibrated": ("--calibrate",),
}
"""Steps before and after a method, by the name of their runs."""

MANY_TASKS = (
    *(f"{name}+{step}" for name in ("tsv", "wudi") for step in STEPS),
    "task-arithmetic+calibrated",
)
"""Methods with a step that are also run with the largest number of tasks."""

ALONE: dict[str, tuple[object, ...]] = {
    "iso-c-1": ("--method", "iso-c", "--alpha", 1),
    "iso-cts-1": ("--method", "iso-cts", "--alpha", 1),
    "dc-1": ("--method", "dc", "--alpha", 1),
    "wudi-1": ("--method", "wudi", "--alpha", 1),
    "wudi-swudi-1": ("--method", "wudi", "--alpha", 1, "--wudi-filter", "swudi"),
    "wudi-tact-1": ("--method", "wudi", "--alpha", 1, "--wudi-filter", "tact"),
    "tsv-lines-1": STEPS["lines"],
    "tsv-larv-1": STEPS["larv"],
    "tsv-calibrated-1": STEPS["calibrated"],
    "wudi-larv-1": ("--method", "wudi", "--alpha", 1, *STEPS["larv"]),
    "task-arithmetic-calibrated-1": (
        "--method",
        "task-arithmetic",
        "--alpha",
        1,
        *STEPS["calibrated"],
    ),
}
"""What is known without any image: α = 1."""

VARIANTS = {
    "procrustes": ("--precision", "exact"),
    "whitening": ("--precision", "exact", "--orthogonalizer", "whitening"),
    "fused": ("--qkv", "fused"),
    "task-arithmetic-1": ("--method", "task-arithmetic", "--alpha", 1),
    "low-rank-1": ("--method", "low-rank", "--alpha", 1),
    "orthogonal-1": ("--method", "orthogonal"),
    "orthogonal-fused": ("--method", "orthogonal", "--qkv", "fused"),
}
MERGE_RANKS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.125)
FRACTIONS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5)
"""Shares of the singular values, for merges and for compression."""

Accuracies = dict[str, float]


def command(*words: object) -> dict[str, Any]:
    """Run `hf-tsv WORDS --json` in this process, and return the object it prints.

    Args:
        words: words of the command line.

    Raises:
        SystemExit: a part of it failed; a command that fails wholly ends this process.
    """
    from hf_tsv.cli import app

    out = io.StringIO()
    with redirect_stdout(out):
        app([*map(str, words), "--json", "--quiet"], standalone_mode=False)
    found: dict[str, Any] = json.loads(out.getvalue())
    if found.get("errors"):
        raise SystemExit(f"{words[0]}: {found['errors']}")
    return found


@dataclass(frozen=True)
class Seed:
    """Models, images and results of one seed.

    Args:
        number: the seed.
        models: folder with `base` and a fine-tune of every task.
        images: folder of parquet files.
        results: folder of JSON files, one per run.
        tasks: names of the tasks, in order.
        more_alphas: further α by method.
    """

    number: int
    models: Path
    images: Path
    results: Path
    tasks: tuple[str, ...]
    more_alphas: Mapping[str, str] = field(default_factory=lambda: MORE_ALPHAS)

    def kept(self, name: str, measure: Callable[[], Any]) -> Any:
        """Result of a run, measured unless it is already kept."""
        file = self.results / f"{name}.json"
        if not file.exists():
            found = measure()
            self.results.mkdir(parents=True, exist_ok=True)
            staging = file.with_suffix(".part")
            staging.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            staging.rename(file)
        return json.loads(file.read_text(encoding="utf-8"))

    def options(self, tasks: Sequence[str], split: str) -> list[object]:
        """Options `--task` for these tasks; the names of classes are whole prompts."""
        words: list[object] = ["--template", "{}", "--split", "test"]
        for task in tasks:
            words += ["--task", f"{task}={self.images / f'{task}-{split}.parquet'}"]
        return words

    def accuracies(self, model: Path, tasks: Sequence[str]) -> Accuracies:
        """Top-1 accuracy on test images, 0 to 1, by task."""
        base = ("--base-model", self.models / "base")
        found = command("evaluate", model, *base, "--batch-size", 250, *self.options(tasks, "test"))
        return {name: entry["accuracy"] for name, entry in found["tasks"].items()}

    def merged(self, tasks: Sequence[str], *options: object) -> dict[str, Any]:
        """Report and accuracies of a merge of some tasks."""
        output = self.results / "merged"
        models = [self.models / task for task in tasks]
        base = ("--base-model", self.models / "base")
        verb = "tune" if "--task" in options else "merge"
        done = command(verb, *models, *base, "-o", output, "--force", *options)
        return {"report": done, "accuracies": self.accuracies(output, tasks)}


def references(seed: Seed) -> dict[str, Accuracies]:
    """Accuracies of the base model, zero-shot, and of every task's own fine-tune."""
    whole = seed.models / "whole"  # of adapters: the towers that they make
    folder = whole if whole.exists() else seed.models
    own = {t: seed.accuracies(folder / t, [t])[t] for t in seed.tasks}
    return {"base": seed.accuracies(seed.models / "base", seed.tasks), "fine-tuned": own}


def method(seed: Seed, count: int, name: str, *options: object) -> dict[str, Any]:
    """Results of a method, and steps, with α chosen on validation images."""
    tasks = seed.tasks[:count]
    images = (*seed.options(tasks, "validation"), "--limit", VALIDATION_IMAGES)
    alphas = ",".join([ALPHAS, *([seed.more_alphas[name]] if name in seed.more_alphas else [])])
    found = seed.merged(tasks, "--method", name, *options, "--alphas", alphas, *images)
    tuning = found["report"]["tuning"]
    return {
        "alpha": tuning["alpha"],
        "alphas": tuning["alphas"],
        "validation": tuning["mean"],
        "accuracies": found["accuracies"],
    }


def plain(seed: Seed, count: int, *options: object) -> dict[str, Any]:
    """Results of a merge with given settings."""
    return {"accuracies": seed.merged(seed.tasks[:count], *options)["accuracies"]}


def adapted(seed: Seed, count: int) -> dict[str, Any]:
    """Results of TSV-Merge with coefficients learned on unlabelled validation images."""
    tasks = seed.tasks[:count]
    images = seed.options(tasks, "validation")
    found = seed.merged(tasks, "--method", "ada", *ADAPTATION, *images)
    return {"accuracies": found["accuracies"], "entropy": found["report"]["adaptation"]["entropy"]}


def compressed(seed: Seed, count: int) -> dict[str, Any]:
    """Results and size of every task as factors of rank k/T, each on its own images.

    The base model is needed too, and counted; the size of the checkpoints is given to compare.
    """
    output = seed.results / "factors"
    accuracies, stored, whole = {}, 0, 0
    for task in seed.tasks[:count]:
        base = ("--base-model", seed.models / "base", "--rank-fraction", 1 / count)
        done = command("compress", seed.models / task, *base, "-o", output, "--force")
        accuracies[task] = seed.accuracies(output, [task])[task]
        stored += done["factors_bytes"]
        whole += done["checkpoint_bytes"]
    stored += done["base_bytes"]
    return {"accuracies": accuracies, "bytes": stored, "checkpoint_bytes": whole}


def swept(seed: Seed) -> dict[str, Any]:
    """Results of every task with decreasing shares of its singular vectors."""
    words = [*seed.options(seed.tasks, "test"), "--base-model", seed.models / "base"]
    for task in seed.tasks:
        words += ["--reference", f"{task}={seed.models / task}"]
    shares = ",".join(map(str, FRACTIONS))
    found = command("sweep", *words, "--rank-fraction", shares, "--batch-size", 250)
    return {key: found[key] for key in ("fractions", "mean", "full", "stored")}


def masked(seed: Seed, count: int) -> dict[str, Any]:
    """Results and size of every task as a mask beside the sum of all updates."""
    output = seed.results / "merged"
    tasks = seed.tasks[:count]
    found = seed.merged(tasks, "--method", "tall-mask")["report"]
    accuracies = {t: seed.accuracies(output / "masks" / t, [t])[t] for t in tasks}
    vision = sum(_vision_bytes(file) for file in (seed.models / "base", output))
    return {"accuracies": accuracies, "bytes": found["mask_bytes"] + vision}


def _vision_bytes(folder: Path) -> int:
    """Bytes of the vision tower, the part that a fine-tune has of its own."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = [name for name in weights.keys() if name.startswith("vision_model.")]  # noqa: SIM118
        return sum(weights.get_tensor(name).nbytes for name in names)


def stepped() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Methods with a step, as pairs of a method and its options, by the name of their runs."""
    return {
        f"{name}+{step}": (name, options)
        for name in METHODS
        for step, options in STEPS.items()
        if step != "calibrated" or catalogue.METHODS[name].calibrates
    }


Runs = dict[str, Callable[[], Any]]
"""Runs by the name they are kept under."""


def method_runs(seed: Seed, counts: Sequence[int]) -> Runs:
    """Runs of all methods, with and without a choice of α, and of steps.

    Args:
        seed: models and images.
        counts: numbers of tasks merged.
    """
    runs, add = _begun(seed)
    steps_of = {max(counts): MANY_TASKS, min(counts): tuple(stepped())}
    for count in counts:
        add("average", count, plain, "--method", "average")
        for name in METHODS:
            add(name, count, method, name)
        for name in steps_of.get(count, ()):
            row, options = stepped()[name]
            add(name, count, method, row, *options)
        for name, options in ALONE.items():
            add(name, count, plain, *options)
        add("ada", count, adapted)
        add("tsv-default", count, plain)
    return runs


def core_runs(seed: Seed, counts: Sequence[int]) -> Runs:
    """Runs of the methods that come nearest to the fine-tunes, for models that take long.

    Args:
        seed: models and images.
        counts: numbers of tasks merged.
    """
    names = (
        "average", "tsv-default", "task-arithmetic", "iso-c", "iso-cts", "dc", "wudi", "tsv",
        "wudi-1", "wudi-swudi-1", "tsv-larv-1", "tsv-calibrated-1",
    )  # fmt: skip
    wanted = {"references", *(f"{name}-{count}" for name in names for count in counts)}
    every = method_runs(seed, counts)
    return {name: run for name, run in every.items() if name in wanted}


def detail_runs(seed: Seed, counts: Sequence[int]) -> Runs:
    """Runs of variants and ranks of TSV-Merge, and of compression.

    Args:
        seed: models and images.
        counts: numbers of tasks merged.
    """
    runs, add = _begun(seed)
    for count in counts:
        add("tsv-default", count, plain)
        for name, options in VARIANTS.items():
            add(name, count, plain, *options)
        for rank in MERGE_RANKS:
            if rank * count <= 1:
                add(f"rank-{rank:g}", count, plain, "--rank-fraction", rank)
        add("tall-mask", count, masked)
        add("factors", count, compressed)
    runs["sweep"] = lambda: swept(seed)
    return runs


def _begun(seed: Seed) -> tuple[Runs, Callable[..., None]]:
    """Runs with the references alone, and a function that adds one."""
    runs: Runs = {"references": lambda: references(seed)}
    return runs, adding(runs, seed)


def adding(runs: Runs, seed: Seed) -> Callable[..., None]:
    """Make a function that adds a run of some tasks of a seed."""

    def add(name: str, count: int, measure: Callable[..., Any], *arguments: object) -> None:
        runs[f"{name}-{count}"] = lambda: measure(seed, count, *arguments)

    return add


def clear(seed: Seed) -> None:
    """Remove the models that runs have left."""
    for name in ("merged", "factors", "routed"):
        shutil.rmtree(seed.results / name, ignore_errors=True)
