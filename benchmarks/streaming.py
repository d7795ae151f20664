"""A merge straight from the Hub against one that downloads first: bytes, disk, memory, time.

`python -m benchmarks.streaming` puts eight checkpoints of a real size on a local Hub (that of the
tests, addressed by the real client), merges them both ways and prints a table. The Hub shares the
cores with the merge, and its network is as fast as memory, so the times hold for this machine only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.speed import processes, synthetic
from hf_tsv.checkpoints.storage.files import LocalFiles
from hf_tsv.checkpoints.storage.headers import read_header

if TYPE_CHECKING:
    from hub import Hub

TESTS = Path(__file__).parents[1] / "tests" / "support"


@contextmanager
def watched(*folders: Path) -> Iterator[list[int]]:
    """Measure the most bytes that files in these folders take, every 20 ms.

    Args:
        folders: folders, which may not exist yet.
    """
    most, done = [0], threading.Event()

    def look() -> None:
        while not done.is_set():
            total = 0
            for folder in folders:
                for file in folder.rglob("*"):
                    try:
                        total += file.lstat().st_blocks * 512 if file.is_file() else 0
                    except OSError:  # deleted meanwhile
                        continue
            most[0] = max(most[0], total)
            done.wait(0.02)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def tensor_bytes(folder: Path) -> int:
    """Size of all tensors of a checkpoint."""
    files = LocalFiles(folder)
    headers = [read_header(files, n, str(folder)) for n in files.names() if n.endswith("tensors")]
    return sum(info.nbytes for header in headers for info in header.values())


def started(zoo: synthetic.Zoo) -> Hub:
    """Start a Hub that has the base model and all fine-tunes."""
    sys.path.insert(0, str(TESTS))
    from hub import Hub

    hub = Hub()
    hub.start()
    hub.add_repo("org/base", zoo.base)
    for task in zoo.tasks:
        hub.add_repo(f"org/{task.name}", task)
    return hub


def main() -> None:
    """Merge both ways and print the cost of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=synthetic.MODELS, default="ViT-B/32")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--depth", type=int, help="layers [default: all]")
    arguments = parser.parse_args()
    layers = arguments.depth or synthetic.MODELS[arguments.model].layers
    zoo = synthetic.checkpoints(arguments.model, arguments.tasks, layers)
    needed = sum(tensor_bytes(folder) for folder in (zoo.base, *zoo.tasks))
    hub = started(zoo)
    tasks = [f"org/{task.name}" for task in zoo.tasks]
    written = {}
    print(
        f"{arguments.model}, {layers} layers, {len(tasks)} tasks: {needed / 1e6:.0f} MB of tensors"
    )
    print(
        "\n| | fetched / needed | peak disk | peak memory | wall time |\n|---|---:|---:|---:|---:|"
    )
    for name, flags in (("download", []), ("--stream", ["--stream"])):
        with tempfile.TemporaryDirectory(dir=synthetic.CACHE) as place:
            work = Path(place)
            environment = {
                "HF_ENDPOINT": hub.endpoint,
                "HF_HOME": str(work / "home"),
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
                "TMPDIR": place,
            }
            hub.requests.clear()
            command = ["hf_tsv", "merge", *tasks, "--base-model", "org/base", "-o", work / "merged"]
            with watched(work) as disk:
                took = processes.run([*command, *flags, "--json", "--quiet"], environment)
            fetched = sum(request.body_sent for request in hub.requests if request.origin == "cdn")
            kept = synthetic.CACHE / f"streaming-{os.getpid()}-{len(written)}"
            shutil.move(work / "merged" / "model.safetensors", kept)
            written[name] = kept
            print(
                f"| {name} | {fetched / needed:.4f} | {disk[0] / 1e6:.0f} MB"
                f" | {took.peak_bytes / 1e6:.0f} MB | {took.wall:.0f} s |",
                flush=True,
            )
    contents = [file.read_bytes() for file in written.values()]
    for file in written.values():
        file.unlink()
    print(f"\nThe bytes are {'the same' if contents[0] == contents[1] else 'DIFFERENT'}.")
    sys.exit(contents[0] != contents[1])


if __name__ == "__main__":
    main()
