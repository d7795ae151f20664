"""A fine-tune of a CLIP on the Hub, made by chance: `nudged.py REPOSITORY FOLDER SEED`."""

from __future__ import annotations

import sys


def nudge(repository: str, folder: str, seed: int) -> None:
    """Save the model with a little noise on every weight of its vision tower."""
    import torch
    from transformers import CLIPModel

    torch.manual_seed(seed)
    model = CLIPModel.from_pretrained(repository)
    with torch.no_grad():
        for weight in model.vision_model.parameters():
            weight.add_(torch.randn_like(weight), alpha=1e-3)
    model.save_pretrained(folder)


if __name__ == "__main__":
    nudge(sys.argv[1], sys.argv[2], int(sys.argv[3]))
