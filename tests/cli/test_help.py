"""Help pages, names of options and values, and the small commands around the others."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import SCRIPT, hf_tsv, hf_tsv_script
from hub import Hub

from hf_tsv.cli import COMMANDS
from hf_tsv.cli.help import shell_lines
from hf_tsv.recipes.compressing import Options
from hf_tsv.recipes.settings import Settings
from hf_tsv.system.device import available, pick_device
from hf_tsv.system.errors import RecipeError
from hf_tsv.system.version import __version__

MOST_LINES = {"merge": 112, "tune": 131}
"""Two screens of 50 lines; what learns has the options of a merge and of images."""


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_a_page_fits_its_terminal(command: str, columns: int) -> None:
    page = hf_tsv(*command.split(), "--help", COLUMNS=str(columns))
    assert page.code == 0, page.err
    lines = page.out.splitlines()
    long = [line for line in lines if len(line) > columns]
    assert all("clip-vit-base" in line for line in long)  # a name that is longer
    assert not long or columns < 80
    assert columns != 80 or len(lines) <= MOST_LINES.get(command, 80)
    assert not re.search(r"<\w+>|\[(?!OPTIONS)[A-Z]|\.\.\.\.|…|{[A-Z]", page.out), page.out
    assert "\N{NON-BREAKING HYPHEN}" not in page.out and "\N{NO-BREAK SPACE}" not in page.out


@pytest.mark.parametrize("command", COMMANDS)
def test_a_page_names_what_is_needed_and_shows_examples(command: str) -> None:
    page = hf_tsv(command, "-h", COLUMNS="80").out
    usage = page.split("\n\n")[0]
    assert ("-o DIR" in usage) == (command in ("merge", "tune", "route", "compress", "reconstruct"))
    assert f"  $ hf-tsv {command}" in page.split("\nExamples:\n")[1]
    titles = set(re.findall(r"^(\S.*):$", page, re.MULTILINE))
    assert titles <= {
        "Arguments", "Inputs", "Output", "Method", "Decomposition", "Images", "Learning", "Run",
        "Size (give one)", "Storage", "Methods (--method)", "Examples", "Options",
    }  # fmt: skip
    assert ("Method" in titles) == (command in ("merge", "tune", "route"))


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("env", "ui")])
def test_a_command_alone_says_what_is_missing_with_one_example(command: str) -> None:
    done = hf_tsv(command)
    assert done.code == 2 and done.out == ""
    assert "Error: Name " in done.err and f"Example: hf-tsv {command} " in done.err
    assert len(done.err.splitlines()) < 8


def test_examples_can_be_pasted() -> None:
    line = "hf-tsv merge org/a org/b --base-model org/base -o out"
    for width in (30, 45, 60, 100):
        text = shell_lines(line, width)
        assert max(map(len, text.splitlines())) <= width
        assert text.replace("\\\n", "").replace("$", "").split() == line.split()
        assert not re.search(r"--base-model \\\n", text)


@pytest.mark.parametrize("words", [["-V"], ["--version"], ["version"]])
def test_the_version(words: list[str]) -> None:
    assert hf_tsv(*words).out == f"{__version__}\n"


def test_help_is_a_command_too() -> None:
    assert hf_tsv("help", "push").out == hf_tsv("push", "--help").out
    assert hf_tsv("help").out == hf_tsv().out == hf_tsv("--help").out


def test_env_tells_what_a_bug_report_needs() -> None:
    found = hf_tsv("env", "--json").json
    assert found["torch"] == torch.__version__ and found["hf-tsv"] == __version__
    assert found["endpoint"] == os.environ["HF_ENDPOINT"] and found["token"] == "yes"
    assert "cpu" in found["devices"] and "tsv" in found["methods"]
    assert os.environ["HF_TOKEN"] not in hf_tsv("env").out


@pytest.mark.parametrize(
    ("typed", "found"),
    [("hf-tsv mer", "merge"), ("hf-tsv push --cre", "--create-pr"),
     ("hf-tsv merge --method iso-c", "iso-cts"), ("hf-tsv compress --dtype bf", "bfloat16")],
)  # fmt: skip
def test_words_are_completed(typed: str, found: str) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    done = hf_tsv_script(_HF_TSV_COMPLETE="complete_bash", **words)
    assert found in done.out.split(), done


def test_wrong_words_are_refused_without_torch(tmp_path: Path) -> None:

    code = """
import sys
from hf_tsv.cli import main, output
output._leave = sys.exit  # this process goes on
sys.argv[0] = "hf-tsv"
try:
    main()
except SystemExit as end:
    assert end.code == 2, end.code
assert "torch" not in sys.modules
"""
    for words in (["merge"], ["merge", "a", "b", "--method", "slrp"], ["compress", "a", "--rank"],
                  ["merge", "a", "--dtype", "x"], ["push", "a"], ["tune", "-x"]):  # fmt: skip
        subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)


# Other names


@pytest.mark.parametrize(
    ("given", "meant"),
    [({"method": "task_arithmetic"}, {"method": "task-arithmetic"}),
     ({"method": "linear"}, {"method": "average"}), ({"method": "TIES"}, {"method": "ties"}),
     ({"dtype": "bf16"}, {"dtype": "bfloat16"}), ({"dtype": "fp16"}, {"dtype": "float16"}),
     ({"dtype": "half"}, {"dtype": "float16"}), ({"dtype": "fp32"}, {"dtype": "float32"}),
     ({"dtype": torch.bfloat16}, {"dtype": "bfloat16"}),
     ({"out_format": "open-clip"}, {"out_format": "open_clip"})],
)  # fmt: skip
def test_names_of_other_tools_are_understood(given: Any, meant: Any) -> None:
    assert Settings(**given) == Settings(**meant)
    if "dtype" in given:
        assert Options(**given) == Options(**meant)
    ((name, value),) = given.items()
    if isinstance(value, str):
        words = ["merge", "./absent", f"--{name.replace('_', '-')}", value, "-o", "x"]
        done = hf_tsv(*words)
        assert done.code == 2 and "no folder './absent'" in done.err, done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [("--method tsvv", "Did you mean tsv?"), ("--method task-arithmetics", "task-arithmetic?"),
     ("--dtype float", ""), ("--dtype floatt16", "Did you mean float16?"),
     ("--method slerp", "Choose one of tsv,"), ("--precision exakt", "Did you mean exact?")],
)  # fmt: skip
def test_the_nearest_name_is_suggested(words: str, said: str, tmp_path: Path) -> None:
    done = hf_tsv("merge", tmp_path / "absent", *words.split(), "-o", tmp_path / "x")
    assert said in done.err and "Value error" not in done.err
    assert done.code == 2 and ("no folder" in done.err) == (not said)


@pytest.mark.parametrize(
    ("command", "other"), [("merge", "ada"), ("tune --task a=b/c", "tall-mask")]
)
def test_a_method_of_another_command_is_not_offered(
    command: str, other: str, tmp_path: Path
) -> None:
    words = [*command.split(), "org/a", "org/b", "-o", tmp_path / "x", "--method"]
    listed = hf_tsv(*words, "slerp").err
    assert ", ties, consensus, " in listed and f" {other}" not in listed
    assert f"The method {other} " in hf_tsv(*words, other).err


def test_a_wrong_name_in_python_is_answered_too() -> None:
    with pytest.raises(RecipeError, match="Did you mean consensus"):
        Settings(method="concensus")


@pytest.mark.parametrize("name", [None, "auto", "cpu", -1, "-1", torch.device("cpu")])
def test_devices_by_every_name(name: Any) -> None:
    assert pick_device(name).type == (available()[-1] if name in (None, "auto") else "cpu")[
        :4
    ].rstrip(":")


@pytest.mark.parametrize("name", ["gpu", "99", 99, "cuda:99"])
def test_a_device_that_is_not_here_is_answered_by_those_that_are(name: Any, hub: Hub) -> None:
    with pytest.raises(RecipeError, match=r"Choose auto or cpu"):
        pick_device(name)
    done = hf_tsv("merge", "org/a", "org/b", "-o", "x", "--device", str(name))
    assert done.code == 2 and "Choose auto or cpu" in done.err and hub.requests == []


# What a run tells


def test_a_sum_is_not_called_an_average(world: Path) -> None:
    words = ["merge", "org/vision", "org/flat", "--method", "task_arithmetic"]
    done = hf_tsv(*words, "-o", "merged", cwd=world)
    assert done.code == 0, done.err
    assert re.search(r"^\d+ tensors summed, (1 averaged, )?\d+ copied", done.err, re.MULTILINE)
    assert json.loads(hf_tsv(*words, "--dry-run", "--json", cwd=world).out)["weights"]["summed"]


def test_a_merge_says_what_is_there_and_what_comes_next(world: Path, hub: Hub) -> None:
    done = hf_tsv("merge", "org/vision", "org/flat", "-o", "merged", cwd=world)
    assert "Merged 2 checkpoints in " in done.err
    assert "README.md (model card) and hf_tsv_recipe.yaml (recipe)" in done.err
    assert "`hf-tsv push merged REPO_ID`" in done.err and "`hf-tsv evaluate merged --" in done.err
    done = hf_tsv("merge", "org/vision", "-o", "more", "--push-to", "me/x", cwd=world)
    assert done.out == f"{world / 'more'}\n"
    assert done.err.count("/me/x") == 1 and f"Uploaded to {hub.endpoint}/me/x.\n" in done.err
    assert "Merged 1 checkpoint in" in done.err


def test_a_dry_run_shows_every_choice(world: Path) -> None:
    words = ["--alpha", "0.7", "--rank", "3", "--dtype", "bf16", "--push-to", "me/x", "-o", "m"]
    done = hf_tsv("merge", "org/vision", "org/flat", *words, "--dry-run", cwd=world)
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in done.out.splitlines())
    assert rows["method"] == "tsv, α = 0.7" and rows["rank"] == "3" and rows["push to"] == "me/x"
    assert rows["output"].endswith(", bfloat16") and rows["folder"] == str(world / "m")


def test_verbose_tells_requests_and_timings(world: Path, hub: Hub) -> None:
    done = hf_tsv("merge", "org/vision", "org/flat", "-o", "m", "-v", cwd=world)
    assert "HTTP Request: GET " in done.err and "/api/models/org/vision" in done.err
    assert re.search(r"^computing +[\d.]+ s$", done.err, re.MULTILINE)
    assert os.environ["HF_TOKEN"] not in done.err
    assert "HTTP Request" not in hf_tsv("merge", "org/vision", "-o", "n", cwd=world).err


def test_json_is_one_line_for_programs(world: Path) -> None:
    done = hf_tsv("inspect", "org/vision", "--json", "-q", cwd=world)
    assert len(done.out.splitlines()) == 1 and done.json["schema_version"] == 1
    assert SCRIPT.exists()
