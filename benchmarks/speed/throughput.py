"""Images a second of an evaluation, beside a plain loop of transformers on the same files.

`python -m benchmarks.speed.throughput` makes JPEG images and a random CLIP of real size, sends the
images through the loop of `hf-tsv evaluate` and through a plain one in turn, and refuses results
whose predictions differ. The parts of both loops are timed alone, one after the other. A model that
routes between two synthetic fine-tunes stands in both loops too. It writes
`benchmarks/speed/results/throughput.json` and `throughput.md`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel

import hf_tsv
from benchmarks.speed import machine, synthetic
from benchmarks.speed.machine import seconds
from benchmarks.speed.synthetic import MODELS, PREFIX, Zoo
from benchmarks.tiny_clip.models import build_model, build_processor
from hf_tsv.evaluation import classifying, zero_shot
from hf_tsv.evaluation.data import LabelledImages, load
from hf_tsv.evaluation.pixels import batches
from hf_tsv.models.building import ZERO_SHOT

RESULTS = Path(__file__).parent / "results" / "throughput.json"
CLASSES = ("cat", "dog", "emu", "fox")
HEAD = 16  # classes among which the loops choose
SIDES = (320, 640)  # least and most pixels of a side
OURS, PLAIN = "hf-tsv", "transformers"
WHOLE, PREPARING, PARTS = "whole", "preparing", ("decode", "preprocess", "model")
TASKS = 2  # of the model that routes

Found = dict[str, Any]


def write_images(folder: Path, count: int) -> None:
    """Write JPEG images of several sizes, smooth with some noise, as a folder for each class."""
    rng = np.random.default_rng(0)
    for i in range(count):
        width, height = rng.integers(SIDES[0], SIDES[1] + 1, 2).tolist()
        grain = rng.integers(4, 17)
        small = rng.integers(0, 256, (grain, grain, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(small).resize((width, height)), dtype=np.int16)
        pixels = smooth + rng.integers(-20, 21, smooth.shape, dtype=np.int16)
        file = folder / "test" / CLASSES[i % len(CLASSES)] / f"{i:05}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, quality=90)


def write_model(zoo: Zoo, folder: Path) -> None:
    """Write a CLIP with the vision tower of the zoo's base, and all that evaluation needs."""
    torch.manual_seed(0)
    processor = build_processor(CLASSES)
    config = build_model(processor.tokenizer, width=64, layers=1, mlp_ratio=2).config
    config.vision_config = synthetic.config(zoo.model, zoo.layers)
    model = CLIPModel(config)
    tower = load_file(zoo.base / "model.safetensors")
    model.vision_model.load_state_dict({k.removeprefix(PREFIX): v for k, v in tower.items()})
    model.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)


@dataclass(frozen=True)
class Loops:
    """The two loops over the same images with the same model, and their parts."""

    pipe: Any
    directions: Tensor
    images: LabelledImages
    files: Sequence[Path]
    size: int

    def ours(self) -> list[int]:
        """Classes that the loop of an evaluation predicts."""
        found = classifying.by_batches(
            self.pipe, self.directions, self.images, self._parts(), "images", lambda _: None
        )
        return [one for batch in found for one in batch.predicted]

    def plain(self) -> list[int]:
        """Classes that a plain loop predicts: read, prepare, classify, batch by batch."""
        found: list[int] = []
        for part in self._parts():
            pictures = [Image.open(self.files[i]).convert("RGB") for i in part]
            found += self._predicted(self._prepared(pictures)).tolist()
        return found

    def parts(self) -> dict[str, dict[str, Callable[[], object]]]:
        """Parts of the loops, each on the results of the part before it."""
        parts, every = self._parts(), range(len(self.files))
        pictures = [self.images.read(i, "images")[0] for i in every]
        pixels = [self._prepared(pictures[part[0] : part[-1] + 1]) for part in parts]

        def ahead() -> None:
            for _ in batches(self.images, self.pipe.image_processor, parts, "images"):
                pass

        def in_turn() -> None:
            for part in parts:
                self._prepared([Image.open(self.files[i]).convert("RGB") for i in part])

        classify = partial(zero_shot.classify, self.pipe.model, self.directions)
        return {
            "decode": {
                OURS: lambda: [self.images.read(i, "images") for i in every],
                PLAIN: lambda: [Image.open(file).convert("RGB") for file in self.files],
            },
            "preprocess": {
                OURS: lambda: [self._prepared(picture) for picture in pictures],
                PLAIN: lambda: [
                    self._prepared(pictures[part[0] : part[-1] + 1]) for part in parts
                ],
            },
            PREPARING: {OURS: ahead, PLAIN: in_turn},
            "model": {
                OURS: lambda: [classify(some) for some in pixels],
                PLAIN: lambda: [self._predicted(some) for some in pixels],
            },
        }  # fmt: skip

    def _parts(self) -> list[range]:
        every = range(len(self.files))
        return [every[i : i + self.size] for i in range(0, len(every), self.size)]

    def _prepared(self, pictures: Any) -> Tensor:
        pixels: Tensor = self.pipe.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return pixels

    @torch.inference_mode()
    def _predicted(self, pixels: Tensor) -> Tensor:
        """Predict as transformers' `CLIPModel` does; one that routes is given the head too."""
        known = {"text_embeds": self.directions} if hasattr(self.pipe.model, "router") else {}
        found = self.pipe.model.get_image_features(pixel_values=pixels, **known).pooler_output
        return (found / found.norm(dim=-1, keepdim=True) @ self.directions.T).argmax(dim=1)


def opened(folder: Path, pictures: Path, size: int) -> Loops:
    """Loops over all images with a model of a folder."""
    pipe: Any = hf_tsv.pipeline(ZERO_SHOT, folder, device="cpu", progress=False)
    images = load(hf_tsv.EvaluationTask("images", str(pictures)))
    files = sorted(pictures.glob("test/*/*.jpg"))
    some = pipe.image_processor([Image.open(file) for file in files[:HEAD]], return_tensors="pt")
    return Loops(pipe, head(pipe.model, some["pixel_values"]), images, files, size)


@torch.inference_mode()
def head(model: Any, pixels: Tensor) -> Tensor:
    """Directions of as many classes as images: each image's embedding, orthogonal to their mean.

    Class prompts are no use: a random model has all images nearest to the same one.
    """
    routed = {"text_embeds": torch.eye(model.config.projection_dim)[:1]}
    known = routed if hasattr(model, "router") else {}
    found = model.get_image_features(pixel_values=pixels, **known).pooler_output
    mean = torch.nn.functional.normalize(found.mean(dim=0), dim=0)
    return torch.nn.functional.normalize(found - (found @ mean)[:, None] * mean, dim=1)


def measured(loops: Loops, rounds: int, *, parts: bool) -> Found:
    """Milliseconds an image of both loops in each round, and of their parts."""
    chosen: dict[str, dict[str, Callable[[], object]]] = {
        WHOLE: {OURS: loops.ours, PLAIN: loops.plain}, **(loops.parts() if parts else {})
    }  # fmt: skip
    predicted = loops.ours()  # warms up too
    if predicted != loops.plain():
        raise RuntimeError("The two loops predict different classes.")
    if len(set(predicted)) < 2:
        raise RuntimeError("All images are of one class, so the loops cannot be compared.")
    found: Found = {name: {loop: [] for loop in calls} for name, calls in chosen.items()}
    for _ in range(rounds):
        for name, calls in chosen.items():
            for loop, call in calls.items():
                spent = 1000 * seconds(call) / len(loops.files)
                found[name][loop].append(round(spent, 3))
    return found


def ratio(row: Found, what: str) -> str:
    """Times faster than transformers: median (least … most) of the rounds."""
    both = zip(row["times"][what][PLAIN], row["times"][what][OURS], strict=True)
    found = [plain / own for plain, own in both]
    return f"{statistics.median(found):.2f} ({min(found):.2f} … {max(found):.2f}) ×"


def cells(row: Found) -> list[str]:
    """Cells of the table in `docs/benchmarks.md`: images a second, and how much faster."""
    rates = [1000 / statistics.median(row["times"][WHOLE][loop]) for loop in (OURS, PLAIN)]
    preparing = ratio(row, PREPARING) if PREPARING in row["times"] else ""
    return [row["model"], *(f"{rate:.1f}" for rate in rates), ratio(row, WHOLE), preparing]


def markdown(found: Found) -> str:
    """Results as tables."""
    facts = found["facts"]
    about = (
        f"`{facts['command']}`: {facts['images']} JPEG images of {SIDES[0]} to {SIDES[1]} pixels a"
        f" side, batches of {facts['batch_size']}, {facts['rounds']} rounds on {facts['cpus']}"
        f" cores, load {facts['load']:.1f} at the start. Both loops predict the same classes."
        " Ratios are the time of the plain loop over that of hf-tsv in the same round: median"
        " (least … most)."
    )
    lines = [
        "# Beside a plain loop of transformers", "", about, "",
        "| model | images/s, hf-tsv | transformers | faster | faster, decoding and preprocessing |",
        "|---|---:|---:|---:|---:|",
        *(f"| {' | '.join(cells(row))} |" for row in found["rows"]),
        "", "Milliseconds an image, medians; the parts alone, reading in one thread.", "",
        f"| model | | {' | '.join((*PARTS, WHOLE))} |", f"|---|---|{'---:|' * (len(PARTS) + 1)}",
    ]  # fmt: skip
    for row in found["rows"]:
        for loop in (OURS, PLAIN):
            spent = [
                f"{statistics.median(row['times'][name][loop]):.2f}" if name in row["times"] else ""
                for name in (*PARTS, WHOLE)
            ]
            lines.append(f"| {' | '.join([row['model'], loop, *spent])} |")
    return "\n".join(lines) + "\n"


def compared(zoo: Zoo, place: Path, count: int, size: int, rounds: int) -> list[Found]:
    """Rows of a plain and of a routed model; folders for both and images are made in a place."""
    write_images(place / "images", count)
    write_model(zoo, place / "base")
    hf_tsv.route(zoo.tasks, base_model=place / "base", output=place / "routed", progress=False)
    rows = []
    for folder, kind in (("base", ""), ("routed", f", routed among {len(zoo.tasks)} tasks")):
        loops = opened(place / folder, place / "images", size)
        name = f"{zoo.model}, {zoo.layers} layers{kind}"
        rows.append({"model": name, "times": measured(loops, rounds, parts=folder == "base")})
    return rows


def main() -> None:
    """Make, run, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=MODELS, default="ViT-B/32")
    parser.add_argument("--layers", type=int, help="[default: all]")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=synthetic.CACHE, help="for checkpoints")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the results")
    chosen = parser.parse_args()
    layers = chosen.layers or MODELS[chosen.model].layers
    facts = machine.facts([], "cpu") | {"command": "python -m benchmarks.speed.throughput"}
    facts |= {"load": round(os.getloadavg()[0], 1), "rounds": chosen.rounds}
    facts |= {"images": chosen.images, "batch_size": chosen.batch_size}
    facts["versions"] |= {name: version(name) for name in ("transformers", "pillow")}
    zoo = synthetic.checkpoints(chosen.model, TASKS, layers, folder=chosen.cache)
    with tempfile.TemporaryDirectory() as place:
        sizes = (chosen.images, chosen.batch_size, chosen.rounds)
        rows = compared(zoo, Path(place), *sizes)
    found = {"facts": facts, "rows": rows}
    machine.publish(chosen.results, found, markdown(found))


if __name__ == "__main__":
    main()
