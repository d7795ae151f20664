"""Merge and compress fine-tuned CLIP checkpoints with task singular vectors.

Example:
    >>> import hf_tsv
    >>> hf_tsv.merge(["org/clip-a", "org/clip-b"], output="merged")  # doctest: +SKIP
    >>> classify = hf_tsv.pipeline("zero-shot-image-classification", "merged")  # doctest: +SKIP

Merging: `merge`, `interference` (what tasks do to one another), `evaluate`, `push`.
Looking: `find` (fine-tunes on the Hub that can be merged), `inspect`.
Routing: `route` (one model that finds out which tasks an image belongs to).
Compressing: `compress` and `export_peft` (LoRA), `reconstruct`, `sweep` (accuracy by rank).
Loading: `load_model`, `pipeline`, `TaskFactors`, `TaskSwitcher` (several tasks in one model).

Functions return reports, whose `to_dict()` has all that the command line prints with `--json`.
Errors are `HfTsvError`s with a `message` and a `hint`. Warnings are printed; what is being done,
such as which base model was found, is printed after `logging.getLogger("hf_tsv").setLevel("INFO")`.
`progress=False` hides bars. `help(hf_tsv.merge)` explains every argument.

`from hf_tsv import *` leaves out `inspect` and `pipeline`, the names of a module of Python and a
function of transformers.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_tsv.models.loading import load_model as load_model
    from hf_tsv.models.loading import pipeline as pipeline
    from hf_tsv.models.switching import TaskSwitcher as TaskSwitcher
    from hf_tsv.recipes.images import EvaluationTask as EvaluationTask
    from hf_tsv.recipes.learning import Adaptation as Adaptation
    from hf_tsv.recipes.recipe import Recipe as Recipe
    from hf_tsv.recipes.searching import Search as Search
    from hf_tsv.reports.compression import CompressReport as CompressReport
    from hf_tsv.reports.interference import InterferenceReport as InterferenceReport
    from hf_tsv.reports.merging import MergeReport as MergeReport
    from hf_tsv.reports.routing import RouteReport as RouteReport
    from hf_tsv.system.errors import CheckpointError as CheckpointError
    from hf_tsv.system.errors import DataError as DataError
    from hf_tsv.system.errors import HfTsvError as HfTsvError
    from hf_tsv.system.errors import LostProcessError as LostProcessError
    from hf_tsv.system.errors import OutputError as OutputError
    from hf_tsv.system.errors import RecipeError as RecipeError
    from hf_tsv.system.errors import RepoError as RepoError
    from hf_tsv.system.version import __version__ as __version__
    from hf_tsv.verbs.compress import compress as compress
    from hf_tsv.verbs.evaluate import EvaluateReport as EvaluateReport
    from hf_tsv.verbs.evaluate import evaluate as evaluate
    from hf_tsv.verbs.export_peft import export_peft as export_peft
    from hf_tsv.verbs.factors import TaskFactors as TaskFactors
    from hf_tsv.verbs.find import FindReport as FindReport
    from hf_tsv.verbs.find import find as find
    from hf_tsv.verbs.inspect import InspectReport as InspectReport
    from hf_tsv.verbs.inspect import inspect as inspect
    from hf_tsv.verbs.interference import interference as interference
    from hf_tsv.verbs.merge import merge as merge
    from hf_tsv.verbs.push import PushReport as PushReport
    from hf_tsv.verbs.push import push as push
    from hf_tsv.verbs.reconstruct import ReconstructReport as ReconstructReport
    from hf_tsv.verbs.reconstruct import reconstruct as reconstruct
    from hf_tsv.verbs.route import route as route
    from hf_tsv.verbs.sweep import SweepReport as SweepReport
    from hf_tsv.verbs.sweep import sweep as sweep
    from hf_tsv.verbs.tune import tune as tune

_PUBLIC = {
    "models.loading": ["load_model", "pipeline"],
    "models.switching": ["TaskSwitcher"],
    "recipes.images": ["EvaluationTask"],
    "recipes.learning": ["Adaptation"],
    "recipes.recipe": ["Recipe"],
    "recipes.searching": ["Search"],
    "reports.interference": ["InterferenceReport"],
    "reports.merging": ["MergeReport"],
    "system.errors": [
        "CheckpointError",
        "DataError",
        "HfTsvError",
        "LostProcessError",
        "OutputError",
        "RecipeError",
        "RepoError",
    ],
    "system.version": ["__version__"],
    "reports.compression": ["CompressReport"],
    "verbs.compress": ["compress"],
    "verbs.evaluate": ["EvaluateReport", "evaluate"],
    "verbs.export_peft": ["export_peft"],
    "verbs.factors": ["TaskFactors"],
    "verbs.find": ["FindReport", "find"],
    "verbs.inspect": ["InspectReport", "inspect"],
    "verbs.interference": ["interference"],
    "verbs.merge": ["merge"],
    "verbs.push": ["PushReport", "push"],
    "verbs.reconstruct": ["ReconstructReport", "reconstruct"],
    "reports.routing": ["RouteReport"],
    "verbs.route": ["route"],
    "verbs.sweep": ["SweepReport", "sweep"],
    "verbs.tune": ["tune"],
}
"""Public names, by the module that defines them."""

_HOMES = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_HOMES.keys() - {"inspect", "pipeline"})  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import hf_tsv` stays cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_tsv' has no attribute {name!r}")
    with warnings.catch_warnings():  # bars are text in a notebook without ipywidgets
        warnings.filterwarnings("ignore", "IProgress not found")
        return getattr(import_module(f"hf_tsv.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
