"""The merge of one weight against the plain algorithm, in time and in error.

`python -m benchmarks.speed.kernels` makes related tasks with power-law spectra in the shapes of
ViT-B/32 and ViT-L/14, and computes each weight in turn by float32 SVDs throughout (the plain
algorithm, all threads) and by `hf_tsv.tsv.merge`. Errors are against float64 SVDs.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from hf_tsv import linalg, tsv

SHAPES = {"ViT-B/32": [(768, 768), (3072, 768), (768, 3072)], "ViT-L/14": [(1024, 1024)]}
TASKS = (8, 20)
EXPONENT = 0.5
SHARED = 64
"""Leading directions that all tasks have in part."""


def related(shape: tuple[int, int], tasks: int, seed: int) -> list[Tensor]:
    """Updates with σ_j = j^−1/2 whose leading directions lean towards those of one subspace."""
    generator = torch.Generator().manual_seed(seed)
    k = min(shape)
    sigma = torch.arange(1, k + 1, dtype=torch.float64) ** -EXPONENT

    def bases(size: int) -> list[Tensor]:
        common = torch.randn(size, SHARED, generator=generator, dtype=torch.float64)
        made = []
        for _ in range(tasks):
            own = torch.randn(size, k, generator=generator, dtype=torch.float64)
            own[:, :SHARED] += common * torch.rand(SHARED, generator=generator) * 3
            made.append(torch.linalg.qr(own)[0])
        return made

    pairs = zip(bases(shape[0]), bases(shape[1]), strict=True)
    scale = 3e-4 * math.sqrt(math.prod(shape)) / float(sigma.norm())
    return [((U * sigma) @ V.mT * scale).float() for U, V in pairs]


def plain(deltas: Sequence[Tensor], rank: int) -> Tensor:
    """Algorithm 1 of the paper with `torch.linalg.svd`, in the dtype given."""
    factors = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    U = torch.cat([U[:, :rank] for U, _, _ in factors], dim=1)
    S = torch.cat([S[:rank] for _, S, _ in factors])
    V = torch.cat([Vh[:rank] for _, _, Vh in factors])
    P, _, Qh = torch.linalg.svd(U, full_matrices=False)
    R, _, Th = torch.linalg.svd(V, full_matrices=False)
    return ((P @ Qh) * S) @ (R @ Th)


def certified(deltas: Sequence[Tensor], rank: int) -> Tensor:
    """The same by hf-tsv, as a merge runs it."""
    with linalg.threads():
        return tsv.merge(deltas, rank).matrix


def timed(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds of one call, and its result."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, Frobenius."""
    return float((found.double() - expected).norm() / expected.norm())


def main() -> None:
    """Measure in turn, print ratios with their spread."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", choices=SHAPES, action="append", help="[default: all]")
    arguments = parser.parse_args()
    certified(related((64, 64), 2, 0), 8)  # loads libraries
    shapes = [shape for model in arguments.model or SHAPES for shape in SHAPES[model]]
    table = Table(title=f"One weight, power law j^-1/2, CPU, {torch.get_num_threads()} threads")
    for name in ("shape", "tasks", "plain", "hf-tsv", "ratio", "lowest … highest"):
        table.add_column(name, justify="right")
    table.add_column("error, plain", justify="right")
    table.add_column("error, hf-tsv", justify="right")
    jobs = [(shape, tasks) for shape in shapes for tasks in TASKS]
    for shape, tasks in track(jobs, "Measuring", console=Console(stderr=True)):
        deltas = related(shape, tasks, seed=tasks)
        rank = tsv.default_rank(shape, tasks)
        expected = plain([delta.double() for delta in deltas], rank)
        slow, fast, ratios = [], [], []
        for _ in range(arguments.rounds):
            seconds, reference = timed(lambda: plain(deltas, rank))  # noqa: B023
            slow.append(seconds)
            seconds, result = timed(lambda: certified(deltas, rank))  # noqa: B023
            fast.append(seconds)
            ratios.append(slow[-1] / fast[-1])
        table.add_row(
            " × ".join(map(str, shape)),
            str(tasks),
            f"{statistics.median(slow):.2f} s",
            f"{statistics.median(fast):.2f} s",
            f"{statistics.median(ratios):.1f}",
            f"{min(ratios):.1f} … {max(ratios):.1f}",
            f"{error(reference, expected):.0e}",
            f"{error(result, expected):.0e}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
