"""`hf-tsv tune`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from hf_tsv.cli import images, options
from hf_tsv.cli import merge as merging
from hf_tsv.cli.groups import NotOffered, Only, Several, call
from hf_tsv.cli.output import Out
from hf_tsv.methods.catalogue import METHODS
from hf_tsv.recipes.learning import to_learn
from hf_tsv.recipes.settings import Settings

USAGE = ("CHECKPOINTS...", "--task NAME=DATASET...", "-o DIR", "[OPTIONS]")
MISSING = "Name the checkpoints to merge, images with --task, and a folder with -o."
EXAMPLES = (
    f"hf-tsv tune {merging.BOTH} --task sun397=tanganke/sun397 --split train --limit 500 -o tuned",
    f"hf-tsv tune {merging.BOTH} --method ada --task dtd=tanganke/dtd -o learned",
    "hf-tsv tune ./a ./b --method tsv,ties --slopes 0,0.5 --task a=./images -o tuned",
)
WITHOUT_ALPHA = tuple(m.name for m in METHODS.values() if m.alpha is None)
TABLES = {"Methods (--method)": {m.name: m.says for m in METHODS.values() if m.alpha is not None}}


@dataclass(frozen=True, kw_only=True)
class LearningOptions:
    """Options of what is learned, and how."""

    PANEL = "Learning"
    alphas: Annotated[
        str | None, "FIRST:LAST:STEP", "Values of α to try, or 0.5,1,1.5. [default: 0:2:0.1]"
    ] = None
    slopes: Annotated[
        str | None,
        "S1,S2,...",
        "Slopes to try: α counts 1 - S times in the first block, 1 + S times in the last."
        " [default: 0]",
    ] = None
    trials: Annotated[int | None, "N", "Try N random combinations of these. [default: all]"] = None
    steps: Annotated[int | None, "N", "With ada: Adam steps. [default: 300]"] = None
    learning_rate: Annotated[
        float | None, "X", "With ada: Adam learning rate. [default: 0.002]"
    ] = None
    seed: Annotated[int | None, "N", "Seed of --trials, or of ada's images. [default: 0]"] = None
    batch_size: Annotated[
        int | None, "N", "Images of a task at once. [default: 64; 16 with ada]"
    ] = None


def tune(
    checkpoints: Annotated[
        list[str],
        "CHECKPOINTS...",
        "Fine-tuned checkpoints, task factors or adapters: org/name, org/name@revision, or a local"
        " folder.",
    ],
    *,
    source: options.SourceOptions,
    pictures: Annotated[images.ImageOptions, Only("task", "datasets", "limit")],
    learning: LearningOptions,
    result: merging.ResultOptions,
    method: Annotated[
        merging.MethodName | None,
        options.METHOD,
        NotOffered(*WITHOUT_ALPHA),
        Several(),
        "NAME,...",
        "Method, see below; several: tsv,dc. [default: tsv]",
    ] = None,
    how: Annotated[
        merging.MethodOptions,
        Only(
            "weights",
            "scale",
            "keep_base",
            "precision",
            "layer_scale",
            "calibrate",
            "wudi_filter",
            "ranks",
        ),
    ],
    compute: Annotated[options.ComputeOptions, Only("device", "max_memory")],
    run: options.RunOptions,
    access: options.AccessOptions,
) -> None:
    """Merge with a method, α or coefficients that are chosen on images.

    Tries methods, and values of α, the scale of the merged update, on labelled validation images,
    and writes the best merge. With `--method ada` it instead learns a coefficient of each task in
    each weight, on images without labels (AdaMerging). The recipe repeats the merge without images.
    """
    out = Out(as_json=run.as_json, quiet=run.quiet, verbose=run.verbose)
    tasks = pictures.tasks
    to_learn(method or Settings.method, tasks, limit=pictures.limit, **vars(learning))
    from hf_tsv.verbs import tune as tune_

    groups = (source, pictures, result, result.target, result.files, how, compute, learning, run)
    own = {**merging.settings(result, how), "progress": run.progress}
    own["method"] = method or Settings.method
    done = call(tune_.tune, (*groups, access), checkpoints, tasks, **own)
    merging.told(out, done, result, run)
