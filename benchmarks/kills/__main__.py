"""SIGKILL at every step that a run takes on the disk, and at random times; then a check.

`python -m benchmarks.kills` runs merge, compress, reconstruct, route and push on tiny CLIPs, kills
them, and checks the output folder and a local Hub: each must hold nothing, or the earlier result,
or the complete one. Then it repeats the command, sometimes killing it again, until it ends, and
compares every byte with those of an undisturbed run.

With `--disks` nothing is killed. Instead the disk is full from each step on, or small (a file
system in memory of growing size, by `unshare`), or read-only. The run must print one error with a
hint, leave the folder in one of the same states, and write the same bytes once there is space.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.kills import disks
from benchmarks.kills.zygote import Order, Zygote
from hf_tsv.checkpoints.names import TASKS_FOLDER

if TYPE_CHECKING:
    from hub import Hub

TESTS = Path(__file__).parents[2] / "tests" / "support"
MOST_STEPS = 5000
CONFIGS = ("config.json", "tsv_config.json", "adapter_config.json", "hf_tsv_mask.json")

Content = dict[str, str]
"""Digest (sha256) of every file, by its path in a folder or repository."""

Result = tuple[Content | None, Content | None]
"""Content of the output folder and of the Hub repository; None if absent."""


@dataclass(frozen=True)
class Scenario:
    """Command with the place of its result.

    Args:
        name: name for the table.
        arguments: arguments of hf-tsv; `OUT` is the output folder.
        earlier: arguments of an earlier run whose output is already there.
        repo_id: repository of the result on the Hub.
    """

    name: str
    arguments: tuple[str, ...]
    earlier: tuple[str, ...] = ()
    repo_id: str | None = None


@dataclass
class Tally:
    """Observations of a scenario."""

    kills: int = 0
    wrong: list[str] = field(default_factory=list)
    resumed: int = 0


class WrongError(Exception):
    """A state was found that must not occur."""


@dataclass
class Place:
    """Folders of a run, and the Hub.

    Args:
        root: folder that holds everything.
        hub: Hub of the tests.
        zygote: process that runs commands.
    """

    root: Path
    hub: Hub
    zygote: Zygote

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def unpushed(self) -> Path:
        return self.root / "home" / "hf-tsv" / "unpushed"

    def log(self) -> str:
        return (self.root / "log").read_text(errors="replace")

    def run(self, arguments: Sequence[str], *, step: int = 0, seconds: float = 0.0) -> bool:
        """Run to the end, or to a kill before a step or after a time; tell whether it ended."""
        code = self._code(arguments, step, seconds)
        if code not in (0, -signal.SIGKILL if step or seconds else 0):
            raise WrongError(f"exit code {code}: {self.log()}")
        return not code

    def run_on_a_bad_disk(self, arguments: Sequence[str], full_from: int = 0) -> bool:
        """Run to the end, or to one error with a hint; tell whether it succeeded."""
        code = self._code(arguments, full_from, full=True)
        log = self.log()
        clear = log.count("Error: ") == 1 and "Hint: " in log and "Traceback" not in log
        if code not in (0, 1) or (code and not clear):
            raise WrongError(f"exit code {code}: {log}")
        return not code

    def _code(
        self, arguments: Sequence[str], step: int = 0, seconds: float = 0.0, *, full: bool = False
    ) -> int:
        words = [str(self.work / "out") if word == "OUT" else word for word in arguments]
        folders = [str(self.work), str(self.unpushed)]
        log, steps = str(self.root / "log"), str(self.root / "steps")
        return self.zygote.run(Order(words, folders, log, steps, step, seconds, full))

    def clean(self, scenario: Scenario) -> None:
        """Restore the state before the first run."""
        for path in self.work.iterdir():
            shutil.rmtree(path)
        shutil.rmtree(self.unpushed, ignore_errors=True)
        if scenario.repo_id:
            self.hub.repos.pop(scenario.repo_id, None)
        if scenario.earlier:
            self.run(scenario.earlier)

    def there(self, scenario: Scenario) -> Result:
        """Result in the folder and on the Hub, None where there is none."""
        out = self.work / "out"
        local = content_of(out) if out.exists() else None
        pushed = None
        if scenario.repo_id in self.hub.repos:
            head = self.hub.repos[scenario.repo_id].resolve("main")
            pushed = {name: blob.oid for name, blob in head.files.items()}
            pushed.pop(".gitattributes", None)
        return local, pushed or None

    def finished_weights(self) -> int:
        """Number of whole lines in the journals; not in those of tasks beside a merge."""
        return sum(
            file.read_bytes().count(b"\n")
            for folder in (self.work, self.unpushed)
            for file in folder.rglob("done.*.jsonl")
            if TASKS_FOLDER not in file.parts
        )


def content_of(folder: Path) -> Content:
    """Digests of all files of a folder, by path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check(place: Place, scenario: Scenario, before: Result, whole: Result) -> None:
    """Check that a kill leaves nothing, the earlier result, or the complete one.

    Raises:
        [`WrongError`]: it leaves something else, or an incomplete folder that could be loaded.
    """
    local, pushed = place.there(scenario)
    for found, was, should in zip((local, pushed), before, whole, strict=True):
        if found not in (was, should, None):
            raise WrongError(f"{scenario.name}: neither nothing nor the complete result")
        if found is None and was is not None:
            raise WrongError(f"{scenario.name}: the earlier output is gone")
    complete = [set(c.values()) for c in (*before, *whole) if c]
    for parent in (place.work, place.unpushed):
        for file in [f for name in CONFIGS for f in parent.rglob(name)]:
            held = content_of(file.parent)
            loads = {
                held[name] for name in held if "/" not in name and name.endswith(".safetensors")
            }
            if not any(loads <= files for files in complete):
                raise WrongError(f"{scenario.name}: {file.parent} loads and is not whole")


def _different(found: Result, whole: Result) -> set[str]:
    """Paths that only one of two results has, or whose bytes differ."""
    pairs = [
        (one or {}, other or {}) for one, other in zip(found, whole, strict=True) if one != other
    ]
    return {path for one, other in pairs for path, _ in one.items() ^ other.items()}


def finish(
    place: Place, scenario: Scenario, tally: Tally, whole: Result, again: Callable[[], bool]
) -> None:
    """Run a killed command until it ends, and compare its result."""
    while True:
        if scenario.repo_id is None and place.there(scenario) == whole:
            # The run was complete; whatever is left beside the folder has no further use.
            return
        done = place.finished_weights()
        if not again():
            tally.kills += 1
        else:
            said = re.search(r"(\d+) of \d+ weights are done", place.log())
            if said and done:
                tally.resumed += 1
                if int(said[1]) < done:
                    raise WrongError(f"{scenario.name}: {done} weights were finished: {said[0]}")
            break
    if (found := place.there(scenario)) != whole:
        files = ", ".join(sorted(_different(found, whole)))
        raise WrongError(f"{scenario.name}: other bytes than those of an undisturbed run: {files}")

    left = sorted(path.name for path in place.work.iterdir() if path.name != "out")
    left += [str(path) for path in place.unpushed.rglob("*") if path.is_file()]
    if left:
        raise WrongError(f"{scenario.name}: left over: {left}")


def main() -> None:
    """Kill, check, run again; print a table; exit 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=200, help="at random times [default: 200]")
    parser.add_argument("--every", type=int, default=1, help="of so many steps kill at one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="NAME", action="append", help="scenarios; repeatable")
    parser.add_argument("--disks", action="store_true", help="full, small and read-only ones")
    arguments = parser.parse_args()
    mounts = arguments.disks and disks.in_namespace()
    if arguments.disks and not mounts:
        print("Nothing can be mounted here: no small and no read-only disks.", file=sys.stderr)
    sys.path.insert(0, str(TESTS))
    chance = random.Random(arguments.seed)
    with ExitStack() as stack:
        place = prepared(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        stack.callback(place.hub.stop)
        stack.callback(place.zygote.close)
        if mounts:
            stack.enter_context(disks.mounted(place.work))
        scenarios = [s for s in scenarios_of(place) if s.name in (arguments.only or [s.name])]
        what = "bad disks" if arguments.disks else "kills"
        print(f"| | steps | {what} | resumed | wrong |\n|---|---:|---:|---:|---:|")
        failed = False
        for scenario in scenarios:
            if arguments.disks and scenario.repo_id:
                continue
            kills = 0 if arguments.disks else arguments.kills // len(scenarios)
            tally, steps = tried(
                place, scenario, chance, kills, arguments.every, bad_disks=arguments.disks
            )
            failed |= bool(tally.wrong)
            print(
                f"| {scenario.name} | {steps} | {tally.kills} | {tally.resumed}"
                f" | {len(tally.wrong)} |",
                flush=True,
            )
            for line in tally.wrong[:5]:
                print(line, file=sys.stderr)
    sys.exit(failed)


def prepared(root: Path) -> Place:
    """Make tiny checkpoints, a Hub and the process that runs the commands."""
    from hub import Hub

    hub = Hub()
    hub.start()
    environment = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(root / "home"),
        "HF_TOKEN": "hf_write",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "2",
    }
    os.environ.update(environment)
    import clips  # type: ignore[import-not-found]

    clips.make_base(root / "base")
    for seed, kind in enumerate(("vision", "full"), start=1):
        clips.make_fine_tune(root / "base", root / kind, seed, kind)
    place = Place(root, hub, Zygote(environment))
    place.work.mkdir()
    base = ("--base-model", str(root / "base"))
    place.run(("compress", str(root / "full"), *base, "-o", str(root / "factors")))
    place.run(("merge", str(root / "vision"), str(root / "full"), *base, "-o", str(root / "done")))
    return place


def scenarios_of(place: Place) -> list[Scenario]:
    """Scenarios to kill."""
    vision, full = str(place.root / "vision"), str(place.root / "full")
    base = ("--base-model", str(place.root / "base"))
    merge = ("merge", vision, full, *base)
    to = ("-o", "OUT")
    return [
        Scenario("merge", (*merge, "--max-shard-size", "40KB", *to)),
        Scenario("merge, replacing", (*merge, *to, "--force"), (*merge, "--alpha", "0.5", *to)),
        Scenario("merge, masks", (*merge, "--method", "tall-mask", *to)),
        Scenario("merge, pushed", (*merge, "--push-to", "me/x"), repo_id="me/x"),
        Scenario(
            "merge, pushed again",
            (*merge, "--push-to", "me/x"),
            (*merge, "--alpha", "0.5", "--push-to", "me/x"),
            "me/x",
        ),
        Scenario("compress", ("compress", full, *base, *to)),
        Scenario("compress, adapter", ("compress", full, *base, "--out-format", "peft", *to)),
        Scenario(
            "compress, pushed", ("compress", full, *base, "--push-to", "me/x"), repo_id="me/x"
        ),
        Scenario("reconstruct", ("reconstruct", str(place.root / "factors"), *base, *to)),
        Scenario("route", ("route", str(place.root / "factors"), vision, *base, *to)),
        Scenario("push", ("push", str(place.root / "done"), "me/x"), repo_id="me/x"),
    ]


def tried(
    place: Place,
    scenario: Scenario,
    chance: random.Random,
    kills: int,
    every: int,
    *,
    bad_disks: bool = False,
) -> tuple[Tally, int]:
    """Kill a scenario at steps and at random times, or run it on bad disks."""
    tally = Tally()
    place.clean(scenario)
    before = place.there(scenario)
    started = time.monotonic()
    place.run(scenario.arguments)
    seconds = time.monotonic() - started
    whole = place.there(scenario)
    steps = int((place.root / "steps").read_text())
    assert steps < MOST_STEPS, steps

    def once(run: Callable[[], bool], again: Callable[[], bool]) -> bool:
        place.clean(scenario)
        ended = True
        try:
            ended = run()
            check(place, scenario, before, whole)
            if not ended:
                tally.kills += 1
                finish(place, scenario, tally, whole, again)
        except WrongError as error:
            tally.wrong.append(str(error))
        return ended

    def to_the_end() -> bool:
        return place.run(scenario.arguments)

    def run_until(step: int) -> bool:
        if bad_disks:
            return place.run_on_a_bad_disk(scenario.arguments, step)
        return place.run(scenario.arguments, step=step)

    def run_on(option: str) -> bool:
        with disks.changed(place.work, option):
            return place.run_on_a_bad_disk(scenario.arguments)

    def perhaps_killed() -> bool:
        delay = chance.choice((0.0, chance.uniform(0, seconds)))
        ended = place.run(scenario.arguments, seconds=delay)
        check(place, scenario, before, whole)
        return ended

    for step in range(1 + chance.randrange(every), steps + 1, every):
        once(lambda: run_until(step), to_the_end)  # noqa: B023
    for _ in range(kills):
        delay = chance.uniform(0, seconds)
        once(lambda: place.run(scenario.arguments, seconds=delay), perhaps_killed)  # noqa: B023
    if os.path.ismount(place.work):
        once(lambda: run_on("ro"), to_the_end)
        place.clean(scenario)
        size = disks.used(place.work)
        while True:
            size += 4096 * every
            if once(lambda: run_on(f"size={size}"), to_the_end):  # noqa: B023
                break
    return tally, steps


if __name__ == "__main__":
    main()
