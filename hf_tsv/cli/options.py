"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from hf_tsv.system.text import one_line

TARGET = "Where the result goes"
METHOD = "How to merge"
RUN = "How to run"


class Dtype(str, Enum):
    """Types that weights are written in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Qkv(str, Enum):
    """Values of `--qkv`."""

    split = "split"  # type: ignore[assignment]
    fused = "fused"


class OutFormat(str, Enum):
    """Values of `--out-format`."""

    transformers = "transformers"
    open_clip = "open_clip"


# `Optional` because typer reads the annotations at run time on Python 3.10.
BaseModel = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="REF",
        help="What was fine-tuned. [default: what model cards and factors say]",
        show_default=False,
    ),
]
Output = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "-o",
        "--output",
        metavar="DIR",
        help="Folder to write.",
        rich_help_panel=TARGET,
        show_default=False,
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force", help="Replace an output folder that hf-tsv wrote.", rich_help_panel=TARGET
    ),
]
PushTo = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="REPO_ID",
        help="Hub repository to upload to; created if needed.",
        rich_help_panel=TARGET,
        show_default=False,
    ),
]
Private = Annotated[
    Optional[bool],  # noqa: UP045
    typer.Option(
        "--private/--no-private",
        help="Make a new repository private.",
        rich_help_panel=TARGET,
        show_default=False,
    ),
]
Revision = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="BRANCH",
        help="Branch to push to; created if needed.",
        rich_help_panel=TARGET,
        show_default=False,
    ),
]
CreatePr = Annotated[
    bool, typer.Option("--create-pr", help="Push as a pull request.", rich_help_panel=TARGET)
]
CommitMessage = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="TEXT",
        help="Summary of the commit.",
        rich_help_panel=TARGET,
        show_default=False,
    ),
]
Rank = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        help="Singular vectors kept of each task. [default: min(shape) / number of tasks]",
        rich_help_panel=METHOD,
        show_default=False,
    ),
]
RankFraction = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(
        help="The same as a share of min(shape).", rich_help_panel=METHOD, show_default=False
    ),
]
Exclude = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        metavar="GLOB",
        help="Weights to average instead of decomposing; repeatable, replaces the default."
        " [default: text_projection.weight]",
        rich_help_panel=METHOD,
        show_default=False,
    ),
]
QkvForm = Annotated[
    Optional[Qkv],  # noqa: UP045
    typer.Option(
        help="Decompose attention projections one by one, or stacked as OpenCLIP stores them."
        " [default: as the base model stores them]",
        rich_help_panel=METHOD,
        show_default=False,
    ),
]
Subfolder = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="DIR",
        help="Where the checkpoints lie in their repositories or folders; the same as"
        " org/name/DIR. Not of the base model.",
        show_default=False,
    ),
]
MaxShardSize = Annotated[
    str, typer.Option(metavar="SIZE", help="Largest output file.", rich_help_panel=TARGET)
]
Device = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="NAME",
        help="cpu, cuda, … [default: the best there is]",
        rich_help_panel=RUN,
        show_default=False,
    ),
]
MaxMemory = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="SIZE",
        help="Memory each process may use: 2GB. Less goes on at a time then. [default: no limit]",
        rich_help_panel=RUN,
        show_default=False,
    ),
]
Timings = Annotated[
    bool,
    typer.Option(
        "--timings",
        help="Show the seconds spent reading, waiting, computing and writing.",
        rich_help_panel=RUN,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Show what would be done; reads headers only, writes nothing.",
        rich_help_panel=RUN,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=RUN)]
Quiet = Annotated[
    bool,
    typer.Option("-q", "--quiet", help="No progress, no status.", rich_help_panel=RUN),
]
Token = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Hub token. [default: HF_TOKEN, or the one of `hf auth login`]",
        rich_help_panel=RUN,
        show_default=False,
    ),
]
CacheDir = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        help="Hub cache. [default: as the Hub client]", rich_help_panel=RUN, show_default=False
    ),
]

Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Read tensors from the Hub when they are needed, without a copy on disk.",
        rich_help_panel=RUN,
    ),
]


def shard_size(text: str) -> int | str:
    """Bytes, if it is a plain number; else a size such as 5GB, checked where it is used."""
    return int(text) if re.fullmatch("[0-9]+", text) else text


def timings(seconds: dict[str, float], treatments: dict[str, dict[str, Any]]) -> str:
    """Seconds by what was done, and the weights that took longest."""
    slowest = sorted(
        ((entry["seconds"], name) for name, entry in treatments.items() if "seconds" in entry),
        key=lambda pair: -pair[0]["computing"],
    )
    rows = [(name, f"{value:.2f} s") for name, value in seconds.items()]
    rows += [(f"{found['computing']:.2f} s", name) for found, name in slowest[:3]]
    return columns(rows)


def pinned(entry: dict[str, str | None]) -> str:
    """A checkpoint of a report, as one reference."""
    from hf_tsv.checkpoints.reference import at_revision

    return at_revision(str(entry["ref"]), entry["revision"])


def columns(rows: list[tuple[str, str]]) -> str:
    """Names and values as two aligned columns, one line each."""
    rows = [(one_line(name), one_line(value)) for name, value in rows]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
