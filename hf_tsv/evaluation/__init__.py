"""Accuracy of models on labelled images: the verb `evaluate`, and its parts for other verbs."""

from hf_tsv.evaluation.data import EvaluationTask, LabelledImages, load
from hf_tsv.evaluation.job import RESULTS_FILE
from hf_tsv.evaluation.running import EvaluateReport, evaluate

__all__ = [
    "RESULTS_FILE",
    "EvaluateReport",
    "EvaluationTask",
    "LabelledImages",
    "evaluate",
    "load",
]
