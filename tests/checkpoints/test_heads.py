"""Task heads kept beside a merge: one file a task, and each task classified with its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import clips
import pytest
import torch
from cli import copied
from cli import hf_tsv as run
from hub import Hub
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hf_tsv
from hf_tsv.checkpoints.formats.heads import file_names
from hf_tsv.system.errors import CheckpointError, HfTsvError, RecipeError

LABELS = {"digits": ["one", "two", "three"], "animals": ["cat", "dog", "emu", "fox", "gnu"]}
CLASSES, ZERO_SHOT = "image-classification", "zero-shot-image-classification"


def classifier(zoo: Path, folder: Path, seed: int) -> Path:
    """A CLIPForImageClassification as a user trains and saves it."""
    from transformers import CLIPForImageClassification

    labels = LABELS[folder.name]
    config = clips.clip_config()
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    torch.manual_seed(seed)
    model = CLIPForImageClassification(config)
    state = clips.fine_tuned_state(zoo / "base", seed, "vision_model.")
    missing = model.load_state_dict(state, strict=False)
    assert set(missing.missing_keys) == {"classifier.weight", "classifier.bias"}
    return clips.save(model, folder)


@pytest.fixture(scope="session")
def tasks(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two classifiers with 3 and 5 classes."""
    folder = tmp_path_factory.mktemp("classifiers")
    return [classifier(zoo, folder / name, seed) for seed, name in enumerate(LABELS, 11)]


@pytest.fixture
def merged(zoo: Path, tasks: list[Path], tmp_path: Path) -> Path:
    """Both and a fine-tune without a head, merged with their heads."""
    done = run("merge", *tasks, zoo / "vision", "--base-model", zoo / "base", "--keep-heads", "-o",
               tmp_path / "merged")  # fmt: skip
    assert done.code == 0, done.err
    assert "Classification heads: heads/digits.safetensors, heads/animals.safetensors." in done.err
    assert "Left out" not in done.err
    return tmp_path / "merged"


def image() -> Image.Image:
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 255, (32, 32, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def test_one_file_a_task(zoo: Path, tasks: list[Path], merged: Path, tmp_path: Path) -> None:
    files = sorted(path.name for path in (merged / "heads").iterdir())
    assert files == ["animals.safetensors", "digits.safetensors"]
    for folder in tasks:
        kept = load_file(merged / "heads" / f"{folder.name}.safetensors")
        own = load_file(folder / "model.safetensors")
        assert set(kept) == {"classifier.weight", "classifier.bias"}
        assert all(torch.equal(tensor, own[name]) for name, tensor in kept.items())
        with safe_open(merged / "heads" / f"{folder.name}.safetensors", "pt") as file:
            said = json.loads(file.metadata()["config"])
        assert list(said["id2label"].values()) == LABELS[folder.name]
    # and everything else is as without them
    done = run("merge", *tasks, zoo / "vision", "--base-model", zoo / "base", "-o", tmp_path / "m")
    assert "Left out of" in done.err and not (tmp_path / "m" / "heads").exists()
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "m" / name).read_bytes() == (merged / name).read_bytes()


@pytest.mark.parametrize("task", list(LABELS))
def test_each_task_is_classified_with_its_own_head(
    tasks: list[Path], merged: Path, task: str
) -> None:
    """The same as transformers computes with the merged encoder under the fine-tune's head."""
    from transformers import AutoImageProcessor, CLIPForImageClassification

    found = hf_tsv.pipeline(CLASSES, merged, head=task)(image(), top_k=None)
    folder = next(folder for folder in tasks if folder.name == task)
    model = clips.load(CLIPForImageClassification, folder).eval()
    encoder = {
        name: tensor
        for name, tensor in load_file(merged / "model.safetensors").items()
        if name.startswith("vision_model.")
    }
    model.load_state_dict(encoder, strict=False)
    inputs = AutoImageProcessor.from_pretrained(merged)(image(), return_tensors="pt")
    with torch.no_grad():
        scores = model(**inputs).logits.softmax(-1)[0]
    expected = dict(zip(LABELS[task], scores.tolist(), strict=True))
    assert {entry["label"]: pytest.approx(entry["score"]) for entry in found} == expected
    loaded = hf_tsv.load_model(merged, head=task)
    assert type(loaded).__name__ == "CLIPForImageClassification"
    assert list(loaded.config.id2label.values()) == LABELS[task]


def test_without_a_task_it_is_what_it_was(merged: Path) -> None:
    assert type(hf_tsv.load_model(merged)).__name__ == "CLIPModel"
    assert hf_tsv.pipeline(ZERO_SHOT, merged)(image(), candidate_labels=["a", "b"])
    with pytest.raises(CheckpointError, match=r"no classification head.*: animals, digits"):
        hf_tsv.pipeline(CLASSES, merged)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"head": "plants"}, r"no head of the task 'plants'.*animals, digits"),
        ({"head": "../digits"}, "no head of the task"),
        ({"head": "digits", "kind": ZERO_SHOT}, "does image-classification"),
        ({"head": CLASSES}, "Write `kind='image-classification'`"),
    ],
)
def test_a_head_that_is_none(merged: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(HfTsvError, match=said):
        hf_tsv.load_model(merged, **options)


def test_a_merge_without_heads_says_how_to_get_them(zoo: Path, tmp_path: Path) -> None:
    hf_tsv.merge([zoo / "vision"], base_model=zoo / "base", output=tmp_path / "m")
    with pytest.raises(CheckpointError, match="Merge with `keep_heads=True`"):
        hf_tsv.load_model(tmp_path / "m", head="vision")
    done = run("merge", zoo / "vision", zoo / "flat", "--base-model", zoo / "base", "--keep-heads",
               "-o", tmp_path / "n")  # fmt: skip
    assert done.code == 1 and "No checkpoint has a task head" in done.err
    assert not (tmp_path / "n").exists()
    with pytest.raises(RecipeError, match="keep_heads"):
        hf_tsv.merge([zoo / "vision"], base_model=zoo / "base", output=tmp_path / "n",
                     keep_heads="yes")  # type: ignore[arg-type]  # fmt: skip


def test_to_the_hub_and_back_by_the_code_on_the_card(
    hub: Hub, zoo: Path, tasks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("org/base", zoo / "base")
    for folder in tasks:
        hub.add_repo(f"org/{folder.name}", folder)
    hub.add_repo("me/merged", {"heads/old.safetensors": b"old", "notes.txt": "mine"})
    done = run("merge", "org/digits", "org/animals", "--base-model", "org/base", "--keep-heads",
               "--push-to", "me/merged", "--stream", "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["heads"] == {
        "heads/digits.safetensors": "org/digits", "heads/animals.safetensors": "org/animals"
    }  # fmt: skip
    assert done.json["left_out"] == {}
    there = hub.files("me/merged")
    assert {name for name in there if "/" in name} == set(done.json["heads"])
    assert "notes.txt" in there
    card = there["README.md"].decode()
    assert "`digits`, `animals`" in card and "left out" not in card
    code = card.split("## Task heads")[1].split("```python\n")[1].split("```")[0]
    namespace: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    image().save("photo.jpg")
    exec(code, namespace)
    assert {entry["label"] for entry in namespace["classifier"](image())} <= set(LABELS["digits"])
    assert run("inspect", "me/merged", "--json").json["heads"] == ["animals", "digits"]
    # the recipe keeps them again
    again = run("merge", "--recipe", save(there, tmp_path), "-o", tmp_path / "again")
    assert again.code == 0, again.err
    for name in done.json["heads"]:
        assert (tmp_path / "again" / name).read_bytes() == there[name]


def save(files: dict[str, bytes], folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(files["hf_tsv_recipe.yaml"])
    return path


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_heads_of_factors_and_of_adapters(zoo: Path, tasks: list[Path], tmp_path: Path) -> None:
    hf_tsv.compress(tasks[0], base_model=zoo / "base", output=tmp_path / "digits")
    with pytest.raises(CheckpointError, match="holds one task"):
        hf_tsv.load_model(tmp_path / "digits", head="digits")
    lora(tasks[1], tmp_path / "animals")
    report = hf_tsv.merge([tmp_path / "digits", tmp_path / "animals"], base_model=zoo / "base",
                          output=tmp_path / "m", keep_heads=True)  # fmt: skip
    assert list(report.heads) == ["heads/digits.safetensors", "heads/animals.safetensors"]
    for name, labels in LABELS.items():
        kept = load_file(tmp_path / "m" / "heads" / f"{name}.safetensors")
        assert len(kept["classifier.bias"]) == len(labels)
    model: Any = hf_tsv.load_model(tmp_path / "m", head="digits")
    assert list(model.config.id2label.values()) == LABELS["digits"]
    model = hf_tsv.load_model(tmp_path / "m", head="animals")  # PEFT keeps no labels
    assert list(model.config.id2label) == [0, 1, 2, 3, 4]


def lora(folder: Path, target: Path) -> None:
    """An adapter of a classifier with its head, as PEFT saves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPForImageClassification

    model = clips.load(CLIPForImageClassification, folder)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"])
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.01 * torch.randn(parameter.shape)
    adapted.save_pretrained(target)


def test_a_damaged_head_is_refused(merged: Path) -> None:
    file = merged / "heads" / "digits.safetensors"
    tensors, content = load_file(file), file.read_bytes()
    for config in (None, "{", "[]"):
        save_file(tensors, file, metadata=None if config is None else {"config": config})
        with pytest.raises(CheckpointError, match="does not say what its labels are"):
            hf_tsv.load_model(merged, head="digits")
    file.write_bytes(content[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        hf_tsv.load_model(merged, head="digits")


def test_a_damaged_head_is_found_before_the_work(
    zoo: Path, tasks: list[Path], tmp_path: Path
) -> None:
    folder = copied(tasks[0], tmp_path / "digits")
    state = load_file(folder / "model.safetensors")
    state["classifier.bias"][1] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    done = run("merge", folder, "--base-model", zoo / "base", "--keep-heads", "-o", tmp_path / "m")
    assert done.code == 1 and "classifier.bias are NaN" in done.err
    assert "Merging" not in done.err and not list(tmp_path.glob("*m*"))


def test_other_files_beside_the_heads_are_no_tasks(merged: Path) -> None:
    (merged / "heads" / "notes.txt").write_text("mine")
    assert hf_tsv.inspect(merged).heads == ["animals", "digits"]


def test_the_repository_of_an_input_is_not_pushed_to(
    hub: Hub, zoo: Path, tasks: list[Path], tmp_path: Path
) -> None:
    files = {f"heads/{file.name}": file for file in tasks[0].iterdir()}
    hub.add_repo("me/all", files)
    hub.add_repo("org/base", zoo / "base")
    done = run("merge", "me/all/heads", "--base-model", "org/base", "--push-to", "me/all")
    assert done.code == 1 and "would replace the input me/all/heads" in done.err
    assert len(hub.repos["me/all"].commits) == 1


def test_names_of_files_are_distinct_and_harmless() -> None:
    names = [
        "a",
        "A",
        "org/a",
        "../x",
        "a\nb",
        "ü",
        "",
        "...",
        "n" * 300,
        "a",
        "a-2",
        "org/a",
        "日" * 99,
    ]
    files = file_names(names)
    stems = [name.removeprefix("heads/").removesuffix(".safetensors") for name in files]
    assert len({stem.lower() for stem in stems}) == len(names)
    assert all(stem and "/" not in stem and "\n" not in stem for stem in stems)
    assert all(len(stem.encode()) < 120 for stem in stems)  # a file's name has 255 bytes
    assert stems[0] == "a" and stems[2] == "org-a" and not any(s.startswith(".") for s in stems)
