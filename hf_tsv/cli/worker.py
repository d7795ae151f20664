"""A command whose progress another program reads: `python -m hf_tsv.cli.worker merge …`.

Lines on stderr that begin with `MARK` are progress, as JSON; all else is what the command says
anyway. The command ends when its standard input does, which is when that program does.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict

from hf_tsv.cli import main
from hf_tsv.system.processes import end_with_input
from hf_tsv.system.progress import Progress, watchers
from hf_tsv.system.text import one_line
from hf_tsv.ui.commands import MARK, Step

EVERY = 0.2  # seconds between two lines of progress

_said = 0.0


def tell(progress: Progress) -> None:
    """Write a line of progress, if it is time for one or the work is done."""
    global _said  # noqa: PLW0603
    now = time.monotonic()
    if now - _said >= EVERY or progress.done == progress.steps:
        _said = now
        step = Step(one_line(progress.description), round(progress.share, 4), str(progress))
        sys.stderr.write(f"{MARK}{json.dumps(asdict(step))}\n")
        sys.stderr.flush()


if __name__ == "__main__":
    watchers.append(tell)
    end_with_input()
    main()
