"""Cost of switching tasks beside its matrix products: eight tasks of a ViT-B/32, in memory.

`python -m benchmarks.speed.switching` builds the vision tower with random weights and random
factors of rank k/10 for eight tasks. It times in turn the products U diag(S) Vh alone, activating a
task, restoring the base, and copying a whole state into the model as a reference.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from hf_tsv import TaskSwitcher
from hf_tsv.linalg.updates import TaskSingularVectors, Update

TASKS = 8
RANK_FRACTION = 0.1


def random_task(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Update]:
    """Make random factors for every matrix and a random update for every other tensor."""
    generator = torch.Generator().manual_seed(seed)
    updates: dict[str, Update] = {}
    for name, shape in shapes.items():
        if len(shape) != 2:
            updates[name] = torch.randn(shape, generator=generator) * 1e-3
            continue
        rank = max(1, int(RANK_FRACTION * min(shape)))
        updates[name] = TaskSingularVectors(
            torch.randn(shape[0], rank, generator=generator) / shape[0] ** 0.5,
            torch.linspace(1, 0.1, rank),
            torch.randn(rank, shape[1], generator=generator) / shape[1] ** 0.5,
        )
    return updates


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    """Measure in turn, print medians and ratios with their spread."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(patch_size=32)).eval()
    shapes = {f"vision_model.{name}": tuple(p.shape) for name, p in model.named_parameters()}
    tasks = {str(i): random_task(shapes, i) for i in range(TASKS)}
    switcher = TaskSwitcher(model, tasks, "CLIPVisionModel")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pairs = {
        task: [(u.U * u.S, u.Vh) for u in updates.values() if isinstance(u, TaskSingularVectors)]
        for task, updates in tasks.items()
    }
    buffers: dict[torch.Size, Tensor] = {
        p.shape: torch.empty_like(p) for p in model.parameters() if p.ndim == 2
    }

    def products() -> None:
        for matrices in pairs.values():
            for left, right in matrices:
                shape = torch.Size((left.shape[0], right.shape[1]))
                torch.mm(left, right, out=buffers[shape])

    def activate() -> None:
        for task in switcher.names:
            switcher.activate(task)

    rows: dict[str, list[float]] = {"products": [], "activate": [], "deactivate": [], "copy": []}
    with torch.no_grad():
        for step in range(arguments.rounds + 1):
            found = {
                "products": timed(products) / TASKS,
                "activate": timed(activate) / TASKS,
                "deactivate": timed(switcher.deactivate),
                "copy": timed(lambda: model.load_state_dict(state)),
            }
            if step:  # the first round warms up
                for name, seconds in found.items():
                    rows[name].append(seconds)
    names = {
        "products": "U diag(S) Vh of all matrices, nothing else",
        "activate": "activate a task",
        "deactivate": "restore the base model",
        "copy": "copy a whole state dict, for comparison",
    }
    table = Table(title=f"Switching {TASKS} tasks of a ViT-B/32, rank k/10, float32, CPU")
    table.add_column("per task")
    for name in ("median", "over the products", "lowest … highest"):
        table.add_column(name, justify="right")
    for key, seconds in rows.items():
        ratios = [a / b for a, b in zip(seconds, rows["products"], strict=True)]
        table.add_row(
            names[key],
            f"{1000 * statistics.median(seconds):.0f} ms",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} … {max(ratios):.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
