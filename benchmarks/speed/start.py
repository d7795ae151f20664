"""Time from the start of a command to its end, where there is next to nothing to compute.

`python -m benchmarks.speed.start` runs commands on two towers of 1 MB in turn, beside
`import torch` and `hf version` as measures of the machine, and writes the seconds to
`benchmarks/speed/results/start.json`, with the packages whose import takes longest.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed import machine, synthetic
from benchmarks.speed.processes import OFFLINE, ROOT
from benchmarks.speed.synthetic import Zoo

RESULTS = Path(__file__).parent / "results"
PROGRAM = [sys.executable, "-m", "hf_tsv"]
TORCH = "import torch"
IMPORT = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)")
SHOWN = 8  # packages


def commands(zoo: Zoo, out: Path) -> dict[str, list[str]]:
    """Commands by the name that the table gives them; their outputs are in a folder."""
    base, tasks = ["--base-model", str(zoo.base)], [str(task) for task in zoo.tasks]
    named = {
        "--help": ["--help"],
        "merge, without an argument": ["merge"],
        "inspect": ["inspect", tasks[0]],
        "merge --dry-run": ["merge", *tasks, *base, "--dry-run"],
        "merge": ["merge", *tasks, *base, "-o", str(out / "merged")],
        "compress": ["compress", tasks[0], *base, "-o", str(out / "compressed")],
    }
    return {
        TORCH: [sys.executable, "-c", TORCH],
        "hf version": [str(Path(sys.executable).with_name("hf")), "version"],
        **{f"hf-tsv {name}": [*PROGRAM, *words] for name, words in named.items()},
    }


def run(command: Sequence[str], compiled: Path, codes: Sequence[int] = (0, 2)) -> tuple[float, str]:
    """Seconds of a command, and what it says on stderr; 2 is the code of a usage error."""
    started = time.perf_counter()
    environment = {**os.environ, **OFFLINE, "PYTHONPYCACHEPREFIX": str(compiled)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # everything is compiled, as once installed
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode not in codes:
        raise RuntimeError(done.stderr)
    return seconds, done.stderr


def imports(said: str) -> dict[str, float]:
    """Seconds of the packages whose import takes longest, of the output of `-X importtime`."""
    spent: Counter[str] = Counter()
    for microseconds, name in IMPORT.findall(said):
        spent[name.partition(".")[0]] += int(microseconds)
    return {name: round(total / 1e6, 3) for name, total in spent.most_common(SHOWN)}


def measured(zoo: Zoo, rounds: int, out: Path) -> dict[str, Any]:
    """Seconds of every command in each round, and the costs of its imports in one run more."""
    chosen, compiled = commands(zoo, out), out.with_name("compiled")
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for number in range(rounds + 1):  # the first one compiles, and fills the memory of the disk
        for name, command in chosen.items():
            shutil.rmtree(out, ignore_errors=True)
            spent, _ = run(command, compiled)
            if number:
                seconds[name].append(round(spent, 3))
    costs = {}
    for name, command in chosen.items():
        if command[0] == sys.executable:
            shutil.rmtree(out, ignore_errors=True)
            costs[name] = imports(run([command[0], "-X", "importtime", *command[1:]], compiled)[1])
    shutil.rmtree(out, ignore_errors=True)
    return {
        name: {
            "seconds": spent,
            "median": round(median(spent), 2),
            "to torch": [round(a / b, 3) for a, b in zip(spent, seconds[TORCH], strict=True)],
            "imports": costs.get(name, {}),
        }
        for name, spent in seconds.items()
    }


def rows(found: dict[str, Any]) -> list[str]:
    """Rows of the table in `docs/benchmarks.md`."""
    lines = []
    for name, row in found.items():
        spent, share = row["seconds"], row["to torch"]
        cells = (
            f"`{name}`",
            f"{row['median']:.2f} ({min(spent):.2f} … {max(spent):.2f}) s",
            f"{median(share):.2f} ×",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7, help="of all commands in turn")
    parser.add_argument("--cache", type=Path, default=synthetic.CACHE, help="for checkpoints")
    chosen = parser.parse_args()
    zoo = synthetic.checkpoints("tiny", 2, 2, folder=chosen.cache)
    facts = machine.facts([], "cpu") | {"command": "python -m benchmarks.speed.start"}
    facts["load"] = round(os.getloadavg()[0], 1)
    found = measured(zoo, chosen.rounds, chosen.cache / "start")
    text = json.dumps({"facts": facts, "commands": found}, indent=1) + "\n"
    (RESULTS / "start.json").write_text(text, encoding="utf-8")
    print("\n".join(rows(found)))


if __name__ == "__main__":
    main()
