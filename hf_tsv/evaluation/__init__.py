"""What models score on labelled images: the verb `evaluate`, and its parts for other verbs."""

from hf_tsv.evaluation.data import EvaluationTask, LabelledImages, load
from hf_tsv.evaluation.job import NEEDED, RESULTS_FILE
from hf_tsv.evaluation.running import EvaluateReport, evaluate
from hf_tsv.evaluation.scoring import PreparedTask, accuracies, heads, prepare

__all__ = [
    "NEEDED",
    "RESULTS_FILE",
    "EvaluateReport",
    "EvaluationTask",
    "LabelledImages",
    "PreparedTask",
    "accuracies",
    "evaluate",
    "heads",
    "load",
    "prepare",
]
