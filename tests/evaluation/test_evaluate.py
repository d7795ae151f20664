"""Accuracy on labelled images, against transformers' own pipeline and scikit-learn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import clips
import numpy as np
import pytest
import torch
from cli import copied, ended
from cli import hf_tsv as run
from forks import fork
from labelled import CLASSES, make_folder, picture, with_an_odd_word
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix
from transformers import CLIPModel

import hf_tsv
from hf_tsv.evaluation import data
from hf_tsv.system.errors import DataError, HfTsvError, RecipeError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|multiprocess|dill).*")


@pytest.fixture(scope="session")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, one folder a class, in two splits."""
    return make_folder(tmp_path_factory.mktemp("data") / "pets")


@pytest.fixture(scope="session")
def columns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parquet file with two columns of numbers and no names of classes."""
    import datasets

    numbers = [i % 3 for i in range(12)]
    rows = datasets.Dataset.from_dict(
        {
            "picture": [picture(CLASSES[n], i) for i, n in enumerate(numbers)],
            "kind": numbers,
            "wrong": [7] * 12,
        },
        features=datasets.Features(
            {
                "picture": datasets.Image(),
                "kind": datasets.Value("int64"),
                "wrong": datasets.Value("int64"),
            }
        ),
    )
    file = tmp_path_factory.mktemp("parquet") / "pets.parquet"
    rows.to_parquet(file)
    return file


def by_transformers(folder: Path, pets: Path, prompt: str) -> tuple[list[str], list[str]]:
    """What the zero-shot pipeline of transformers says of every test image, and the truth."""
    from transformers import pipeline

    classify = pipeline("zero-shot-image-classification", model=str(folder))
    truth, found = [], []
    for name in CLASSES:
        for file in sorted((pets / "test" / name).iterdir()):
            scores: Any = classify(
                Image.open(file).convert("RGB"),
                candidate_labels=list(CLASSES),
                hypothesis_template=prompt,
            )
            truth.append(name)
            found.append(max(scores, key=lambda score: score["score"])["label"])
    return truth, found


@pytest.mark.parametrize("prompt", ["a photo of a {}.", "{}"])
def test_accuracy_is_that_of_transformers_and_scikit_learn(
    zoo: Path, pets: Path, prompt: str
) -> None:
    report = hf_tsv.evaluate(zoo / "base", {"pets": str(pets)}, templates=[prompt], batch_size=5)
    found = report.tasks["pets"]
    truth, predicted = by_transformers(zoo / "base", pets, prompt)
    assert report.accuracy == found["accuracy"] == accuracy_score(truth, predicted)
    expected = confusion_matrix(truth, predicted, labels=list(CLASSES))
    assert found["confusion"] == expected.tolist()
    assert (found["images"], found["split"], found["classes"]) == (24, "test", list(CLASSES))
    assert report.normalised is None and report.errors == {} and report.limit is None


@torch.inference_mode()
def test_prompts_of_several_templates_are_averaged(zoo: Path) -> None:
    """Each embedding has length 1, and their mean again."""
    from transformers import AutoTokenizer

    from hf_tsv.evaluation.zero_shot import head

    model = clips.load(CLIPModel, zoo / "base").eval()
    tokenizer = AutoTokenizer.from_pretrained(zoo / "base")
    templates = ["a {}", "{} here", "the {} is a pet"]
    found = head(model, tokenizer, CLASSES, templates)
    for row, name in zip(found, CLASSES, strict=True):
        parts = []
        for template in templates:
            texts = tokenizer([template.format(name)], return_tensors="pt")
            features = model.get_text_features(**texts)
            features = getattr(features, "pooler_output", features)[0].double()
            parts.append(features / features.norm())
        mean = torch.stack(parts).mean(0)
        assert torch.allclose(row.double(), mean / mean.norm(), atol=1e-6)


def test_every_kind_of_model(zoo: Path, pets: Path, tmp_path: Path) -> None:
    """A vision tower with the base's texts, a merge, task factors: the same as the whole model."""
    hf_tsv.merge([zoo / "vision"], base_model=zoo / "base", output=tmp_path / "merged")
    hf_tsv.compress(zoo / "vision", base_model=zoo / "base", rank_fraction=1.0,
                    output=tmp_path / "factors")  # fmt: skip
    models = {tmp_path / "merged": None, zoo / "vision": zoo / "base", tmp_path / "factors": None}
    found = [
        hf_tsv.evaluate(ref, {"pets": str(pets)}, base_model=base).tasks["pets"]["confusion"]
        for ref, base in models.items()
    ]
    assert found[0] == found[1] == found[2]


def test_what_is_kept_of_the_fine_tunes(zoo: Path, pets: Path, columns: Path) -> None:
    tasks = [
        hf_tsv.EvaluationTask("pets", str(pets)),
        hf_tsv.EvaluationTask("columns", str(columns), label="kind", classes=CLASSES),
        hf_tsv.EvaluationTask("alone", str(pets), split="train"),
    ]
    references = {"pets": zoo / "base", "columns": zoo / "full"}
    report = hf_tsv.evaluate(zoo / "full", tasks, references=references, base_model=zoo / "base")
    own = hf_tsv.evaluate(zoo / "base", {"pets": str(pets)}).accuracy
    found = report.tasks
    assert found["pets"]["reference"] == {"ref": str(zoo / "base"), "accuracy": own}
    assert found["pets"]["normalised"] == found["pets"]["accuracy"] / own
    assert found["columns"]["normalised"] == 1.0
    assert "reference" not in found["alone"] and found["alone"]["images"] == 9
    kept = (found["pets"]["normalised"], found["columns"]["normalised"])
    assert report.normalised == sum(kept) / 2  # eq. 9
    assert report.accuracy == sum(entry["accuracy"] for entry in found.values()) / 3


def test_a_quick_look_is_always_the_same_and_says_so(zoo: Path, pets: Path) -> None:
    words = ["evaluate", zoo / "base", "--task", f"pets={pets}", "--limit", "7"]
    first, second = (run(*words, "--json").json for _ in range(2))
    assert first["tasks"] == second["tasks"] and first["tasks"]["pets"]["images"] == 7
    assert first["limit"] == 7
    assert sum(map(sum, first["tasks"]["pets"]["confusion"])) == 7
    assert "at most 7 images per task" in run(*words).out


def test_results_are_written_whole(zoo: Path, pets: Path, tmp_path: Path) -> None:
    words = ["evaluate", zoo / "base", "--task", f"pets={pets}", "-o", tmp_path / "results"]
    done = ended(fork(*words, "--json", freezing=True))
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "results" / "evaluation.json").read_text()) == done.json
    files = {path.name for path in (tmp_path / "results").iterdir()}
    assert files == {"evaluation.json", "accuracy.png", "confusion-pets.png"}
    assert run(*words).code == 1  # it is there
    assert run(*words, "--force").code == 0


def damaged(pets: Path, folder: Path, how: str) -> dict[str, Any]:
    """A dataset that cannot be used; what is chosen of it."""
    copied(pets, folder)
    if how == "corrupt":
        (folder / "test" / "dog" / "3.png").write_bytes(b"\x89PNG no more")
    elif how == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    return {
        "split": {"split": "nowhere"},
        "label": {"label": "nothing"},
        "image": {"image": "nothing"},
        "names": {"classes": ("a", "b")},
    }.get(how, {})


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("corrupt", r"image \d+ of the split test cannot be read"),
        ("empty", "cannot be read"),
        ("absent", "cannot be read"),
        ("split", r"has no split 'nowhere'.*It has train, test"),
        ("label", r"has no column 'nothing'.*It has image, label"),
        ("image", r"has no column 'nothing'.*It has image, label"),
        ("names", "2 names for the 3 classes"),
    ],
)
def test_one_damaged_task_does_not_cost_the_others(
    zoo: Path, pets: Path, tmp_path: Path, how: str, said: str
) -> None:
    choices = damaged(pets, tmp_path / "bad", how)
    if how == "absent":
        shutil.rmtree(tmp_path / "bad")
    bad = hf_tsv.EvaluationTask("bad", str(tmp_path / "bad"), **choices)
    good = hf_tsv.EvaluationTask("good", str(pets))
    report = hf_tsv.evaluate(zoo / "base", [bad, good])
    assert list(report.tasks) == ["good"] and list(report.errors) == ["bad"]
    with pytest.raises(DataError, match=said) as error:
        hf_tsv.evaluate(zoo / "base", [bad])
    assert "bad" in error.value.message


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({}, "0 columns that may be the labels.*picture, kind, wrong"),
        ({"label": "kind"}, "does not name its classes"),
        ({"label": "wrong", "classes": CLASSES}, "image 0 has the label 7, and there are 3"),
        (
            {"label": "picture", "classes": CLASSES},
            "picture of .* does not hold one label an image",
        ),
        ({"image": "kind", "label": "wrong"}, "kind of .* does not hold one image a row"),
    ],
)
def test_columns_that_do_not_say_enough(
    zoo: Path, columns: Path, choices: dict[str, Any], said: str
) -> None:
    task = hf_tsv.EvaluationTask("pets", str(columns), **choices)
    with pytest.raises(DataError, match=said):
        hf_tsv.evaluate(zoo / "base", [task])


def test_failures_show_and_end_with_1(zoo: Path, pets: Path, tmp_path: Path) -> None:
    done = run("evaluate", zoo / "base", "--task", f"pets={pets}", "--task", "no=./absent",
               "--reference", f"pets={tmp_path / 'gone'}", "-o", tmp_path / "r")  # fmt: skip
    assert done.code == 1 and "Traceback" not in done.err
    assert done.out.splitlines()[-1].split() == ["failed", "no,", "pets"]
    assert done.err.count("Warning: no: ") == done.err.count("its reference: ") == 1, done.err
    kept = json.loads((tmp_path / "r" / "evaluation.json").read_text())
    assert kept["tasks"]["pets"]["images"] == 24 and set(kept["errors"]) == {"no", "pets"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "pets"], "names no dataset"),
        (["--task", "=x"], "incomplete"),
        ([], "No task given"),
        (["--task", "a={pets}", "--task", "a={pets}"], "given twice"),
        (["--task", "a={pets}", "--reference", "b=x"], "--reference has b"),
        (["--task", "a={pets}", "--reference", "b"], "NAME=REF"),
        (["--task", "a={pets}", "--limit", "0"], "--limit must be at least 1"),
        (["--task", "a={pets}", "--template", "a pet"], "no single {}"),
    ],
)
def test_bad_arguments_end_in_one_line(
    zoo: Path, pets: Path, arguments: list[str], said: str
) -> None:
    done = run("evaluate", zoo / "base", *[word.replace("{pets}", str(pets)) for word in arguments])
    assert done.code == 2 and said in done.err and "Hint: " in done.err and done.out == ""


def test_the_only_task_that_fails_is_told_once(zoo: Path, tmp_path: Path) -> None:
    done = run("evaluate", zoo / "base", "--task", f"a={tmp_path / 'none'}")
    assert done.code == 1 and done.err.count("cannot be read") == 1, done.err
    assert "Error: No task could be measured: a: " in done.err and ".." not in done.err


@pytest.mark.parametrize("dataset", ["~nobody-of-this-name/x", "x" * 300, "~nobody-here/x.parquet"])
def test_a_path_that_cannot_be_is_one_line(zoo: Path, dataset: str) -> None:
    done = run("evaluate", zoo / "base", "--task", f"a={dataset}")
    assert done.code == 1 and "a: " in done.err, done.err
    done = run("evaluate", zoo / "base", "--task", "a=b/c", "-o", "~nobody-of-this-name/x")
    assert done.code == 1 and "home directory" in done.err, done.err


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data.LIBRARIES, "no_such_module", "no-such-package")
    with pytest.raises(RecipeError, match=r"needs no-such-package.*pip install no-such-package"):
        hf_tsv.evaluate("org/a", {"pets": "org/pets"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=org/x", ("org/x", None, None)),
        ("a=org/x@v1", ("org/x", None, "v1")),
        ("a=org/x:small", ("org/x", "small", None)),
        ("a=org/x:small@refs/pr/1", ("org/x", "small", "refs/pr/1")),
    ],
)
def test_a_task_in_words(text: str, expected: tuple[str, str | None, str | None]) -> None:
    task = hf_tsv.EvaluationTask.parse(text)
    assert (task.dataset, task.config, task.revision) == expected and task.name == "a"


def test_a_path_with_strange_signs_is_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "a:b@c"
    folder.mkdir()
    assert hf_tsv.EvaluationTask.parse(f"x={folder}").dataset == str(folder)
    with pytest.raises(HfTsvError):
        hf_tsv.EvaluationTask.parse("x=a:b:c@")


def test_16_bits_of_grey_score_as_8_bits(zoo: Path, tmp_path: Path) -> None:
    for i in range(6):
        grey = np.asarray(picture(CLASSES[i % 3], i).convert("L"))
        for bits, levels in ((8, grey), (16, grey.astype(np.uint16) * 257)):
            folder = tmp_path / str(bits) / "test" / CLASSES[i % 3]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(levels).save(folder / f"{i}.png")
    found = hf_tsv.evaluate(zoo / "base", {n: str(tmp_path / n) for n in ("8", "16")}).tasks
    assert found["8"]["confusion"] == found["16"]["confusion"]


def test_a_tokenizer_without_a_length_cuts_at_the_positions(zoo: Path, tmp_path: Path) -> None:
    base = copied(zoo / "base", tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    assert config.pop("model_max_length") == 24
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("cat", "a very long name of a class with more tokens than positions"):
        (tmp_path / "long" / "test" / name).mkdir(parents=True)
        picture("cat", 1).save(tmp_path / "long" / "test" / name / "1.png")
    found = [hf_tsv.evaluate(ref, {"a": str(tmp_path / "long")}) for ref in (base, zoo / "base")]
    assert found[0].tasks == found[1].tasks


def test_what_nobody_expects_of_one_task_does_not_cost_the_others(
    zoo: Path, pets: Path, tmp_path: Path
) -> None:
    base, odd = with_an_odd_word(zoo, pets, tmp_path)
    report = hf_tsv.evaluate(base, {"odd": str(odd), "pets": str(pets)})
    assert list(report.tasks) == ["pets"]
    said = "odd failed with IndexError: index out of range in self. HF_DEBUG=1 shows where."
    assert report.errors == {"odd": said}
    done = run("evaluate", base, "--task", f"odd={odd}")
    assert done.code == 1 and said in done.err and "Traceback" not in done.err
