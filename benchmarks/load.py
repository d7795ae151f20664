"""Merges of many tasks, many tensors and large models under a hard limit of memory.

`python -m benchmarks.load` makes checkpoints in `.bench/` and merges them in processes whose memory
the kernel limits (`RLIMIT_DATA`: private writable memory, used or not). It writes tables to
`benchmarks/results/`. The large model takes 30 GB of disk. Where a limit leaves no room for a
buffer of OpenBLAS, OpenBLAS requests it again for ever, so hf-tsv must know the limit, by
`--max-memory`.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.speed import machine, processes, synthetic
from benchmarks.speed.synthetic import Size, Zoo

RESULTS = Path(__file__).parent / "results"
MB = 1_000_000


@dataclass(frozen=True)
class Scenario:
    """Merge, and the memory it may take.

    Args:
        what: description.
        tasks: number of tasks.
        layers: number of layers of the towers.
        limit: bytes that the kernel gives a process.
        max_memory: value of `--max-memory`, in bytes.
        size: size of a tower made of random numbers.
        model: name in `synthetic.MODELS`, instead of a size.
    """

    what: str
    tasks: int
    layers: int
    limit: int
    max_memory: int
    size: Size | None = None
    model: str = ""


SCENARIOS: Mapping[str, Scenario] = {
    "tasks": Scenario("100 tasks of a small CLIP", 100, 4, 700 * MB, 650 * MB, Size(128, 4, 4, 32)),
    "tensors": Scenario(
        "50,000 tensors, 2 tasks", 2, 3125, 1300 * MB, 1200 * MB, Size(16, 3125, 4, 32)
    ),
    "large": Scenario("20 tasks of ViT-L/14", 20, 24, 2000 * MB, 1700 * MB, model="ViT-L/14"),
}


@dataclass(frozen=True)
class Row:
    """Measurements of a merge.

    Args:
        what: description.
        tensors: number of tensors of each checkpoint.
        tasks: number of tasks.
        input_bytes: size of all checkpoints.
        limit: bytes that the kernel gave the process.
        max_memory: value of `--max-memory`, in bytes.
        stated: peak it predicted, in bytes, on top of its libraries.
        peak: peak of resident memory, in bytes, pages of files and libraries included.
        wall: seconds.
        cpu: seconds, of all threads.
        beside: bytes of the files beside the weights.
        report: bytes of the JSON that it printed.
    """

    what: str
    tensors: int
    tasks: int
    input_bytes: int
    limit: int
    max_memory: int
    stated: int
    peak: int
    wall: float
    cpu: float
    beside: int
    report: int


def made(scenario: Scenario, cache: Path) -> Zoo:
    """Make the checkpoints of a scenario."""
    if scenario.size is None:
        return synthetic.checkpoints(scenario.model, scenario.tasks, scenario.layers, folder=cache)
    return random_checkpoints(scenario.size, scenario.tasks, scenario.layers, cache)


def random_checkpoints(size: Size, tasks: int, layers: int, cache: Path) -> Zoo:
    """Make a tower of any depth and fine-tunes of it from random numbers, in seconds."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    folder = cache / f"random-{size.hidden}-{layers}-layers-{tasks}-tasks"
    names = tuple(folder / f"task-{i:03}" for i in range(tasks))
    zoo = Zoo("random", layers, "random", folder / "base", names)
    if folder.exists():
        return zoo
    config = CLIPVisionConfig(
        hidden_size=size.hidden, intermediate_size=2 * size.hidden, num_hidden_layers=1,
        num_attention_heads=size.heads, patch_size=size.patch, architectures=["CLIPVisionModel"],
    )  # fmt: skip
    with torch.device("meta"):
        one = {n: tuple(t.shape) for n, t in CLIPVisionModel(config).state_dict().items()}
    shapes = {}
    for name, shape in one.items():
        for i in range(layers if ".layers.0." in name else 1):
            shapes[synthetic.PREFIX + name.replace(".layers.0.", f".layers.{i}.")] = shape
    config.num_hidden_layers = layers
    draft = cache / f"{folder.name}.part"
    shutil.rmtree(draft, ignore_errors=True)
    g = torch.Generator().manual_seed(0)
    base = {n: synthetic.WEIGHT_RMS * torch.randn(s, generator=g) for n, s in shapes.items()}
    for place in (zoo.base, *names):
        state = base if place == zoo.base else {
            n: w + synthetic.UPDATE_RMS * torch.randn(w.shape, generator=g)
            for n, w in base.items()
        }  # fmt: skip
        (draft / place.name).mkdir(parents=True)
        save_file(state, draft / place.name / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(draft / place.name)
    draft.rename(folder)
    return zoo


def measured(scenario: Scenario, zoo: Zoo, cache: Path) -> Row:
    """Merge once, within the limit.

    Raises:
        [`processes.FailedError`]: the memory did not suffice, or something else went wrong.
    """
    out, said = cache / "load-out", cache / "load.json"
    shutil.rmtree(out, ignore_errors=True)
    command = [
        "benchmarks.load", "--limited", scenario.limit, said, "merge", *zoo.tasks, "--base-model",
        zoo.base, "-o", out, "--max-memory", scenario.max_memory, "--json", "--quiet",
    ]  # fmt: skip
    took = processes.run(list(map(str, command)))
    report = json.loads(said.read_text())
    row = Row(
        what=scenario.what,
        tensors=sum(report["weights"].values()),
        tasks=len(zoo.tasks),
        input_bytes=zoo.bytes(),
        limit=scenario.limit,
        max_memory=scenario.max_memory,
        stated=report["peak_memory_bytes"],
        peak=took.peak_bytes,
        wall=took.wall,
        cpu=took.cpu,
        beside=sum(f.stat().st_size for f in out.iterdir() if f.suffix != ".safetensors"),
        report=said.stat().st_size,
    )
    shutil.rmtree(out)
    said.unlink()
    return row


def limited(limit: int, said: Path, arguments: list[str]) -> None:
    """Run hf-tsv in this process within a limit of memory; its output goes into a file."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    from hf_tsv import cli

    sys.argv = ["hf-tsv", *arguments]
    with said.open("w") as sys.stdout:
        cli.main()


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown table of the rows."""
    lines = [
        "# Merges under a hard limit of memory",
        "",
        "`python -m benchmarks.load`: real processes, which the kernel refuses more private memory"
        " than the limit (`RLIMIT_DATA`; it counts what is asked for, used or not, and no pages of"
        " files). The peak is of resident memory, libraries and pages of files included.",
        "",
        "| merge | tensors | inputs | limit | `--max-memory` | stated beside libraries | peak |"
        " wall | CPU | card, recipe, config | JSON |",
        "|---|" + "---:|" * 10,
    ]
    for row in rows.values():
        lines.append(
            f"| {row['what']} | {row['tensors']:,} | {row['input_bytes'] / 1e9:.2f} GB"
            + "".join(f" | {row[k] / 1e6:,.0f} MB" for k in ("limit", "max_memory", "stated"))
            + f" | {row['peak'] / 1e6:,.0f} MB | {row['wall']:.0f} s | {row['cpu']:.0f} s"
            f" | {row['beside'] / 1e3:.0f} kB | {row['report'] / 1e6:.1f} MB |"
        )
    for row in rows.values():
        facts = row["facts"]
        lines += [
            "",
            f"{row['what']}: {facts['date']}, {facts['cpu']}, {facts['cpus']} CPUs,"
            f" {facts['threads']} threads, {facts['memory_bytes'] / 1e9:.0f} GB of memory, shared"
            " with other work.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the scenarios and write the results."""
    if sys.argv[1:2] == ["--limited"]:
        limited(int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=SCENARIOS, action="append", help="[default: all]")
    parser.add_argument("--cache", type=Path, default=synthetic.CACHE, help="[default: .bench]")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    file = RESULTS / "load.json"
    rows = json.loads(file.read_text()) if file.exists() else {}
    for name in arguments.only or SCENARIOS:
        zoo = made(SCENARIOS[name], arguments.cache)
        row = measured(SCENARIOS[name], zoo, arguments.cache)
        rows[name] = {**asdict(row), "facts": machine.facts([], "cpu")}
        rows[name]["facts"]["command"] = f"python -m benchmarks.load --only {name}"
        RESULTS.mkdir(exist_ok=True)
        file.write_text(json.dumps(rows, indent=1) + "\n")
        (RESULTS / "load.md").write_text(table({n: rows[n] for n in SCENARIOS if n in rows}))
    print((RESULTS / "load.md").read_text())


if __name__ == "__main__":
    main()
