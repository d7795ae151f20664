"""The command line: one thin file a command."""

from __future__ import annotations

import typer

from hf_tsv.cli import compress, evaluate, inspect, interference, merge, push, reconstruct, sweep
from hf_tsv.cli.groups import flattened
from hf_tsv.cli.output import guarded

app = typer.Typer(
    name="hf-tsv",
    help=(
        "Merge or compress fine-tuned CLIP checkpoints from the Hugging Face Hub with task singular"
        " vectors, without training and without data."
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
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


for module in (merge, compress, reconstruct, push, interference, inspect, evaluate, sweep):
    name = module.__name__.rpartition(".")[2]
    command = guarded()(flattened(getattr(module, name)))
    examples = module.EXAMPLES.replace("\n", "\n\n")  # a paragraph each
    app.command(name, no_args_is_help=True, epilog=f"**Examples**\n\n{examples}")(command)


def main() -> None:
    """Entry point of the console script."""
    app()
