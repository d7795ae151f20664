"""Environments that see what a distribution says it needs, and nothing else, without a download."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement


def link_requirements(wanting: Distribution, site: Path, done: set[str]) -> None:
    """Put what a distribution says it needs, and nothing else, from here into an environment."""
    link(wanting.requires or (), site, done)


def link(requirements: Iterable[str], site: Path, done: set[str]) -> None:
    """Put the distributions that fulfil these requirements, with their own, into a folder."""
    for line in requirements:
        requirement = Requirement(line)
        if requirement.name in done or (
            requirement.marker and not requirement.marker.evaluate({"extra": ""})
        ):
            continue
        done.add(requirement.name)
        found = distribution(requirement.name)
        assert requirement.specifier.contains(found.version, prereleases=True), line
        for name in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(str(found.locate_file(name)))
        link_requirements(found, site, done)
