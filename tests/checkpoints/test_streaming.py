"""Merging straight from the Hub: by range, ahead and side by side, without a copy on disk."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clips
import pytest
import torch
from adapters import trained
from cli import hf_tsv as run
from deep import deep_checkpoints
from ends import ends, ranks
from forks import fork
from home import HF_HOME
from hub import Hub
from safetensors.torch import load_file

import hf_tsv
from benchmarks.speed import processes
from benchmarks.streaming import tensor_bytes, watched
from hf_tsv.checkpoints import sources
from hf_tsv.checkpoints.storage import ahead
from hf_tsv.checkpoints.storage.ahead import AHEAD_BYTES, AheadFiles, Connections
from hf_tsv.hub import client as client_module
from hf_tsv.hub import snapshot
from hf_tsv.system.errors import RepoError

SIZE = 3_000_000
CONTENT = random.Random(0).randbytes(SIZE)


@pytest.fixture
def files(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[AheadFiles]:
    """Two files of a repository; of 100 kB that wait, in pieces of 50 kB."""
    monkeypatch.setattr(ahead, "SMALLEST_PIECE", 10_000)
    hub.add_repo("org/model", {"a.safetensors": CONTENT, "b.safetensors": CONTENT[::-1]})
    repo = snapshot("org/model", None)
    hub.requests.clear()
    found = AheadFiles(repo, "", Connections(), 100_000)
    yield found
    found.close()
    hub.reset()
    for thread in threading.enumerate():
        if thread.name == "hf-tsv-fetch":  # a last request would count in the next test
            thread.join()


def read(files: AheadFiles, name: str, start: int, length: int) -> bytes:
    buffer = bytearray(length)
    files.read_into(name, start, memoryview(buffer))
    return bytes(buffer)


# Fetching ahead


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_expected_and_read_the_bytes_are_right(files: AheadFiles, seed: int) -> None:
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(SIZE), 40))
    spans = [
        (rng.choice(["a.safetensors", "b.safetensors"]), start, stop - start)
        for start, stop in zip(cuts[::2], cuts[1::2], strict=True)
    ]
    spans += rng.sample(spans, 3)
    files.expect(spans)
    asked = [span for span in spans if rng.random() < 0.8]
    asked += [("a.safetensors", rng.randrange(SIZE - 9), 9) for _ in range(3)]
    if seed % 2:
        rng.shuffle(asked)
    for name, start, length in asked:
        whole = CONTENT if name[0] == "a" else CONTENT[::-1]
        assert read(files, name, start, length) == whole[start : start + length]


def test_each_byte_is_fetched_once_and_no_other(hub: Hub, files: AheadFiles) -> None:
    spans = [("a.safetensors", at, 1000) for at in range(0, 200_000, 1000)]  # small: together
    spans += [("a.safetensors", 500_000, 300_000), ("b.safetensors", 7, 70_000)]  # large: apart
    files.expect(spans)
    for name, start, length in spans:
        whole = CONTENT if name[0] == "a" else CONTENT[::-1]
        assert read(files, name, start, length) == whole[start : start + length]
    assert hub.sent() == 570_000
    assert len([r for r in hub.requests if r.origin == "cdn"]) == 4 + 6 + 2


def test_what_waits_to_be_read_is_bounded(hub: Hub, files: AheadFiles) -> None:
    files.expect([("a.safetensors", 0, SIZE)])
    time.sleep(0.5)
    assert 50_000 <= hub.sent() <= 100_000
    assert read(files, "a.safetensors", 0, 120_000) == CONTENT[:120_000]
    time.sleep(0.5)
    assert hub.sent() <= 250_000


def test_several_requests_are_under_way_at_a_time(hub: Hub, files: AheadFiles) -> None:
    hub.fail("a.safetensors", delay=0.5, truncate=SIZE, times=2)
    files.expect([("a.safetensors", 0, 100_000)])
    time.sleep(0.3)
    assert len([r for r in hub.requests if r.origin == "cdn"]) == 2 and hub.sent() == 0


def test_bytes_that_were_skipped_do_not_pile_up(hub: Hub, files: AheadFiles) -> None:
    spans = [("a.safetensors", at, 50_000) for at in range(0, 2_000_000, 100_000)]
    files.expect(spans)
    for name, start, length in spans[::5]:
        assert read(files, name, start, length) == CONTENT[start : start + length]
    assert hub.sent() < 50_000 * 15


def test_small_gaps_are_fetched_along(hub: Hub, files: AheadFiles) -> None:
    """As between the tensors of a pickle, which begin at multiples of 64."""
    spans = [("a.safetensors", at, 900) for at in range(0, 40_000, 1000)]
    files.expect([spans[0], ("a.safetensors", 900, 0), *spans[1:]])  # one has no bytes
    for name, start, length in spans:
        assert read(files, name, start, length) == CONTENT[start : start + length]
    assert len([r for r in hub.requests if r.origin == "cdn"]) == 1
    assert hub.sent() == 39_900


def test_whoever_waits_is_told_when_it_is_over(hub: Hub, files: AheadFiles) -> None:
    hub.fail("a.safetensors", delay=5, truncate=SIZE, times=9)
    files.expect([("a.safetensors", 0, 200_000)])
    for start in (0, 2_000_000):  # what was expected, and what was not
        threading.Timer(0.3, files.close).start()
        began = time.monotonic()
        with pytest.raises(RepoError, match="no longer being read"):
            read(files, "a.safetensors", start, 10)
        assert time.monotonic() - began < 4  # and not the five seconds of the answer
        files._closed = False


def test_threads_end_with_the_files(hub: Hub, files: AheadFiles) -> None:
    files.expect([("a.safetensors", 0, 200_000)])
    read(files, "a.safetensors", 0, 10)
    assert fetching() >= 8
    files.close()
    limit = time.monotonic() + 20
    while fetching() and time.monotonic() < limit:
        time.sleep(0.01)
    assert fetching() == 0


def fetching() -> int:
    return sum(thread.name == "hf-tsv-fetch" for thread in threading.enumerate())


def test_a_failure_is_told_to_who_reads(hub: Hub, files: AheadFiles) -> None:
    hub.fail("a.safetensors", status=404, times=9)
    files.expect([("a.safetensors", 0, 200_000)])
    with pytest.raises(RepoError, match="org/model"):
        read(files, "a.safetensors", 0, 10)


# Merging


def test_every_kind_of_input_gives_the_same_bytes(hub: Hub, zoo: Path, tmp_path: Path) -> None:
    """Whole, flat and full checkpoints, a pickle, an adapter, factors, a folder, all at once."""
    hub.add_repo("org/base", zoo / "base")
    for kind in ("vision", "full"):
        hub.add_repo(f"org/{kind}", zoo / kind)
    torch.save(load_file(zoo / "flat" / "model.safetensors"), tmp_path / "pytorch_model.bin")
    config = zoo / "flat" / "config.json"
    hub.add_repo("org/old", {"x/pytorch_model.bin": tmp_path / "pytorch_model.bin",
                             "x/config.json": config})  # fmt: skip
    trained(zoo, tmp_path / "lora", "dora")
    hub.add_repo("org/lora", tmp_path / "lora")
    hf_tsv.compress(zoo / "projection", base_model=zoo / "base", output=tmp_path / "factors")
    hub.add_repo("org/factors", tmp_path / "factors")
    tasks = ["org/vision", "org/full", "org/old/x", "org/lora", "org/factors", zoo / "flat"]
    words = ["merge", *tasks, "--base-model", "org/base"]
    streamed = run(*words, "--stream", "-o", tmp_path / "a")
    assert streamed.code == 0, streamed.err
    assert weights_on_disk(Path(HF_HOME)) == []
    plain = run(*words, "-o", tmp_path / "b")
    assert plain.code == 0, plain.err
    for name in ("model.safetensors", "config.json", "hf_tsv_recipe.yaml", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def weights_on_disk(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size > 20_000]


@pytest.mark.parametrize("verb", ["compress", "interference", "reconstruct"])
def test_other_verbs_stream_too(world: Path, hub: Hub, zoo: Path, verb: str) -> None:
    hf_tsv.compress(zoo / "vision", base_model="org/base", output=world / "factors")
    hub.add_repo("org/factors", world / "factors")
    words = {
        "compress": ["org/vision", "-o", "a"],
        "interference": ["org/vision", "org/full", "-o", "a"],
        "reconstruct": ["org/factors", "-o", "a"],
    }[verb]
    clear_cache()
    done = run(verb, *words, "--stream", cwd=world)
    assert done.code == 0, done.err
    assert weights_on_disk(Path(HF_HOME)) == []
    plain = run(verb, *words[:-1], "b", cwd=world)
    assert plain.code == 0, plain.err
    for file in (world / "a").glob("*.safetensors"):
        assert file.read_bytes() == (world / "b" / file.name).read_bytes()
    if verb == "interference":
        a, b = (json.loads((world / n / "interference.json").read_text()) for n in "ab")
        assert a["weights"] == b["weights"]


def clear_cache() -> None:
    import shutil

    shutil.rmtree(Path(HF_HOME, "hub"), ignore_errors=True)


def test_what_the_cache_has_is_not_fetched(world: Path, hub: Hub) -> None:
    assert run("merge", "org/vision", "org/full", "-o", "a", cwd=world).code == 0
    hub.requests.clear()
    done = run("merge", "org/vision", "org/full", "org/flat", "--stream", "-o", "b", cwd=world)
    assert done.code == 0, done.err
    size = hub.repos["org/flat"].resolve("main").files["model.safetensors"].size
    assert hub.sent("/org/flat/.*safetensors") > 1.5 * size  # the header comes with more
    for name in ("vision", "full", "base"):
        assert hub.sent(f"/org/{name}/.*safetensors") <= 100_000


def test_the_plan_says_how_much_will_be_fetched(world: Path, hub: Hub, zoo: Path) -> None:
    words = ["merge", "org/vision", "org/full", "--dry-run", "--json"]
    whole = run(*words, cwd=world).json
    part = run(*words, "--stream", cwd=world).json
    sizes = [
        tensor.nbytes
        for name in ("base", "vision", "full")
        for tensor in load_file(zoo / name / "model.safetensors").values()
    ]
    assert part["download_bytes"] == sum(sizes) < whole["download_bytes"]
    assert part["peak_memory_bytes"] == whole["peak_memory_bytes"] + AHEAD_BYTES


def test_a_private_repository_and_its_storage(hub: Hub, zoo: Path, tmp_path: Path) -> None:
    """The storage answers 400 to any request with a token."""
    hub.add_repo("org/base", zoo / "base", private=True)
    hub.add_repo("org/vision", zoo / "vision", private=True)
    words = ["merge", "org/vision", "--base-model", "org/base", "--stream", "-o", tmp_path / "m"]
    done = run(*words, "--token", "hf_write", HF_TOKEN=None)
    assert done.code == 0, done.err
    cdn = [r for r in hub.requests if r.origin == "cdn"]
    assert len(cdn) > 4 and not any("authorization" in r.headers for r in cdn)
    api = [r for r in hub.requests if r.origin == "api" and "/resolve/" in r.path]
    assert api and all(r.headers["authorization"] == "Bearer hf_write" for r in api)


AT_ONCE = {"Retry-After": "0"}


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 503, "headers": AT_ONCE},
        {"status": 429, "headers": AT_ONCE},
        {"drop_after": 500},
        {"truncate": 300},
        {"ignore_range": True},
        {"truncate": SIZE, "headers": {"Content-Range": "bytes 3-4/5"}},
    ],
)
def test_faults_that_pass_change_nothing(
    deep: Hub, undisturbed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    fault: dict[str, Any],
) -> None:  # fmt: skip
    monkeypatch.setattr(client_module, "RETRY_WAITS", (0.0,) * 4)
    for _ in range(4):  # one request may meet all
        deep.fail("safetensors", times=1, **fault)
    streamed(tmp_path / "m")
    assert not deep._faults[-1].times
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == undisturbed


def streamed(output: Path) -> None:
    """The mean of two fine-tunes: all is read, and nothing decomposed."""
    hf_tsv.merge(["org/t1", "org/t2"], base_model="org/base", output=output, stream=True,
                 method="average")  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two fine-tunes of 13 MB each."""
    folder = tmp_path_factory.mktemp("deep")
    deep_checkpoints(folder, 4)
    return folder


@pytest.fixture(scope="module")
def undisturbed(checkpoints: Path) -> bytes:
    """What the same merge makes of folders."""
    base, *tasks = (checkpoints / name for name in ("base", "t1", "t2"))
    hf_tsv.merge(tasks, base_model=base, output=checkpoints / "m", method="average")
    return (checkpoints / "m" / "model.safetensors").read_bytes()


@pytest.fixture
def deep(hub: Hub, checkpoints: Path) -> Hub:
    """The same on the Hub."""
    for name in ("base", "t1", "t2"):
        hub.add_repo(f"org/{name}", checkpoints / name)
    return hub


def test_a_storage_that_is_gone_ends_the_merge_and_it_goes_on_later(
    deep: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "RETRY_WAITS", (0.0,) * 4)

    def merge(name: str) -> None:
        deep.requests.clear()
        hf_tsv.merge(["org/t1", "org/t2"], base_model="org/base", output=tmp_path / name,
                     stream=True)  # fmt: skip

    merge("a")
    fetched = deep.sent("safetensors")
    assert fetched > 37e6
    deep.requests.clear()
    monkeypatch.setattr(sources, "AHEAD_BYTES", 1_500_000)  # so that it takes its time
    failing = threading.Thread(target=fail_after, args=(deep, 15_000_000))
    failing.start()
    with pytest.raises(RepoError, match="answered 503"):
        merge("b")
    failing.join()
    assert not (tmp_path / "b").exists()
    assert (tmp_path / ".b.hf-tsv" / "done.0.jsonl").read_text()
    deep._faults.clear()
    merge("b")
    a, b = (tmp_path / name / "model.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()
    assert deep.sent("safetensors") < 0.9 * fetched


def fail_after(hub: Hub, amount: int) -> None:
    """Let the storage fail for good once so many bytes were sent."""
    limit = time.monotonic() + 30
    while hub.sent() < amount and time.monotonic() < limit:
        time.sleep(0.001)
    hub.fail("safetensors", status=503, times=10**6)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_merge_that_waits_for_the_hub(
    deep: Hub, tmp_path: Path, kind: signal.Signals
) -> None:
    before = 3  # its header, a weight to see that it is not the base, one that it is a fine-tune
    deep.fail("/org/t1/.*safetensors", delay=60, truncate=10**9, times=99, after=before)
    words = ["merge", "org/t1", "org/t2", "--base-model", "org/base", "--stream", "-o", "m"]
    process = fork(*words, cwd=tmp_path)
    limit = time.monotonic() + 60
    while not deep.sent("/org/t2/") > 200_000:
        assert time.monotonic() < limit, "no weights are read"
        time.sleep(0.02)
    process.send_signal(kind)
    _, err = process.communicate(timeout=8)  # an answer would take a minute
    assert process.returncode == 128 + kind, err
    assert "Traceback" not in err
    assert not (tmp_path / "m").exists()


def test_what_transformers_has_downloaded_is_not_fetched(world: Path, hub: Hub) -> None:
    """It leaves the card where it is."""
    from transformers import CLIPModel, CLIPVisionModel

    clips.load(CLIPVisionModel, "org/vision")
    clips.load(CLIPModel, "org/base")
    hub.requests.clear()
    done = run("merge", "org/vision", "--stream", "-o", "m", cwd=world)
    assert done.code == 0, done.err
    for name in ("vision", "base"):  # its header
        assert hub.sent(f"/org/{name}/.*safetensors") <= 100_000


def test_several_processes_stream_their_shares(world: Path, hub: Hub) -> None:
    words = ["merge", "org/vision", "org/full", "--stream", "-o"]
    done = run(*words, "one", cwd=world)
    assert done.code == 0, done.err
    assert [done.code for done in ends(ranks(*words, "two", count=2, cwd=world))] == [0, 0]
    one, two = (world / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


# How much it takes


VISION = {**clips.VISION, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 16,
          "num_attention_heads": 8}  # fmt: skip
TASKS = 3


@pytest.fixture
def large(hub: Hub, tmp_path: Path) -> Path:
    """A base and three fine-tunes of 50 MB in shards, on the Hub; an empty folder to work in."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(vision_config=VISION, text_config=clips.TEXT, projection_dim=24)
    torch.manual_seed(0)
    folder, model = tmp_path / "large", CLIPModel(config)
    for seed in range(TASKS + 1):  # each differs from the base, and from the one before
        generator = torch.Generator().manual_seed(seed)
        if seed:
            for parameter in model.vision_model.parameters():
                parameter.data += 1e-3 * torch.randn(parameter.shape, generator=generator)
        clips.save(model, folder / str(seed), max_shard_size="20MB")
        hub.add_repo(f"org/{seed}" if seed else "org/base", folder / str(seed))
    work = tmp_path / "work"
    work.mkdir()
    return work


def test_bytes_fetched_disk_and_memory_of_a_streamed_merge(large: Path, hub: Hub) -> None:
    folder = large.parent / "large"
    needed = sum(map(tensor_bytes, folder.iterdir()))
    assert needed > (TASKS + 1) * 50e6
    tasks = [f"org/{i}" for i in range(1, TASKS + 1)]
    quick = ["--exclude", "*.mlp.*", "--exclude", "*.[qkv]_proj.*"]  # read, but not decomposed
    words = ["hf_tsv", "merge", *tasks, "--base-model", "org/base", *quick, "-o"]
    clear_cache()
    hub.requests.clear()
    online = {"HF_HUB_OFFLINE": "0", "TMPDIR": str(large)}
    with watched(large, Path(HF_HOME)) as most:
        streamed = processes.run([*words, large / "streamed", "--stream"], online)
    fetched = sum(r.body_sent for r in hub.requests if r.origin == "cdn")
    assert abs(fetched / needed - 1) < 0.02, (fetched, needed)
    output = sum(file.stat().st_size for file in (large / "streamed").iterdir())
    assert most[0] < 1.02 * output + 1e6, (most, output)
    plain = processes.run([*words, large / "plain"], online)
    for file in (large / "plain").glob("model*"):
        assert file.read_bytes() == (large / "streamed" / file.name).read_bytes()
    assert streamed.peak_bytes < plain.peak_bytes + AHEAD_BYTES + 30e6, (streamed, plain)
