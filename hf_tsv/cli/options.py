"""Options that several commands share."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_tsv.cli.groups import Panel
from hf_tsv.recipes.settings import Dtype, Qkv
from hf_tsv.system.errors import RecipeError

TARGET = Panel("Where the result goes")
METHOD = Panel("How to merge")
RUN = Panel("How to run")


def folder(content: str) -> Any:
    """The option `-o` of a command that writes a folder of its own."""
    return typer.Option("-o", "--output", metavar="DIR", help=content, rich_help_panel=TARGET)


OutputDtype = Annotated[Dtype | None, "Type of the written weights. [default: as the base model]"]


@dataclass(frozen=True)
class SourceOptions:
    """Origin of the checkpoints."""

    base_model: Annotated[
        str | None, "REF", "Model before fine-tuning. [default: what model cards and factors say]"
    ] = None
    subfolder: Annotated[
        str | None,
        "DIR",
        "Where the checkpoints lie in their repositories or folders; the same as org/name/DIR."
        " Does not apply to the base model.",
    ] = None
    allow_other_base: Annotated[
        bool, "Go on although an update is as large as that of a fine-tune of another model."
    ] = False


@dataclass(frozen=True)
class TargetOptions:
    PANEL = TARGET
    output: Annotated[Path | None, folder("Folder to write.")] = None
    force: Annotated[bool, "Replace an output folder that hf-tsv wrote."] = False
    push_to: Annotated[str | None, "REPO_ID", "Hub repository to upload to; created if needed."] = (
        None
    )
    private: Annotated[bool | None, "Make a new repository private."] = None
    revision: Annotated[str | None, "BRANCH", "Branch to push to; created if needed."] = None
    create_pr: Annotated[bool, "Push as a pull request."] = False
    commit_message: Annotated[str | None, "TEXT", "Summary of the commit."] = None


@dataclass(frozen=True)
class FileOptions:
    PANEL = TARGET
    dtype: OutputDtype = None
    max_shard_size: Annotated[str | None, "SIZE", "Largest output file. [default: 5GB]"] = None

    @property
    def shard_size(self) -> int | str | None:
        """Size as given; a plain number as a number, which is how recipes hold it."""
        text = self.max_shard_size
        return int(text) if text and re.fullmatch("[0-9]{1,19}", text) else text


@dataclass(frozen=True)
class RankOptions:
    PANEL = METHOD
    rank: Annotated[
        int | None, "Singular vectors kept of each task. [default: min(shape) / number of tasks]"
    ] = None
    rank_fraction: Annotated[float | None, "The same as a share of min(shape)."] = None
    exclude: Annotated[
        list[str] | None,
        "GLOB",
        "Weights to average instead of decomposing; repeatable, replaces the default."
        " [default: text_projection.weight]",
    ] = None
    qkv: Annotated[
        Qkv | None,
        "Decompose attention projections one by one, or stacked as OpenCLIP stores them."
        " [default: as the base model stores them]",
    ] = None

    def arguments(self) -> dict[str, Any]:
        """Arguments of a function; those not given are left out, for its own defaults."""
        found = {name: value for name, value in vars(self).items() if value is not None}
        if self.exclude is not None:
            found["exclude"] = [glob for glob in self.exclude if glob]
        return found


@dataclass(frozen=True)
class ComputeOptions:
    PANEL = RUN
    batch_size: Annotated[int, "Images at a time."] = 64
    device: Annotated[str | None, "NAME", "cpu, cuda, … [default: the best there is]"] = None
    max_memory: Annotated[
        str | None,
        "SIZE",
        "Memory limit per process, such as 2GB; fewer weights are held at once to stay below it."
        " [default: no limit]",
    ] = None


@dataclass(frozen=True)
class RunOptions:
    PANEL = RUN
    timings: Annotated[bool, "Show the seconds spent reading, waiting, computing and writing."] = (
        False
    )
    dry_run: Annotated[bool, "Show what would be done; reads headers only, writes nothing."] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress, no status.")] = False

    @property
    def progress(self) -> bool | None:
        """False hides progress bars; None shows them on a terminal."""
        return False if self.quiet else None


@dataclass(frozen=True)
class AccessOptions:
    PANEL = RUN
    token: Annotated[
        str | None, "Hub token. [default: HF_TOKEN, or the one of `hf auth login`]"
    ] = field(default=None, repr=False)
    cache_dir: Annotated[Path | None, "Hub cache. [default: as the Hub client]"] = None
    stream: Annotated[
        bool, "Read tensors from the Hub when they are needed, without a copy on disk."
    ] = False


def numbers(option: str, text: str, example: str) -> list[float]:
    """Numbers between commas, as an option has them."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"{option} is {text!r}.", f"Write numbers: {option} {example}.") from None
