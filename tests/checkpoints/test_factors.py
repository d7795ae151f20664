"""Task factors on disk: every byte accounted for, every figure true, every damage named."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from copy import deepcopy
from functools import reduce
from pathlib import Path
from typing import Any

import clips
import pytest
import torch
from hub import Hub
from huggingface_hub import HfApi
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import hf_tsv
from hf_tsv import TaskFactors
from hf_tsv.checkpoints.names import FACTORS_CONFIG, FACTORS_FILE
from hf_tsv.checkpoints.reference import parse, pin
from hf_tsv.linalg.updates import TaskSingularVectors
from hf_tsv.system.errors import CheckpointError, OutputError, RepoError

RANK = 4
INDEX = f"{FACTORS_FILE}.index.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
SIZES = {"F32": 4, "BF16": 2, "F16": 2}
MATRIX = "vision_model.encoder.layers.0.mlp.fc1.weight"  # (64, 32)
SQUARE = "vision_model.encoder.layers.0.self_attn.q_proj.weight"  # (32, 32)
CONVOLUTION = "vision_model.embeddings.patch_embedding.weight"  # (32, 3, 8, 8)
BIAS = "vision_model.encoder.layers.0.mlp.fc1.bias"
HEAD = ("classifier.bias", "classifier.weight")

Change = Callable[[dict[str, Any]], object]


def compress(
    zoo: Path, kind: str, output: Path, base: Path | None = None, **options: Any
) -> TaskFactors:
    rule = {} if {"rank", "energy", "budget"} & options.keys() else {"rank": RANK}
    return hf_tsv.compress(
        str(zoo / kind), base_model=str(base or zoo / "base"), output=output, **rule, **options
    )


@pytest.fixture(scope="module")
def made(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Factors of an image classifier: matrices, dense updates and a task head."""
    folder = tmp_path_factory.mktemp("factors") / "made"
    compress(zoo, "classifier", folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of them to damage."""
    return Path(shutil.copytree(made, tmp_path / "damaged"))


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / FACTORS_CONFIG).read_text())
    return content


def edit_config(folder: Path, change: Change) -> Path:
    content = config_of(folder)
    change(content)
    (folder / FACTORS_CONFIG).write_text(json.dumps(content))
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(folder / FACTORS_FILE)
    change(tensors)
    save_file(tensors, folder / FACTORS_FILE, {"format": "pt"})
    return folder


def header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file, read by hand."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries: dict[str, Any] = json.loads(raw[8 : 8 + length])
    entries.pop("__metadata__", None)
    return entries


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def canonical(name: str) -> str:
    parts = ("vision_model.", "text_model.", "visual_projection.", "text_projection.", "logit_")
    return name if name.startswith(parts) else f"vision_model.{name}"


def deltas(zoo: Path, kind: str) -> dict[str, Tensor]:
    """The updates of one fine-tune in float64, by canonical name."""
    base = load_file(zoo / "base" / "model.safetensors")
    tuned = load_file(zoo / kind / "model.safetensors")
    return {
        canonical(name): tensor.double() - base[canonical(name)].double()
        for name, tensor in tuned.items()
        if not name.startswith("classifier.")
    }


def stored_update(tensors: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    """What the files say about the update of one weight, in float64."""
    if f"{name}.delta" in tensors:
        return tensors[f"{name}.delta"].double()
    if f"{name}.S" in tensors:
        U, S, Vh = (tensors[f"{name}.{part}"].double() for part in ("U", "S", "Vh"))
        return (U @ torch.diag(S) @ Vh).reshape(shape)
    return torch.zeros(shape, dtype=torch.float64)


def refused(folder: Path, *said: str) -> None:
    """Opening fails with one error that names the folder and these things."""
    with pytest.raises(CheckpointError) as error:
        TaskFactors.from_pretrained(folder)
    for text in (str(folder), *said):
        assert text in error.value.message


# Files


def test_the_files_are_safetensors_json_and_a_card(made: Path) -> None:
    assert set(contents(made)) == {"config.json", FACTORS_CONFIG, FACTORS_FILE, "README.md"}


def test_the_description_says_where_the_factors_come_from(zoo: Path, made: Path) -> None:
    content = config_of(made)
    assert content["format"] == "hf-tsv task factors"
    assert content["format_version"] == 1
    assert content["hf_tsv_version"] == hf_tsv.__version__
    assert content["rank_rule"] == {"rank": RANK}
    assert content["left_out"] == []
    assert content["source"] == {"ref": "classifier", "revision": None, "license": None}
    assert content["base_model"]["ref"] == "base"
    assert content["base_model"]["revision"] is None
    assert content["model_config"] == json.loads((zoo / "classifier/config.json").read_text())


def test_the_digests_are_those_of_the_base(zoo: Path, made: Path) -> None:
    base = load_file(zoo / "base" / "model.safetensors")
    content = config_of(made)
    lines = ""
    for name, weight in sorted(content["weights"].items()):
        tensor = base[name]
        said = f"F32 {list(tensor.shape)} ".encode() + tensor.numpy().tobytes()
        assert weight["base_sha256"] == hashlib.sha256(said).hexdigest()
        lines += f"{name} {weight['base_sha256']}\n"
    assert content["base_model"]["fingerprint"] == hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_stored_byte_is_accounted_for(zoo: Path, tmp_path: Path, dtype: str) -> None:
    factors = compress(zoo, "classifier", tmp_path / "out", dtype=dtype)
    content, entries = config_of(tmp_path / "out"), header(tmp_path / "out" / FACTORS_FILE)
    name_of_dtype = NAMES[DTYPES[dtype]]
    itemsize, expected = SIZES[name_of_dtype], {}
    for name, weight in content["weights"].items():
        assert set(weight) == {
            *("stored", "shape", "dtype", "rank", "numerical_rank", "energy", "norm", "bytes"),
            "base_sha256",
        }
        if weight["stored"] == "dense":
            expected[f"{name}.delta"] = weight["shape"]
            assert weight["bytes"] == math.prod(weight["shape"]) * itemsize
        elif weight["stored"] == "factors":
            rows, columns = weight["shape"]
            expected[f"{name}.U"] = [rows, RANK]
            expected[f"{name}.S"] = [RANK]
            expected[f"{name}.Vh"] = [RANK, columns]
            assert weight["bytes"] == RANK * (rows + 1 + columns) * itemsize
    assert {n: e["shape"] for n, e in entries.items() if not n.endswith(".value")} == expected
    for name, entry in entries.items():
        assert entry["dtype"] == ("F32" if name.endswith(".value") else name_of_dtype)
    sizes = {n: e["data_offsets"][1] - e["data_offsets"][0] for n, e in entries.items()}
    head = sum(size for name, size in sizes.items() if name.endswith(".value"))
    assert head == (3 * 32 + 3) * 4
    assert content["factors_bytes"] == sum(sizes.values())
    assert content["factors_bytes"] == head + sum(w["bytes"] for w in content["weights"].values())
    assert factors.report is not None
    assert factors.report.factors_bytes == content["factors_bytes"]
    assert factors.report.output_bytes == (tmp_path / "out" / FACTORS_FILE).stat().st_size


def test_the_sizes_of_the_checkpoint_and_its_base_are_those_of_their_tensors(
    zoo: Path, made: Path
) -> None:
    base = load_file(zoo / "base" / "model.safetensors")
    tuned = load_file(zoo / "classifier" / "model.safetensors")
    content = config_of(made)
    assert content["checkpoint_bytes"] == sum(tensor.nbytes for tensor in tuned.values())
    assert content["base_bytes"] == sum(base[name].nbytes for name in tuned if name in base)


@pytest.mark.parametrize(
    ("rank", "square", "oblong"),
    [
        (1, "factors", "factors"),
        (15, "factors", "factors"),  # 15 · (32 + 1 + 32) = 975 < 1024 = 32 · 32
        (16, "dense", "factors"),
        (21, "dense", "factors"),  # 21 · (64 + 1 + 32) = 2037 < 2048 = 64 · 32
        (22, "dense", "dense"),
        (1000, "dense", "dense"),
    ],
)
def test_a_weight_whose_factors_would_not_be_smaller_is_stored_dense(
    zoo: Path, tmp_path: Path, rank: int, square: str, oblong: str
) -> None:
    weights = compress(zoo, "vision", tmp_path / "out", rank=rank).config.weights
    assert (weights[SQUARE].stored, weights[MATRIX].stored) == (square, oblong)
    assert weights[SQUARE].rank == (rank if square == "factors" else 0)
    assert weights[MATRIX].rank == (rank if oblong == "factors" else 0)
    for weight in weights.values():
        assert weight.bytes <= math.prod(weight.shape) * 4


def test_an_unchanged_weight_takes_no_bytes(zoo: Path, tmp_path: Path) -> None:
    factors = compress(zoo, "projection", tmp_path / "out")
    weight = factors.config.weights["visual_projection.weight"]
    assert (weight.stored, weight.bytes, weight.rank, weight.norm) == ("none", 0, 0, 0.0)
    assert factors.update("visual_projection.weight") is None
    assert not any("visual_projection" in name for name in header(tmp_path / "out" / FACTORS_FILE))


def test_shards_and_their_index_hold_the_same_tensors(
    zoo: Path, made: Path, tmp_path: Path
) -> None:
    compress(zoo, "classifier", tmp_path / "out", max_shard_size="8KB")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    assert set(contents(tmp_path / "out")) == {
        *("config.json", FACTORS_CONFIG, INDEX, "README.md"),
        *(
            f"task_factors-{n:05}-of-{len(shards):05}.safetensors"
            for n in range(1, 1 + len(shards))
        ),
    }
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    held = {name: shard.name for shard in shards for name in header(shard)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == config_of(made)["factors_bytes"]
    expected = load_file(made / FACTORS_FILE)
    tensors = reduce(lambda all_, shard: all_ | load_file(shard), shards, {})
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    factors = TaskFactors.from_pretrained(tmp_path / "out")
    assert factors.weight_files == (*(shard.name for shard in shards), INDEX)
    update = factors.update(MATRIX)
    assert isinstance(update, TaskSingularVectors)
    assert torch.equal(update.U, expected[f"{MATRIX}.U"])


@pytest.mark.parametrize("kind", clips.KINDS)
def test_names_are_canonical_whatever_the_layout_of_the_source(
    zoo: Path, tmp_path: Path, kind: str
) -> None:
    compress(zoo, kind, tmp_path / "out")
    base = load_file(zoo / "base" / "model.safetensors")
    weights = config_of(tmp_path / "out")["weights"]
    assert set(weights) == set(deltas(zoo, kind))
    for name, weight in weights.items():
        assert weight["shape"] == list(base[name].shape)


def test_a_task_head_is_kept_bit_for_bit(zoo: Path, made: Path) -> None:
    source = load_file(zoo / "classifier" / "model.safetensors")
    stored = load_file(made / FACTORS_FILE)
    factors = TaskFactors.from_pretrained(made)
    assert config_of(made)["task_head"] == list(HEAD)
    assert tuple(factors.head) == factors.left_out == HEAD
    for name in HEAD:
        assert torch.equal(stored[f"{name}.value"], source[name])
        assert torch.equal(factors.head_tensor(name), source[name])


def test_a_task_head_keeps_its_dtype_whatever_that_of_the_factors(
    zoo: Path, tmp_path: Path
) -> None:
    source = load_file(zoo / "classifier" / "model.safetensors")
    factors = compress(zoo, "classifier", tmp_path / "out", dtype="float16")
    assert all(torch.equal(factors.head_tensor(name), source[name]) for name in HEAD)


# Values


def test_factors_are_the_leading_singular_triplets(zoo: Path, made: Path) -> None:
    tensors, truth = load_file(made / FACTORS_FILE), deltas(zoo, "classifier")
    names = [name.removesuffix(".S") for name in tensors if name.endswith(".S")]
    assert len(names) == 13
    for name in names:
        U, S, Vh = torch.linalg.svd(truth[name], full_matrices=False)
        found = [tensors[f"{name}.{part}"].double() for part in ("U", "S", "Vh")]
        assert torch.allclose(found[1], S[:RANK], rtol=1e-6, atol=0)
        signs = torch.sign((found[0] * U[:, :RANK]).sum(0))
        assert torch.allclose(found[0] * signs, U[:, :RANK], rtol=0, atol=1e-4)
        assert torch.allclose(found[2] * signs[:, None], Vh[:RANK], rtol=0, atol=1e-4)


def test_the_error_of_a_matrix_is_the_tail_of_its_spectrum(zoo: Path, made: Path) -> None:
    factors, truth = TaskFactors.from_pretrained(made), deltas(zoo, "classifier")
    for name in (MATRIX, SQUARE):
        update = factors.update(name)
        assert isinstance(update, TaskSingularVectors)
        tail = torch.linalg.svdvals(truth[name])[RANK:].norm()
        lost = torch.dist(update.matrix().double(), truth[name])
        assert float(lost) == pytest.approx(float(tail), rel=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_stored_vectors_are_orthonormal_up_to_rounding(
    zoo: Path, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    compress(zoo, "vision", tmp_path / "out", dtype=dtype)
    tensors = load_file(tmp_path / "out" / FACTORS_FILE)
    for name in (MATRIX, SQUARE):
        U, Vh = (tensors[f"{name}.{part}"].double() for part in ("U", "Vh"))
        for gram in (U.mT @ U, Vh @ Vh.mT):
            assert torch.allclose(gram, torch.eye(RANK).double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("rule", [{"rank": RANK}, {"energy": 0.7}, {"budget": "40%"}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_figures_are_those_of_the_stored_tensors(
    zoo: Path, tmp_path: Path, dtype: str, rule: dict[str, Any]
) -> None:
    compress(zoo, "vision", tmp_path / "out", dtype=dtype, **rule)
    content, tensors = config_of(tmp_path / "out"), load_file(tmp_path / "out" / FACTORS_FILE)
    truth = deltas(zoo, "vision")
    for name, weight in content["weights"].items():
        delta = truth[name]
        assert weight["norm"] == pytest.approx(float(delta.norm()), rel=1e-6)
        matrix = delta.reshape(len(delta), -1)
        energies = torch.linalg.svdvals(matrix).square()
        kept = energies[: weight["rank"]].sum() / energies.sum()
        energy = {"factors": float(kept), "dense": 1.0, "none": 0.0}[weight["stored"]]
        assert weight["energy"] == pytest.approx(energy, rel=1e-6)
    lost = sum((stored_update(tensors, n, d.shape) - d).square().sum() for n, d in truth.items())
    total = sum(delta.square().sum() for delta in truth.values())
    expected = math.sqrt(float(lost) / float(total))  # type: ignore[arg-type]
    assert content["update_error"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "least", "most"),
    [("float32", 0, 1e-6), ("float16", 1e-5, 1e-3), ("bfloat16", 1e-3, 0.01)],
)
def test_rounding_counts_where_nothing_is_left_out(
    zoo: Path, tmp_path: Path, dtype: str, least: float, most: float
) -> None:
    compress(zoo, "vision", tmp_path / "out", rank=32, dtype=dtype)
    content, tensors = config_of(tmp_path / "out"), load_file(tmp_path / "out" / FACTORS_FILE)
    truth = deltas(zoo, "vision")
    lost = sum((tensors[f"{n}.delta"].double() - d).square().sum() for n, d in truth.items())
    total = sum(delta.square().sum() for delta in truth.values())
    assert {weight["energy"] for weight in content["weights"].values()} == {1.0}
    assert least <= content["update_error"] <= most
    expected = math.sqrt(float(lost) / float(total))  # type: ignore[arg-type]
    assert content["update_error"] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_numerical_rank_is_that_of_the_whole_update(made: Path) -> None:
    weights = config_of(made)["weights"]
    assert (weights[MATRIX]["rank"], weights[MATRIX]["numerical_rank"]) == (RANK, 32)
    assert (weights[BIAS]["rank"], weights[BIAS]["numerical_rank"]) == (0, 0)


def test_an_update_is_read_as_it_is_stored(made: Path) -> None:
    tensors, factors = load_file(made / FACTORS_FILE), TaskFactors.from_pretrained(made)
    dense, low_rank = factors.update(BIAS), factors.update(MATRIX)
    assert isinstance(dense, Tensor)
    assert isinstance(low_rank, TaskSingularVectors)
    assert torch.equal(dense, tensors[f"{BIAS}.delta"])
    for part in ("U", "S", "Vh"):
        assert torch.equal(getattr(low_rank, part), tensors[f"{MATRIX}.{part}"])


def test_the_digest_of_every_tensor_read_is_noted(made: Path) -> None:
    factors, digests = TaskFactors.from_pretrained(made), {}
    factors.update(BIAS, digests)
    factors.update(MATRIX, digests)
    tensors = load_file(made / FACTORS_FILE)
    assert digests == {
        name: hashlib.sha256(
            f"F32 {list(tensors[name].shape)} ".encode() + tensors[name].numpy().tobytes()
        ).hexdigest()
        for name in (f"{BIAS}.delta", f"{MATRIX}.U", f"{MATRIX}.S", f"{MATRIX}.Vh")
    }


def test_a_convolution_is_stored_whole_unless_asked(made: Path) -> None:
    assert config_of(made)["weights"][CONVOLUTION]["stored"] == "dense"


@pytest.mark.parametrize("rank", [RANK, 27])  # 27 · (32 + 1 + 192) = 6075 < 6144 = 32 · 192
def test_a_compressed_convolution_comes_back_in_its_shape(
    zoo: Path, tmp_path: Path, rank: int
) -> None:
    factors = compress(zoo, "vision", tmp_path / "out", rank=rank, compress_conv=True)
    weight = factors.config.weights[CONVOLUTION]
    assert (weight.stored, weight.rank, weight.bytes) == ("factors", rank, rank * 225 * 4)
    entries = header(tmp_path / "out" / FACTORS_FILE)
    assert entries[f"{CONVOLUTION}.U"]["shape"] == [32, rank]
    assert entries[f"{CONVOLUTION}.Vh"]["shape"] == [rank, 192]
    update = factors.update(CONVOLUTION)
    assert isinstance(update, Tensor)
    assert update.shape == (32, 3, 8, 8)
    U, S, Vh = torch.linalg.svd(deltas(zoo, "vision")[CONVOLUTION].flatten(1), full_matrices=False)
    expected = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    assert torch.dist(update.double().flatten(1), expected) < 1e-5 * S[0]


def test_a_convolution_whose_factors_would_not_be_smaller_is_stored_whole(
    zoo: Path, tmp_path: Path
) -> None:
    factors = compress(zoo, "vision", tmp_path / "out", rank=28, compress_conv=True)
    assert factors.config.weights[CONVOLUTION].stored == "dense"


# Opening


def test_a_folder_is_opened_as_it_was_made(zoo: Path, tmp_path: Path) -> None:
    made = compress(zoo, "vision", tmp_path / "out")
    opened = TaskFactors.from_pretrained(tmp_path / "out")
    assert opened.config == made.config
    assert opened.stored == made.stored
    assert opened.tensors == opened.config.weights
    assert opened.needed_files == (FACTORS_CONFIG, FACTORS_FILE)
    assert str(opened) == str(tmp_path / "out")
    assert opened.report is None


def test_unknown_keys_are_ignored(folder: Path) -> None:
    expected = TaskFactors.from_pretrained(folder).config

    def change(content: dict[str, Any]) -> None:
        content["later"] = {"a": [1]}
        content["weights"][MATRIX]["later"] = None
        content["base_model"]["later"] = 3

    assert TaskFactors.from_pretrained(edit_config(folder, change)).config == expected


def test_the_order_of_the_weights_does_not_matter(folder: Path) -> None:
    expected = TaskFactors.from_pretrained(folder).config

    def change(content: dict[str, Any]) -> None:
        content["weights"] = dict(reversed(content["weights"].items()))

    assert TaskFactors.from_pretrained(edit_config(folder, change)).config == expected


def test_a_repository_is_downloaded_and_opened(hub: Hub, made: Path, tmp_path: Path) -> None:
    sha = hub.add_repo("org/factors", made)
    factors = TaskFactors.from_pretrained("org/factors", cache_dir=tmp_path, progress=False)
    assert str(factors) == "org/factors"
    assert factors.pinned.revision == sha
    assert factors.config == TaskFactors.from_pretrained(made).config
    hub.requests.clear()
    for name in HEAD:
        assert torch.equal(
            factors.head_tensor(name), TaskFactors.from_pretrained(made).head_tensor(name)
        )
    assert hub.requests == []


def test_a_private_repository_is_opened_with_a_token(hub: Hub, made: Path, tmp_path: Path) -> None:
    hub.add_repo("reader/factors", made, private=True)
    with pytest.raises(RepoError, match="reader/factors"):
        TaskFactors.from_pretrained("reader/factors", cache_dir=tmp_path)
    opened = TaskFactors.from_pretrained("reader/factors", cache_dir=tmp_path, token="hf_read")
    assert opened.head


def test_a_revision_is_opened_as_it_was(hub: Hub, made: Path, tmp_path: Path) -> None:
    first = hub.add_repo("org/factors", made)
    hub.tag("org/factors", "v1", first)
    later = config_of(made) | {"update_error": 0.5}
    hub.commit("org/factors", {FACTORS_CONFIG: json.dumps(later)})
    errors = {
        ref: TaskFactors.from_pretrained(ref, cache_dir=tmp_path).config.update_error
        for ref in ("org/factors@v1", f"org/factors@{first}", "org/factors")
    }
    old = config_of(made)["update_error"]
    assert list(errors.values()) == [old, old, 0.5]


def test_an_unknown_revision_is_refused_by_name(hub: Hub, made: Path) -> None:
    hub.add_repo("org/factors", made)
    with pytest.raises(RepoError, match="nowhere"):
        TaskFactors.from_pretrained("org/factors@nowhere")


def test_a_checkpoint_is_no_task_factors(hub: Hub, zoo: Path) -> None:
    refused(zoo / "vision", f"has no {FACTORS_CONFIG}")
    hub.add_repo("org/vision", zoo / "vision")
    with pytest.raises(CheckpointError, match=rf"org/vision has no {FACTORS_CONFIG}.*compress"):
        TaskFactors.from_pretrained("org/vision")


def test_an_adapter_is_no_task_factors(zoo: Path, tmp_path: Path) -> None:
    hf_tsv.export_peft(
        str(zoo / "vision"), base_model=str(zoo / "base"), output=tmp_path / "lora", rank=2
    )
    with pytest.raises(CheckpointError, match=r"lora is a PEFT adapter.*peft"):
        TaskFactors.from_pretrained(tmp_path / "lora")
    (tmp_path / "lora" / FACTORS_CONFIG).unlink()
    refused(tmp_path / "lora", f"has no {FACTORS_CONFIG}")


# Saving


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "8KB"}], ids=["single", "sharded"])
def test_saved_factors_are_the_same_bytes(
    zoo: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    compress(zoo, "classifier", tmp_path / "out", **options)
    TaskFactors.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "a" / "copy")
    assert contents(tmp_path / "a" / "copy") == contents(tmp_path / "out")


def test_downloaded_factors_are_saved_as_the_same_bytes(
    hub: Hub, made: Path, tmp_path: Path
) -> None:
    hub.add_repo("org/factors", made)
    factors = TaskFactors.from_pretrained("org/factors", cache_dir=tmp_path / "cache")
    factors.save_pretrained(tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(made)


def test_factors_without_a_folder_of_their_own_can_be_saved(zoo: Path, tmp_path: Path) -> None:
    factors = hf_tsv.compress(str(zoo / "vision"), base_model=str(zoo / "base"), rank=RANK)
    factors.save_pretrained(tmp_path / "copy")
    assert TaskFactors.from_pretrained(tmp_path / "copy").config == factors.config


def test_an_empty_folder_is_filled(made: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    TaskFactors.from_pretrained(made).save_pretrained(tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(made)


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_another_s_is_never_replaced(made: Path, tmp_path: Path, force: bool) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=str(tmp_path)):
        TaskFactors.from_pretrained(made).save_pretrained(tmp_path, force=force)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_older_factors_are_replaced_only_by_force(zoo: Path, made: Path, tmp_path: Path) -> None:
    compress(zoo, "vision", tmp_path / "out", max_shard_size="8KB")
    factors, before = TaskFactors.from_pretrained(made), contents(tmp_path / "out")
    with pytest.raises(OutputError, match=r"out exists.*force"):
        factors.save_pretrained(tmp_path / "out")
    assert contents(tmp_path / "out") == before
    factors.save_pretrained(tmp_path / "out", force=True)
    assert contents(tmp_path / "out") == contents(made)


def test_factors_never_replace_their_own_source(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(OutputError, match="would replace the input"):
        TaskFactors.from_pretrained(folder).save_pretrained(folder, force=True)
    link = folder.with_name("link")
    link.symlink_to(folder)
    with pytest.raises(OutputError):
        TaskFactors.from_pretrained(folder).save_pretrained(link, force=True)
    assert contents(folder) == before


def test_factors_that_are_not_downloaded_cannot_be_saved(
    hub: Hub, made: Path, tmp_path: Path
) -> None:
    hub.add_repo("org/factors", made)
    factors = TaskFactors.opened(pin(parse("org/factors"), cache_dir=str(tmp_path)))
    with pytest.raises(CheckpointError, match=r"org/factors is not downloaded.*from_pretrained"):
        factors.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


# Pushing


def test_pushed_factors_are_one_commit_of_the_same_bytes(
    hub: Hub, made: Path, tmp_path: Path
) -> None:
    url = TaskFactors.from_pretrained(made).push_to_hub("me/factors", commit_message="Add task")
    commits = HfApi().list_repo_commits("me/factors")
    assert [commit.title for commit in commits] == ["Add task", "initial commit"]
    assert url == f"{hub.endpoint}/me/factors/commit/{commits[0].commit_id}"
    found = hub.files("me/factors")
    assert set(found) - {".gitattributes"} == set(contents(made))
    for name in (FACTORS_CONFIG, FACTORS_FILE):
        assert found[name] == (made / name).read_bytes()
    assert b"me/factors" in found["README.md"]
    opened = TaskFactors.from_pretrained("me/factors", cache_dir=tmp_path)
    assert opened.config == TaskFactors.from_pretrained(made).config


def test_factors_are_pushed_to_a_branch(hub: Hub, made: Path) -> None:
    main = hub.add_repo("me/factors", {"notes.txt": "text"})
    TaskFactors.from_pretrained(made).push_to_hub("me/factors", revision="next")
    assert hub.repos["me/factors"].branches["main"] == main
    assert FACTORS_FILE in hub.files("me/factors", "next")


def test_factors_are_proposed_as_a_pull_request(hub: Hub, made: Path) -> None:
    main = hub.add_repo("other/factors", {"notes.txt": "text"})
    url = TaskFactors.from_pretrained(made).push_to_hub("other/factors", create_pr=True)
    assert url == f"{hub.endpoint}/other/factors/discussions/1"
    assert hub.repos["other/factors"].branches == {"main": main}
    assert FACTORS_FILE in hub.files("other/factors", "refs/pr/1")


@pytest.mark.parametrize("private", [None, True])
def test_a_new_repository_is_as_private_as_asked(
    hub: Hub, made: Path, private: bool | None
) -> None:
    TaskFactors.from_pretrained(made).push_to_hub("factors", private=private)
    assert hub.repos["me/factors"].private is bool(private)


def test_a_push_without_rights_is_refused_before_anything_is_sent(hub: Hub, made: Path) -> None:
    with pytest.raises(RepoError, match="other/factors"):
        TaskFactors.from_pretrained(made).push_to_hub("other/factors")
    with pytest.raises(RepoError, match="can write"):
        TaskFactors.from_pretrained(made).push_to_hub("reader/factors", token="hf_read")
    assert hub.repos == {}


def test_sharded_factors_replace_a_single_file_on_the_hub(
    hub: Hub, zoo: Path, made: Path, tmp_path: Path
) -> None:
    TaskFactors.from_pretrained(made).push_to_hub("me/factors")
    compress(zoo, "classifier", tmp_path / "out", max_shard_size="8KB").push_to_hub("me/factors")
    assert FACTORS_FILE not in hub.files("me/factors")
    opened = TaskFactors.from_pretrained("me/factors", cache_dir=tmp_path / "cache")
    assert opened.weight_files[-1] == INDEX


# The base they belong to


def test_their_own_base_is_accepted(made: Path) -> None:
    factors = TaskFactors.from_pretrained(made)
    for name, weight in factors.config.weights.items():
        factors.check_base(name, weight.base_sha256, "org/base")


def test_another_base_is_refused_by_name(zoo: Path, made: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        TaskFactors.from_pretrained(made).check_base(MATRIX, "0" * 64, "org/other")
    for text in (str(made), "base model base", MATRIX, "org/other"):
        assert text in error.value.message


def test_another_base_is_refused_with_the_commit_that_is_wanted(
    hub: Hub, zoo: Path, tmp_path: Path
) -> None:
    sha = hub.add_repo("org/base", zoo / "base")
    factors = hf_tsv.compress(
        str(zoo / "vision"),
        base_model="org/base",
        output=tmp_path / "out",
        rank=RANK,
        cache_dir=tmp_path / "cache",
    )
    assert config_of(tmp_path / "out")["base_model"]["revision"] == sha
    with pytest.raises(CheckpointError, match=f"base model org/base@{sha[:12]}, and"):
        factors.check_base(MATRIX, "0" * 64, "org/other")


# Damage: tensors


def halve(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].half()


def turn(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].mT.contiguous()


@pytest.mark.parametrize(
    "name", [f"{MATRIX}.U", f"{MATRIX}.S", f"{MATRIX}.Vh", f"{BIAS}.delta", f"{HEAD[0]}.value"]
)
def test_a_missing_tensor_is_named(folder: Path, name: str) -> None:
    refused(edit_tensors(folder, lambda tensors: tensors.pop(name)), f"{name} is missing")


@pytest.mark.parametrize("name", [f"{MATRIX}.W", MATRIX, "extra.value", f"{BIAS}.S"])
def test_a_tensor_that_is_not_described_is_named(folder: Path, name: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(2)}))
    refused(folder, FACTORS_CONFIG, f"does not mention {name}")


@pytest.mark.parametrize("name", [f"{MATRIX}.U", f"{MATRIX}.Vh"])
def test_a_tensor_of_another_shape_is_named_with_both(folder: Path, name: str) -> None:
    turned = load_file(folder / FACTORS_FILE)[name].mT.shape
    edit_tensors(folder, lambda tensors: turn(tensors, name))
    refused(folder, f"{name} is F32 {list(turned)}", f"says F32 {list(turned)[::-1]}")


@pytest.mark.parametrize("name", [f"{MATRIX}.S", f"{BIAS}.delta"])
def test_a_tensor_of_another_dtype_is_named_with_both(folder: Path, name: str) -> None:
    edit_tensors(folder, lambda tensors: halve(tensors, name))
    refused(folder, f"{name} is F16", f"{FACTORS_CONFIG} says F32")


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ([1.0, 3.0, 2.0, 1.0], "not sorted"),
        ([4.0, 3.0, 2.0, 2.0001], "not sorted"),
        ([3.0, 2.0, 1.0, -1.0], "negative"),
        ([-1.0, -2.0, -3.0, -4.0], "negative"),
    ],
)
def test_singular_values_are_descending_and_not_negative(
    folder: Path, values: list[float], what: str
) -> None:
    name = f"{MATRIX}.S"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.tensor(values)}))
    with pytest.raises(CheckpointError, match=f"singular values of {MATRIX} are {what}") as error:
        TaskFactors.from_pretrained(folder).update(MATRIX)
    assert str(folder) in error.value.message


def test_equal_singular_values_and_zeros_are_sound(folder: Path) -> None:
    values = torch.tensor([2.0, 2.0, 0.0, 0.0])
    edit_tensors(folder, lambda tensors: tensors.update({f"{MATRIX}.S": values}))
    update = TaskFactors.from_pretrained(folder).update(MATRIX)
    assert isinstance(update, TaskSingularVectors)
    assert torch.equal(update.S, values)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("weight", "name"),
    [*((MATRIX, f"{MATRIX}.{part}") for part in ("U", "S", "Vh")), (BIAS, f"{BIAS}.delta")],
)
def test_a_value_that_is_no_number_is_named(
    folder: Path, weight: str, name: str, value: float
) -> None:
    edit_tensors(folder, lambda tensors: tensors[name].view(-1)[1].fill_(value))
    factors = TaskFactors.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=rf"1 of \d+ values of {name} are NaN or Inf"):
        factors.update(weight)


def test_a_task_head_with_a_value_that_is_no_number_is_named(folder: Path) -> None:
    name = f"{HEAD[1]}.value"
    edit_tensors(folder, lambda tensors: tensors[name].view(-1)[0].fill_(math.nan))
    with pytest.raises(CheckpointError, match=f"values of {name} are NaN"):
        TaskFactors.from_pretrained(folder).head_tensor(HEAD[1])


# Damage: files


def test_missing_weights_are_named(folder: Path) -> None:
    (folder / FACTORS_FILE).unlink()
    refused(folder, FACTORS_FILE, INDEX)


def test_truncated_weights_are_refused(folder: Path) -> None:
    raw = (folder / FACTORS_FILE).read_bytes()
    (folder / FACTORS_FILE).write_bytes(raw[:-1])
    refused(folder, f"{FACTORS_FILE} is truncated")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_a_description_that_is_no_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / FACTORS_CONFIG).write_bytes(content)
    refused(folder, FACTORS_CONFIG)


@pytest.fixture
def sharded(zoo: Path, tmp_path: Path) -> Path:
    compress(zoo, "text", tmp_path / "sharded", max_shard_size="8KB")
    return tmp_path / "sharded"


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = min(sharded.glob("*.safetensors"))
    shard.unlink()
    refused(sharded, shard.name)


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd", "a/../../b", ".."])
def test_an_index_that_points_outside_the_folder_is_refused(sharded: Path, place: str) -> None:
    (sharded.parent / "outside.safetensors").write_bytes(min(sharded.glob("*.saf*")).read_bytes())
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][min(index["weight_map"])] = place
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, INDEX, "points outside its folder", place)


# Damage: the description

GONE = object()
TEXTS = ("base_model.ref", "base_model.fingerprint", "source.ref", "factor_dtype")
OPTIONAL = ("base_model.revision", "source.revision", "source.license")
OBJECTS = ("base_model", "source", "rank_rule", "model_config", "weights")
WHOLE = ("checkpoint_bytes", "base_bytes", "factors_bytes")
LISTS = ("task_head", "left_out")
OF_WEIGHT = {
    "text": ("stored", "dtype", "base_sha256"),
    "whole": ("rank", "numerical_rank", "bytes"),
    "number": ("energy", "norm"),
}
NO_TEXT = (GONE, None, 3, True, ["F32"], {})
NO_WHOLE = (GONE, None, -1, True, 4.0, "4", math.nan, [4])
NO_NUMBER = (GONE, None, -0.5, True, "0.5", math.nan, math.inf, -math.inf, [0.5])
NO_SHAPE = (GONE, None, 3, "64", {}, [0, 32], [-64, 32], [64.0, 32], [True, 32], [None, 32])

MALFORMED = [
    *((key, value) for key in TEXTS for value in NO_TEXT),
    *((key, value) for key in OPTIONAL for value in (3, True, ["x"], {})),
    *((key, value) for key in OBJECTS for value in (GONE, None, 3, "x", [], [{}])),
    *((key, value) for key in WHOLE for value in NO_WHOLE),
    *(("update_error", value) for value in NO_NUMBER),
    *((key, value) for key in LISTS for value in (GONE, None, 3, "a", {}, [1], [None], [["a"]])),
    *((f"{MATRIX}/{key}", value) for key in OF_WEIGHT["text"] for value in NO_TEXT),
    *((f"{MATRIX}/{key}", value) for key in OF_WEIGHT["whole"] for value in NO_WHOLE),
    *((f"{MATRIX}/{key}", value) for key in OF_WEIGHT["number"] for value in NO_NUMBER),
    *((f"{MATRIX}/shape", value) for value in (*NO_SHAPE, [2**31, 32], [2**200, 2])),
    *((f"{MATRIX}/rank", value) for value in (0, 33, 64, 2**200)),  # k = 32
    *((f"{MATRIX}/shape", value) for value in ([64], [])),  # factors of a vector
    *((f"{MATRIX}/stored", value) for value in ("", "Factors", "lora")),
    *((f"{MATRIX}/dtype", value) for value in ("", "float32", "F8", "I64", "BOOL")),
    *(("factor_dtype", value) for value in ("", "float32", "I32")),
    *((MATRIX + "/", value) for value in (None, 3, "x", [])),
    ("base_model.fingerprint", "0" * 64),
]


def place_of(content: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The object and the last key of `weight/key` or `a.b`."""
    if key.endswith("/"):
        return content["weights"], key[:-1]
    if "/" in key:
        weight, _, last = key.partition("/")
        return content["weights"][weight], last
    *path, last = key.split(".")
    return reduce(lambda entry, part: entry[part], path, content), last


def with_value(folder: Path, key: str, value: Any) -> Path:
    def change(content: dict[str, Any]) -> None:
        entry, last = place_of(content, key)
        if value is GONE:
            del entry[last]
        else:
            entry[last] = value

    return edit_config(folder, change)


def said_of(key: str) -> str:
    """How an error calls the entry; a shape that fits no factors is a wrong rank."""
    weight, slash, last = key.partition("/")
    return f"weights.{weight}.{last}".removesuffix(".") if slash else key


def shown(value: Any) -> str:
    return "gone" if value is GONE else str(value)[:12]


@pytest.mark.parametrize(("key", "value"), MALFORMED, ids=shown)
def test_a_malformed_entry_is_named(folder: Path, key: str, value: Any) -> None:
    said = said_of(key)
    if key == f"{MATRIX}/shape" and value in ([64], []):
        said = said_of(f"{MATRIX}/rank")
    refused(with_value(folder, key, value), f"{said} in {FACTORS_CONFIG} is missing or malformed")


@pytest.mark.parametrize("key", ["update_error", f"{MATRIX}/energy", f"{MATRIX}/norm"])
def test_a_number_beyond_all_floats_is_named(folder: Path, key: str) -> None:
    refused(with_value(folder, key, 10**400), f"{said_of(key)} in {FACTORS_CONFIG}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (f"{MATRIX}/base_sha256", "\ud800"),
        ("base_model.ref", "org/\ud800"),
        ("source.license", "\ud800"),
        ("task_head", ["\ud800"]),
        ("model_config", {"model_type": "\ud800"}),
        ("rank_rule", {"budget": "\ud800"}),
    ],
    ids=ascii,
)
def test_half_a_surrogate_pair_is_no_text(folder: Path, key: str, value: Any) -> None:
    refused(with_value(folder, key, value), FACTORS_CONFIG)


def test_a_source_whose_config_is_no_text_is_refused(zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo / "vision", tmp_path / "vision")
    config = json.loads((tmp_path / "vision/config.json").read_text())
    (tmp_path / "vision/config.json").write_text(json.dumps(config | {"note": "\ud800"}))
    with pytest.raises(CheckpointError, match=r"vision.*config\.json"):
        compress(tmp_path, "vision", tmp_path / "out", base=zoo / "base")


def test_the_configuration_of_the_source_may_have_keys_of_any_name(folder: Path) -> None:
    config = {"model_type": "clip", "a\nb": 1}
    factors = TaskFactors.from_pretrained(with_value(folder, "model_config", config))
    assert factors.config.model_config == config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (f"{MATRIX}/energy", 1.5),
        (f"{BIAS}/rank", 4),
        (f"{MATRIX}/bytes", 1),
        ("factors_bytes", 1),
        ("checkpoint_bytes", 0),
        ("checkpoint_bytes", 10**400),
        ("source.revision", "main"),
        ("task_head", ["logit_scale"]),
        ("compress_conv", 1),
    ],
)
def test_a_figure_that_cannot_be_true_is_named(folder: Path, key: str, value: Any) -> None:
    refused(with_value(folder, key, value), f"{said_of(key)} in {FACTORS_CONFIG}")


def test_factors_in_double_precision_are_no_such_format(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        updates = {n: t.double() for n, t in tensors.items() if not n.endswith(".value")}
        tensors.update(updates)

    edit_tensors(folder, change)
    refused(with_value(folder, "factor_dtype", "F64"), f"factor_dtype in {FACTORS_CONFIG}")


@pytest.mark.parametrize("version", [2, 10**30])
def test_a_newer_format_asks_for_a_newer_hf_tsv(folder: Path, version: int) -> None:
    with_value(folder, "format_version", version)
    with pytest.raises(CheckpointError, match=rf"format version {version}.*up to 1.*Update hf-tsv"):
        TaskFactors.from_pretrained(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("format", value) for value in (GONE, None, "", "HF-TSV TASK FACTORS", 3, [], {})),
        *(("format_version", value) for value in (GONE, None, 0, -1, True, 1.0, "1", [1])),
    ],
    ids=shown,
)
def test_another_format_is_refused(folder: Path, key: str, value: Any) -> None:
    refused(with_value(folder, key, value), f"{FACTORS_CONFIG} does not describe task factors")


def test_a_digest_that_does_not_fit_the_fingerprint_is_refused(folder: Path) -> None:
    with_value(folder, f"{MATRIX}/base_sha256", "0" * 64)
    refused(folder, "base_model.fingerprint")


def test_a_weight_that_is_not_described_does_not_fit_the_fingerprint(folder: Path) -> None:
    refused(with_value(folder, f"{MATRIX}/", GONE), "base_model.fingerprint")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (f"{MATRIX}/rank", 5, f"{MATRIX}.U"),
        (f"{MATRIX}/shape", [32, 64], f"{MATRIX}.U"),
        (f"{MATRIX}/shape", [2**31 - 1, 2**31 - 1], f"{MATRIX}.U"),
        (f"{BIAS}/stored", "none", f"{BIAS}.delta"),
        (f"{SQUARE}/shape", [32, 33], f"{SQUARE}.Vh"),
        ("factor_dtype", "BF16", "BF16"),
        ("task_head", [HEAD[0]], f"{HEAD[1]}.value"),
        ("task_head", [*HEAD, "classifier.more"], "classifier.more.value"),
    ],
    ids=shown,
)
def test_a_description_of_other_tensors_is_refused(
    folder: Path, key: str, value: Any, said: str
) -> None:
    refused(with_value(folder, key, value), said)


def test_a_weight_described_as_dense_needs_its_update(folder: Path) -> None:
    with_value(folder, f"{MATRIX}/rank", 0)
    refused(with_value(folder, f"{MATRIX}/stored", "dense"), f"{MATRIX}.delta is missing")


STRANGE = st.one_of(
    st.sampled_from([None, True, False, 0, 1, -1, 4, 5, 33, 2**31, 2**63, 10**400]),
    st.sampled_from([0.0, 0.5, 2.5, -1.5, 1e308, math.nan, math.inf]),
    st.sampled_from(["", "F32", "I64", "dense", "none", "factors", "\ud800", "a\nb", "ä"]),
    st.sampled_from([[], {}, [0], [[]], [64, 32], ["a"], [2**40, 2**40], [1] * 70, {"a": {}}]),
)


def fingerprint(weights: dict[str, Any]) -> str:
    lines = "".join(f"{name} {weights[name]['base_sha256']}\n" for name in sorted(weights))
    return hashlib.sha256(lines.encode()).hexdigest()


@pytest.fixture(scope="module")
def small(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Factors of two weights and a task head."""
    folder = Path(shutil.copytree(made, tmp_path_factory.mktemp("small") / "small"))
    content, tensors = config_of(folder), load_file(folder / FACTORS_FILE)
    content["weights"] = {name: content["weights"][name] for name in (MATRIX, BIAS)}
    content["base_model"]["fingerprint"] = fingerprint(content["weights"])
    content["model_config"] = {"model_type": "clip", "vision_config": {"hidden_size": 32}}
    kept = {n: t for n, t in tensors.items() if n.startswith((MATRIX, BIAS, "classifier."))}
    (folder / FACTORS_CONFIG).write_text(json.dumps(content))
    save_file(kept, folder / FACTORS_FILE, {"format": "pt"})
    return folder


def mutate(content: dict[str, Any], data: st.DataObject) -> None:
    """Replace, add or remove something, anywhere."""
    place: Any = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and data.draw(st.integers(0, 5)):
            place = place[key]
            continue
        what = data.draw(st.sampled_from(["replace", "replace", "replace", "add", "remove"]))
        if what == "remove":
            del place[key]
        elif what == "add" and isinstance(place, dict):
            place[data.draw(st.text(max_size=3))] = deepcopy(place[key])
        else:
            place[key] = deepcopy(data.draw(STRANGE))
        return


@settings(
    max_examples=120,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_description_is_read_or_refused(
    small: Path, tmp_path: Path, data: st.DataObject
) -> None:
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    content = config_of(small)
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(content, data)
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
        content["base_model"]["fingerprint"] = fingerprint(content["weights"])
    (tmp_path / FACTORS_CONFIG).write_text(json.dumps(content))
    try:
        factors = TaskFactors.from_pretrained(tmp_path)
    except CheckpointError as error:
        assert str(tmp_path) in error.message
        return
    for name, weight in factors.config.weights.items():
        update = factors.update(name)
        assert (update is None) == (weight.stored == "none")
        assert update is None or tuple(update.shape) == weight.shape
    assert set(factors.head) == set(factors.config.task_head)
    assert factors.config.to_json().encode()
