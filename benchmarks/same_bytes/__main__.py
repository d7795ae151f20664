"""Run the commands by both checkouts, compare, print."""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import same_bytes
from benchmarks.same_bytes.commands import Command, all_commands, selected
from benchmarks.same_bytes.compare import compared
from benchmarks.same_bytes.sides import (
    CHECKOUT,
    BrokenError,
    Side,
    at_work,
    carried_out,
    make_inputs,
)

HOME = Command("home/hf-tsv", ())
"""Not a command but what all of them have left beside the Hub client's cache."""


def main() -> None:
    """Compare; exit 1 if anything differs."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.same_bytes",
        description=(same_bytes.__doc__ or "").splitlines()[0],
    )
    parser.add_argument("before", type=Path, nargs="?", help="checkout to compare with")
    parser.add_argument("after", type=Path, nargs="?", default=CHECKOUT, help="[default: this one]")
    parser.add_argument("--only", metavar="GLOB", action="append", help="commands; repeatable")
    parser.add_argument("--list", action="store_true", help="show the commands and end")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="new; keeps all outputs")
    arguments = parser.parse_args()
    globs = arguments.only or ["*"]
    every = all_commands()
    chosen = {c.name for c in every if any(fnmatch.fnmatch(c.name, glob) for glob in globs)}
    commands = selected(every, chosen)
    if arguments.list:
        for command in commands:
            launcher = f"torchrun {command.processes}: " if command.processes else ""
            killed = f"killed after {command.kill_after}: " if command.kill_after else ""
            words = "a program" if command.words[0] == "-c" else " ".join(command.words)
            print(f"{command.name:<24} {launcher}{killed}{words}")
        return
    if arguments.before is None or not commands:
        parser.error("name the checkout to compare with, and commands that there are")
    checkouts = (arguments.before.resolve(), arguments.after.resolve())
    with ExitStack() as stack:
        if arguments.keep:
            root = arguments.keep.resolve()
            root.mkdir(parents=True)
        else:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        started = time.monotonic()
        results = list(run(root, checkouts, commands))
        seconds = time.monotonic() - started
    wrong = [result["name"] for result in results if result["outcome"] != "same"]
    print(
        f"{len(commands)} commands, {len(wrong)} different ({seconds:.0f} s)"
        + (f": {', '.join(wrong)}" if wrong else "")
    )
    if arguments.json:
        names = {"before": str(checkouts[0]), "after": str(checkouts[1])}
        text = json.dumps({**names, "seconds": round(seconds, 1), "commands": results}, indent=1)
        arguments.json.write_text(text + "\n")
    sys.exit(bool(wrong))


def run(
    root: Path, checkouts: tuple[Path, Path], commands: Sequence[Command]
) -> Iterator[dict[str, Any]]:
    """Run both sides at once; print and give what is found of each command as soon as it is."""
    print("making inputs", file=sys.stderr)
    make_inputs(root / "inputs", checkouts[0])
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(2))
        sides = [
            stack.enter_context(at_work(checkout, root / name, root / "inputs"))
            for checkout, name in zip(checkouts, ("side-1", "side-2"), strict=True)
        ]
        for number, command in enumerate((*commands, HOME), start=1):
            print(f"{number}/{len(commands) + 1} {command.name}", file=sys.stderr)
            began = time.monotonic()
            codes = [0, 0] if command is HOME else list(pool.map(attempt, sides, [command] * 2))
            result = judged(command, sides, codes)
            print(line_of(result), flush=True)
            yield {**result, "seconds": round(time.monotonic() - began, 2)}


def line_of(result: dict[str, Any]) -> str:
    """What is printed of a command."""
    found = result["differences"]
    told = f"{result['files']:>3} files, {result['bytes']:>9,} bytes"
    if found:
        told = found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")
    return f"{result['name']:<24} {result['outcome']:<10} {told}"


def attempt(side: Side, command: Command) -> int | str:
    """The exit code of a command, or why there is none that counts."""
    try:
        return carried_out(side, command)
    except (BrokenError, subprocess.TimeoutExpired) as error:
        return str(error)


def judged(command: Command, sides: Sequence[Side], codes: Sequence[int | str]) -> dict[str, Any]:
    """What is found of a command that both sides have run."""
    folders = [side.folder(command) for side in sides]
    roots = (sides[0].root, sides[1].root)
    found: list[str] = []
    if codes[0] != codes[1]:
        found.append(f"exit code: {codes[0]} / {codes[1]}")
    found += map(str, compared(folders[0], folders[1], roots))
    if command.like:
        for side, when in zip(sides, ("before", "after"), strict=True):
            other, own = side.root / command.like / "out", side.folder(command) / "out"
            found += [
                f"{when}, beside {command.like}: {difference}"
                for difference in compared(other, own, roots)
                if Path(difference.file).name != "README.md"
            ]
    outcome = "DIFFERENT" if found else "same"
    if codes[0] != command.code:
        outcome = "BROKEN"
        said = folders[0] / "stderr"
        lines = said.read_text(errors="replace").strip().splitlines() if said.exists() else []
        found.insert(0, f"ended with {codes[0]}: {lines[-1] if lines else ''}")
    files = [path for path in folders[1].rglob("*") if path.is_file()]
    return {
        "name": command.name, "outcome": outcome, "differences": found, "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
    }  # fmt: skip


if __name__ == "__main__":
    main()
