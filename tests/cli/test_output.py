"""Words and colours of what a command tells, and tracebacks where Python calls the package."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from cli import hf_tsv
from hub import Hub

from hf_tsv import RepoError, merge
from hf_tsv.cli.output import as_options
from hf_tsv.system.text import as_keys, counted


@pytest.mark.parametrize(
    ("text", "options", "keys"),
    [
        ("Add `force=True`.", "Add --force.", "Add force: True."),
        ("Pass `output=DIR`.", "Pass -o DIR.", "Pass output: DIR."),
        ("`rank=` must be at least 1.", "--rank must be at least 1.", "rank must be at least 1."),
        ("Use `dtype='bfloat16'`.", "Use --dtype bfloat16.", "Use dtype: 'bfloat16'."),
        ("`dense=False`", "--no-dense", "dense: False"),
        ("`push_to=REPO_ID`", "--push-to REPO_ID", "push_to: REPO_ID"),
        ("`references=` of `hf-tsv merge`", "--reference of `hf-tsv merge`", None),
        ("x = `y` and z=`w`", "x = `y` and z=`w`", "x = `y` and z=`w`"),
    ],
)
def test_arguments_are_options_on_the_command_line(
    text: str, options: str, keys: str | None
) -> None:
    assert as_options(text) == options
    assert keys is None or as_keys(text) == keys


def test_counts_are_singular_and_plural() -> None:
    told = [counted(n, "weight") for n in (0, 1, 2, 1000)]
    assert told == ["0 weights", "1 weight", "2 weights", "1,000 weights"]
    assert counted(2, "copy", "copies") == "2 copies" and counted(1, "copy", "copies") == "1 copy"


SPOKEN = """
import logging, os
from hf_tsv.cli import output
from hf_tsv.system.errors import RecipeError
from hf_tsv.system.progress import logger
out = output.Out()
with output.guarded("merge"):
    logger.warning("`exclude=x` matches no weight.")
    out.status("Merged.", done=True)
    raise RecipeError("It is \\x1b[31mwrong\\x1b[0m.", "Add `force=True`.")
"""


def on_a_terminal(tmp_path: Path, **environment: str) -> str:
    """The stderr of [`SPOKEN`] on a terminal."""
    main, end = pty.openpty()
    hidden = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    process = subprocess.Popen(
        [sys.executable, "-c", SPOKEN], stderr=end, cwd=tmp_path,
        env={**hidden, "TERM": "xterm", "PYTHONUTF8": "1", **environment},
    )  # fmt: skip
    os.close(end)
    said = b""
    while True:
        try:
            said += (more := os.read(main, 1000))
        except OSError:  # the other end is closed
            break
        if not more:
            break
    os.close(main)
    assert process.wait(timeout=60) == 1
    return said.decode()


def test_colours_are_those_of_hf(tmp_path: Path) -> None:
    assert on_a_terminal(tmp_path) == (
        "\033[33mWarning:\033[0m --exclude x matches no weight.\r\n"
        "\033[32m✓\033[0m Merged.\r\n"
        "\033[1;31mError:\033[0m It is \\x1b[31mwrong\\x1b[0m.\r\n"
        "\033[90mHint:\033[0m Add --force.\r\n"
    )


@pytest.mark.parametrize("plain", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_colours_can_be_switched_off(tmp_path: Path, plain: dict[str, str]) -> None:
    said = on_a_terminal(tmp_path, **plain)
    assert "\033" not in said and "Error: It is" in said and "✓ Merged." in said


@pytest.mark.parametrize(("debug", "least", "most"), [("0", 5, 15), ("1", 30, 10**6)])
def test_a_typo_in_a_name_is_a_short_traceback(
    world: Path, monkeypatch: pytest.MonkeyPatch, debug: str, least: int, most: int
) -> None:
    monkeypatch.setenv("HF_DEBUG", debug)
    with pytest.raises(RepoError) as error:
        merge(["org/nope", "org/vision"], output=world / "out")
    found = "".join(traceback.format_exception(error.value)).splitlines()
    assert least <= len(found) <= most, found
    assert "RepoError: org/nope does not exist on the Hub" in found[-1]


def test_an_error_of_a_library_points_to_its_traceback(world: Path) -> None:
    done = hf_tsv("merge", "org/nope", "-o", "out", cwd=world)
    assert done.err.endswith("\nHint: HF_DEBUG=1 shows where it failed.\n")


def test_a_download_that_is_stopped_says_what_stays(world: Path, hub: Hub) -> None:
    def stop() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    hub.fail("/org/vision/[0-9a-f]{64}/", after=1, action=stop)
    done = hf_tsv("merge", "org/vision", "-o", "out", cwd=world)
    assert done.code == 130 and "`hf cache prune` deletes partial files" in done.err, done.err
    assert done.err.endswith("Interrupted.\n") and list(world.iterdir()) == []
