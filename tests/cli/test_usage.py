"""Wrong usage: exit code 2, one style, options instead of arguments, and no second for torch."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

IN_ONE_PROCESS = """
import contextlib, io, json, sys
from hf_tsv import cli
from hf_tsv.cli import output
output._leave = sys.exit
for words in json.load(sys.stdin):
    err = io.StringIO()
    sys.argv = ["hf-tsv", *words]
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, err.getvalue(), "torch" in sys.modules]))
"""

MERGE = "merge org/a org/b -o out "
WRONG = {
    "merge org/a org/b": "No output given.\nHint: Pass -o DIR, --push-to REPO_ID, or both.",
    "merge -o out": "No checkpoint given.",
    MERGE + "--rank 0": "--rank must be at least 1 (got 0).\nHint: See `hf-tsv merge --help`.",
    MERGE + "--weights a,b": "--weights must be numbers (got 'a,b').",
    MERGE + "--weights 1": "--weights has 1 number for 2 checkpoints.",
    MERGE + "--weights 0,0": "--weights are all 0.",
    MERGE + "--weights a=0 --weights b=0": "--weights are all 0.",
    MERGE
    + "--weights org/c=1": "--weights names 'org/c', which is none of the checkpoints org/a, ",
    MERGE + "--weights a=1,org/a=2": "--weights names org/a twice, also as 'a'.",
    MERGE + "--weights a=1,a=2": "--weights names a twice.\nHint: Give it one number.",
    MERGE
    + "--weights a=1,b": "--weights must be NAME=NUMBER (got 'a=1,b').\nHint: Example: org/a=",
    MERGE + "--weights a=x": "--weights gives a 'x', which is no number.",
    MERGE + "--weights a=nan": "Each of --weights must be a finite number (got nan).",
    MERGE
    + "--scale 0.5": "--scale must be NAME=NUMBER (got '0.5').\nHint: Example: vision_model.*",
    MERGE + "--scale *=x": "--scale gives * 'x', which is no number.",
    MERGE + "--scale *=nan": "The scale of '*' must be a finite number (got nan).",
    MERGE + "--scale org/c:*=1": "--scale names 'org/c', which is none of the checkpoints org/a, ",
    MERGE + "--scale org/a:=1": "--scale has a factor without a glob, 'org/a:'.",
    MERGE + "--method tall-mask --scale *=1": "Hint: Name a task: --scale TASK:GLOB=FACTOR.",
    MERGE + "--rank-fraction 2": "--rank-fraction must be above 0 and at most 1 (got 2).",
    MERGE + "--rank 3 --rank-fraction 0.1": "--rank and --rank-fraction cannot be combined.",
    MERGE + "--max-memory lots": "--max-memory: invalid size 'lots'.\nHint: Examples: 2GB, 800MB.",
    MERGE + "--max-shard-size big": "--max-shard-size: invalid size 'big'.",
    MERGE + "--alpha x": "Invalid value for '--alpha': not a number.\n",
    MERGE + "--rank x": "Invalid value for '--rank': not a whole number.\n",
    MERGE + "--alpha nan": "--alpha must be a finite number (got nan).",
    MERGE + "--method tall-mask --alpha 2": "The method tall-mask has no α.\nHint: Omit --alpha.",
    MERGE + "--method ties --report": "Hint: Omit --report, or use `hf-tsv interference`.",
    MERGE + "--dtype nope": "nope",
    MERGE + "--method nope": "nope",
    MERGE + "--nope": "No such option: --nope",
    MERGE + "--revision v1": "--revision applies to an upload, and none is asked for.",
    MERGE + "--no-private": "and none is asked for.\nHint: Add --push-to REPO_ID.\n",
    MERGE + "--subfolder /a": "'/a' is not a subfolder.",
    "merge org/a --push-to me/b --create-pr --revision v1": "--create-pr and --revision cannot be",
    "merge ./absent -o out": "There is no folder './absent'.",
    "merge org/a//b -o out": "org/a//b",
    "tune org/a --task a=b/c": "No output given.",
    "tune org/a --task a=b/c -o out --steps 3": "--steps is for the method ada only.",
    "tune org/a --task a=b/c -o out --method ada --alphas 0:1:1": "--alphas is not for the method",
    "tune org/a --task a=b/c -o out --alphas 2:1:1": "--alphas cannot be '2:1:1'.",
    "merge": "Name the checkpoints to merge, and a folder for the result with -o.\nExample: hf-tsv",
    "compress org/a": "No output given.",
    "compress org/a -o out --rank 4 --energy 0.9": "--rank and --energy cannot be combined.",
    "compress org/a -o out --energy 1.5": "--energy must be above 0 and at most 1 (got 1.5).",
    "compress org/a -o out --budget 0.1": "Hint: Did you mean 10%? Examples: 10%, 35MB.",
    "compress org/a -o out --no-dense": "--no-dense and --model-class apply to an adapter.",
    "compress": "",
    "route org/a -o out": "Routing chooses among tasks, and there is 1.",
    "route org/a org/b": "No output given.",
    "route org/a org/b -o out --temperature 0": "--temperature must be at least 1e-06 (got 0).",
    "route org/a org/b -o out --dtype nope": "nope",
    "reconstruct org/a": "No output given.",
    "reconstruct org/a -o out --dtype nope": "nope",
    "push merged a/b/c": "'a/b/c' is not a repository id.\nHint: Give org/name, with letters,",
    MERGE + "--push-to ./x": "'./x' is not a repository id",
    "push only-one": "Missing argument",
    "interference org/a": "Hint: Name at least two checkpoints.",
    "inspect ''": "There is no folder ''.",
    "evaluate org/a": "No task given.",
    "evaluate org/a --suite nope": "There is no suite 'nope'.",
    "evaluate org/a --task a": "The task 'a' names no dataset.",
    "evaluate org/a --task a=b/c --limit 0": "--limit must be at least 1 (got 0).",
    "evaluate org/a --task a=b/c --create-pr": "--create-pr applies to the card.",
    "evaluate org/a --task a=b/c --reference d=e/f": "--reference has d, which is no task.",
    "sweep --task a=b/c": "Hint: Name it as a=REF with --reference.",
    "sweep --task a=b/c --reference a=d/e --rank-fraction 0.1,2": "--rank-fraction must be above 0",
    "mrege": "No such command 'mrege'. Did you mean 'merge'?",
}


def test_wrong_usage_ends_with_2_before_torch_is_imported(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_ONE_PROCESS], input=json.dumps([*map(shlex.split, WRONG)]),
        capture_output=True, text=True, check=True, cwd=tmp_path, timeout=300,
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"},
    )  # fmt: skip
    ends = map(json.loads, done.stdout.splitlines())
    for (words, said), (code, err, torch) in zip(WRONG.items(), ends, strict=True):
        assert code == 2 and said in err and not torch, (words, code, err, torch)
        if said:
            assert err.startswith("Error: ") and "\nHint: " in err, (words, err)
        assert "`--" not in err and "─" not in err, (words, err)
    assert list(tmp_path.iterdir()) == []
