"""The structure of the package: sizes, circles, words, and the map of it in the docs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hf_tsv"
FILES = sorted(PACKAGE.rglob("*.py"))
MAP = ROOT / "docs" / "architecture.md"

LONGEST_FILE = 400
ALL_LINES = 30_850  # a new capability may need more; say in its commit what for
FLOORS = 10

RIDDLES = re.compile(
    r"(Of|So many|So much|That which|As many|As it|As much|How many|How much|How often|Which of)\b"
    r"|(What|That|Where|Whose|When|Why) (?!.*\?)"
)
"""Beginnings of a sentence whose subject is the name that it stands below."""


def lines_of(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def docstrings(tree: ast.Module) -> list[tuple[int, str]]:
    """Every docstring and every string below a constant, with its line."""
    return [
        (node.lineno, node.value.value)
        for parent in ast.walk(tree)
        if isinstance(body := getattr(parent, "body", None), list)
        for node in body
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]


def modules_on_circles(graph: grimp.ImportGraph) -> set[str]:
    """Modules that import themselves by way of others."""
    below: dict[str, set[str]] = {
        module: graph.find_modules_directly_imported_by(module) for module in graph.modules
    }
    on_circles = set(below)
    while True:  # what imports nothing that is left, or is imported by nothing left, is on none
        imported = {name for module in on_circles for name in below[module]}
        kept = {m for m in on_circles if m in imported and below[m] & on_circles}
        if kept == on_circles:
            return on_circles
        on_circles = kept


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_no_file_is_longer_than_400_lines(file: Path) -> None:
    assert lines_of(file) <= LONGEST_FILE


def test_the_package_stays_small() -> None:
    assert sum(map(lines_of, FILES)) <= ALL_LINES


def test_there_is_no_circle_of_imports() -> None:
    graph = grimp.build_graph("hf_tsv", exclude_type_checking_imports=False, cache_dir=None)
    assert modules_on_circles(graph) == set()


def test_a_circle_is_found() -> None:
    graph = grimp.ImportGraph()
    for module in ("a", "b", "c", "d"):
        graph.add_module(module)
    for importer, imported in (("a", "b"), ("b", "c"), ("c", "b"), ("c", "d")):
        graph.add_import(importer=importer, imported=imported)
    assert modules_on_circles(graph) == {"b", "c"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_docstrings_begin_with_their_subject(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    riddles = [(line, text.split("\n")[0]) for line, text in docstrings(tree)]
    assert [found for found in riddles if RIDDLES.match(found[1])] == []


def test_every_path_of_the_map_exists() -> None:
    text = MAP.read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:hf_tsv|tests|docs|model_cards|benchmarks)/[\w./-]*)`", text))
    assert len(paths) > 30
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_the_map_has_every_package() -> None:
    text = MAP.read_text(encoding="utf-8")
    packages = {file.parent.relative_to(ROOT).as_posix() for file in PACKAGE.rglob("__init__.py")}
    assert [name for name in sorted(packages - {"hf_tsv"}) if f"`{name}/`" not in text] == []
