"""Options that several commands share."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_tsv.cli.groups import Panel
from hf_tsv.recipes.settings import Dtype, Qkv

SUN397, DTD, SVHN = (f"tanganke/clip-vit-base-patch32_{task}" for task in ("sun397", "dtd", "svhn"))
"""Public fine-tunes for the examples of help pages."""

INPUTS = Panel("Inputs")
TARGET = Panel("Output")
METHOD = Panel("Method")
RUN = Panel("Run")


def folder(content: str) -> Any:
    """The option `-o` of a command that writes a folder of its own."""
    return typer.Option("-o", "--output", metavar="DIR", help=content, rich_help_panel=TARGET)


OutputDtype = Annotated[Dtype | None, "DTYPE", "float32, float16, bfloat16. [default: the base's]"]


@dataclass(frozen=True)
class SourceOptions:
    """Origin of the checkpoints."""

    PANEL = INPUTS
    base_model: Annotated[
        str | None, "REF", "Base (pretrained) model. [default: taken from the model cards]"
    ] = None
    subfolder: Annotated[
        str | None,
        "DIR",
        "Subfolder of the weights in every checkpoint, but not in the base model. Same as"
        " org/name/DIR.",
    ] = None
    allow_other_base: Annotated[
        bool, "Go on although an update is as large as that of a fine-tune of another model."
    ] = False


@dataclass(frozen=True)
class TargetOptions:
    PANEL = TARGET
    output: Annotated[Path | None, folder("Folder to write.")] = None
    force: Annotated[bool, "Replace an output folder that hf-tsv wrote."] = False
    push_to: Annotated[
        str | None, "REPO_ID", "Upload to this Hub repository; created if needed."
    ] = None
    private: Annotated[bool | None, "Visibility of a repository that is created."] = None
    revision: Annotated[
        str | None,
        "BRANCH",
        "Branch to push to; created if needed. To read a branch or tag, write org/name@revision.",
    ] = None
    create_pr: Annotated[bool, "Push as a pull request."] = False
    commit_message: Annotated[str | None, "TEXT", "Title of the commit."] = None
    collection: Annotated[str | None, "SLUG", "Hub collection to add it to: slug or URL."] = None


@dataclass(frozen=True)
class FileOptions:
    PANEL = TARGET
    dtype: OutputDtype = None
    max_shard_size: Annotated[str | None, "SIZE", "Largest weight file. [default: 5GB]"] = None

    @property
    def shard_size(self) -> int | str | None:
        """Size as given; a plain number as a number, which is how recipes hold it."""
        text = self.max_shard_size
        return int(text) if text and re.fullmatch("[0-9]{1,19}", text) else text


@dataclass(frozen=True)
class RankOptions:
    PANEL = "Decomposition"
    rank: Annotated[
        int | None,
        "N",
        "Singular vectors kept of each task. [default: smaller side of the matrix / number of"
        " tasks]",
    ] = None
    rank_fraction: Annotated[
        float | None, "F", "Rank as a share of the smaller side, such as 0.1."
    ] = None
    exclude: Annotated[
        list[str] | None,
        "GLOB",
        "Matrices to average instead of decomposing; repeatable. [default: text_projection.weight]",
    ] = None
    qkv: Annotated[
        Qkv | None,
        "split|fused",
        "Decompose query, key and value weights one by one, or stacked. [default: as the base"
        " model stores them]",
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
    batch_size: Annotated[int, "N", "Images at a time."] = 64
    device: Annotated[str | None, "NAME", "auto, cpu, cuda, cuda:1, mps, 0. [default: auto]"] = None
    max_memory: Annotated[
        str | None,
        "SIZE",
        "Memory limit per process, such as 2GB; fewer weights are then processed at once."
        " [default: none]",
    ] = None


@dataclass(frozen=True)
class RunOptions:
    PANEL = RUN
    timings: Annotated[bool, "Show where the time went."] = False
    dry_run: Annotated[bool, "Show the plan. Reads only headers, writes nothing."] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="No progress bars and no status lines.")
    ] = False
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Also show timings and requests to the Hub.")
    ] = False

    @property
    def progress(self) -> bool | None:
        """False hides progress bars; None shows them on a terminal."""
        return False if self.quiet else None


@dataclass(frozen=True)
class AccessOptions:
    PANEL = RUN
    token: Annotated[str | None, "TOKEN", "Hub token. [default: HF_TOKEN or `hf auth login`]"] = (
        field(default=None, repr=False)
    )
    cache_dir: Annotated[Path | None, "DIR", "Hub cache. [default: $HF_HOME/hub]"] = None
    stream: Annotated[bool, "Read weights from the Hub without a copy on disk."] = False
