"""Reading safetensors checkpoints: headers alone, every tensor as stored, no damage unnoticed."""

from __future__ import annotations

import json
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from clips import clip_config, load, make_base, save
from headers import FLOAT, INDEX_FILE, folder_of, opened, refused, safetensors
from hub import Hub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load as library_load
from safetensors.torch import load_file, save_file

from hf_tsv.checkpoints.names import SINGLE_FILE
from hf_tsv.checkpoints.storage.dtypes import DTYPES
from hf_tsv.checkpoints.storage.files import LocalFiles, inside_folder
from hf_tsv.checkpoints.storage.headers import FIRST_READ_BYTES
from hf_tsv.system.errors import CheckpointError

fuzz = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("reader") / "base")


@pytest.fixture(scope="module")
def sharded(base: Path) -> Path:
    """The same weights in several files and an index."""
    from transformers import CLIPModel

    return save(load(CLIPModel, base), base.with_name("sharded"), max_shard_size="60KB")


# What is there is read


def test_tensors_of_every_dtype_and_shape_are_read_as_they_were_saved(tmp_path: Path) -> None:
    saved = {
        f"{dtype}".lower(): torch.arange(6).reshape(2, 3).to(dtype.torch)
        for dtype in DTYPES.values()
    }
    saved |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "ä 層": torch.ones(1)}
    folder_of(tmp_path, {})
    save_file(saved, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    checkpoint = opened(tmp_path)
    assert set(checkpoint.tensors) == set(saved)
    for name, tensor in saved.items():
        found = checkpoint.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found, tensor)


def test_a_checkpoint_saved_by_transformers_is_read_without_loss(base: Path) -> None:
    expected = load_file(base / SINGLE_FILE)
    checkpoint = opened(base)
    assert checkpoint.weight_files == (SINGLE_FILE,)
    assert set(checkpoint.tensors) == set(expected)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in expected.items())


def test_shards_are_one_checkpoint(base: Path, sharded: Path) -> None:
    checkpoint, single = opened(sharded), opened(base)
    assert len(checkpoint.weight_files) > 3
    assert checkpoint.weight_files[-1] == INDEX_FILE
    assert set(checkpoint.tensors) == set(single.tensors)
    assert all(torch.equal(checkpoint.read(n), single.read(n)) for n in single.tensors)


def test_a_single_file_wins_over_an_index_as_in_transformers(tmp_path: Path) -> None:
    index = {"weight_map": {"old": "gone.safetensors"}}
    file = safetensors({"weight": FLOAT}, bytes(4))
    assert set(opened(folder_of(tmp_path, {SINGLE_FILE: file, INDEX_FILE: index})).tensors) == {
        "weight"
    }


def test_a_bfloat16_checkpoint_stays_bfloat16(tmp_path: Path) -> None:
    from transformers import CLIPModel

    save(CLIPModel(clip_config()).to(torch.bfloat16), tmp_path)
    dtypes = {info.dtype.torch for info in opened(tmp_path).tensors.values()}
    assert torch.bfloat16 in dtypes and torch.float32 not in dtypes


# Headers alone


@pytest.mark.parametrize("kind", ["base", "sharded"])
def test_a_repository_shows_the_same_headers_as_its_files(
    hub: Hub, request: pytest.FixtureRequest, kind: str
) -> None:
    folder = request.getfixturevalue(kind)
    hub.add_repo("org/model", folder)
    remote, local = opened("org/model"), opened(folder)
    assert remote.tensors == local.tensors
    assert remote.weight_files == local.weight_files
    assert remote.model_config == local.model_config
    name = "vision_model.post_layernorm.weight"
    assert torch.equal(remote.read(name), local.read(name))


def test_opening_a_repository_fetches_no_weights(hub: Hub, tmp_path: Path) -> None:
    folder_of(tmp_path, {})
    save_file({"weight": torch.ones(1000, 1000)}, tmp_path / SINGLE_FILE)
    hub.add_repo("org/model", tmp_path)
    checkpoint = opened("org/model")
    assert hub.sent("safetensors") == FIRST_READ_BYTES
    hub.requests.clear()
    checkpoint.read("weight")
    assert hub.sent("safetensors") == checkpoint.tensors["weight"].nbytes


def test_a_header_longer_than_the_first_read_is_fetched_in_two_parts(
    hub: Hub, tmp_path: Path
) -> None:
    saved = {f"{'very_long_name_' * 10}{n}": torch.full((100,), float(n)) for n in range(800)}
    folder_of(tmp_path, {})
    save_file(saved, tmp_path / SINGLE_FILE)
    hub.add_repo("org/model", tmp_path)
    remote = opened("org/model")
    header = 8 + int.from_bytes((tmp_path / SINGLE_FILE).read_bytes()[:8], "little")
    assert hub.sent("safetensors") == header > FIRST_READ_BYTES
    assert remote.tensors == opened(tmp_path).tensors


# Damage: one line that names the checkpoint and what is wrong


def offsets(**of: list[int]) -> dict[str, Any]:
    """Entries of float32 vectors that lie at these offsets."""
    return {
        name: {"dtype": "F32", "shape": [(stop - start) // 4], "data_offsets": [start, stop]}
        for name, (start, stop) in of.items()
    }


DAMAGED = {
    "empty file": (b"", "is empty"),
    "seven bytes": (b"\x01" * 7, "header is longer than the file"),
    "no header": (bytes(8), "not valid JSON"),
    "huge header": (safetensors({}, length=2**64 - 1), "header is longer than the file"),
    "header beyond the end": (safetensors({}, length=3), "header is longer than the file"),
    "not JSON": (safetensors(b"{weight: 1}"), "not valid JSON"),
    "not UTF-8": (safetensors(b'{"\xff": 1}'), "not valid JSON"),
    "UTF-16": (
        safetensors(json.dumps({"weight": FLOAT}).encode("utf-16"), bytes(4)),
        "not valid JSON",
    ),
    "lone surrogate": (
        safetensors(b'{"\\ud800": ' + json.dumps(FLOAT).encode() + b"}", bytes(4)),
        "",
    ),
    "list": (safetensors([FLOAT], bytes(4)), "not a JSON object"),
    "deeply nested": (safetensors(b"[" * 90_000 + b"]" * 90_000), "not valid JSON"),
    "same name twice": (
        safetensors(
            b'{"weight": %b, "weight": %b}' % (2 * (json.dumps(FLOAT).encode(),)), bytes(4)
        ),
        "not valid JSON",
    ),
    "no tensors": (safetensors({"__metadata__": {}}), "holds no tensors"),
    "overlap": (safetensors(offsets(a=[0, 8], b=[4, 12]), bytes(12)), "b does not start where"),
    "gap": (safetensors(offsets(a=[0, 4], b=[8, 12]), bytes(12)), "b does not start where"),
    "gap before": (safetensors(offsets(a=[4, 8]), bytes(8)), "a does not start where"),
    "same place": (safetensors(offsets(a=[0, 4], b=[0, 4]), bytes(4)), "does not start where"),
    "beyond the end": (safetensors(offsets(a=[0, 8]), bytes(4)), "truncated"),
    "bytes left over": (safetensors(offsets(a=[0, 4]), bytes(5)), "1 bytes follow"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_refused(tmp_path: Path, kind: str) -> None:
    content, reason = DAMAGED[kind]
    message = refused(folder_of(tmp_path, {SINGLE_FILE: content}))
    assert SINGLE_FILE in message
    assert reason in message


MALFORMED = {
    "no dtype": {"shape": [1], "data_offsets": [0, 4]},
    "no shape": {"dtype": "F32", "data_offsets": [0, 4]},
    "no offsets": {"dtype": "F32", "shape": [1]},
    "not an object": 3,
    "null": None,
    "text": "F32",
    "dtype is a list": {**FLOAT, "dtype": []},
    "dtype is an object": {**FLOAT, "dtype": {}},
    "shape is a number": {**FLOAT, "shape": 1},
    "shape is an object": {**FLOAT, "shape": {}},
    "shape is text": {**FLOAT, "shape": ""},
    "size is a float": {**FLOAT, "shape": [1.0]},
    "size is true": {**FLOAT, "shape": [True]},
    "size is null": {**FLOAT, "shape": [None]},
    "size is negative": {**FLOAT, "shape": [-1, -1]},
    "size is beyond 64 bits": {"dtype": "F32", "shape": [2**70, 0], "data_offsets": [0, 0]},
    "size overflows": {"dtype": "F32", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]},
    "offset is a float": {**FLOAT, "data_offsets": [0, 4.0]},
    "offset is false": {**FLOAT, "data_offsets": [False, 4]},
    "offset is negative": {**FLOAT, "data_offsets": [-4, 0]},
    "offsets are swapped": {**FLOAT, "data_offsets": [4, 0]},
    "three offsets": {**FLOAT, "data_offsets": [0, 4, 8]},
    "too few bytes": {**FLOAT, "shape": [2]},
    "too many bytes": {**FLOAT, "dtype": "F16"},
    "unknown dtype": {**FLOAT, "dtype": "F31"},
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_entry_is_refused_by_the_name_of_its_tensor(tmp_path: Path, kind: str) -> None:
    file = safetensors({"the.weight": MALFORMED[kind]}, bytes(4))
    assert "the.weight" in refused(folder_of(tmp_path, {SINGLE_FILE: file}))


def test_a_quantised_checkpoint_is_told_what_to_do(tmp_path: Path) -> None:
    entry = {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}
    folder_of(tmp_path, {SINGLE_FILE: safetensors({"weight": entry}, bytes(4))})
    with pytest.raises(CheckpointError, match=r"weight has dtype F8_E4M3.* Dequantise"):
        opened(tmp_path)


def test_a_truncated_download_is_refused(base: Path, tmp_path: Path) -> None:
    whole = (base / SINGLE_FILE).read_bytes()
    folder_of(tmp_path, {SINGLE_FILE: whole[:-1]})
    assert f"{len(whole)} bytes expected, {len(whole) - 1} found" in refused(tmp_path)


def test_a_file_that_shrinks_after_it_was_opened_gives_no_wrong_values(tmp_path: Path) -> None:
    folder_of(tmp_path, {SINGLE_FILE: safetensors({"weight": FLOAT}, bytes(4))})
    checkpoint = opened(tmp_path)
    with (tmp_path / SINGLE_FILE).open("r+b") as file:
        file.truncate(20)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        checkpoint.read("weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_that_are_not_finite_are_counted_and_named(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    weight = torch.ones(3, 4, dtype=dtype)
    weight[1, :2] = value
    folder_of(tmp_path, {})
    save_file({"fine": torch.ones(2), "the.weight": weight}, tmp_path / SINGLE_FILE)
    checkpoint = opened(tmp_path)
    assert checkpoint.read("fine").sum() == 2
    with pytest.raises(CheckpointError) as error:
        checkpoint.read("the.weight")
    assert f"{tmp_path}: 2 of 12 values of the.weight are NaN or Inf" in error.value.message


# The index


@pytest.mark.parametrize(
    "name",
    [
        "../other/model.safetensors",
        "a/../../model.safetensors",
        "..",
        "/etc/passwd",
        "\\\\server\\share",
        "..\\model.safetensors",
        "C:model.safetensors",
        "C:/model.safetensors",
        "",
        "a\0b",
        3,
        None,
        ["model.safetensors"],
    ],
)
def test_an_index_cannot_point_outside_its_folder(tmp_path: Path, name: Any) -> None:
    index = {"weight_map": {"weight": name}}
    (tmp_path / "model.safetensors").write_bytes(safetensors({"weight": FLOAT}, bytes(4)))
    message = refused(folder_of(tmp_path / "checkpoint", {INDEX_FILE: index}))
    assert f"points outside its folder: {name!r}" in message


@pytest.mark.parametrize("name", [".", "./", "sub/..", "sub", "n" * 300, "n/" * 3000, "\ud800"])
def test_an_index_that_names_no_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    refused(folder_of(tmp_path, {INDEX_FILE: {"weight_map": {"weight": name}}}))


@pytest.mark.parametrize(
    ("name", "inside"),
    [("model.safetensors", True), ("sub/model.safetensors", True), ("a..b", True), ("..", False)],
)
def test_what_counts_as_inside_a_folder(name: str, inside: bool) -> None:
    assert inside_folder(name) is inside


def test_a_missing_shard_is_named(tmp_path: Path, sharded: Path) -> None:
    shards = sorted(sharded.glob("model-*.safetensors"))
    for file in (*shards[1:], sharded / INDEX_FILE, sharded / "config.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert shards[0].name in refused(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    file = safetensors({"the.weight": FLOAT}, bytes(4))
    index = {"weight_map": {"the.weight": "1.safetensors", "other": "2.safetensors"}}
    folder_of(tmp_path, {INDEX_FILE: index, "1.safetensors": file, "2.safetensors": file})
    assert "the.weight is stored in two files" in refused(tmp_path)


def test_an_empty_shard_is_refused(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    first = safetensors({"a": FLOAT}, bytes(4))
    folder_of(
        tmp_path, {INDEX_FILE: index, "1.safetensors": first, "2.safetensors": safetensors({})}
    )
    assert "2.safetensors holds no tensors" in refused(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "named"),
    [
        ({"first": "1", "second": "2", "third": "2", "gone": "2"}, "gone"),
        ({"first": "1", "second": "1", "third": "2"}, "second"),
        ({"first": "1", "third": "2"}, "second"),
    ],
    ids=["names a tensor that is not there", "names another shard", "leaves a tensor out"],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(
    tmp_path: Path, weight_map: dict[str, str], named: str
) -> None:
    files = {
        "1": safetensors({"first": FLOAT}, bytes(4)),
        "2": safetensors(offsets(second=[0, 4], third=[4, 8]), bytes(8)),
    }
    message = refused(folder_of(tmp_path, {INDEX_FILE: {"weight_map": weight_map}, **files}))
    assert INDEX_FILE in message and named in message.partition(INDEX_FILE)[2]


@pytest.mark.parametrize("content", [{}, [], 3, None, {"weight_map": 3}, {"weight_map": {}}, b"{"])
def test_an_index_without_a_weight_map_is_refused(tmp_path: Path, content: Any) -> None:
    assert INDEX_FILE in refused(folder_of(tmp_path, {INDEX_FILE: content}))


def test_one_tensor_in_both_spellings_is_refused(tmp_path: Path) -> None:
    names = ("embeddings.class_embedding", "vision_model.embeddings.class_embedding")
    header = {name: {**FLOAT, "data_offsets": [4 * n, 4 * n + 4]} for n, name in enumerate(names)}
    files = {"config.json": {"model_type": "clip_vision_model"}}
    folder_of(tmp_path, {**files, SINGLE_FILE: safetensors(header, bytes(8))})
    assert f"{names[1]} is stored twice" in refused(tmp_path)


# What is no CLIP checkpoint at all


def test_a_folder_without_weights_is_told_what_to_name(tmp_path: Path) -> None:
    folder_of(tmp_path, {"optimizer.bin": b"", "scheduler.pt": b""})
    with pytest.raises(CheckpointError, match=r"no model\.safetensors.*weights of a model"):
        opened(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    assert "has no config.json" in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"3", b"[" * 100_000])
def test_a_damaged_config_is_refused(tmp_path: Path, content: bytes) -> None:
    assert "config.json" in refused(folder_of(tmp_path, {"config.json": content}))


@pytest.mark.parametrize("model_type", ["", None, 3, [], {}, ["clip"]])
def test_a_config_of_no_model_is_refused(tmp_path: Path, model_type: Any) -> None:
    message = refused(folder_of(tmp_path, {"config.json": {"model_type": model_type}}))
    assert f"not a model of transformers: its config.json says model_type {model_type!r}" in message


# Whatever the bytes: read, or refused with a CheckpointError


def read_everything(folder: Path) -> dict[str, torch.Tensor] | None:
    """All tensors, or None if the checkpoint is refused."""
    files: Any = None
    try:
        checkpoint = opened(folder)
        files = checkpoint.pinned.files
        return {name: checkpoint.read(name) for name in checkpoint.tensors}
    except CheckpointError as error:
        assert error.message
        return None
    finally:
        if isinstance(files, LocalFiles):
            files.close()


def check_against_library(folder: Path, content: bytes) -> None:
    """What is read is what the safetensors library reads; it may refuse no more than we do."""
    folder_of(folder, {SINGLE_FILE: content})
    found = read_everything(folder)
    if found is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = library_load(content)
        except SafetensorError as error:
            raise AssertionError(f"the library refuses it: {error}") from None
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {
        n: (t.dtype, t.shape) for n, t in expected.items()
    }
    assert all(torch.equal(found[name], expected[name]) for name in found)


@fuzz
@given(content=st.binary(max_size=200), length=st.none() | st.integers(0, 300))
def test_random_bytes_are_refused(tmp_path: Path, content: bytes, length: int | None) -> None:
    check_against_library(tmp_path, safetensors(content, length=length))


VALID = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "I64", "shape": [], "data_offsets": [16, 24]},
    "c": {"dtype": "BF16", "shape": [0, 3], "data_offsets": [24, 24]},
}
STRANGE = st.one_of(
    st.sampled_from([None, True, False, 0, 1, 4, -1, 16, 24, 2**31, 2**63, 2**64, 2**200]),
    st.sampled_from([0.0, 1.5, float("nan"), "", "F32", "I8", "BOOL", "F8_E5M2", "\ud800", "1"]),
    st.sampled_from([[], {}, [0], [[]], [0, 4], [1, 4], [0, 2**63], [2**62, 2**62, 0], [1] * 70]),
)


@st.composite
def almost_valid_headers(draw: st.DrawFn) -> Any:
    """A valid header in which one to three things were replaced, added or removed."""
    header: Any = json.loads(json.dumps(VALID))
    for _ in range(draw(st.integers(1, 3))):
        place = header
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and draw(st.integers(0, 4)):
                place = place[key]
                continue
            if draw(st.integers(0, 4)):
                place[key] = deepcopy(draw(STRANGE))  # the next round may change it
            else:
                del place[key]
            break
    return header


@fuzz
@given(header=almost_valid_headers(), size=st.sampled_from([24, 24, 24, 0, 16, 25]))
def test_a_mutated_header_is_read_as_the_library_does_or_refused(
    tmp_path: Path, header: Any, size: int
) -> None:
    check_against_library(tmp_path, safetensors(header, bytes(size)))


@fuzz
@given(
    edits=st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=2)), min_size=1, max_size=3),
    cut=st.integers(0, 30),
)
def test_a_file_with_a_few_wrong_bytes_is_read_as_the_library_does_or_refused(
    tmp_path: Path, edits: list[tuple[int, bytes]], cut: int
) -> None:
    content = bytearray(safetensors(VALID, bytes(24)))
    for position, replacement in edits:
        content[position : position + len(replacement)] = replacement
    check_against_library(tmp_path, bytes(content[: len(content) - cut // 10]))


@fuzz
@given(
    weight_map=st.dictionaries(
        st.sampled_from(["a", "b", "c", ""]),
        STRANGE | st.text(max_size=4) | st.sampled_from(["1", "2", "./1", "config.json", "1/x"]),
    )
)
def test_any_index_is_read_or_refused(tmp_path: Path, weight_map: Any) -> None:
    first, second = safetensors(offsets(a=[0, 4]), bytes(4)), safetensors(VALID, bytes(24))
    files = {INDEX_FILE: {"weight_map": weight_map}, "1": first, "2": second}
    read_everything(folder_of(tmp_path, files))


JSON = st.recursive(
    STRANGE, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5
)


@fuzz
@given(
    config=JSON
    | st.fixed_dictionaries(
        {"model_type": st.sampled_from(["clip", "clip_vision_model"]) | JSON},
        optional={"vision_config": JSON, "_name_or_path": JSON, "dtype": JSON},
    )
)
def test_any_config_is_read_or_refused(tmp_path: Path, config: Any) -> None:
    file = safetensors({"weight": FLOAT}, bytes(4))
    read_everything(folder_of(tmp_path, {SINGLE_FILE: file, "config.json": config}))
