"""Results as `model-index` in a model card's front matter; its other bytes stay as they are."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from hf_tsv import hub
from hf_tsv.checkpoints.reference import PinnedCheckpoint, repo_id_of
from hf_tsv.system.errors import OutputError
from hf_tsv.system.folders import disk_errors, local_kind
from hf_tsv.system.untrusted import MAX_BYTES, parse_yaml

CARD = "README.md"
DIGITS = 4  # of an accuracy
TASK = "zero-shot-image-classification"
FRONT_MATTER = re.compile(r"\A(\s*---[ \t]*\r?\n)(.*?)(?=^---[ \t]*\r?$)", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"^([\"']?)model-index\1[ \t]*:.*?(?=^[^\s-]|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Card:
    """Model card and the place it is written to: a local path, or a repository.

    `name` is the model's, `commit` the one that `text` was read at.
    """

    text: str
    name: str
    path: Path | None = None
    repo_id: str | None = None
    branch: str = "main"
    commit: str | None = None
    create_pr: bool = False

    def __str__(self) -> str:
        return str(self.path) if self.path is not None else f"the card of {self.repo_id}"


def open_card(pinned: PinnedCheckpoint, *, token: str | None, create_pr: bool) -> Card:
    """Find the card of a model, and refuse now if it cannot be written later."""
    local = pinned.is_local
    card = _local_card(pinned, create_pr) if local else _hub_card(pinned, token, create_pr)
    with_results(card, [])  # raises if results cannot be added
    return card


def _local_card(pinned: PinnedCheckpoint, create_pr: bool) -> Card:
    if create_pr:
        raise OutputError(
            f"{pinned} is a folder, and `create_pr=True` applies to a repository.",
            "Omit `create_pr=True`.",
        )
    path = Path(pinned.ref).expanduser() / CARD
    if not path.is_file():
        raise OutputError(f"{pinned} has no {CARD} to add results to.", "Write a model card first.")
    if path.stat().st_size > MAX_BYTES:
        raise OutputError(f"{path} is too large for a card.", "Omit `card=True`.")
    with disk_errors(path):
        return Card(_decoded(path.read_bytes(), str(path)), path.parent.resolve().name, path=path)


def _hub_card(pinned: PinnedCheckpoint, token: str | None, create_pr: bool) -> Card:
    repo_id, branch = repo_id_of(pinned.ref), pinned.asked_revision or "main"
    repo = pinned.files.downloads
    if repo is None:
        raise OutputError(
            f"The card of {repo_id} cannot be written while the Hub cannot be reached.",
            "Omit `card=True`, or try again with a connection.",
        )
    if pinned.files.subfolder:
        raise OutputError(
            f"{pinned} is a subfolder, and a card describes the whole repository.",
            "Omit `card=True`.",
        )
    if create_pr and branch != "main":
        raise OutputError(
            "`create_pr=True` and a revision cannot be combined.", "Give one of them."
        )
    if branch == pinned.revision:
        raise OutputError(
            f"{pinned} is a commit, and results are added to the card of a branch.",
            f"Evaluate {repo_id} or {repo_id}@BRANCH.",
        )
    hub.writable_repo_id(repo_id, token=token, create_pr=create_pr)
    size = repo.sizes.get(CARD, 0)
    if size > MAX_BYTES:
        raise OutputError(f"The card of {repo_id} is too large for one.", "Omit `card=True`.")
    text = _decoded(bytes(hub.read_range(repo, CARD, 0, size)), f"the card of {repo_id}")
    name = repo_id.rpartition("/")[2]
    return Card(text, name, None, repo_id, branch, pinned.revision, create_pr)


def _decoded(content: bytes, what: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise OutputError(f"{what} is not UTF-8.", "Save it as UTF-8.") from None


def write(
    card: Card,
    tasks: Mapping[str, Mapping[str, Any]],
    *,
    token: str | None,
    body: Callable[[str], str] = str,
) -> str:
    """Write results by task into a card; return its path, or the address of the commit.

    The text with results in its front matter goes through `body` before it is written.
    """
    text = body(with_results(card, [eval_result(name, found) for name, found in tasks.items()]))
    if card.path is None:
        assert card.repo_id is not None
        return hub.push_file(
            card.repo_id, CARD, text.encode(), branch=card.branch, parent=card.commit,
            create_pr=card.create_pr, commit_message="Add evaluation results", token=token,
        )  # fmt: skip
    new = card.path.with_name(f".{CARD}.hf-tsv")
    with disk_errors(card.path):
        try:
            new.write_bytes(text.encode())
            shutil.copymode(card.path, new)
            new.replace(card.path)
        finally:
            new.unlink(missing_ok=True)
    return str(card.path)


def eval_result(name: str, found: Mapping[str, Any]) -> EvalResult:
    """Result of one task for a card, without paths of this machine."""
    path, kind = Path(found["dataset"]).expanduser(), found["dataset"]
    if path.suffix == ".parquet":
        kind = "parquet"
    elif path.exists():
        kind = "imagefolder"
    few = found["images"] < found["total"]
    args: dict[str, Any] = {"images": found["images"]} if few else {}
    args |= {"templates": found["templates"]} if "templates" in found else {}
    if own := found.get("reference"):
        ref = str(own["ref"])
        args["reference"] = ref if local_kind(ref) is None else Path(ref).expanduser().name
        args["reference_accuracy"] = round(own["accuracy"], DIGITS)
    drawn = f" on {found['images']} of {found['total']} images, drawn at random"
    return EvalResult(
        task_type=TASK,
        dataset_type=kind,
        dataset_name=name,
        dataset_config=found["config"],
        dataset_split=found["split"],
        dataset_revision=found["revision"],
        metric_type="accuracy",
        metric_value=round(found["accuracy"], DIGITS),
        metric_name=f"Accuracy{drawn if few else ''}",
        metric_args=args or None,
    )


def with_results(card: Card, results: Sequence[EvalResult]) -> str:
    """Text of a card with new results, which replace earlier ones of the same task and data."""
    found = FRONT_MATTER.match(card.text)
    head, block = (found[1], found[2]) if found else ("---\n", "")
    try:
        data = parse_yaml(block) or {}
        index = _merged(data.get("model-index"), card.name, results)
        written = yaml.safe_dump({"model-index": index}, sort_keys=False, allow_unicode=True)
        if head.endswith("\r\n"):
            written = written.replace("\n", "\r\n")
        changed, replaced = BLOCK.subn(lambda _: written, block, count=1)
        changed += "" if replaced else written
        if parse_yaml(changed) != {**data, "model-index": index}:
            raise ValueError
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError,
            TypeError, ValueError):  # fmt: skip
        raise OutputError(
            f"The front matter of {card} cannot take results.", "Check its YAML, and `model-index`."
        ) from None
    rest = card.text[found.end() :] if found else f"---\n{card.text}"
    return f"{head}{changed}{rest}"


def _merged(index: Any, name: str, results: Sequence[EvalResult]) -> list[dict[str, Any]]:
    """Results of a `model-index`, those that are measured again replaced by the new ones."""
    index = index or [{"name": name, "results": []}]
    model, *others = index
    new = [eval_results_to_model_index(name, [result])[0]["results"][0] for result in results]
    again = {_same(entry, entry["metrics"][0]) for entry in new}
    kept = [
        {**entry, "metrics": metrics}
        for entry in model["results"]
        if (metrics := [m for m in entry["metrics"] if _same(entry, m) not in again])
    ]
    return [{**model, "results": [*kept, *new]}, *others]


def _same(entry: dict[str, Any], metric: dict[str, Any]) -> str:
    """Key that is equal for results of the same task and data, whatever the data's commit."""
    data = entry["dataset"]
    local = "/" not in data["type"]
    parts = [data["type"], data["name"] if local else None, data.get("config"), data.get("split")]
    images = (metric.get("args") or {}).get("images")
    return repr([entry["task"]["type"], *parts, metric["type"], images])
