"""One environment for every template: escaping and filters for text from repositories."""

from __future__ import annotations

import re
from pathlib import Path


def templates() -> Path:
    """Folder of the card templates: inside the installed package, or beside it in the source."""
    package = Path(__file__).parents[1]
    installed = package / "model_cards"
    return installed if installed.is_dir() else package.parent / "model_cards"


def plain(text: object) -> str:
    """Text from elsewhere as it reads, with nothing Markdown or HTML would act on."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", line)


def code(text: object) -> str:
    """Text from elsewhere as inline code, whatever it contains."""
    line = " ".join(str(text).split())
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def cell(text: object) -> str:
    """Inline code inside a table, whose cells end at a bar even in code."""
    return code(text).replace("|", r"\|")


def fence(text: str) -> str:
    return "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)
