"""A checkout at work: its process, its Hub, its folder, and how it runs a command."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.same_bytes.commands import OUTPUT, Command
from benchmarks.same_bytes.inputs import CARD, OPEN_CLIP

if TYPE_CHECKING:
    from hub import Hub

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
TRIES = 5
"""Runs that may end before they could be killed."""

CONVERT = """
import hf_tsv, json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
for name, (source, alpha) in json.loads(sys.argv[1]).items():
    hf_tsv.merge([source], base_model="base", alpha=alpha, method="task-arithmetic", output=name,
                 out_format="open_clip", progress=False)
Path("oc-bin").mkdir()
config = Path("oc-1/open_clip_config.json").read_bytes()
Path("oc-bin/open_clip_config.json").write_bytes(config)
weights = load_file("oc-1/open_clip_model.safetensors")
torch.save(weights, "oc-bin/open_clip_pytorch_model.bin")
"""
"""A program that writes OpenCLIP's files in the current folder."""


class BrokenError(Exception):
    """A command did not end as it must for a comparison to mean anything."""


@dataclass(frozen=True)
class Side:
    """A checkout at work.

    Args:
        checkout: its folder.
        root: of its outputs; the names of both sides are equally long.
        inputs: common to both.
        hub: of its own.
        worker: runs its commands.
    """

    checkout: Path
    root: Path
    inputs: Path
    hub: Hub
    worker: subprocess.Popen[str]

    def folder(self, command: Command) -> Path:
        return self.root / command.name

    def words(self, command: Command) -> list[str]:
        """Arguments with the names of folders in them, relative where they are outputs."""
        words = [re.sub(OUTPUT, "../", word) for word in command.words]
        return [re.sub(r"%([\w-]+)", rf"{self.inputs}/\1", word) for word in words]

    def fork(self, command: Command, kill_after: int = 0) -> int:
        """Run a command in a child of the worker; its exit status, or minus a signal."""
        order = {"folder": str(self.folder(command)), "arguments": self.words(command)}
        assert self.worker.stdin is not None and self.worker.stdout is not None
        print(json.dumps({**order, "kill_after": kill_after}), file=self.worker.stdin, flush=True)
        return int(self.worker.stdout.readline())


@contextmanager
def at_work(checkout: Path, root: Path, inputs: Path) -> Iterator[Side]:
    """A side with its Hub and worker."""
    root.mkdir()
    hub = filled_hub(inputs)
    worker = subprocess.Popen(
        [sys.executable, str(HERE / "worker.py"), str(checkout)], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(checkout, root, hub),
    )  # fmt: skip
    assert worker.stdin is not None and worker.stdout is not None
    try:
        if worker.stdout.readline() != "ready\n":
            sys.exit(f"{checkout} cannot be imported")
        yield Side(checkout, root, inputs, hub, worker)
    finally:
        worker.stdin.close()
        worker.wait()
        hub.stop()


def environment(checkout: Path, root: Path, hub: Hub) -> dict[str, str]:
    """Variables of the processes of one side."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE_"))}
    return {
        **kept,
        "PYTHONPATH": str(checkout), "HF_HOME": str(root / "home"), "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": "hf_write", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1", "COLUMNS": "120", "PYTHONHASHSEED": "0",
    }  # fmt: skip


def filled_hub(inputs: Path) -> Hub:
    """The tests' loopback Hub, wherever in their folder it is, with checkpoints and a dataset."""
    (package,) = {path.parents[1] for path in (CHECKOUT / "tests").rglob("hub/wire.py")}
    if str(package) not in sys.path:
        sys.path.insert(0, str(package))
    from hub import Hub

    hub = Hub()
    hub.start()
    hub.add_repo("org/base", inputs / "base")
    for name in ("vision", "full"):
        files = {path.name: path for path in (inputs / name).iterdir()}
        hub.add_repo(f"org/{name}", {**files, "README.md": CARD})
    rows = {"data/test-00000-of-00001.parquet": inputs / "pets.parquet"}
    hub.add_repo("org/data", rows, kind="datasets")
    return hub


def make_inputs(folder: Path, checkout: Path) -> None:
    """Inputs as `inputs.py` makes them, and OpenCLIP's files by a checkout."""
    folder.mkdir()
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    variables = {**os.environ, **quiet, "HF_HOME": str(folder / "home")}
    with_hf_tsv = {**variables, "PYTHONPATH": str(checkout)}
    for arguments, env in (
        ([str(HERE / "inputs.py"), str(folder)], variables),
        (["-c", CONVERT, json.dumps(OPEN_CLIP)], with_hf_tsv),
    ):
        done = subprocess.run(
            [sys.executable, *arguments], env=env, cwd=folder, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"the inputs could not be made:\n{done.stderr}")
    for name in OPEN_CLIP:  # no trace of the merge
        for file in ("README.md", "hf_tsv_recipe.yaml"):
            (folder / name / file).unlink(missing_ok=True)


def carried_out(side: Side, command: Command) -> int:
    """Run a command, to its end or killed and again; keep what it pushed beside its output."""
    folder = side.folder(command)
    folder.mkdir()
    heads = heads_of(side.hub)
    if command.processes:
        code = launched(side, command)
    else:
        if command.kill_after:
            interrupted(side, command)
        code = side.fork(command)
    for key, head in heads_of(side.hub).items():
        if heads.get(key) != head:
            for name, content in side.hub.files(key[0], head).items():
                target = folder / "pushed" / key[0] / key[1] / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
    (folder / "left").write_text("\n".join(sorted(path.name for path in folder.iterdir())))
    return code


def interrupted(side: Side, command: Command) -> None:
    """Kill a command when it has finished some weights.

    Raises:
        [`BrokenError`]: it it cannot be killed, or ends with an error.
    """
    for _ in range(TRIES):
        code = side.fork(command, command.kill_after)
        if code == -signal.SIGKILL and not (side.folder(command) / "out").exists():
            return
        if code not in (0, -signal.SIGKILL):
            raise BrokenError(f"ended with {code} before it could be killed")
        shutil.rmtree(side.folder(command))
        side.folder(command).mkdir()
    raise BrokenError("was done before it could be killed")


def launched(side: Side, command: Command) -> int:
    """Run a command by torchrun."""
    folder = side.folder(command)
    launcher = ["--standalone", f"--nproc-per-node={command.processes}", "-m", "hf_tsv"]
    with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
        return subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *launcher, *side.words(command)],
            cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=err, check=False, timeout=300,
            env=environment(side.checkout, side.root, side.hub),
        ).returncode  # fmt: skip


def heads_of(hub: Hub) -> dict[tuple[str, str], str]:
    """Commits of all branches and pull requests, by repository and name."""
    return {
        (key, ref.removeprefix("refs/").replace("/", "-")): sha
        for key, repo in hub.repos.items()
        for ref, sha in repo.refs.items()
    }
