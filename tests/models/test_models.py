"""Factors and checkpoints as transformers models, in pipelines, and switched in one base model."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import clips
import pytest
import torch
from cli import ended
from forks import fork
from hub import Hub
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import hf_tsv
from hf_tsv import CheckpointError, RecipeError, TaskSwitcher

ZERO_SHOT, FEATURES, CLASSES = (
    "zero-shot-image-classification",
    "image-feature-extraction",
    "image-classification",
)
CLASS_OF_PIPELINE = {
    ZERO_SHOT: "CLIPModel",
    FEATURES: "CLIPVisionModel",
    CLASSES: "CLIPForImageClassification",
}
CLASS_OF_KIND = {
    "vision": "CLIPVisionModel",
    "flat": "CLIPVisionModel",
    "projection": "CLIPVisionModelWithProjection",
    "full": "CLIPModel",
    "text": "CLIPTextModel",
    "classifier": "CLIPForImageClassification",
}
HEADS = {"classifier.weight", "classifier.bias"}
KEEPS: tuple[Literal["memory", "disk"], ...] = ("memory", "disk")
State = dict[str, Tensor]


@dataclass(frozen=True)
class Made:
    """What the zoo was made into: folders by kind, and the base that all belong to."""

    base: Path
    plain: Mapping[str, Path]
    factors: Mapping[str, Path]
    whole: Mapping[str, Path]
    merged: Path


@pytest.fixture(scope="module")
def made(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Factors of every kind of fine-tune, what `reconstruct` makes of them, and a merge."""
    folder = tmp_path_factory.mktemp("made")
    factors = {kind: folder / f"{kind}-tsv" for kind in clips.KINDS}
    whole = {kind: folder / f"{kind}-whole" for kind in clips.KINDS}
    for kind in clips.KINDS:
        hf_tsv.compress(
            zoo / kind, base_model=zoo / "base", output=factors[kind], rank_fraction=0.5
        )
        hf_tsv.reconstruct(factors[kind], output=whole[kind])
    tasks = [zoo / "vision", zoo / "text"]
    hf_tsv.merge(tasks, base_model=zoo / "base", output=folder / "merged")
    plain = {kind: zoo / kind for kind in clips.KINDS}
    return Made(zoo / "base", plain, factors, whole, folder / "merged")


def stored(folder: Path, prefix: str = "") -> State:
    return {prefix + name: t for name, t in load_file(folder / "model.safetensors").items()}


def combined(made: Made, kind: str) -> State:
    """The base with a plain fine-tune over it, by names of CLIPModel."""
    prefix = "vision_model." if kind == "flat" else ""
    tuned = stored(made.plain[kind], prefix)
    return stored(made.base) | {name: t for name, t in tuned.items() if name not in HEADS}


def transformers_class(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def loaded(model_class: str, folder: Path) -> Any:
    """The same folder, loaded by transformers alone."""
    return clips.load(transformers_class(model_class), folder, dtype="auto")


def snapshot(model: Any) -> State:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def differing(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Names whose tensors are not the same bit for bit, dtype included."""
    assert found.keys() == expected.keys()
    return [
        name
        for name, tensor in expected.items()
        if found[name].dtype != tensor.dtype or not torch.equal(found[name], tensor)
    ]


def output(model: Any) -> Tensor:
    """What the network says of one image and one text."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 32, 32, generator=generator).to(model.dtype)
    tokens = torch.tensor([[256, 3, 4, 257]])
    with torch.no_grad():
        name = type(model).__name__
        if name == "CLIPModel":
            answer: Tensor = model(input_ids=tokens, pixel_values=pixels).logits_per_image
        elif name == "CLIPForImageClassification":
            answer = model(pixel_values=pixels).logits
        elif name.startswith("CLIPText"):
            answer = model(input_ids=tokens).last_hidden_state
        else:
            answer = model(pixel_values=pixels).last_hidden_state
    return answer


def assert_same_model(found: Any, expected: Any) -> None:
    """Same class, weights bit for bit, and outputs up to the order of sums in the kernels."""
    assert type(found) is type(expected)
    assert not found.training
    assert differing(snapshot(found), snapshot(expected)) == []
    torch.testing.assert_close(output(found), output(expected), rtol=1e-6, atol=1e-6)


def half_zoo(folder: Path, dtype: torch.dtype, kind: str = "vision") -> tuple[Path, Path]:
    """A base in half precision, and factors of a fine-tune of it."""
    base = clips.make_base(folder / "base", dtype=dtype)
    tuned = clips.make_fine_tune(base, folder / kind, 7, kind)
    hf_tsv.compress(tuned, base_model=base, output=folder / f"{kind}-tsv", rank=6)
    return base, folder / f"{kind}-tsv"


# load_model: factors


@pytest.mark.parametrize("kind", clips.KINDS)
def test_factors_load_as_the_checkpoint_that_reconstruct_writes(made: Made, kind: str) -> None:
    model_class = "CLIPForImageClassification" if kind == "classifier" else "CLIPModel"
    found = hf_tsv.load_model(made.factors[kind])
    assert_same_model(found, loaded(model_class, made.whole[kind]))


@pytest.mark.parametrize("kind", clips.KINDS)
def test_every_stored_weight_of_the_reconstruction_is_in_the_model(made: Made, kind: str) -> None:
    """Read with safetensors, so that no renaming in transformers can hide a weight."""
    model = hf_tsv.load_model(made.factors[kind], kind=ZERO_SHOT)
    expected = {n: t for n, t in stored(made.whole[kind]).items() if n not in HEADS}
    assert differing(snapshot(model), expected) == []


@pytest.mark.parametrize("kind", clips.KINDS)
def test_a_task_decides_about_the_class_of_factors(made: Made, kind: str) -> None:
    found = hf_tsv.load_model(made.factors[kind], kind=FEATURES)
    assert_same_model(found, loaded("CLIPVisionModel", made.whole[kind]))


def test_the_task_head_and_its_labels_come_with_the_factors(made: Made) -> None:
    model = hf_tsv.load_model(made.factors["classifier"])
    tuned = stored(made.plain["classifier"])
    assert differing({n: snapshot(model)[n] for n in HEADS}, {n: tuned[n] for n in HEADS}) == []
    assert model.config.id2label == {i: f"LABEL_{i}" for i in range(3)}


def test_factors_of_convolutions_load_as_they_are_reconstructed(made: Made, tmp_path: Path) -> None:
    hf_tsv.compress(
        made.plain["vision"], base_model=made.base, output=tmp_path / "conv-tsv",
        rank_fraction=0.5, compress_conv=True,
    )  # fmt: skip
    hf_tsv.reconstruct(tmp_path / "conv-tsv", output=tmp_path / "whole")
    found = hf_tsv.load_model(tmp_path / "conv-tsv")
    assert_same_model(found, loaded("CLIPModel", tmp_path / "whole"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_of_a_half_precision_base_keep_its_dtype(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    _, factors = half_zoo(tmp_path, dtype)
    hf_tsv.reconstruct(factors, output=tmp_path / "whole")
    found = hf_tsv.load_model(factors)
    assert found.dtype == found.config.dtype == dtype
    assert_same_model(found, loaded("CLIPModel", tmp_path / "whole"))


def test_factors_made_from_a_vision_tower_load_as_one(made: Made, tmp_path: Path) -> None:
    base = made.plain["vision"]
    hf_tsv.compress(made.plain["flat"], base_model=base, output=tmp_path / "tsv")
    hf_tsv.reconstruct(tmp_path / "tsv", output=tmp_path / "whole")
    found = hf_tsv.load_model(tmp_path / "tsv")
    assert_same_model(found, loaded("CLIPVisionModel", tmp_path / "whole"))


def test_a_tower_that_nobody_has_is_an_error(made: Made, tmp_path: Path) -> None:
    base = made.plain["vision"]
    hf_tsv.compress(made.plain["flat"], base_model=base, output=tmp_path / "tsv")
    with pytest.raises(CheckpointError, match="text_model"):
        hf_tsv.load_model(tmp_path / "tsv", kind=ZERO_SHOT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_is_loaded_in_the_dtype_asked_for(made: Made, dtype: torch.dtype) -> None:
    found = hf_tsv.load_model(made.factors["full"], dtype=dtype, device="cpu")
    expected = loaded("CLIPModel", made.whole["full"]).to(dtype)
    assert found.dtype == dtype and found.device.type == "cpu"
    assert differing(snapshot(found), snapshot(expected)) == []


def test_a_device_that_is_not_here_is_refused(made: Made) -> None:
    assert hf_tsv.load_model(made.factors["vision"], device="cpu").device.type == "cpu"
    with pytest.raises(RecipeError, match="There is no device 'xyz' here"):
        hf_tsv.load_model(made.factors["vision"], device="xyz")


def test_a_checkpoint_that_lacks_a_weight_is_not_filled_up(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.base, tmp_path / "clip")
    tensors = stored(tmp_path / "clip")
    del tensors["vision_model.encoder.layers.0.mlp.fc1.weight"]
    save_file(tensors, tmp_path / "clip/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"clip lacks vision_model\..*fc1\.weight"):
        hf_tsv.load_model(tmp_path / "clip")


def test_a_base_of_several_dtypes_loses_nothing(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.base, tmp_path / "base")
    tensors = stored(tmp_path / "base")
    tensors["logit_scale"] = tensors["logit_scale"].half()
    save_file(tensors, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    factors = hf_tsv.compress(made.plain["vision"], base_model=tmp_path / "base", rank=4)
    factors.save_pretrained(tmp_path / "tsv")
    hf_tsv.reconstruct(tmp_path / "tsv", output=tmp_path / "whole")
    whole = {name: tensor.float() for name, tensor in stored(tmp_path / "whole").items()}
    assert differing(snapshot(hf_tsv.load_model(tmp_path / "tsv")), whole) == []


def test_an_update_that_overflows_the_base_is_refused(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.factors["vision"], tmp_path / "tsv")
    file = tmp_path / "tsv/task_factors.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".S"))
    tensors[name][0] = 1e38
    tensors[name.removesuffix("S") + "U"] *= 100
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="does not fit into"):
        hf_tsv.load_model(tmp_path / "tsv")


def test_the_number_of_labels_is_that_of_the_head(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.plain["classifier"], tmp_path / "classifier")
    config = json.loads((tmp_path / "classifier/config.json").read_text())
    for key in ("id2label", "label2id", "num_labels"):
        config.pop(key, None)
    (tmp_path / "classifier/config.json").write_text(json.dumps(config))
    found = hf_tsv.load_model(tmp_path / "classifier")
    assert found.config.num_labels == 3
    factors = hf_tsv.compress(tmp_path / "classifier", base_model=made.base)
    factors.save_pretrained(tmp_path / "tsv")
    hf_tsv.reconstruct(tmp_path / "tsv", output=tmp_path / "whole")
    from transformers import CLIPForImageClassification

    again = clips.load(CLIPForImageClassification, tmp_path / "whole")
    assert again.config.num_labels == 3 and again.classifier.weight.shape[0] == 3


def test_a_pipeline_without_any_processor_says_what_is_missing(made: Made, tmp_path: Path) -> None:
    tensors_only = ("config.json", "model.safetensors")
    for source, name in ((made.base, "base"), (made.plain["full"], "full")):
        (tmp_path / name).mkdir()
        for file in tensors_only:
            shutil.copy(source / file, tmp_path / name / file)
    with pytest.raises(CheckpointError, match="processor and tokenizer that zero-shot"):
        hf_tsv.pipeline(ZERO_SHOT, tmp_path / "full", base_model=tmp_path / "base")


def test_loading_leaves_no_file_open(made: Made) -> None:
    def open_files() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    before = open_files()
    hf_tsv.load_model(made.factors["vision"])
    hf_tsv.TaskFactors.from_pretrained(made.factors["vision"]).update(
        "vision_model.post_layernorm.weight"
    )
    hf_tsv.compress(made.plain["vision"], base_model=made.base, rank=2)
    hf_tsv.reconstruct(made.factors["vision"], dry_run=True)
    del_switcher = switcher(made, "vision", keep="disk")
    del del_switcher
    assert open_files() == before


def test_factors_are_not_put_on_another_base(made: Made) -> None:
    with pytest.raises(CheckpointError, match=r"belongs to the base model .* differs from it"):
        hf_tsv.load_model(made.factors["vision"], base_model=made.plain["full"])


def test_factors_without_a_head_cannot_classify_images(made: Made) -> None:
    with pytest.raises(CheckpointError, match="has no classification head"):
        hf_tsv.load_model(made.factors["vision"], kind=CLASSES)


def test_a_task_that_no_clip_does_is_refused(made: Made) -> None:
    with pytest.raises(RecipeError, match=f"'text-generation'.*{ZERO_SHOT}"):
        hf_tsv.load_model(made.factors["vision"], kind="text-generation")


# load_model: whole checkpoints


@pytest.mark.parametrize("kind", clips.KINDS)
def test_a_plain_checkpoint_loads_as_transformers_loads_it(made: Made, kind: str) -> None:
    found = hf_tsv.load_model(made.plain[kind])
    assert_same_model(found, loaded(CLASS_OF_KIND[kind], made.plain[kind]))


@pytest.mark.parametrize("kind", clips.KINDS)
def test_what_a_plain_checkpoint_lacks_is_of_the_base(made: Made, kind: str) -> None:
    """A flat one too, whose unprefixed names CLIPModel does not know: never a random tower."""
    found = hf_tsv.load_model(made.plain[kind], kind=ZERO_SHOT, base_model=made.base)
    assert type(found).__name__ == "CLIPModel" and not found.training
    assert differing(snapshot(found), combined(made, kind)) == []
    expected = loaded("CLIPModel", made.base)
    expected.load_state_dict(combined(made, kind))
    torch.testing.assert_close(output(found), output(expected), rtol=1e-6, atol=1e-6)


def test_the_base_loads_as_it_is(made: Made) -> None:
    assert_same_model(hf_tsv.load_model(made.base), loaded("CLIPModel", made.base))


def test_a_merge_loads_as_transformers_loads_it(made: Made) -> None:
    assert_same_model(hf_tsv.load_model(made.merged), loaded("CLIPModel", made.merged))


def test_one_tower_of_a_whole_checkpoint_needs_no_base(made: Made) -> None:
    found = hf_tsv.load_model(made.merged, kind=FEATURES)
    assert_same_model(found, loaded("CLIPVisionModel", made.merged))


def test_a_tower_without_any_base_is_an_error(made: Made) -> None:
    with pytest.raises(CheckpointError, match="which base model"):
        hf_tsv.load_model(made.plain["flat"], kind=ZERO_SHOT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_checkpoint_keeps_its_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    base, _ = half_zoo(tmp_path, dtype, "projection")
    assert_same_model(hf_tsv.load_model(base), loaded("CLIPModel", base))
    found = hf_tsv.load_model(tmp_path / "projection")
    assert_same_model(found, loaded("CLIPVisionModelWithProjection", tmp_path / "projection"))
    assert found.dtype == dtype


# load_model: the Hub


def push_factors(hub: Hub, made: Made, kind: str = "vision") -> str:
    """Upload base, fine-tune and factors of it; return the commit of the base."""
    sha = hub.add_repo("org/base", made.base)
    hub.add_repo(f"org/{kind}", made.plain[kind])
    hf_tsv.compress(
        f"org/{kind}", base_model="org/base", push_to=f"me/{kind}-tsv", rank_fraction=0.5
    )
    return sha


def test_the_base_is_read_at_the_commit_that_the_factors_name(
    hub: Hub, made: Made, tmp_path: Path
) -> None:
    push_factors(hub, made)
    moved = tmp_path / "moved.safetensors"
    save_file({n: t + 1 for n, t in stored(made.base).items()}, moved, metadata={"format": "pt"})
    hub.commit("org/base", {"model.safetensors": moved})
    found = hf_tsv.load_model("me/vision-tsv", cache_dir=tmp_path / "cache")
    assert_same_model(found, loaded("CLIPModel", made.whole["vision"]))


def test_a_revision_is_one_of_the_factors(hub: Hub, made: Made) -> None:
    push_factors(hub, made)
    hub.tag("me/vision-tsv", "v1", "main")
    broken = dict.fromkeys(("tsv_config.json", "task_factors.safetensors"), "not factors")
    hub.commit("me/vision-tsv", broken)
    found = hf_tsv.load_model("me/vision-tsv@v1")
    assert differing(snapshot(found), stored(made.whole["vision"])) == []


def test_the_card_of_a_plain_checkpoint_names_its_base(
    hub: Hub, made: Made, tmp_path: Path
) -> None:
    hub.add_repo("org/base", made.base)
    hub.add_repo("me/flat", made.plain["flat"])
    hub.commit("me/flat", {"README.md": "---\nbase_model: org/base\n---\n"})
    found = hf_tsv.load_model("me/flat", kind=ZERO_SHOT, cache_dir=tmp_path)
    assert differing(snapshot(found), combined(made, "flat")) == []


def test_a_private_repository_is_read_with_the_token_given(hub: Hub, made: Made) -> None:
    hub.add_repo("reader/base", made.base, private=True)
    found = hf_tsv.load_model("reader/base", token="hf_read")
    assert differing(snapshot(found), stored(made.base)) == []


def test_a_warm_cache_serves_an_offline_run(hub: Hub, made: Made, tmp_path: Path) -> None:
    """Model, pipeline and switcher in one process that may not use the network."""
    push_factors(hub, made)
    hf_tsv.pipeline(ZERO_SHOT, "me/vision-tsv")
    hub.requests.clear()
    code = f"""
import hf_tsv
from safetensors.torch import save_file
model = hf_tsv.load_model("me/vision-tsv")
save_file(model.state_dict(), {str(tmp_path / "offline.safetensors")!r})
hf_tsv.pipeline("zero-shot-image-classification", "me/vision-tsv")
hf_tsv.TaskSwitcher.from_pretrained(["me/vision-tsv"]).activate("vision")
"""
    done = ended(fork("-c", code, environment={**os.environ, "HF_HUB_OFFLINE": "1"}))
    assert done.code == 0, done.err
    assert (
        differing(load_file(tmp_path / "offline.safetensors"), stored(made.whole["vision"])) == []
    )
    assert hub.requests == []


# pipeline


@pytest.fixture(scope="module")
def image() -> Image.Image:
    pixels = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(1))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


@pytest.fixture(scope="module")
def by_hand(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Per repository of the table, a folder with everything a stock pipeline needs."""
    folder = tmp_path_factory.mktemp("by-hand")
    for kind in ("vision", "flat", "full", "classifier"):
        shutil.copytree(made.base, folder / kind)
        tensors = combined(made, kind)
        if kind == "classifier":
            tensors |= {n: t for n, t in stored(made.plain[kind]).items() if n in HEADS}
            config = json.loads((made.plain[kind] / "config.json").read_text())
            (folder / kind / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / kind / "model.safetensors", metadata={"format": "pt"})
    return {
        "factors": made.whole["vision"],
        "factors with a head": made.whole["classifier"],
        "merged": made.merged,
        **{f"plain {kind}": folder / kind for kind in ("vision", "flat", "full", "classifier")},
        "base": made.base,
    }


def repository(made: Made, row: str) -> Path:
    """The repository of a row of the table."""
    if row.startswith("plain "):
        return made.plain[row.removeprefix("plain ")]
    others = {
        "factors": made.factors["vision"],
        "factors with a head": made.factors["classifier"],
        "merged": made.merged,
        "base": made.base,
    }
    return others[row]


def answer(pipe: Any, task: str, image: Image.Image) -> Any:
    more = {"candidate_labels": ["a cat", "a dog"]} if task == ZERO_SHOT else {}
    return pipe(image, **more)


def flat_numbers(value: Any) -> tuple[list[str], list[float]]:
    """Labels and numbers of a pipeline's answer, in order."""
    if isinstance(value, dict):
        return [value["label"]], [value["score"]]
    if not isinstance(value, list):
        return [], [value]
    parts = [flat_numbers(item) for item in value]
    return [t for part in parts for t in part[0]], [x for part in parts for x in part[1]]


def stock_pipeline(task: str, folder: Path) -> Any:
    import transformers

    make: Any = transformers.pipeline
    processor = transformers.AutoImageProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]
    more: dict[str, Any] = {"image_processor": processor}
    if task == ZERO_SHOT:
        more["tokenizer"] = transformers.AutoTokenizer.from_pretrained(folder)
    return make(task, model=loaded(CLASS_OF_PIPELINE[task], folder), **more)


ROWS = (
    "factors", "factors with a head", "merged",
    "plain vision", "plain flat", "plain full", "plain classifier", "base",
)  # fmt: skip
WITH_HEAD = ("factors with a head", "plain classifier")


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("task", [ZERO_SHOT, FEATURES, CLASSES])
def test_a_pipeline_answers_as_a_stock_one_of_the_whole_checkpoint(
    made: Made, by_hand: Mapping[str, Path], image: Image.Image, task: str, row: str
) -> None:
    """Factors say what their base is; of plain repositories without a card the user says it."""
    base = made.base if row.startswith("plain") else None
    if task == CLASSES and row not in WITH_HEAD:
        with pytest.raises(CheckpointError, match=r"has no classification head.*zero-shot"):
            hf_tsv.pipeline(task, repository(made, row), base_model=base)
        return
    pipe = hf_tsv.pipeline(task, repository(made, row), base_model=base)
    labels, numbers = flat_numbers(answer(pipe, task, image))
    expected = flat_numbers(answer(stock_pipeline(task, by_hand[row]), task, image))
    assert type(pipe.model).__name__ == CLASS_OF_PIPELINE[task]
    assert labels == expected[0]
    assert numbers == pytest.approx(expected[1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("row", ["factors", "plain flat"])
def test_a_task_changes_what_the_pipeline_answers(made: Made, image: Image.Image, row: str) -> None:
    """Otherwise the table could be right about the base model everywhere."""
    pipes = [
        hf_tsv.pipeline(FEATURES, repo, base_model=made.base if "flat" in repo.name else None)
        for repo in (repository(made, row), made.base)
    ]
    found, base = (flat_numbers(answer(pipe, FEATURES, image))[1] for pipe in pipes)
    assert found != pytest.approx(base, rel=1e-3, abs=1e-3)


def test_an_unknown_pipeline_is_refused(made: Made) -> None:
    with pytest.raises(RecipeError, match=f"'text-generation'.*{ZERO_SHOT}, {FEATURES} or"):
        hf_tsv.pipeline("text-generation", made.factors["vision"])


def test_a_pipeline_computes_in_the_dtype_asked_for(made: Made, image: Image.Image) -> None:
    pipe = hf_tsv.pipeline(
        FEATURES, made.factors["vision"], dtype=torch.bfloat16, device="cpu", batch_size=2
    )
    assert pipe.model.dtype == torch.bfloat16 and pipe.device.type == "cpu"
    assert len(answer(pipe, FEATURES, image)[0]) == 17


def test_a_processor_given_is_used(made: Made) -> None:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"height": 32, "width": 32}, do_normalize=False)
    pipe = hf_tsv.pipeline(FEATURES, made.factors["vision"], image_processor=processor)
    assert pipe.image_processor is processor


def test_a_loaded_model_works_in_a_stock_pipeline(made: Made, image: Image.Image) -> None:
    import transformers

    make: Any = transformers.pipeline
    found = make(
        ZERO_SHOT,
        model=hf_tsv.load_model(made.factors["vision"], kind=ZERO_SHOT),
        image_processor=transformers.AutoImageProcessor.from_pretrained(made.base),  # type: ignore[no-untyped-call]
        tokenizer=transformers.AutoTokenizer.from_pretrained(made.base),
    )
    expected = stock_pipeline(ZERO_SHOT, made.whole["vision"])
    labels, numbers = flat_numbers(answer(found, ZERO_SHOT, image))
    assert labels == ["a cat", "a dog"] or labels == ["a dog", "a cat"]
    assert numbers == pytest.approx(
        flat_numbers(answer(expected, ZERO_SHOT, image))[1], rel=1e-5, abs=1e-6
    )


def test_a_pipeline_of_the_hub_takes_the_processor_of_the_base(
    hub: Hub, made: Made, tmp_path: Path, image: Image.Image
) -> None:
    push_factors(hub, made)
    pipe = hf_tsv.pipeline(ZERO_SHOT, "me/vision-tsv", cache_dir=tmp_path)
    expected = stock_pipeline(ZERO_SHOT, made.whole["vision"])
    labels, numbers = flat_numbers(answer(pipe, ZERO_SHOT, image))
    other = flat_numbers(answer(expected, ZERO_SHOT, image))
    assert labels == other[0]
    assert numbers == pytest.approx(other[1], rel=1e-5, abs=1e-6)


# TaskSwitcher


def switcher(made: Made, *kinds: str, **options: Any) -> TaskSwitcher:
    """Over factors of these kinds, without the bar of transformers."""
    with contextlib.redirect_stderr(io.StringIO()):
        return TaskSwitcher.from_pretrained([made.factors[kind] for kind in kinds], **options)


def assert_rounded_alike(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Two steps of the dtype for W0 + Δ in float32, and what float32 loses in summing Δ itself.

    An update of the zoo is about 2e-3 an entry, so a sum of 16 products of float32 is good to 1e-9.
    """
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        eps = torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(found[name], tensor, rtol=2 * eps, atol=1e-9, msg=name)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("kind", clips.KINDS)
def test_an_active_task_is_its_reconstruction(
    made: Made, kind: str, keep: Literal["memory", "disk"]
) -> None:
    tasks = switcher(made, kind, keep=keep)
    tasks.activate(kind)
    assert tasks.active == kind
    expected = {n: t for n, t in stored(made.whole[kind]).items() if n not in HEADS}
    assert_rounded_alike(snapshot(tasks.model), expected)
    assert differing(snapshot(tasks.model), stored(made.base)) != []


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("kinds", [("vision", "flat"), ("vision", "text"), ("full", "text")])
def test_a_switch_is_an_activation_from_the_start(
    made: Made, kinds: tuple[str, str], keep: Literal["memory", "disk"]
) -> None:
    """Also where the first task changes weights that the second does not."""
    for first, second in (kinds, kinds[::-1]):
        fresh, used = (switcher(made, *kinds, keep=keep) for _ in range(2))
        fresh.activate(second)
        used.activate(first)
        used.activate(second)
        assert used.active == second
        assert differing(snapshot(used.model), snapshot(fresh.model)) == []


@pytest.mark.parametrize("keep", KEEPS)
def test_a_weight_that_only_one_task_changes_is_restored_by_the_other(
    made: Made, keep: Literal["memory", "disk"]
) -> None:
    tasks = switcher(made, "vision", "text", keep=keep)
    tasks.activate("vision")
    tasks.activate("text")
    base, found = stored(made.base), snapshot(tasks.model)
    unchanged = {n for n in base if not n.startswith("text_model.")}
    changed = set(differing(found, base))
    assert changed and not changed & unchanged


@pytest.mark.parametrize("keep", KEEPS)
def test_deactivate_gives_the_base_back_bit_for_bit(
    made: Made, keep: Literal["memory", "disk"]
) -> None:
    tasks = switcher(made, "full", "vision", "text", keep=keep)
    for sequence in (("full",), ("vision", "text"), ("text", "full", "vision")):
        for name in sequence:
            tasks.activate(name)
        tasks.deactivate()
        assert tasks.active is None
        assert differing(snapshot(tasks.model), stored(made.base)) == []


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_is_switched_in_its_dtype(
    tmp_path: Path, dtype: torch.dtype, keep: Literal["memory", "disk"]
) -> None:
    """The sum is rounded once, from float32: never more than a step from the reconstruction."""
    base, factors = half_zoo(tmp_path, dtype)
    hf_tsv.reconstruct(factors, output=tmp_path / "whole")
    tasks = TaskSwitcher.from_pretrained([factors], keep=keep)
    tasks.activate("vision")
    expected = stored(tmp_path / "whole")
    for name, found in snapshot(tasks.model).items():
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(found, expected[name], rtol=step, atol=1e-9, msg=name)
    equal = [torch.equal(snapshot(tasks.model)[name], expected[name]) for name in expected]
    assert sum(equal) > 0.9 * len(equal)  # ties in rounding are rare
    tasks.deactivate()
    assert differing(snapshot(tasks.model), stored(base)) == []


@pytest.mark.parametrize("keep", KEEPS)
def test_a_switcher_works_in_the_dtype_asked_for(
    made: Made, keep: Literal["memory", "disk"]
) -> None:
    tasks = switcher(made, "vision", "text", keep=keep, dtype=torch.bfloat16, device="cpu")
    before = {name: t.bfloat16() for name, t in stored(made.base).items()}
    assert differing(snapshot(tasks.model), before) == []
    tasks.activate("vision")
    changed = set(differing(snapshot(tasks.model), before))
    assert changed and all(name.startswith("vision_model.") for name in changed)
    tasks.deactivate()
    assert differing(snapshot(tasks.model), before) == []


@pytest.mark.parametrize("keep", KEEPS)
def test_convolutions_are_switched_whole_or_as_factors(
    made: Made, tmp_path: Path, keep: Literal["memory", "disk"]
) -> None:
    hf_tsv.compress(
        made.plain["vision"], base_model=made.base, output=tmp_path / "conv-tsv",
        rank_fraction=0.25, compress_conv=True,
    )  # fmt: skip
    hf_tsv.reconstruct(tmp_path / "conv-tsv", output=tmp_path / "whole")
    name = "vision_model.embeddings.patch_embedding.weight"
    kinds = {
        repo: hf_tsv.TaskFactors.from_pretrained(repo).tensors[name].stored
        for repo in (made.factors["vision"], tmp_path / "conv-tsv")
    }
    assert list(kinds.values()) == ["dense", "factors"]
    tasks = TaskSwitcher.from_pretrained(list(kinds), keep=keep)
    for task, whole in (("conv", tmp_path / "whole"), ("vision", made.whole["vision"])):
        tasks.activate(task)
        assert_rounded_alike(snapshot(tasks.model), stored(whole))
    tasks.deactivate()
    assert differing(snapshot(tasks.model), stored(made.base)) == []


def test_factors_in_half_precision_are_added_in_float32(made: Made, tmp_path: Path) -> None:
    hf_tsv.compress(
        made.plain["full"], base_model=made.base, output=tmp_path / "full-tsv",
        rank_fraction=0.5, factor_dtype="bfloat16",
    )  # fmt: skip
    hf_tsv.reconstruct(tmp_path / "full-tsv", output=tmp_path / "whole")
    tasks = TaskSwitcher.from_pretrained([tmp_path / "full-tsv"])
    tasks.activate("full")
    assert_rounded_alike(snapshot(tasks.model), stored(tmp_path / "whole"))


@pytest.mark.parametrize("keep", KEEPS)
def test_parameters_stay_the_same_objects_in_the_same_memory(
    made: Made, keep: Literal["memory", "disk"]
) -> None:
    def places() -> list[tuple[str, int, int]]:
        return [(n, id(p), p.data_ptr()) for n, p in tasks.model.named_parameters()]

    tasks = switcher(made, "full", "vision", keep=keep)
    before = places()
    for name in ("full", "vision"):
        tasks.activate(name)
        assert places() == before
    tasks.deactivate()
    assert places() == before


def test_an_active_task_is_what_the_network_computes(made: Made) -> None:
    tasks = switcher(made, "vision", "full")
    for kind in ("vision", "full"):
        tasks.activate(kind)
        expected = output(loaded("CLIPModel", made.whole[kind]))
        torch.testing.assert_close(output(tasks.model), expected, rtol=1e-5, atol=1e-5)


def test_activating_the_active_task_again_changes_nothing(made: Made) -> None:
    tasks = switcher(made, "full")
    tasks.activate("full")
    before = snapshot(tasks.model)
    tasks.activate("full")
    assert tasks.active == "full"
    assert differing(snapshot(tasks.model), before) == []


@pytest.mark.parametrize("keep", KEEPS)
def test_deactivate_before_any_task_changes_nothing(
    made: Made, keep: Literal["memory", "disk"]
) -> None:
    tasks = switcher(made, "full", keep=keep)
    tasks.deactivate()
    assert tasks.active is None
    assert differing(snapshot(tasks.model), stored(made.base)) == []


def test_one_tower_is_switched_without_the_other(made: Made) -> None:
    tasks = switcher(made, "full", "text", model_class="CLIPVisionModel")
    assert type(tasks.model).__name__ == "CLIPVisionModel"
    base = snapshot(tasks.model)
    assert differing(base, snapshot(loaded("CLIPVisionModel", made.base))) == []
    tasks.activate("full")
    assert_rounded_alike(
        snapshot(tasks.model), snapshot(loaded("CLIPVisionModel", made.whole["full"]))
    )
    tasks.activate("text")
    assert differing(snapshot(tasks.model), base) == []


def test_a_class_that_transformers_lacks_is_refused(made: Made) -> None:
    with pytest.raises(RecipeError, match=r"no CLIP class 'ViT'.*CLIPVisionModel"):
        switcher(made, "vision", model_class="ViT")


def test_a_classifier_is_not_switched_with_a_random_head(made: Made) -> None:
    with pytest.raises(CheckpointError, match="classification head"):
        switcher(made, "classifier", model_class="CLIPForImageClassification")


def held_bytes() -> int:
    """Of all tensors that are alive, each storage once."""
    gc.collect()
    storages = {
        item.untyped_storage().data_ptr(): item.untyped_storage().nbytes()
        for item in gc.get_objects()
        if issubclass(type(item), Tensor) and item.device.type == "cpu"
    }
    return sum(storages.values())


def test_memory_keeps_a_copy_of_changed_weights_only_and_disk_of_none(made: Made) -> None:
    sizes = {}
    for keep in KEEPS:
        before = held_bytes()
        tasks = switcher(made, "vision", "text", keep=keep)
        sizes[keep] = held_bytes() - before
        del tasks
    changed = [
        tensor.nbytes
        for name, tensor in stored(made.base).items()
        if name.startswith(("vision_model.", "text_model."))
    ]
    assert 0 < sum(changed) < sum(t.nbytes for t in stored(made.base).values())
    assert sizes["memory"] - sizes["disk"] == sum(changed)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_converted_after_loading_is_still_switched(
    made: Made, dtype: torch.dtype, keep: Literal["memory", "disk"]
) -> None:
    tasks = switcher(made, "vision", keep=keep)
    tasks.model.to(dtype)  # type: ignore[arg-type]
    base = snapshot(tasks.model)
    tasks.activate("vision")
    whole = stored(made.whole["vision"])
    step = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    for name, found in snapshot(tasks.model).items():
        assert found.dtype == dtype
        rounding = step * (base[name].abs() + whole[name].abs()) + 1e-9  # of W0 and of the sum
        assert ((found - whole[name]).abs() <= rounding).all(), name
    tasks.deactivate()
    assert differing(snapshot(tasks.model), base) == []


# TaskSwitcher: names and refusals


def test_tasks_are_called_like_their_repositories(hub: Hub, made: Made) -> None:
    push_factors(hub, made)
    hub.add_repo("me/b", hub.files("me/vision-tsv"))
    tasks = TaskSwitcher.from_pretrained(["me/vision-tsv@main", "hf://me/b"])
    assert tasks.names == ["vision", "b"]
    tasks.activate("vision")
    assert_rounded_alike(snapshot(tasks.model), stored(made.whole["vision"]))


def test_tasks_are_called_as_a_mapping_says(made: Made) -> None:
    named = {"me": made.factors["vision"], "you": made.factors["text"]}
    tasks = TaskSwitcher.from_pretrained(named)
    assert tasks.names == ["me", "you"]
    tasks.activate("you")
    assert_rounded_alike(snapshot(tasks.model), stored(made.whole["text"]))


def test_one_reference_is_one_task(made: Made) -> None:
    assert TaskSwitcher.from_pretrained(str(made.factors["vision"])).names == ["vision"]


@pytest.mark.parametrize("references", [["me/a-tsv", "org/a-tsv"], ["me/a-tsv@v1", "me/a"]])
def test_two_tasks_of_one_name_are_refused_before_anything_is_read(
    hub: Hub, references: list[str]
) -> None:
    with pytest.raises(RecipeError, match=r"are both called 'a'.*Give names"):
        TaskSwitcher.from_pretrained(references)
    assert hub.requests == []


@pytest.mark.parametrize("references", [[], {}])
def test_no_tasks_are_refused(made: Made, references: Sequence[str] | Mapping[str, str]) -> None:
    with pytest.raises(RecipeError, match="no tasks"):
        TaskSwitcher.from_pretrained(references, base_model=made.base)


def test_an_unknown_task_is_an_error_that_lists_the_others(made: Made) -> None:
    tasks = switcher(made, "vision", "text", "full")
    tasks.activate("text")
    before = snapshot(tasks.model)
    with pytest.raises(RecipeError, match=r"no task 'cars'.*Choose vision, text or full"):
        tasks.activate("cars")
    assert tasks.active == "text"
    assert differing(snapshot(tasks.model), before) == []


def test_a_checkpoint_is_not_a_task(made: Made) -> None:
    with pytest.raises(CheckpointError, match=r"flat is a checkpoint, not task factors"):
        TaskSwitcher.from_pretrained(
            [made.factors["vision"], made.plain["flat"]], base_model=made.base
        )


def test_factors_of_another_base_are_refused(made: Made, tmp_path: Path) -> None:
    other = clips.make_base(tmp_path / "other", seed=3)
    tuned = clips.make_fine_tune(other, tmp_path / "tuned", 9)
    hf_tsv.compress(tuned, base_model=other, output=tmp_path / "tuned-tsv")
    references = [made.factors["vision"], tmp_path / "tuned-tsv"]
    with pytest.raises(CheckpointError, match="name different base models"):
        TaskSwitcher.from_pretrained(references)
    with pytest.raises(CheckpointError, match=r"tuned-tsv belongs to the base model"):
        TaskSwitcher.from_pretrained(references, base_model=made.base)


def test_w0_is_kept_in_memory_or_on_disk_and_nowhere_else(made: Made) -> None:
    with pytest.raises(RecipeError, match=r"`keep=` cannot be 'gpu'.*memory or disk"):
        switcher(made, "vision", keep="gpu")


# TaskSwitcher: threads and interruptions


@pytest.mark.parametrize("keep", KEEPS)
def test_threads_that_switch_at_once_leave_one_whole_task(
    made: Made, keep: Literal["memory", "disk"]
) -> None:
    tasks = switcher(made, "vision", "text", "full", keep=keep)
    whole: dict[str | None, State] = {None: snapshot(tasks.model)}
    for name in tasks.names:
        tasks.activate(name)
        whole[name] = snapshot(tasks.model)
    failures: list[BaseException] = []
    rounds = 8
    barrier = threading.Barrier(4, timeout=60)

    def work(choices: Sequence[str | None]) -> None:
        try:
            for turn in range(rounds):
                barrier.wait()
                for choice in (choices[turn % 4], choices[(turn + 1) % 4]):
                    if choice is None:
                        tasks.deactivate()
                    else:
                        tasks.activate(choice)
                if barrier.wait() == 0:  # nobody writes now
                    assert differing(snapshot(tasks.model), whole[tasks.active]) == []
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    order = [None, "vision", "text", "full"]
    threads = [threading.Thread(target=work, args=(order[i:] + order[:i],)) for i in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failures == []
    assert differing(snapshot(tasks.model), whole[tasks.active]) == []


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("before", [None, "text"])
@pytest.mark.parametrize("after", ["vision", "text", None])
def test_what_an_interrupted_activation_left_is_repaired_by_the_next_call(
    made: Made,
    monkeypatch: pytest.MonkeyPatch,
    keep: Literal["memory", "disk"],
    before: str | None,
    after: str | None,
) -> None:
    tasks = switcher(made, "vision", "text", keep=keep)
    whole: dict[str | None, State] = {None: snapshot(tasks.model)}
    for name in tasks.names:
        tasks.activate(name)
        whole[name] = snapshot(tasks.model)
    tasks.deactivate()
    if before is not None:
        tasks.activate(before)
    addmm, calls = torch.addmm, 0

    def interrupted(*args: Any, out: Tensor, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            out.fill_(torch.nan)  # half written
            raise KeyboardInterrupt
        return addmm(*args, out=out, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "addmm", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tasks.activate("vision")
    assert tasks.active is None
    assert differing(snapshot(tasks.model), whole[None]) != []
    if after is None:
        tasks.deactivate()
    else:
        tasks.activate(after)
    assert tasks.active == after
    assert differing(snapshot(tasks.model), whole[after]) == []
