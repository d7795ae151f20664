"""The runs of one seed, through the command line of hf-tsv; each is kept once it is done."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VALIDATION_IMAGES = 100
"""Of each task, that α is chosen on."""

ALPHAS = "0.1:0.5:0.1,0.7:1.9:0.3"
ADAPTATION = ("--steps", 100, "--learning-rate", 0.005)
"""A third of the default steps, and as far in all."""

MORE_ALPHAS = {"orthogonal": "2.2:3.1:0.3"}
"""All vectors of all tasks in a square matrix made orthogonal are the average: α may be large."""

METHODS = (
    "task-arithmetic",
    "ties",
    "consensus",
    "low-rank",
    "orthogonal",
    "iso-c",
    "iso-cts",
    "tsv",
)
"""Whose α is chosen on validation images."""

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
"""Of the singular values, for merges and for compression."""

Accuracies = dict[str, float]


def command(*words: object) -> dict[str, Any]:
    """Run `hf-tsv WORDS --json` in this process; the object it prints.

    Args:
        words: of the command line.

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
    """Models and images of one seed, and what was measured on them.

    Args:
        number: of it.
        models: folder with `base` and a fine-tune of every task.
        images: folder of parquet files.
        results: folder of JSON files, one a run.
        tasks: their names, in order.
    """

    number: int
    models: Path
    images: Path
    results: Path
    tasks: tuple[str, ...]

    def kept(self, name: str, measure: Callable[[], Any]) -> Any:
        """What a run found, measured if that is not known yet."""
        file = self.results / f"{name}.json"
        if not file.exists():
            found = measure()
            self.results.mkdir(parents=True, exist_ok=True)
            staging = file.with_suffix(".part")
            staging.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            staging.rename(file)
        return json.loads(file.read_text(encoding="utf-8"))

    def options(self, tasks: Sequence[str], split: str) -> list[object]:
        """`--task` of every one of these tasks; the names of classes are whole prompts."""
        words: list[object] = ["--template", "{}", "--split", "test"]
        for task in tasks:
            words += ["--task", f"{task}={self.images / f'{task}-{split}.parquet'}"]
        return words

    def accuracies(self, model: Path, tasks: Sequence[str]) -> Accuracies:
        """Top-1 on test images, 0 to 1."""
        base = ("--base-model", self.models / "base")
        found = command("evaluate", model, *base, "--batch-size", 250, *self.options(tasks, "test"))
        return {name: entry["accuracy"] for name, entry in found["tasks"].items()}

    def merged(self, tasks: Sequence[str], *options: object) -> dict[str, Any]:
        """What a merge of some tasks scores."""
        output = self.results / "merged"
        models = [self.models / task for task in tasks]
        base = ("--base-model", self.models / "base")
        done = command("merge", *models, *base, "-o", output, "--force", *options)
        return {"report": done, "accuracies": self.accuracies(output, tasks)}


def references(seed: Seed) -> dict[str, Accuracies]:
    """The base model, zero-shot, and every task's own fine-tune."""
    own = {t: seed.accuracies(seed.models / t, [t])[t] for t in seed.tasks}
    return {"base": seed.accuracies(seed.models / "base", seed.tasks), "fine-tuned": own}


def method(seed: Seed, count: int, name: str) -> dict[str, Any]:
    """A method with α chosen on validation images."""
    tasks = seed.tasks[:count]
    images = (*seed.options(tasks, "validation"), "--limit", VALIDATION_IMAGES)
    alphas = f"{ALPHAS},{MORE_ALPHAS[name]}" if name in MORE_ALPHAS else ALPHAS
    found = seed.merged(tasks, "--method", name, "--tune-alpha", alphas, *images)
    tuning = found["report"]["tuning"]
    return {
        "alpha": tuning["alpha"],
        "alphas": tuning["alphas"],
        "validation": tuning["mean"],
        "accuracies": found["accuracies"],
    }


def plain(seed: Seed, count: int, *options: object) -> dict[str, Any]:
    """A merge whose settings are given."""
    return {"accuracies": seed.merged(seed.tasks[:count], *options)["accuracies"]}


def adapted(seed: Seed, count: int) -> dict[str, Any]:
    """TSV-Merge with coefficients learned on unlabelled validation images."""
    tasks = seed.tasks[:count]
    images = seed.options(tasks, "validation")
    found = seed.merged(tasks, "--method", "ada", *ADAPTATION, *images)
    return {
        "accuracies": found["accuracies"],
        "entropy": found["report"]["adaptation"]["entropy"],
    }


def compressed(seed: Seed, count: int) -> dict[str, Any]:
    """Every task as factors of rank k/T, each on its own images; and what is stored.

    The base model is needed too, and counted; beside it stand the checkpoints themselves.
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
    """Every task with fewer and fewer of its singular vectors."""
    words = [*seed.options(seed.tasks, "test"), "--base-model", seed.models / "base"]
    for task in seed.tasks:
        words += ["--reference", f"{task}={seed.models / task}"]
    shares = ",".join(map(str, FRACTIONS))
    found = command("sweep", *words, "--rank-fraction", shares, "--batch-size", 250)
    return {key: found[key] for key in ("fractions", "mean", "full", "stored")}


def masked(seed: Seed, count: int) -> dict[str, Any]:
    """Every task as a mask beside the sum of all updates; and what is stored."""
    output = seed.results / "merged"
    tasks = seed.tasks[:count]
    found = seed.merged(tasks, "--method", "tall-mask")["report"]
    accuracies = {t: seed.accuracies(output / "masks" / t, [t])[t] for t in tasks}
    vision = sum(_vision_bytes(file) for file in (seed.models / "base", output))
    return {"accuracies": accuracies, "bytes": found["mask_bytes"] + vision}


def _vision_bytes(folder: Path) -> int:
    """Of the vision tower: what a fine-tune has of its own."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = [name for name in weights.keys() if name.startswith("vision_model.")]  # noqa: SIM118
        return sum(weights.get_tensor(name).nbytes for name in names)


def all_runs(seed: Seed, counts: Sequence[int]) -> dict[str, Callable[[], Any]]:
    """Every run of a seed by the name it is kept under.

    Args:
        seed: models and images.
        counts: of tasks merged.
    """
    runs: dict[str, Callable[[], Any]] = {"references": lambda: references(seed)}

    def add(name: str, count: int, measure: Callable[..., Any], *arguments: object) -> None:
        runs[f"{name}-{count}"] = lambda: measure(seed, count, *arguments)

    for count in counts:
        add("average", count, plain, "--method", "average")
        add("tsv-default", count, plain)
        for name in METHODS:
            add(name, count, method, name)
        add("ada", count, adapted)
        for name, options in VARIANTS.items():
            add(name, count, plain, *options)
        for rank in MERGE_RANKS:
            if rank * count <= 1:
                add(f"rank-{rank:g}", count, plain, "--rank-fraction", rank)
        add("tall-mask", count, masked)
        add("factors", count, compressed)
    runs["sweep"] = lambda: swept(seed)
    return runs


def clear(seed: Seed) -> None:
    """Remove the models that runs have left."""
    for name in ("merged", "factors"):
        shutil.rmtree(seed.results / name, ignore_errors=True)
