"""Every choice and every pinned input of a merge, as YAML and back."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from hf_tsv.checkpoints.names import RECIPE_FILE
from hf_tsv.checkpoints.reference import PinnedCheckpoint, at_revision
from hf_tsv.methods.catalogue import METHODS
from hf_tsv.recipes.learning import Adaptation
from hf_tsv.recipes.scaling import checked_scale
from hf_tsv.recipes.settings import Settings, current_versions
from hf_tsv.system.checks import check_number
from hf_tsv.system.errors import RecipeError, UsageError, public
from hf_tsv.system.text import as_keys, counted, shortened
from hf_tsv.system.untrusted import MAX_BYTES, parse_yaml

FORMAT_VERSION = 1

SHORT = "{method: tsv, base_model: org/base, inputs: [org/a, org/b]}"
"""A recipe as somebody would write it, in one line."""

PACKAGE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,98}[A-Za-z0-9])?==[A-Za-z0-9.+!]{1,50}")
"""Name and version of a package, as pip reads them."""


@dataclass(frozen=True)
class PinnedInput:
    """One checkpoint of a recipe.

    Args:
        ref (`str`): repository id, or the name of a folder without its path.
        revision (`str`, *optional*): commit sha, for a repository.
        fingerprint (`str`, *optional*): sha256 of the weights used, for a folder.
        weight (`float`): factor of this task's update.
        scale (`dict[str, float]`): further factors of it by glob, in the weights that match.
    """

    ref: str
    revision: str | None = None
    fingerprint: str | None = None
    weight: float = 1.0
    scale: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("ref", "revision", "fingerprint"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "ref"):
                said = shortened(value)
                raise RecipeError(f"The {name} of an input is {said}.", "Write a string.")
        check_number(f"The weight of {self.ref}", self.weight)
        object.__setattr__(self, "weight", float(self.weight))
        object.__setattr__(self, "scale", checked_scale(self.scale, f"The scale of {self.ref}"))

    @property
    def is_folder(self) -> bool:
        """Tell whether it was a local folder where the recipe was written."""
        return self.revision is None and self.fingerprint is not None


@dataclass(frozen=True)
class Recipe:
    """A merge that can be repeated to the byte, on the same type of device and versions.

    Args:
        base_model ([`PinnedInput`], *optional*): W0; None: the one the inputs' cards agree on.
        inputs (`tuple[PinnedInput, ...]`): the tasks.
        settings ([`Settings`]): every choice.
        device (`str`): type of device the weights were computed on.
        versions (`dict[str, str]`): of hf-tsv and torch.
        coefficients (`dict[str, tuple[float, ...]]`): of each input, by weight, for the method
            `ada`; 1 in weights that are not named.
        adaptation ([`Adaptation`], *optional*): how they were learned.
        allow_other_base (`bool`): an input is so far from the base that it had to be allowed.
    """

    base_model: PinnedInput | None
    inputs: tuple[PinnedInput, ...]
    settings: Settings
    device: str = "cpu"
    versions: dict[str, str] = field(default_factory=current_versions)
    coefficients: dict[str, tuple[float, ...]] = field(default_factory=dict)
    adaptation: Adaptation | None = None
    allow_other_base: bool = False

    def __post_init__(self) -> None:
        method, learned = self.settings.row, bool(self.coefficients or self.adaptation)
        recipe = f"A recipe of the method {method.name}"
        if method.learns and not self.coefficients:
            raise RecipeError(f"{recipe} has no coefficients.", "Use the one it was written as.")
        if learned and not method.learns:
            raise RecipeError(f"{recipe} has coefficients.", "Only the method ada does.")
        for label, row in self.coefficients.items():
            if len(row) != len(self.inputs):
                counts = (
                    f"{counted(len(row), 'coefficient')} for {counted(len(self.inputs), 'input')}"
                )
                raise RecipeError(f"{shortened(label)} has {counts}.", "Give one for each input.")
            what = f"A coefficient of {shortened(label)}"
            for value in row:
                check_number(what, value)
                if value < 0:
                    raise RecipeError(f"{what} is {value}.", "Give 0 or more.")

    def to_yaml(self, *, coefficients: bool = True) -> str:
        """Recipe as written into every output; without its coefficients it is only to be read."""
        content: dict[str, Any] = {
            "hf_tsv_recipe": FORMAT_VERSION,
            **{k: v for k, v in asdict(self.settings).items() if v is not None},
            "exclude": list(self.settings.exclude),
        }
        for name in ("scale", "keep_base", "layer_scale", "calibrate"):
            if content[name] == getattr(Settings(), name):
                del content[name]
        if self.base_model is not None:
            base = _known(self.base_model)
            content["base_model"] = {k: v for k, v in base.items() if k != "weight"}
        content |= {
            "inputs": [_known(item) for item in self.inputs],
            "device": self.device,
            "versions": self.versions,
        }
        if self.allow_other_base:
            content["allow_other_base"] = True
        if self.adaptation is not None:
            content["adaptation"] = self.adaptation.to_dict()
        if self.coefficients and coefficients:
            content["coefficients"] = {n: _Row(row) for n, row in self.coefficients.items()}
        text = _dumped(content, allow_unicode=True)
        lost = any(mark in text for mark in "\x85\u2028\u2029\ufeff")  # on the way back
        return _dumped(content, allow_unicode=False) if lost else text

    @staticmethod
    @public
    def load(path: str | Path) -> Recipe:
        """Read a recipe file, or the recipe of an output folder.

        Raises:
            [`RecipeError`]: the file is missing, or not a recipe this version understands.
        """
        file = Path(path)
        try:
            file = file.expanduser()
            file = file / RECIPE_FILE if file.is_dir() else file
            with file.open("rb") as opened:  # which may have no end
                text = opened.read(MAX_BYTES + 1).decode()
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            if isinstance(error, UnicodeDecodeError):
                reason = "not UTF-8"
            problem = f"The recipe {file} cannot be read: {reason}."
            raise RecipeError(problem, "Check the path.") from None
        return Recipe.from_yaml(text, str(file))

    @staticmethod
    def from_yaml(text: str, source: str = "recipe") -> Recipe:
        """Parse a recipe; unknown keys are errors, so that no choice is dropped silently."""
        content = _content(text, source)
        try:
            names = {f.name for f in fields(Settings)}
            _refuse_not_installed(content)
            settings = Settings(**{key: content.pop(key) for key in list(content) if key in names})
            base = content.pop("base_model", None)
            base = None if base is None else _pinned(base, f"base_model of {source}")
            listed = content.pop("inputs", [])
            if not isinstance(listed, list):
                said = f"inputs of {source} is {shortened(listed)}, and no list."
                raise RecipeError(said, f"Write it like this: {SHORT}")
            inputs = tuple(_pinned(item, f"An input of {source}") for item in listed)
            allowed = content.pop("allow_other_base", False)
            device = content.pop("device", "cpu")
            versions = content.pop("versions", {})
            coefficients = {n: tuple(row) for n, row in content.pop("coefficients", {}).items()}
            learned = content.pop("adaptation", None)
            adaptation = None if learned is None else Adaptation.from_dict(learned)
        except UsageError as error:
            problem = f"{source}: {as_keys(error.message)}"
            raise RecipeError(problem, error.hint and as_keys(error.hint)) from None
        except (KeyError, TypeError, AttributeError) as error:
            raise RecipeError(f"{source} is incomplete or malformed: {error}.") from None
        if not inputs:
            raise RecipeError(f"{source} names no inputs.", f"Write it like this: {SHORT}")
        if type(allowed) is not bool:
            said = f"allow_other_base is {shortened(allowed)}."
            raise RecipeError(said, "Write true or false.")
        if base is not None and (base.weight != 1 or base.scale):
            raise RecipeError(f"{source} gives base_model a weight; only inputs have one.")
        if not isinstance(device, str):
            raise RecipeError(f"device is {shortened(device)}.", "Write a string.")
        texts = [*versions, *versions.values()] if isinstance(versions, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise RecipeError(f"versions is {shortened(versions)}.", "Write names with versions.")
        if content:
            raise RecipeError(f"{source} has an unknown key: {min(map(str, content))}.")
        return Recipe(base, inputs, settings, device, versions, coefficients, adaptation, allowed)


def _content(text: str, source: str) -> dict[str, Any]:
    """Keys and values of a recipe in a format that this version knows."""
    try:
        content = parse_yaml(text)
    except OverflowError:
        raise RecipeError(f"{source} is larger than any recipe, and is not read.") from None
    except ValueError as error:
        raise RecipeError(f"{source} is {error}.") from None
    if not isinstance(content, dict) or not {"hf_tsv_recipe", "inputs"} & content.keys():
        hint = f"Every output holds one as {RECIPE_FILE}; a short one is: {SHORT}"
        raise RecipeError(f"{source} is not an hf-tsv recipe.", hint)
    version = content.pop("hf_tsv_recipe", FORMAT_VERSION)
    if type(version) is not int or version != FORMAT_VERSION:
        problem = f"{source} has a recipe format this version does not know."
        raise RecipeError(problem, "Update hf-tsv.")
    return content


def _pinned(value: object, what: str) -> PinnedInput:
    """One checkpoint of a recipe: its reference alone, or with its revision and weight."""
    if isinstance(value, str):
        return PinnedInput(value)
    names = [f.name for f in fields(PinnedInput)]
    if not isinstance(value, dict) or "ref" not in value or value.keys() - set(names):
        hint = f"Write org/name, or a mapping of {', '.join(names)}, of which ref is needed."
        raise RecipeError(f"{what} is {shortened(value)}.", hint)
    return PinnedInput(**value)


class _Row(list[float]):
    """Numbers that YAML has in one line."""


class _Dumper(yaml.SafeDumper):
    def represent_row(self, row: _Row) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", row, flow_style=True)


_Dumper.add_representer(_Row, _Dumper.represent_row)


def _dumped(content: dict[str, Any], *, allow_unicode: bool) -> str:
    style: dict[str, Any] = {"sort_keys": False, "width": 1000, "allow_unicode": allow_unicode}
    text: str = yaml.dump(content, Dumper=_Dumper, **style)
    return text


def _refuse_not_installed(content: dict[str, Any]) -> None:
    """Refuse the recipe of a method that is not here, and name the package that has it."""
    method, versions = content.get("method"), content.get("versions")
    if not isinstance(method, str) or method in METHODS or not isinstance(versions, dict):
        return  # what is wrong otherwise is found later
    others = [f"{name}=={versions[name]}" for name in versions.keys() - current_versions().keys()]
    if packages := sorted(filter(PACKAGE.fullmatch, others)):
        hint = f"If you trust its package, run: pip install {' '.join(packages)}"
        raise RecipeError(f"The method {shortened(method)} is not installed.", hint)


def _known(item: PinnedInput) -> dict[str, Any]:
    return {key: value for key, value in asdict(item).items() if value not in (None, {})}


def pinned_text(item: PinnedInput | PinnedCheckpoint) -> str:
    """Reference of a commit, or a folder."""
    return at_revision(item.ref, item.revision)
