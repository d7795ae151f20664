"""Cost of routing beside the plain tower: images a second, the making of towers, and memory.

`python -m benchmarks.speed.routing` routes synthetic fine-tunes of a ViT-B/32 for some numbers of
tasks, and sends images through the routed model and through the plain merge in turn, by batch size.
Before it is timed, every tower that the images need has been made. It writes a table to
`benchmarks/speed/results/routing.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hf_tsv
from benchmarks.speed import synthetic
from hf_tsv.system.memory import resident

RESULTS = Path(__file__).parent / "results"
IMAGES = 64
BATCHES = (1, 8, 32)


def images(count: int, size: int = 224) -> Tensor:
    """Noise in several sizes of grain, so that not all images belong to the same tasks."""
    generator = torch.Generator().manual_seed(0)
    grains = [torch.randn(count, 3, n, n, generator=generator) for n in (1, 4, 32)]
    scaled = [torch.nn.functional.interpolate(grain, size) for grain in grains]
    return torch.stack(scaled).sum(dim=0)


def seconds(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def passes(model: Any, pixels: Tensor, batch: int) -> None:
    """All images through a vision tower, by batches."""
    with torch.inference_mode():
        for some in pixels.split(batch):
            model(pixel_values=some)


def measured(folder: Path, rounds: int) -> dict[str, Any]:
    """Times and memory of a routed model."""
    start = resident()
    plain = hf_tsv.load_model(folder / "plain", progress=False)
    with_plain = resident()
    model: Any = hf_tsv.load_model(folder, progress=False)
    loaded = resident()
    pixels = images(IMAGES)
    sets = sorted(set(model.route(pixels).chosen))
    model.router.max_towers = len(sets)
    tower_bytes = sum(t.numel() * t.element_size() for t in model.router.first.parameters())
    making, sizes = [], []
    for chosen in sets:
        before = resident()
        making.append(seconds(lambda chosen=chosen: model.router.tower(chosen)))
        sizes.append(resident() - before)
    rows = {}
    for batch in BATCHES:
        passes(model, pixels, batch)  # warms up
        passes(plain, pixels, batch)
        pairs = [
            (seconds(lambda b=batch: passes(model, pixels, b)),
             seconds(lambda b=batch: passes(plain, pixels, b)))
            for _ in range(rounds)
        ]  # fmt: skip
        rows[batch] = {
            "images a second": IMAGES / statistics.median(own for own, _ in pairs),
            "ratio": [own / other for own, other in pairs],
        }
    return {
        "sets": len(sets),
        "making": making,
        "tower_bytes": tower_bytes,
        "plain_bytes": with_plain - start,
        "loaded_bytes": loaded - with_plain,
        "per_tower_bytes": sum(sizes) / len(sizes),
        "batches": rows,
    }


def markdown(found: dict[int, Any], about: str) -> str:
    """Report as tables."""
    head = ["tasks", "sets", *(f"batches of {batch}" for batch in BATCHES), "a tower is made in"]
    lines = [f"| {' | '.join(head)} |", f"|{'---:|' * len(head)}"]

    def spread(values: Sequence[float], digits: int = 2) -> str:
        middle = f"{statistics.median(values):.{digits}f}"
        return f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})"

    for tasks, one in found.items():
        cells = [
            f"{spread(row['ratio'])}; {row['images a second']:.0f} images/s"
            for row in one["batches"].values()
        ]
        made = f"{spread(one['making'])} s"
        lines.append(f"| {' | '.join([str(tasks), str(one['sets']), *cells, made])} |")
    memory = [
        "| tasks | merge | routed model, loaded | each tower | weights of a tower |",
        "|---:|---:|---:|---:|---:|",
    ]
    for tasks, one in found.items():
        keys = ("plain_bytes", "loaded_bytes", "per_tower_bytes", "tower_bytes")
        memory.append(f"| {tasks} | " + " | ".join(f"{one[k] / 1e6:.0f} MB" for k in keys) + " |")
    parts = ["# Routing beside the plain merge", about, "\n".join(lines), "## Memory"]
    return "\n\n".join([*parts, "\n".join(memory)]) + "\n"


def main() -> None:
    """Make routed models, run, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=3, help="of the towers")
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=synthetic.CACHE, help="for checkpoints")
    chosen = parser.parse_args()
    most = max(chosen.tasks)
    zoo = synthetic.checkpoints("ViT-B/32", most, chosen.layers, folder=chosen.cache)
    found = {}
    for count in chosen.tasks:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "routed"
            hf_tsv.route(zoo.tasks[:count], base_model=zoo.base, output=folder, progress=False)
            (folder / "plain").mkdir()
            for name in ("model.safetensors", "config.json"):
                (folder / "plain" / name).symlink_to(folder / name)
            found[count] = measured(folder, chosen.rounds)
    about = (
        f"`python -m benchmarks.speed.routing`: synthetic fine-tunes of a ViT-B/32 with"
        f" {chosen.layers} layers, {IMAGES} images, {chosen.rounds} rounds. Time of the routed"
        " model over that of the plain merge in the same round, all towers made: median"
        " (least–most)."
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1) + "\n"
    (RESULTS / "routing.json").write_text(text, encoding="utf-8")
    (RESULTS / "routing.md").write_text(markdown(found, about), encoding="utf-8")


if __name__ == "__main__":
    main()
