"""Best rates of the machine, and the time of a merge at those rates."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.speed import plain, synthetic
from benchmarks.speed.synthetic import Zoo

SAMPLE_BYTES = 2**29
BLOCK_BYTES = 2**22
MATRIX = 2048


@dataclass(frozen=True)
class Rates:
    """Best rates that were measured on the machine.

    Args:
        read: bytes per second, from the disk.
        read_cached: bytes per second, of files read or written just before.
        gemm: operations per second of a float64 matrix product.
    """

    read: float
    read_cached: float
    gemm: float


def facts(command: Sequence[str], device: str) -> dict[str, Any]:
    """Circumstances of a measurement: machine, command, versions."""
    import torch

    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python -m benchmarks.speed", *command]),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "scipy", "safetensors")},
        },
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def rates(zoo: Zoo, device: str) -> Rates:
    """Measure the rates, reading files of a zoo."""
    forget(zoo.files())
    cold = _read_rate(zoo.files())
    return Rates(cold, max(_read_rate(zoo.files()) for _ in range(2)), _gemm_rate(device))


def forget(files: Sequence[Path]) -> None:
    """Drop files from the memory of the operating system, so that they are read from disk."""
    if sys.platform != "linux":
        return
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_rate(files: Sequence[Path]) -> float:
    block, count, started = bytearray(BLOCK_BYTES), 0, time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while count < SAMPLE_BYTES and (read := opened.readinto(block)):
                count += read
    return count / (time.perf_counter() - started)


def _gemm_rate(device: str) -> float:
    import torch

    a = torch.randn(MATRIX, MATRIX, dtype=torch.float64, device=device)

    def product() -> float:
        return float((a @ a)[0, 0])  # waits for the device

    product()
    return 2 * MATRIX**3 / min(seconds(product) for _ in range(5))


def seconds(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def matrices(model: str, layers: int) -> list[tuple[int, ...]]:
    """Shapes of the weights that are decomposed."""
    return [shape for shape in synthetic.shapes(model, layers).values() if len(shape) == 2]


def flops(shape: Sequence[int], tasks: int) -> float:
    """Operations to merge one weight by symmetric eigenproblems, none of them avoidable.

    Each task needs a Gram matrix, its tridiagonal form, its leading vectors and their images. Each
    of the two polar factors needs a Gram matrix, all its eigenvectors and its inverse root. Then
    come the products. Tridiagonalisation counts as if it ran at the rate of a matrix product.
    """
    m, n = max(shape), min(shape)
    r = plain.rank_of(shape, tasks)
    q = r * tasks
    task = m * n**2 + 4 / 3 * n**3 + 2 * n**2 * r + 2 * m * n * r
    polar = (m + n) * q**2 + 2 * (4 / 3 + 2 + 1) * q**3
    products = 2 * q**3 + 2 * n * q**2 + 2 * m * n * q
    return tasks * task + polar + products


def floor_seconds(zoo: Zoo, measured: Rates, cold: bool) -> float:
    """Seconds of reading all files once and computing, at the rates of the machine."""
    work = sum(flops(shape, len(zoo.tasks)) for shape in matrices(zoo.model, zoo.layers))
    return zoo.bytes() / (measured.read if cold else measured.read_cached) + work / measured.gemm


def weights_bytes(zoo: Zoo) -> int:
    """Bytes of the largest weight of the base and all tasks in float32, the least a merge holds."""
    largest = max(math.prod(shape) for shape in synthetic.shapes(zoo.model, zoo.layers).values())
    return 4 * (len(zoo.tasks) + 1) * largest


def publish(results: Path, found: Any, text: str) -> None:
    """Write results and, beside them, their table; print the table."""
    results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    results.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
