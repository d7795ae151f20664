"""Merge and compress fine-tuned CLIP checkpoints with task singular vectors."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_tsv.adaptation import Adaptation
    from hf_tsv.compression import CompressReport, compress, export_peft
    from hf_tsv.errors import (
        CheckpointError,
        DataError,
        HfTsvError,
        LostProcessError,
        OutputError,
        RecipeError,
        RepoError,
    )
    from hf_tsv.evaluation import EvaluateReport, EvaluationTask, evaluate
    from hf_tsv.factors import TaskFactors
    from hf_tsv.inspecting import InspectReport, inspect
    from hf_tsv.interfering import InterferenceReport, interference
    from hf_tsv.merging import MergeReport, merge
    from hf_tsv.models import load_model, pipeline
    from hf_tsv.pushing import PushReport, push
    from hf_tsv.recipe import Recipe
    from hf_tsv.reconstruction import ReconstructReport, reconstruct
    from hf_tsv.sweeping import SweepReport, sweep
    from hf_tsv.switching import TaskSwitcher
    from hf_tsv.tuning import AlphaSearch

__version__ = "0.1.0"

_HOMES = {
    "Adaptation": "adaptation",
    "AlphaSearch": "tuning",
    "merge": "merging",
    "MergeReport": "merging",
    "compress": "compression",
    "export_peft": "compression",
    "CompressReport": "compression",
    "evaluate": "evaluation",
    "EvaluateReport": "evaluation",
    "EvaluationTask": "evaluation",
    "inspect": "inspecting",
    "InspectReport": "inspecting",
    "interference": "interfering",
    "InterferenceReport": "interfering",
    "push": "pushing",
    "PushReport": "pushing",
    "reconstruct": "reconstruction",
    "ReconstructReport": "reconstruction",
    "TaskFactors": "factors",
    "load_model": "models",
    "pipeline": "models",
    "TaskSwitcher": "switching",
    "sweep": "sweeping",
    "SweepReport": "sweeping",
    "Recipe": "recipe",
    "HfTsvError": "errors",
    "RepoError": "errors",
    "CheckpointError": "errors",
    "DataError": "errors",
    "RecipeError": "errors",
    "OutputError": "errors",
    "LostProcessError": "errors",
}

__all__ = [
    "Adaptation",
    "AlphaSearch",
    "CheckpointError",
    "CompressReport",
    "DataError",
    "EvaluateReport",
    "EvaluationTask",
    "HfTsvError",
    "InspectReport",
    "InterferenceReport",
    "LostProcessError",
    "MergeReport",
    "OutputError",
    "PushReport",
    "Recipe",
    "RecipeError",
    "ReconstructReport",
    "RepoError",
    "SweepReport",
    "TaskFactors",
    "TaskSwitcher",
    "__version__",
    "compress",
    "evaluate",
    "export_peft",
    "inspect",
    "interference",
    "load_model",
    "merge",
    "pipeline",
    "push",
    "reconstruct",
    "sweep",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import hf_tsv` stays cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_tsv' has no attribute {name!r}")
    return getattr(import_module(f"hf_tsv.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
