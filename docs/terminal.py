"""The terminal of the README as a picture: `python docs/terminal.py` writes `docs/terminal.svg`.

The first command of the README is run for real, in a terminal of its own, on tiny models that the
Hub of the tests serves under the real names. What stands on the screen at the end is the picture.
"""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT)]

COLUMNS, LINES = 100, 60
COMMAND = (
    "hf-tsv merge \\\n    tanganke/clip-vit-base-patch32_"
    "{sun397,stanford-cars,resisc45,eurosat,svhn,gtsrb,mnist,dtd} \\\n"
    "    --base-model openai/clip-vit-base-patch32 -o merged"
)


def recorded(command: str, folder: Path, environment: dict[str, str]) -> str:
    """What a command writes to a terminal, codes and all."""
    leader, follower = pty.openpty()
    script = f'hf-tsv() {{ "{sys.executable}" -m hf_tsv "$@"; }}; {command}'
    words = ["bash", "-c", f"stty cols {COLUMNS} rows {LINES}; {script}"]
    process = subprocess.Popen(
        words, cwd=folder, env=environment, stdin=follower, stdout=follower, stderr=follower
    )
    os.close(follower)
    parts = []
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # nobody has the terminal open any more
            break
        if not part:
            break
        parts.append(part)
    if process.wait():
        raise SystemExit(b"".join(parts).decode())
    return b"".join(parts).decode()


def screen(text: str) -> str:
    """Lines that stand on the terminal in the end, with their colours.

    Bars write over themselves; cursor up, carriage return and erase are what they use for it.
    """
    lines, row = [""], 0
    for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)", text):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r" or re.fullmatch(r"\x1b\[[012]?K", part):
            continue  # erased by what is written next, see below
        elif up := re.fullmatch(r"\x1b\[(\d*)A", part):
            row = max(0, row - int(up[1] or 1))
            del lines[row:]
            lines.append("")
        elif re.fullmatch(r"\x1b\[[0-9;]*m", part) or not part.startswith("\x1b"):
            lines[row] += part
    return "\n".join(lines).strip()


def written_over(text: str) -> str:
    """The text without what a carriage return takes back."""
    lines = text.replace("\r\n", "\n").split("\n")
    kept = []
    for line in lines:
        parts = [part for part in line.split("\r") if re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", part)]
        kept.append(parts[-1] if parts else "")
    return "\n".join(kept)


def main() -> None:
    """Run the command and draw the screen."""
    from home import ENVIRONMENT, HUB  # before anything imports the Hub's client
    from public_names import make, serve
    from rich.console import Console
    from rich.text import Text

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        serve(HUB, make(folder / "models"), folder)
        work = folder / "work"
        work.mkdir()
        environment = {
            **os.environ,
            **ENVIRONMENT,
            "PYTHONPATH": str(ROOT),
            "TERM": "xterm-256color",
        }
        del environment["HF_HUB_DISABLE_PROGRESS_BARS"]
        shown = screen(written_over(recorded(COMMAND, work, environment)))
        shown = shown.replace(str(work), "~")
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.assemble(("$ ", "green"), COMMAND))
    console.print(Text.from_ansi(shown))
    svg = console.export_svg(title="hf-tsv merge", font_aspect_ratio=0.61)
    # The picture asks no server for its font.
    svg = re.sub(r"@font-face \{.*?\}\n", "", svg, flags=re.DOTALL)
    svg = svg.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, monospace")
    (ROOT / "docs" / "terminal.svg").write_text(svg, encoding="utf-8")
    print(shown)


if __name__ == "__main__":
    main()
