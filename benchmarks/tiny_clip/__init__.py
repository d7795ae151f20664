"""Tiny CLIPs, trained here on small image-classification tasks, as something to merge.

`Recipe()` is the quick demo's: the first 8 tasks. `twenty_tasks` was chosen on validation images of
seed 0, for likeness to CLIP and its fine-tunes:

- MLPs four times as wide as the tower. In a first recipe they were twice as wide: square matrices
  have no room for the singular vectors of all tasks at full rank, and CLIP's are not all square.
- Captions of which 45 % name the next class: the base names half of the images right, and still
  distinguishes most of the others.
- A learning rate and a number of steps that move the weights by 6 to 9 %, about 70 % of it in the
  leading twentieth of the directions.

`adapters` fine-tunes the same base model with LoRA; `larger` has a CLIP of 12 layers, and tasks of
64 x 64 pixels.
"""

from __future__ import annotations

from pathlib import Path

TINY = Path(__file__).parents[2] / "examples" / "tiny"
"""Trained models that lie in the repository: the base model and one folder a fine-tune."""

BASE = TINY / "base"

NAMES = (
    "letters", "digits", "shapes", "colours", "orientation", "textures", "counting", "position",
)  # fmt: skip
"""Names of the first 8 tasks, known before torch is imported."""
