"""The words of messages, in the source: arguments, plurals, percentages, and plain English."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hf_tsv"
FILES = sorted(PACKAGE.rglob("*.py"))

THINGS = r"(weights|checkpoints|tasks|tensors|files|images|inputs|classes|coefficients|masks)"
COUNTED = rf"(?<!of )(?<!over )(?<!\+ )(\{{\}}|%d) {THINGS}\b"
OPTION = re.compile(r"(?<![\w-])(--[a-z]|-o\b)")
FRAGMENTS = re.compile(r"\b(go(es)? on|lies?|makes? again|leave (it|\S*-\S+) out)\b", re.IGNORECASE)


def texts(file: Path) -> Iterator[tuple[int, str]]:
    """Texts in a file that are no docstrings, with their lines; `{}` for each value in one."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            inside.add(node.value)
        if isinstance(node, ast.JoinedStr):
            inside |= set(node.values)
            parts = [n.value if isinstance(n, ast.Constant) else "{}" for n in node.values]
            yield node.lineno, "".join(map(str, parts))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            yield node.lineno, node.value


def faults(file: Path) -> Iterator[str]:
    """What is wrong with the texts of a file."""
    for line, text in texts(file):
        plain = re.sub(r"`[^`]*`", "", text)  # without commands and arguments
        below = "cli" not in file.relative_to(PACKAGE).parts
        rules = {
            "an option where Python has an argument": below and " " in plain and OPTION,
            "a number of things without `counted`": COUNTED,
            "a space before %": r"(\{\}|\d|%[.\d]*[dfg]) %(%| of|$)",
            "a word that readers stop at": below and FRAGMENTS,
            "two periods": r"\w\.\.(?=$| )",
        }
        for fault, rule in rules.items():
            if rule and re.search(rule, plain):
                yield f"{file.relative_to(ROOT)}:{line}: {fault}: {text!r}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_messages_are_plain(file: Path) -> None:
    assert not list(faults(file))


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ('raise E(f"{n} weights do not fit.")', "counted"),
        ('log("%d tasks", n)', "counted"),
        ('raise E("Add --force to replace it.")', "argument"),
        ('raise E("Choose another folder with -o.")', "argument"),
        ('say(f"{x:.1f} % of it")', "space"),
        ('say("the same command goes on from there")', "stop at"),
        ('say("Leave --report out.")', "stop at"),
    ],
)
def test_the_faults_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, fault: str
) -> None:
    file = tmp_path / "one.py"
    file.write_text(source, encoding="utf-8")
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert any(fault in found for found in faults(file)), list(faults(file))
