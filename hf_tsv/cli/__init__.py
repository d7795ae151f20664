"""The command line: one thin file a command."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import typer
from typer.exceptions import TyperException

from hf_tsv.cli.help import Command, Group

COMMANDS = {  # with the first line of their help: only the command that is called is imported
    "merge": "Merge fine-tuned CLIP checkpoints into one multi-task model.",
    "tune": "Merge with a method, α or coefficients that are chosen on images.",
    "route": "Make one model that finds out by itself which tasks an image belongs to.",
    "compress": "Compress a fine-tuned CLIP checkpoint into small task factors.",
    "reconstruct": "Rebuild a full checkpoint from task factors and their base model.",
    "push": "Upload an output folder to the Hub as one commit; re-run it to resume.",
    "interference": "Measure how much tasks interfere, layer by layer, before merging.",
    "find": "Find fine-tunes of a base model on the Hub, and tell which can be merged.",
    "inspect": "Show what a checkpoint, a merge or task factors contain, without a download.",
    "evaluate": "Measure zero-shot accuracy on labelled images.",
    "sweep": "Measure how accuracy falls as fine-tunes keep fewer singular vectors.",
    "ui": "Find, merge, try and push models on a page in the browser.",
    "env": "Show versions, devices and settings, for a bug report.",
}

NO_NUMBER = re.compile(r"Input should be a valid (number|whole number)\b.*", re.DOTALL)
"""Words of pydantic, with which typer refuses what is not a number."""

HELP = {"help_option_names": ["-h", "--help"]}


class Commands(Group):
    """Commands by name; what lists them sees their first lines alone."""

    usage = ("COMMAND ...",)
    tables: Mapping[str, Mapping[str, str]] = {
        "Commands": COMMANDS,
        "Environment variables": {
            "HF_TOKEN": "Hub token, if you are not logged in with `hf auth login`.",
            "HF_HOME": "Folder of the Hub cache and of results that wait for their upload.",
            "HF_HUB_OFFLINE=1": "Use the cache alone.",
            "HF_DEBUG=1": "Show the traceback of an error and every request to the Hub.",
            "NO_COLOR=1": "No colours.",
        },
    }
    examples = (
        "hf-tsv merge tanganke/clip-vit-base-patch32_sun397 tanganke/clip-vit-base-patch32_dtd"
        " -o merged",
        "hf-tsv COMMAND --help",
    )

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, line in COMMANDS.items():
            self.add_command(Command(name, help=line, rich_markup_mode=None))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words; `help` and `version` are commands too."""
        if not args or args[0] == "help":
            args = [*args[1:], "--help"]
        return super().parse_args(ctx, ["--version"] if args == ["version"] else args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Name, whole command, and the words that are left for it."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, name and _command(name), rest

    def main(self, *args: Any, standalone_mode: bool = True, **settings: Any) -> Any:
        """Run and exit; what typer refuses is told as all other errors are."""
        try:
            code = super().main(*args, **{**settings, "standalone_mode": False})
            return sys.exit(code or 0) if standalone_mode else code
        except TyperException as error:
            if type(error).__name__ != "NoArgsIsHelpError":  # which has shown the help
                from hf_tsv.cli.output import fail

                message = error.format_message().replace("Value error, ", "")
                message = NO_NUMBER.sub(r"not a \1", message.replace("integer", "whole number"))
                command = getattr(getattr(error, "ctx", None), "command_path", "hf-tsv")
                hint = f"See `{command} --help`."
                ended = message[-1] in ".?)" or "\n" in message  # a command must get no period
                fail(message if ended else f"{message}.", hint, code=error.exit_code)
            sys.exit(error.exit_code)


def _command(name: str) -> Any:
    """A command with its options."""
    from hf_tsv.cli.groups import flattened
    from hf_tsv.cli.output import guarded
    from hf_tsv.cli.usage import checked

    module = import_module(f"hf_tsv.cli.{name}")
    made = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    made.command(name, cls=Command, context_settings=HELP)(
        guarded(name)(checked(flattened(getattr(module, name))))
    )
    command: Any = typer.main.get_command(made)
    command.usage, command.examples = module.USAGE, module.EXAMPLES
    command.missing, command.tables = module.MISSING, getattr(module, "TABLES", {})
    return command


app = typer.Typer(
    name="hf-tsv",
    cls=Commands,
    help=(
        "Merge or compress fine-tuned CLIP checkpoints from the Hugging Face Hub with task singular"
        " vectors."
    ),
    rich_markup_mode=None,
    context_settings=HELP,
    pretty_exceptions_enable=False,
)


def _show_version(value: bool) -> None:
    if value:
        from hf_tsv.system.version import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False,
        "-V",
        "--version",
        callback=_show_version,
        is_eager=True,
        help="Show the version and exit.",
    ),
) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="hf-tsv")
