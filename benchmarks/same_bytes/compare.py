"""Two files, byte for byte, but for what no two runs have in common; and where they differ."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PHASES = "reading|waiting|computing|writing"

CHANGING: tuple[tuple[str, str], ...] = (
    (rf"([\"'](?:seconds|{PHASES})[\"']: )[\d.e+-]+", r"\g<1>0"),
    (r"http://127\.0\.0\.1:\d+", "HUB"),
)
"""What may differ in any text: durations in reports, and the port of the Hub."""

ON_STDERR: tuple[tuple[str, str], ...] = (
    (r"\b\d+(\.\d+)? (s|ms|seconds|MB/s)\b", r"0 \2"),
    (r"\d+ of (\d+ weights are done.\n\w+) \d+", r"0 of \1 0"),
    (r"^0 s +\S+$", "a slow weight"),
    (r".*(?:torch/distributed|torchrun|OMP_NUM_THREADS|\[rank\d\]|socket\.cpp).*\n", ""),
)
"""What may differ on stderr too: times and the slowest weights, how far a run that was killed had
come, and what torchrun says itself."""


@dataclass(frozen=True)
class Difference:
    """Where two outputs part.

    Args:
        file: relative to the folder of the command.
        place: a key, a line, a tensor; and both values.
    """

    file: str
    place: str

    def __str__(self) -> str:
        return f"{self.file}: {self.place}"


def compared(first: Path, second: Path, sides: tuple[Path, Path]) -> Iterator[Difference]:
    """Differences of all files in two folders, in order of their names."""
    folders = (first, second)
    names = [{str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()} for f in folders]
    for name in sorted(names[0] | names[1]):
        missing = [i for i in (0, 1) if name not in names[i]]
        if missing:
            yield Difference(name, f"is missing {('before', 'after')[missing[0]]}")
            continue
        before, after = (
            normalised((folder / name).read_bytes(), name, side)
            for folder, side in zip(folders, sides, strict=True)
        )
        if before != after:
            yield Difference(name, place(name, before, after))


def normalised(content: bytes, name: str, side: Path) -> bytes:
    """A file without the folder of its side and, if it is text, without what changes."""
    content = content.replace(str(side).encode(), b"SIDE")
    if name.endswith((".safetensors", ".png", ".bin")):
        return content
    text = content.decode("utf-8", "surrogateescape")
    for pattern, by in (*CHANGING, *(ON_STDERR if name == "stderr" else ())):
        text = re.sub(pattern, by, text, flags=re.MULTILINE)
    return text.encode("utf-8", "surrogateescape")


def place(name: str, before: bytes, after: bytes) -> str:
    """The first key, tensor, line or byte that differs, and both values."""
    if name.endswith(".safetensors"):
        return _tensor(before, after)
    try:
        found = next(_keys(json.loads(before), json.loads(after)), None)
        return found or "the same values, written differently"
    except ValueError:
        pass
    if b"\0" in before:
        both = zip(before, after, strict=False)
        at = next((i for i, (a, b) in enumerate(both) if a != b), min(len(before), len(after)))
        return f"byte {at}"
    lines = [content.decode(errors="replace").splitlines() for content in (before, after)]
    for i in range(max(map(len, lines))):
        a, b = (side[i] if i < len(side) else "(no line)" for side in lines)
        if a != b:
            at = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)
            start = max(0, at - 20)
            return f"line {i + 1}: {_short(a[start:])} / {_short(b[start:])}"
    return "ends of lines"


def _keys(before: Any, after: Any, key: str = "") -> Iterator[str]:
    """Keys at which two JSON values differ, in order."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in [*before, *(n for n in after if n not in before)]:
            inner = f"{key}.{name}".lstrip(".")
            if name not in before or name not in after:
                yield f"{inner}: only {'before' if name in before else 'after'}"
            else:
                yield from _keys(before[name], after[name], inner)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, (a, b) in enumerate(zip(before, after, strict=True)):
            yield from _keys(a, b, f"{key}[{i}]")
    elif before != after or type(before) is not type(after):
        yield f"{key}: {_short(before)} / {_short(after)}"


def _tensor(before: bytes, after: bytes) -> str:
    """The first tensor that differs, and how many do."""
    headers, bodies = zip(*(_split(content) for content in (before, after)), strict=True)
    if found := next(_keys(*headers), None):
        return f"header: {found}"
    wrong = []
    for name, entry in headers[0].items():
        start, end = entry.get("data_offsets", (0, 0))
        if bodies[0][start:end] != bodies[1][start:end]:
            wrong.append(name)
    return f"{wrong[0]}, {len(wrong)} tensors in all" if wrong else "order or spaces of the header"


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
