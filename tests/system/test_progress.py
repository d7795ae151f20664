"""Progress: the time that is left, lines in a log, bars on a terminal, and silence."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest
from hub import Hub

import hf_tsv as api
from hf_tsv.linalg.shapes import default_rank
from hf_tsv.merging.costs import steps
from hf_tsv.merging.plan import Weight
from hf_tsv.system.progress import Progress, bar

TASKS = 3

SECONDS = {
    (768, 768): 6.64, (3072, 768): 9.97, (768, 3072): 9.45,
    (512, 512): 2.09, (512, 2048): 3.23, (2048, 512): 3.05,
    (49408, 512): 30.03, (512, 768): 2.12, (50, 768): 0.62, (77, 512): 0.48,
    (768, 3, 32, 32): 0.74, (768,): 0.10, (512,): 0.07,
}  # fmt: skip
"""Mean seconds of a weight of each shape in a merge of three fine-tunes of ViT-B/32, as measured on
two busy cores; all other shapes took 0.01."""


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def vit_b_32() -> list[Weight]:
    """The work of a merge of fine-tunes of ViT-B/32, from the shapes of its weights."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in CLIPModel(CLIPConfig()).named_parameters()}
    whole = {"text_projection.weight"}
    return [
        Weight((name,), shape, "decomposed", rank=default_rank(shape, TASKS), inputs=(0, 1, 2))
        if len(shape) == 2 and name not in whole
        else Weight((name,), shape, "averaged", inputs=(0, 1, 2))
        for name, shape in sorted(shapes.items())
    ]


def test_the_time_left_is_right_from_a_tenth_of_the_way_on() -> None:
    weights, clock = vit_b_32(), Clock()
    assert len(weights) == 398
    seconds = [SECONDS.get(weight.shape, 0.01) for weight in weights]
    shown, whole, wrong = Progress("Merging", steps(weights), clock=clock), sum(seconds), []
    for spent in seconds:
        clock.now += spent
        shown.advance(1)
        gone = clock.now - 100
        if 0.1 * whole <= gone <= 0.99 * whole:
            assert shown.left is not None
            wrong.append(shown.left / (whole - gone))
    assert len(wrong) > 300 and min(wrong) > 0.75 and max(wrong) < 1.25


def test_the_time_left_runs_down_within_a_step() -> None:
    clock = Clock()
    shown = Progress("Merging", [("a", 1.0), ("b", 3.0)], clock=clock)
    assert str(shown) == "0/2 [0:00] a"  # nothing is known
    clock.now += 20
    shown.advance(1)
    assert (shown.left, str(shown)) == (60, "1/2 [0:20<1:00] b")
    clock.now += 45
    assert str(shown) == "1/2 [1:05<0:15] b"
    shown.advance(1)
    assert str(shown) == "2/2 [1:05]"


def test_bytes_and_more_of_them_than_were_known() -> None:
    clock = Clock()
    shown = Progress("Downloading", 3_000_000, in_bytes=True, clock=clock)
    clock.now += 3700
    shown.advance(1_500_000)
    assert str(shown) == "1.5 MB/3.0 MB [1:01:40<1:01:40]"
    shown.advance(2_000_000)
    assert shown.share == 1


def test_a_log_has_a_line_every_tenth_or_every_half_minute() -> None:
    clock = Clock()
    shown, said = Progress("Merging", 100, clock=clock), []
    for _ in range(100):
        clock.now += 2
        shown.advance(1)
        said += filter(None, [shown.line()])
    assert said[0] == "Merging: 10%, 10/100 [0:20<3:00]" and len(said) == 9
    shown, said = Progress("Merging", [("fc1", 1.0), ("fc2", 1.0)], clock=clock), []
    for _ in range(61):
        clock.now += 1
        said += filter(None, [shown.line()])
    assert said == ["Merging: 0%, 0/2 [0:30] fc1", "Merging: 0%, 0/2 [1:00] fc1"]
    shown, said = Progress("Merging", 1000, clock=clock), []
    for _ in range(1000):  # nobody needs ten lines on three seconds
        clock.now += 0.003
        shown.advance(1)
        said += filter(None, [shown.line()])
    assert said == []


def test_no_terminal_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("Merging", [("fc1", 1.0)]) as advance:
        advance(1)
    assert capsys.readouterr().err == ""


SHOWN = """
import time
from hf_tsv.system.progress import bar, logger
with bar("Merging", [("vision 3 mlp.fc1", 3.0), ("vision 3 mlp.fc2", 1.0)]) as advance:
    advance(1)
    logger.warning("Something is odd.")
    time.sleep(1.5)
    advance(1)
"""


def on_a_terminal(*words: str | Path) -> str:
    """Output of a Python program whose stderr is a terminal."""
    leader, follower = pty.openpty()
    fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ}
    environment.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    command = [sys.executable, *map(str, words)]
    with subprocess.Popen(
        command, stderr=follower, stdout=subprocess.DEVNULL, env=environment
    ) as running:
        os.close(follower)
        parts = []
        with suppress(OSError):  # the program is gone
            while part := os.read(leader, 4096):
                parts.append(part)
        assert running.wait(60) == 0, parts
    os.close(leader)
    return b"".join(parts).decode().replace("\r\n", "\n")


def test_a_terminal_has_a_bar_that_names_the_weight_and_messages_above_it() -> None:
    text = on_a_terminal("-c", SHOWN)
    assert "Merging:   0%|" in text and "0/2 [0:00] vision 3 mlp.fc1" in text
    assert re.search(r"75%\|[^|]+\| 1/2 \[0:0[1-9]<0:0\d\] vision 3 mlp.fc2", text)  # renewed
    lines = [line.split("\r")[-1].strip() for line in text.split("\n")]
    assert "Warning: Something is odd." in lines
    assert re.search(r"100%\|█+\| 2/2 \[0:0\d\]$", lines[-2])


def test_a_program_without_logging_sees_warnings_as_such() -> None:
    code = """
import logging, hf_tsv.system.progress as p
p.logger.warning("%s is odd.", "org/a")
p.logger.info("Not said.")
p.logger.setLevel("INFO")
p.logger.info("Base model: org/base.")
logging.basicConfig(format="mine %(message)s")
p.logger.warning("Twice?")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == "Warning: org/a is odd.\nBase model: org/base.\nmine Twice?\n"


def test_quiet_uploads_and_loading_say_nothing(hub: Hub, zoo: Path, tmp_path: Path) -> None:
    api.compress(zoo / "vision", base_model=zoo / "base", output=tmp_path / "f", progress=False)
    shown = on_a_terminal("-m", "hf_tsv", "push", tmp_path / "f", "me/f")
    assert "Uploading to me/f." in shown and "100%|" in shown
    code = f"""
import sys
import hf_tsv
from hf_tsv import cli
hf_tsv.push({str(tmp_path / "f")!r}, "me/silent", progress=False)
hf_tsv.load_model("me/silent", base_model={str(zoo / "base")!r}, progress=False)
from huggingface_hub import utils
from transformers.utils import logging
assert not utils.are_progress_bars_disabled() and logging.is_progress_bar_enabled()
utils.disable_progress_bars()
with hf_tsv.system.progress.others_silent():
    assert not logging.is_progress_bar_enabled()
assert utils.are_progress_bars_disabled() and logging.is_progress_bar_enabled()
utils.enable_progress_bars()
sys.argv = ["hf-tsv", "push", {str(tmp_path / "f")!r}, "me/quiet", "-q"]
cli.main()
"""
    assert on_a_terminal("-c", code) == ""
    assert hub.files("me/quiet").keys() == hub.files("me/silent").keys()
