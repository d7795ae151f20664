"""`hf-tsv find`."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_tsv.cli import options
from hf_tsv.cli.groups import Only, Several, call
from hf_tsv.cli.help import shell_lines
from hf_tsv.cli.output import Out, table
from hf_tsv.recipes.finding import Relation, Sort
from hf_tsv.system.text import counted, human_bytes, one_line

if TYPE_CHECKING:
    from hf_tsv.verbs.find import FindReport

USAGE = ("BASE", "[OPTIONS]")
MISSING = "Name a base model on the Hub."
EXAMPLES = (
    "hf-tsv find openai/clip-vit-base-patch32",
    "hf-tsv find openai/clip-vit-base-patch32 --author tanganke --search sun397",
    "hf-tsv find openai/clip-vit-base-patch32 --mergeable -q | xargs hf-tsv merge -o merged",
)
LONGEST_LINE = 160  # characters shown of a reason
HEAD = ("model", "form", "download", "type", "license", "task", "access", "downloads", "likes",
        "changed")  # fmt: skip


@dataclass(frozen=True)
class FilterOptions:
    PANEL = options.INPUTS
    kinds: Annotated[Relation, Several(), "K1,K2,...", "Relations to the base model."] = (
        "finetune,adapter,merge"  # type: ignore[assignment]
    )
    author: Annotated[str | None, "NAME", "User or organisation on the Hub."] = None
    search: Annotated[str | None, "TEXT", "Part of the name."] = None
    task: Annotated[str | None, "TAG", "Pipeline tag, such as image-classification."] = None
    sort: Annotated[Sort, "Highest or newest first."] = "downloads"
    limit: Annotated[int, "N", "Most models to look at."] = 20
    mergeable: Annotated[bool, "Of these, list only what can be merged."] = False
    quiet: Annotated[
        bool,
        options.RUN,
        typer.Option("-q", "--quiet", help="Print one reference a line, and no status."),
    ] = False


def find(
    base_model: Annotated[str, "BASE", "Base (pretrained) model: org/name, org/name@revision."],
    *,
    filters: FilterOptions,
    run: Annotated[options.RunOptions, Only("as_json", "verbose")],
    access: Annotated[options.AccessOptions, Only("token", "cache_dir")],
) -> None:
    """Find fine-tunes of a base model on the Hub, and tell which can be merged.

    Reads small files and the headers of the weight files. Each model is opened as a merge opens it.
    """
    out = Out(as_json=run.as_json, quiet=filters.quiet, verbose=run.verbose)
    from hf_tsv.verbs import find as find_

    own = {"progress": False if filters.quiet else None}
    report = call(find_.find, (filters, access), base_model, **own)
    references = "\n".join(one_line(model["ref"]) for model in report.models)
    out.result(references if filters.quiet else _text(report, base_model), report.to_dict())


def _text(report: FindReport, base_model: str) -> str:
    columns = zip(HEAD, *map(_cells, report.models), strict=True)
    head, *rows = zip(*(column for column in columns if any(column[1:])), strict=True)
    parts = [table(rows, head)]
    models, mergeable = report.models, report.mergeable
    others = [(m["ref"], _short(m["reason"])) for m in models if not m["mergeable"]]
    parts += [f"Not mergeable:\n{table(others)}"] if others else []
    warned = [(m["ref"], _short(text)) for m in models for text in m["warnings"]]
    parts += [f"Warnings:\n{table(warned)}"] if warned else []
    left_out = [(m["ref"], _short(", ".join(m["left_out"]))) for m in models if m["left_out"]]
    parts += [f"Left out by a merge:\n{table(left_out)}"] if left_out else []
    size = human_bytes(sum(model["download_bytes"] for model in models))
    parts.append(
        f"{len(mergeable)} of {counted(len(models), 'model')} can be merged; {size} to download."
    )
    if mergeable:
        words = ["merge", *mergeable, "--base-model", base_model, "-o", "merged"]
        line = f"hf-tsv {shlex.join(words)}"
        parts[-1] += f"\n{shell_lines(line, shutil.get_terminal_size().columns)}"
    return "\n\n".join(parts)


def _cells(model: dict[str, Any]) -> list[str]:
    access = ["private"] * model["private"] + ["gated"] * bool(model["gated"])
    return [
        model["ref"],
        model["form"] if model["mergeable"] else "–",
        human_bytes(model["download_bytes"]) if model["mergeable"] else "",
        ", ".join(model["dtypes"]),
        model["license"] or "",
        model["task"] or "",
        ", ".join(access),
        f"{model['downloads']:,}",
        f"{model['likes']:,}",
        model["changed"][:10],
    ]


def _short(text: str) -> str:
    """Beginning of a message, on one line."""
    line = " ".join(one_line(text).split())
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}…"
