"""What the Hub reads out of a repository's files: the card's metadata, parameter counts."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import Any

import yaml

from .store import Blob

# https://huggingface.co/docs/hub/repositories-licenses
LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause
bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0
cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
grok2-community gemma unknown other
"""
REPO_ID = re.compile(r"([\w.-]+/)?[\w.-]+")


def front_matter(text: str) -> Any:
    """The YAML block at the top of a card, parsed; None where there is no such block."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*$", text, re.DOTALL | re.MULTILINE)
    return yaml.safe_load(match.group(1)) if match else None


def problems(text: str) -> tuple[list[str], list[str]]:
    """What the Hub says of a card: errors, for which it refuses it, and warnings."""
    try:
        card = front_matter(text)
    except yaml.YAMLError as error:
        return [f"Invalid YAML in the metadata of README.md: {error}"], []
    if card is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(card, dict):
        return ["the metadata of README.md must be a mapping"], []
    errors = []
    for key in ("license", "tags", "base_model", "datasets", "language"):
        if not all(isinstance(value, str) for value in _listed(card, key)):
            errors.append(f'"{key}" must be a string or a list of strings')
    for name in _listed(card, "license"):
        if isinstance(name, str) and name not in LICENSES.split():
            errors.append(f'"license" must be one of [{", ".join(LICENSES.split())}], not {name!r}')
    for name in _listed(card, "base_model"):
        if isinstance(name, str) and not REPO_ID.fullmatch(name):
            errors.append(f'"base_model" must be the id of a model on the Hub, not {name!r}')
    return errors, []


def card_data(files: Mapping[str, Blob]) -> dict[str, Any]:
    """The metadata of the README, {} if there is none that can be read."""
    if "README.md" not in files:
        return {}
    try:
        card = front_matter(files["README.md"].read().decode(errors="replace"))
    except yaml.YAMLError:
        return {}
    return card if isinstance(card, dict) else {}


def tags(card: Mapping[str, Any], files: Mapping[str, Blob]) -> list[str]:
    """The tags of a model's page, from its card and its files."""
    bases = _listed(card, "base_model")
    relation = card.get("base_model_relation") or ("merge" if len(bases) > 1 else "finetune")
    found = [
        *([card["library_name"]] if "library_name" in card else []),
        *(["safetensors"] if any(path.endswith(".safetensors") for path in files) else []),
        *_listed(card, "tags"),
        *([card["pipeline_tag"]] if "pipeline_tag" in card else []),
        *_listed(card, "language"),
        *(f"dataset:{name}" for name in _listed(card, "datasets")),
        *(f"base_model:{name}" for name in bases),
        *(f"base_model:{relation}:{name}" for name in bases),
        *(f"license:{name}" for name in _listed(card, "license")),
        "region:us",
    ]
    return list(dict.fromkeys(str(tag) for tag in found))


def eval_results(files: Mapping[str, Blob]) -> list[dict[str, Any]]:
    """Entries of `.eval_results/*.yaml` with the names of their files, or a file's error."""
    found: list[dict[str, Any]] = []
    for path, blob in files.items():
        folder, _, name = path.rpartition("/")
        if folder != ".eval_results" or not name.endswith(".yaml"):
            continue
        try:
            entries = yaml.safe_load(blob.read().decode())
            for entry in entries:
                required = entry["dataset"]["id"], entry["dataset"]["task_id"], entry["value"]
                if not all(isinstance(text, str) for text in required[:2]):
                    raise TypeError("dataset")
            found += [{"filename": path, "data": entry} for entry in entries]
        except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
            found.append({"filename": path, "error": f"Invalid results: {error!r}"})
    return found


def parameter_counts(files: Mapping[str, Blob]) -> dict[str, int]:
    """Parameters by dtype, from the headers of the safetensors files in the root folder."""
    counts: Counter[str] = Counter()
    for path, blob in files.items():
        if path.endswith(".safetensors") and "/" not in path:
            for name, tensor in _safetensors_header(blob).items():
                if name != "__metadata__":
                    counts[tensor["dtype"]] += prod(tensor["shape"])
    return dict(counts)


def _safetensors_header(blob: Blob) -> dict[str, Any]:
    length = int.from_bytes(blob.read(0, 8), "little")
    if not 0 < length <= blob.size - 8:
        return {}
    try:
        return dict(json.loads(blob.read(8, 8 + length)))
    except ValueError:
        return {}


def _listed(card: Mapping[str, Any], key: str) -> list[Any]:
    value = card.get(key)
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
