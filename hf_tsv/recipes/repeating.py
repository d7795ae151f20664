"""A recipe taken up again: read from a file or the Hub, changed by options, its folders found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_tsv.checkpoints import places
from hf_tsv.checkpoints.names import RECIPE_FILE
from hf_tsv.checkpoints.reference import parse, pin
from hf_tsv.methods.catalogue import METHODS
from hf_tsv.recipes.recipe import PinnedInput, Recipe, pinned_text
from hf_tsv.recipes.scaling import Weights, by_name
from hf_tsv.recipes.settings import Settings
from hf_tsv.system.checks import choice
from hf_tsv.system.errors import HfTsvError, RecipeError
from hf_tsv.system.folders import local_kind
from hf_tsv.system.progress import logger
from hf_tsv.system.text import counted
from hf_tsv.system.untrusted import MAX_BYTES

if TYPE_CHECKING:
    from hf_tsv.checkpoints.sources import Access


def load(recipe: str | Path | Recipe, access: Access) -> tuple[Recipe, Path | None]:
    """Read the recipe of a file, of an output folder, or of a repository: `org/name@revision`.

    Returns:
        `tuple[Recipe, Path | None]`: the recipe, and the folder around it, if any.

    Raises:
        [`HfTsvError`]: it is not there, or not a recipe that this version understands.
    """
    if isinstance(recipe, Recipe):
        return recipe, None
    text = str(recipe)
    is_path = text.startswith((".", "/", "~")) or text.endswith((".yaml", ".yml"))
    if is_path or local_kind(text) is not None or "/" not in text:
        found, path = Recipe.load(text), Path(text).expanduser()
        return found, path if path.is_dir() else path.parent
    pinned = pin(parse(text), token=access.token, cache_dir=access.cache_dir)
    size = pinned.files.size(RECIPE_FILE)
    if size is None:
        problem = f"{pinned} has no {RECIPE_FILE}, so it is not a merge of hf-tsv."
        raise RecipeError(problem, "Name a repository or a folder that hf-tsv wrote, or a file.")
    content = pinned.files.read(RECIPE_FILE, 0, min(size, MAX_BYTES + 1))
    return Recipe.from_yaml(content.decode(errors="replace"), f"{pinned}/{RECIPE_FILE}"), None


def changed(
    recipe: Recipe, given: Mapping[str, Any], weights: Weights | None, base: str | None
) -> Recipe:
    """The recipe with settings, weights and a base model that are given beside it; tells each.

    Tasks that weights by name do not name keep those of the recipe; `scale` replaces that of all.
    """
    if "scale" in given:
        recipe = _with_names(recipe)
    own = asdict(recipe.settings)
    for first, second in (("rank", "rank_fraction"), ("rank_fraction", "rank")):
        if first in given:
            own[second] = None
    name = choice("method", given.get("method", recipe.settings.method), tuple(METHODS))
    if name != recipe.settings.method:
        own["alpha"] = own["wudi_filter"] = None  # those of the other method
        own["calibrate"] = own["calibrate"] and METHODS[name].calibrates is not None
        recipe = replace(recipe, coefficients={}, adaptation=None)
    settings = Settings(**{**own, **given})
    for name in own:
        _tell(name, getattr(settings, name), getattr(recipe.settings, name))
    inputs, before = recipe.inputs, recipe.base_model
    if isinstance(weights, Mapping):
        weights = by_name([i.ref for i in inputs], weights, [i.weight for i in inputs])
    if weights is not None:
        if len(weights) != len(inputs):
            counts = counted(len(weights), "weight"), counted(len(inputs), "input")
            problem = "There are {} for the recipe's {}.".format(*counts)
            raise RecipeError(problem, "Give one weight for each.")
        inputs = tuple(replace(i, weight=w) for i, w in zip(inputs, weights, strict=True))
        _tell("weights", list(weights), [item.weight for item in recipe.inputs])
    if base is not None:
        folder = before is not None and before.is_folder and local_kind(base) == "folder"
        if before is not None and not folder:
            _tell("base_model", base, pinned_text(before))
        kept = before.fingerprint if before is not None and folder else None
        base = str(Path(base).expanduser().absolute()) if folder else base
        before = PinnedInput(base, fingerprint=kept)
    return replace(recipe, settings=settings, inputs=inputs, base_model=before)


def _with_names(recipe: Recipe) -> Recipe:
    """The same recipe, whose settings have the factors of its inputs by name."""
    named = {f"{i.ref}:{glob}": factor for i in recipe.inputs for glob, factor in i.scale.items()}
    settings = replace(recipe.settings, scale={**recipe.settings.scale, **named})
    inputs = tuple(replace(item, scale={}) for item in recipe.inputs)
    return replace(recipe, settings=settings, inputs=inputs)


def _tell(name: str, value: object, before: object) -> None:
    if value != before:
        new, old = ("not set" if one in (None, (), {}) else one for one in (value, before))
        logger.info("%s is %s here, and %s in the recipe.", name, new, old)


def placed(recipe: Recipe, supplied: Sequence[str], beside: Path | None) -> Recipe:
    """The recipe with the paths of its local folders on this machine.

    Those supplied are matched by name, then by what they hold. Others are looked for where they
    were, in the current folder, and in and beside the folder of the recipe, `beside`.

    Raises:
        [`RecipeError`]: a folder is not found, or one that is supplied is not of the recipe.
    """
    items = [*recipe.inputs, *([recipe.base_model] if recipe.base_model else [])]
    found = {i: item.ref for i, item in enumerate(items) if _is_path(item)}
    wanted = [i for i, item in enumerate(items) if item.is_folder and i not in found]
    for path in supplied:
        if local_kind(path) != "folder":
            problem = f"{path} is no local folder, and the recipe names its own repositories."
            raise RecipeError(problem, "Name local folders beside a recipe, or drop it.")
    found |= _matched({i: items[i] for i in wanted}, supplied)
    if unknown := [path for path in supplied if path not in found.values()]:
        names = ", ".join(_name(items[i].ref) for i in wanted) or "none"
        problem = f"{unknown[0]} is none of the local folders of the recipe ({names})."
        raise RecipeError(problem, "Drop it, or name the folder that the recipe means.")
    for i, item in enumerate(items):
        if i in found or item.revision is not None:
            continue
        place = next(_places(item, beside), None)
        if place is not None:
            found[i] = place
        elif item.is_folder:
            name = _name(item.ref)
            raise RecipeError(
                f"The recipe was made from the local folder {name}, which is not here.",
                f"Name it beside the recipe: `hf-tsv merge --recipe … PATH/{name}`.",
            )
    items = [replace(item, ref=found.get(i, item.ref)) for i, item in enumerate(items)]
    base = items.pop() if recipe.base_model else None
    return replace(recipe, inputs=tuple(items), base_model=base)


def _name(ref: str) -> str:
    return Path(ref).name or ref


def _is_path(item: PinnedInput) -> bool:
    """Tell whether it is an absolute path, as in older recipes, of a folder that is here."""
    return Path(item.ref).is_absolute() and local_kind(item.ref) == "folder"


def _places(item: PinnedInput, beside: Path | None) -> Iterator[str]:
    """Folders that an input without a revision may be."""
    own = Path(_name(item.ref) if item.is_folder else item.ref)
    tried = [Path(places.noted(item.fingerprint)), own]
    if beside is not None:
        tried += [beside / own, beside.parent / own]
    return (str(path) for path in tried if path.parts and local_kind(str(path)) == "folder")


def _matched(wanted: Mapping[int, PinnedInput], supplied: Sequence[str]) -> dict[int, str]:
    """Supplied folders by their place in the recipe."""
    found: dict[int, str] = {}
    names = [_name(item.ref) for item in wanted.values()]
    given = [_name(str(Path(path).expanduser().resolve())) for path in supplied]
    for i, item in wanted.items():
        name = _name(item.ref)
        if names.count(name) == 1 == given.count(name):
            found[i] = supplied[given.index(name)]
    for path in supplied:
        left = [i for i in wanted if i not in found]
        if path in found.values() or not left:
            continue
        others = [other for other in supplied if other not in found.values()]
        if len(left) == len(others) == 1:  # compared with its fingerprint when it is read
            found[left[0]] = path
        elif (content := _fingerprint(path)) is not None:
            found |= {i: path for i in left if wanted[i].fingerprint == content}
    return found


def _fingerprint(path: str) -> str | None:
    """Fingerprint of the weights that a merge reads of a whole checkpoint; None if it is none."""
    from hf_tsv.checkpoints.opening import open_base
    from hf_tsv.checkpoints.storage.tensors import digest, fingerprint

    try:
        opened = open_base(pin(parse(path)))
        digests = {
            name: digest(opened.read(name))
            for name, info in opened.tensors.items()
            if info.dtype.is_floating_point and info.nbytes
        }
    except HfTsvError:  # what is wrong is told when it is opened again
        return None
    return fingerprint(digests)
