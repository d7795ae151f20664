"""The command line: one thin file a command."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

COMMANDS = {  # with the first line of their help: only the command that is called is imported
    "merge": "Merge fine-tuned CLIP checkpoints into one multi-task checkpoint.",
    "compress": "Compress a fine-tuned CLIP checkpoint into small task factors.",
    "reconstruct": "Make a whole checkpoint of task factors and their base model again.",
    "push": "Upload a finished folder as one commit, at once or after an upload that failed.",
    "interference": "Measure who disturbs whom, layer by layer, before merging.",
    "inspect": "Say what a checkpoint, a merge or task factors hold, from headers alone.",
    "evaluate": "Measure what a model scores on labelled images, zero-shot.",
    "sweep": "Measure what fine-tunes still score with fewer and fewer of their singular vectors.",
}

MARKUP: Literal["markdown"] = "markdown"


class Commands(TyperGroup):
    """Commands by name; what lists them sees their first lines alone."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, line in COMMANDS.items():
            self.add_command(TyperCommand(name, help=line, rich_markup_mode=MARKUP))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Name, whole command, and the words that are left for it."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, name and _command(name), rest

    def main(self, *args: Any, standalone_mode: bool = True, **settings: Any) -> Any:
        """Run and exit; what typer refuses is told as all other errors are."""
        try:
            code = super().main(*args, standalone_mode=False, **settings)
            return sys.exit(code or 0) if standalone_mode else code
        except TyperException as error:
            if type(error).__name__ != "NoArgsIsHelpError":  # which has shown the help
                from hf_tsv.cli.output import fail

                message = error.format_message().replace("Value error, ", "")
                command = getattr(getattr(error, "ctx", None), "command_path", "hf-tsv")
                hint = f"See `{command} --help`."
                fail(message if message[-1] in ".?)" else f"{message}.", hint, code=error.exit_code)
            sys.exit(error.exit_code)


def _command(name: str) -> Any:
    """A command with its options."""
    from hf_tsv.cli.groups import flattened
    from hf_tsv.cli.output import guarded
    from hf_tsv.cli.usage import checked

    module = import_module(f"hf_tsv.cli.{name}")
    examples = module.EXAMPLES.replace("\n", "\n\n")  # a paragraph each
    made = typer.Typer(
        add_completion=False, rich_markup_mode=MARKUP, pretty_exceptions_enable=False
    )
    made.command(name, no_args_is_help=True, epilog=f"**Examples**\n\n{examples}")(
        guarded(name)(checked(flattened(getattr(module, name))))
    )
    return typer.main.get_command(made)


app = typer.Typer(
    name="hf-tsv",
    cls=Commands,
    help=(
        "Merge or compress fine-tuned CLIP checkpoints from the Hugging Face Hub with task singular"
        " vectors, without training and without data."
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=MARKUP,
    context_settings={"help_option_names": ["-h", "--help"]},
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
        False, "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    app()
