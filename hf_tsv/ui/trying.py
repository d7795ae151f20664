"""A merged model tried on an image, in a process of its own.

`python -m hf_tsv.ui.trying FOLDER IMAGE BYTES LABEL...` prints the probability of each label as
JSON, or an error and a hint as a command does. Model and image are those of strangers: what they
ask for may be too much for BYTES of memory.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Sequence

from hf_tsv.system.errors import HfTsvError
from hf_tsv.system.processes import end_with_input

MOST_PIXELS = 50_000_000


class _RefusedError(HfTsvError):
    """An image that is none, or too large."""


def scores(folder: str, image: str, labels: Sequence[str]) -> dict[str, float]:
    """Probability of each label for an image.

    Raises:
        [`HfTsvError`]: the model is none that compares images with texts, or the image cannot be
            read.
    """
    from PIL import Image

    from hf_tsv.models.loading import pipeline

    try:
        with Image.open(image) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise _RefusedError("The image is too large.", "Upload a smaller one.")
            picture = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise _RefusedError("The image cannot be read.", "Upload a PNG or JPEG file.") from None
    classify = pipeline("zero-shot-image-classification", folder, device="cpu", progress=False)
    found = classify(picture, candidate_labels=list(labels))
    return {entry["label"]: entry["score"] for entry in found}


def main() -> None:
    """Classify as the arguments say."""
    folder, image, most, *labels = sys.argv[1:]
    end_with_input()
    resource.setrlimit(resource.RLIMIT_AS, (int(most), int(most)))
    try:
        print(json.dumps(scores(folder, image, labels)))
    except HfTsvError as error:
        print(f"Error: {error.message}\nHint: {error.hint or ''}", file=sys.stderr)
        sys.exit(1)
    except Exception:  # whatever a library raises about a model, a label or memory
        print("Error: The model cannot classify this image by these labels.", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
