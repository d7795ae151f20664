"""Reads hostile folders in a process of its own, whose memory is its own too.

`python tests/hostile.py FOLDER …` opens each as a checkpoint, or reads its recipe, and prints a
line of JSON: what it was refused with, and by how many bytes the process has grown until then.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from hf_tsv.checkpoints.names import RECIPE_FILE
from hf_tsv.checkpoints.opening import open_task, without_base
from hf_tsv.checkpoints.reference import parse, pin
from hf_tsv.recipes.recipe import Recipe
from hf_tsv.system.errors import HfTsvError


def most_memory() -> int:
    """Bytes that this process has had at a time."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def refusal(folder: Path) -> str | None:
    """What a folder is refused with, if it is; anything else ends the process."""
    try:
        if (folder / RECIPE_FILE).exists():
            Recipe.load(folder)
        else:
            open_task(pin(parse(str(folder))), without_base)
    except HfTsvError as error:
        return str(error)
    return None


def main() -> None:
    before = most_memory()
    for name in sys.argv[1:]:
        said = refusal(Path(name))
        print(json.dumps({"said": said, "grown": most_memory() - before}), flush=True)


if __name__ == "__main__":
    main()
