"""The same bytes, however many threads, processes and bytes of memory, in any order of downloads.

Matrices here are large enough that libraries would share out their sums among threads.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import clips
import pytest
import torch
from cli import hf_tsv as run
from ends import LIMIT
from hub import Hub
from safetensors.torch import save_file

WIDTH = 192
TASKS = ("a", "b", "c")

EVERYTHING = """
import json
import sys
from pathlib import Path
import hf_tsv
world, = sys.argv[1:]
tasks, base = [f"{world}/{name}" for name in "abc"], f"{world}/base"
common = {"base_model": base, "progress": False}
for name, options in {
    "tsv": {},
    "little": {"max_memory": "1GB"},
    "exact": {"precision": "exact", "orthogonalizer": "whitening"},
    "fused": {"qkv": "fused", "dtype": "bfloat16"},
    **{name: {"method": name} for name in ("low-rank", "orthogonal", "average", "ties")},
    **{name: {"method": name} for name in ("consensus", "iso-c", "iso-cts", "dc", "tall-mask")},
}.items():
    hf_tsv.merge(tasks, output=name, **options, **common)
for name, options in {
    "share": {},
    "energy": {"energy": 0.8, "dtype": "bfloat16", "compress_conv": True},
    "budget": {"budget": "40%", "dtype": "float16"},
    "rank": {"rank": 200},
}.items():
    hf_tsv.compress(tasks[0], output=name, **options, **common)
hf_tsv.export_peft(tasks[1], output="lora", rank=9, dtype="bfloat16", **common)
hf_tsv.reconstruct("energy", output="again", base_model=base, progress=False)
hf_tsv.merge(["energy", "lora", tasks[2]], output="mixed", **common)
report = hf_tsv.interference(tasks, **common).to_dict()
del report["seconds"], report["timings"]
Path("interference.json").write_text(json.dumps(report))
"""
"""Every way to compute, by one process."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of one layer, and three fine-tunes."""
    folder = tmp_path_factory.mktemp("determinism")
    config = {**clips.VISION, "model_type": "clip_vision_model", "num_hidden_layers": 1}
    layer = "vision_model.encoder.layers.0"
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.patch_embedding.weight": (WIDTH, 3, 16, 16),
        "vision_model.embeddings.position_embedding.weight": (3, WIDTH),
        "vision_model.post_layernorm.weight": (100_000,),
        f"{layer}.mlp.fc1.weight": (4 * WIDTH, WIDTH),
        f"{layer}.mlp.fc1.bias": (4 * WIDTH,),
        f"{layer}.mlp.fc2.weight": (WIDTH, 4 * WIDTH),
        f"{layer}.mlp.fc2.bias": (WIDTH,),
    }
    for key in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes[f"{layer}.self_attn.{key}.weight"] = (WIDTH, WIDTH)
        shapes[f"{layer}.self_attn.{key}.bias"] = (WIDTH,)
    g = torch.Generator().manual_seed(0)
    base = {name: 0.02 * torch.randn(shape, generator=g) for name, shape in shapes.items()}
    for name in ("base", *TASKS):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        changed = base if name == "base" else {
            n: w + 3e-4 * torch.randn(w.shape, generator=g) for n, w in base.items()
        }  # fmt: skip
        save_file(changed, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file by name."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def differing(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name in expected if found[name] != expected[name]]


def test_threads_change_no_byte_of_anything(world: Path, tmp_path: Path) -> None:
    outputs = []
    for threads in (1, 3):
        place = tmp_path / f"threads-{threads}"
        place.mkdir()
        limits = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment = {name: value for name, value in os.environ.items() if name not in limits}
        subprocess.run(
            [sys.executable, "-c", EVERYTHING, str(world)], cwd=place, check=True,
            env={**environment, "OMP_NUM_THREADS": str(threads)}, timeout=LIMIT,
            capture_output=True,
        )  # fmt: skip
        outputs.append(files_of(place))
    one, other = outputs
    assert len(one) > 60
    assert differing(other, one) == []
    weights = {name: data for name, data in one.items() if name.endswith("model.safetensors")}
    assert weights["tsv/model.safetensors"] == weights["little/model.safetensors"]
    assert len(set(weights.values())) > 10  # the others are other merges


@pytest.mark.parametrize("way", [[], ["--stream"]], ids=["downloaded", "streamed"])
def test_the_order_in_which_files_arrive_changes_no_byte(
    hub: Hub, world: Path, tmp_path: Path, way: list[str]
) -> None:
    tasks = [f"org/{name}" for name in TASKS]
    outputs = []
    for delays in ((0.0, 0.0, 0.0, 0.0), (0.2, 0.1, 0.0, 0.05), (0.0, 0.05, 0.2, 0.1)):
        place = tmp_path / str(len(outputs))
        place.mkdir()
        hub.reset()
        for name, delay in zip(("base", *TASKS), delays, strict=True):
            hub.add_repo(f"org/{name}", world / name)
            if delay:
                hub.fail(rf"/org/{name}/.*safetensors", delay=delay, times=math.inf)
        done = run("merge", *tasks, "--base-model", "org/base", "-o", "merged", "--cache-dir",
                   place / "cache", *way, cwd=place)  # fmt: skip
        assert done.code == 0, done.err
        outputs.append(files_of(place / "merged"))
    assert all(differing(other, outputs[0]) == [] for other in outputs[1:])
    done = run("merge", *(world / name for name in TASKS), "--base-model", world / "base", "-o",
               tmp_path / "local")  # fmt: skip
    assert done.code == 0, done.err
    local = files_of(tmp_path / "local")["model.safetensors"]
    assert outputs[0]["model.safetensors"] == local


def test_threads_move_embeddings_by_rounding_only() -> None:
    """What classifies images is on torch's own threads: accuracies may differ by a near tie."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=4 * WIDTH, intermediate_size=8 * WIDTH,
                              num_hidden_layers=2, image_size=64, patch_size=16)  # fmt: skip
    model, images = CLIPVisionModel(config).eval(), torch.randn(8, 3, 64, 64)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            with torch.no_grad():
                found.append(model(images).pooler_output)
    finally:
        torch.set_num_threads(before)
    first = found[0]
    assert all(float((other - first).norm() / first.norm()) < 1e-5 for other in found[1:])
