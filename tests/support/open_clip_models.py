"""What the real OpenCLIP does, as a program of its own that is asked by lines of JSON.

Each is `["make", folder, options]`, `["features", folder, inputs, output]` or `["run", folder,
code]`; the answer is a line too, an empty text or what went wrong.

Its torchvision is built for CUDA. Without it two operators are not there that OpenCLIP never calls;
torchvision only asks for their names. It runs in a process of its own because transformers, which
looks for torchvision too, would use it for its image processors.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import library as operators

for operator in ("nms", "qnms"):
    schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    operators.define(f"torchvision::{operator}", schema)

import open_clip  # noqa: E402
from open_clip.push_to_hf_hub import save_config_for_hf  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 300, "width": 16, "heads": 2, "layers": 2},
}


def architecture(name: str) -> dict[str, Any]:
    """One that OpenCLIP knows, with one layer of each kind and few words."""
    config = open_clip.get_model_config(name)
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 1
    config["text_cfg"]["vocab_size"] = CONFIG["text_cfg"]["vocab_size"]
    return config


def make(
    folder: Path, tasks: int, quick_gelu: bool, pickled: bool, name: str | None = None
) -> None:
    """A base and fine-tunes of both towers, with every parameter moved."""
    config = CONFIG if name is None else architecture(name)
    config = {**config, "quick_gelu": True} if quick_gelu else config
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms begin at 0 and 1
            parameter.add_(torch.randn_like(parameter) * 0.02)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for i in range(tasks + 1):
        target = folder / ("base" if i == 0 else f"t{i}")
        target.mkdir(parents=True)
        generator = torch.Generator().manual_seed(i)
        state = {
            name: tensor + (i > 0) * 2e-3 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in base.items()
        }
        model.load_state_dict(state)
        if pickled:
            torch.save(model.state_dict(), target / "open_clip_pytorch_model.bin")
        else:
            save_file(model.state_dict(), target / "open_clip_model.safetensors")
        images = {
            "size": config["vision_cfg"]["image_size"],
            "mean": (0.5, 0.4, 0.3),
            "std": (0.2, 0.3, 0.4),
        }
        open_clip.model.set_model_preprocess_cfg(model, images)
        save_config_for_hf(model, target / "open_clip_config.json", model_config=config)


def features(folder: Path, inputs: Path, output: Path) -> None:
    """Image and text features, as OpenCLIP computes them from a folder it loads itself."""
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    given = load_file(inputs)
    with torch.inference_mode():
        found = {
            "image": model.eval().encode_image(given["pixels"]),
            "text": model.encode_text(given["tokens"]),
            "logit_scale": model.logit_scale.reshape(1),
        }
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, output)


if __name__ == "__main__":
    answers = sys.stdout
    for line in sys.stdin:
        command, folder, *arguments = json.loads(line)
        error = ""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                if command == "make":
                    make(Path(folder), **arguments[0])
                elif command == "run":
                    os.chdir(folder)
                    exec(arguments[0], {})
                else:
                    features(Path(folder), *map(Path, arguments))
        except Exception:
            error = traceback.format_exc()
        print(json.dumps(error), file=answers, flush=True)
