"""Twenty small image-classification tasks; the first 8 and the first 14 are benchmarks as well."""

from __future__ import annotations

from .first_tasks import FIRST_TASKS
from .further_tasks import FURTHER_TASKS
from .sampling import Task

TASKS: tuple[Task, ...] = (*FIRST_TASKS, *FURTHER_TASKS)
