"""Results as `model-index` in a model card's front matter; its other bytes stay as they are."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from hf_tsv import hub
from hf_tsv.checkpoints.reference import PinnedCheckpoint, repo_id_of
from hf_tsv.evaluation import eval_results
from hf_tsv.evaluation.eval_results import DIGITS
from hf_tsv.system.errors import OutputError
from hf_tsv.system.folders import disk_errors, replace_files
from hf_tsv.system.untrusted import MAX_BYTES, parse_yaml

CARD = "README.md"
TASK = "zero-shot-image-classification"
FRONT_MATTER = re.compile(r"\A(\s*---[ \t]*\r?\n)(.*?)(?=^---[ \t]*\r?$)", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"^([\"']?)model-index\1[ \t]*:.*?(?=^[^\s-]|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Card:
    """Model card and the place it is written to: a local path, or a repository.

    `name` is the model's, `commit` the one that `text` was read at; `results` are the texts of the
    files in `.eval_results` that new entries may be added to, by their paths.
    """

    text: str
    name: str
    path: Path | None = None
    repo_id: str | None = None
    branch: str = "main"
    commit: str | None = None
    create_pr: bool = False
    results: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return str(self.path) if self.path is not None else f"the card of {self.repo_id}"


def open_card(
    pinned: PinnedCheckpoint, tasks: Sequence[str], *, token: str | None, create_pr: bool
) -> Card:
    """Find the card of a model, and refuse now if it cannot be written later.

    `tasks` are the names of those whose data set is on the Hub.
    """
    paths = [eval_results.path_of(task) for task in tasks]
    local = pinned.is_local
    card = (
        _local_card(pinned, paths, create_pr)
        if local
        else _hub_card(pinned, paths, token, create_pr)
    )
    with_results(card, [])  # raises if results cannot be added
    for path, text in card.results.items():
        eval_results.with_entry(text, eval_results.ANY, f"{path} of {pinned}")
    return card


def _local_card(pinned: PinnedCheckpoint, paths: Sequence[str], create_pr: bool) -> Card:
    if create_pr:
        raise OutputError(
            f"{pinned} is a folder, and `create_pr=True` applies to a repository.",
            "Omit `create_pr=True`.",
        )
    path = Path(pinned.ref).expanduser() / CARD
    if not path.is_file():
        raise OutputError(f"{pinned} has no {CARD} to add results to.", "Write a model card first.")
    folder = path.with_name(eval_results.FOLDER)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"{folder} is not a folder.", "Delete it, or omit `card=True`.")
    for name in paths:
        if (path.parent / name).is_dir():
            raise OutputError(f"{path.parent / name} is a folder.", "Delete it.")
    files = {name: file for name in paths if (file := path.parent / name).is_file()}
    with disk_errors(path):
        _check_sizes({str(file): file.stat().st_size for file in (path, *files.values())})
        text = _decoded(path.read_bytes(), str(path))
        results = {name: _decoded(file.read_bytes(), str(file)) for name, file in files.items()}
    return Card(text, path.parent.resolve().name, path=path, results=results)


def _check_sizes(sizes: Mapping[str, int]) -> None:
    """Refuse files that are too large to be read, by the names that an error shows."""
    for name, size in sizes.items():
        if size > MAX_BYTES:
            raise OutputError(f"{name} is too large to add results to.", "Omit `card=True`.")


def _hub_card(
    pinned: PinnedCheckpoint, paths: Sequence[str], token: str | None, create_pr: bool
) -> Card:
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
    sizes = {CARD: repo.sizes.get(CARD, 0)}
    sizes |= {path: repo.sizes[path] for path in paths if path in repo.sizes}
    _check_sizes({f"{path} of {repo_id}": size for path, size in sizes.items()})
    texts = {
        path: _decoded(bytes(hub.read_range(repo, path, 0, size)), f"{path} of {repo_id}")
        for path, size in sizes.items()
    }
    name = repo_id.rpartition("/")[2]
    at = {"branch": branch, "commit": pinned.revision, "create_pr": create_pr}
    return Card(texts.pop(CARD), name, None, repo_id, results=texts, **at)  # type: ignore[arg-type]


def _decoded(content: bytes, what: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise OutputError(f"{what} is not UTF-8.", "Save it as UTF-8.") from None


def write(
    card: Card,
    tasks: Mapping[str, Mapping[str, Any]],
    date: str,
    *,
    token: str | None,
    cache_dir: str | None = None,
    body: Callable[[str], str] = str,
) -> str:
    """Write results by task into a card; return its path, or the address of the commit.

    Results on data sets of the Hub are also written into `.eval_results`, by the same commit. The
    text with results in its front matter goes through `body` before it is written. `date` is that
    of the evaluation.
    """
    files = eval_results.texts(tasks, card.results, date, token=token, cache_dir=cache_dir)
    text = body(with_results(card, [eval_result(name, found) for name, found in tasks.items()]))
    contents = {name: new.encode() for name, new in {**files, CARD: text}.items()}
    if card.path is None:
        assert card.repo_id is not None
        return hub.commit_files(
            card.repo_id, contents, branch=card.branch, parent=card.commit,
            create_pr=card.create_pr, commit_message="Add evaluation results", token=token,
        )  # fmt: skip
    replace_files(card.path.parent, contents)
    return str(card.path)


def eval_result(name: str, found: Mapping[str, Any]) -> EvalResult:
    """Result of one task for a card, without paths of this machine."""
    path, kind = Path(found["dataset"]).expanduser(), found["dataset"]
    if path.suffix == ".parquet":
        kind = "parquet"
    elif path.exists():
        kind = "imagefolder"
    few = found["images"] < found["total"]
    args: dict[str, Any] = {"images": found["images"], "total": found["total"]} if few else {}
    args |= {"templates": found["templates"]} if "templates" in found else {}
    if own := eval_results.reference_of(found):
        args["reference"] = own
        args["reference_accuracy"] = round(found["reference"]["accuracy"], DIGITS)
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
