"""Datasets of the Hub and suites of tasks, on the loopback Hub."""

from __future__ import annotations

from pathlib import Path

import clips
import pytest
import yaml
from cli import hf_tsv as run
from cli import hf_tsv_process as run_process
from hub import Hub
from labelled import CLASSES, add_dataset, parquet

import hf_tsv
from benchmarks import paper
from hf_tsv.evaluation import suites
from hf_tsv.evaluation.data import load
from hf_tsv.recipes.images import EvaluationTask
from hf_tsv.system.errors import DataError, HfTsvError, RecipeError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|multiprocess|dill).*")


def test_a_dataset_of_the_hub_is_read_at_a_commit(hub: Hub, zoo: Path, tmp_path: Path) -> None:
    first = add_dataset(hub, "org/data", tmp_path, count=12)
    hub.tag("datasets/org/data", "v1", first)
    second = add_dataset(hub, "org/data", tmp_path, count=15, seed=50)
    report = hf_tsv.evaluate(zoo / "base", {"new": "org/data", "old": "org/data@v1"})
    found = {name: (task["images"], task["revision"]) for name, task in report.tasks.items()}
    assert found == {"new": (15, second), "old": (12, first)}
    file = tmp_path / "same.parquet"
    file.write_bytes(parquet(tmp_path, count=15, seed=50))
    local = hf_tsv.evaluate(zoo / "base", {"file": str(file)}).tasks["file"]
    assert local["confusion"] == report.tasks["new"]["confusion"] and local["revision"] is None


def test_without_a_connection_the_cache_serves(hub: Hub, zoo: Path, tmp_path: Path) -> None:
    add_dataset(hub, "org/data", tmp_path, seed=7)
    words = ["evaluate", zoo / "base", "--task", "a=org/data", "--json"]
    first = run(*words).json
    done = run_process(*words, HF_HUB_OFFLINE="1")
    assert done.code == 0, done.err
    assert done.json["tasks"]["a"]["confusion"] == first["tasks"]["a"]["confusion"]


def test_a_configuration_of_a_dataset(hub: Hub, tmp_path: Path) -> None:
    configs = [
        {"config_name": name, "data_files": [{"split": "test", "path": f"{name}/*.parquet"}]}
        for name in ("small", "large")
    ]
    card = f"---\n{yaml.safe_dump({'configs': configs})}---\n"
    files = {f"{name}/0.parquet": parquet(tmp_path, count=n) for name, n in
             (("small", 6), ("large", 9))}  # fmt: skip
    hub.add_repo("org/both", {"README.md": card, **files}, kind="datasets")
    for name, count in (("small", 6), ("large", 9)):
        task = EvaluationTask.parse(f"a=org/both:{name}")
        assert load(task).total == count
    with pytest.raises(
        DataError, match=r"a: org/both has several configurations: small, large.*org/both:"
    ):
        load(EvaluationTask.parse("a=org/both"))
    with pytest.raises(
        DataError, match=r"a: org/both has no configuration 'medium'.*It has small, large"
    ):
        load(EvaluationTask.parse("a=org/both:medium"))


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (EvaluationTask("a", "org/data", split="nowhere"), "no split 'nowhere'.*It has test"),
        (EvaluationTask("a", "org/data", label="kind"), "no column 'kind'.*It has image, label"),
        (EvaluationTask("a", "org/data", image="jpg"), "no column 'jpg'.*It has image, label"),
        (EvaluationTask("a", "org/data", classes=("x", "y")), "2 names for the 3 classes"),
        (EvaluationTask("a", "org/data", "v9"), "org/data has no revision 'v9'"),
        (EvaluationTask("a", "org/gone"), "org/gone does not exist"),
        (EvaluationTask("a", "org/secret"), "cannot be read|does not exist"),
        (EvaluationTask("a", "org/none"), "cannot be read"),
        (EvaluationTask("a", "org/empty"), "empty"),
    ],
)
def test_what_is_wrong_with_a_dataset_is_said_with_the_task(
    hub: Hub, tmp_path: Path, task: EvaluationTask, said: str
) -> None:
    add_dataset(hub, "org/data", tmp_path)
    add_dataset(hub, "org/empty", tmp_path, count=0)
    hub.add_repo("org/none", {"README.md": "---\nlicense: mit\n---\n"}, kind="datasets")
    hub.add_repo("org/secret", {"x.csv": "a"}, kind="datasets", private=True)
    with pytest.raises(DataError, match=said) as error:
        load(task, token="hf_read")
    assert error.value.message.startswith("a: ") and error.value.hint


def test_a_corrupt_image_costs_its_own_task_only(hub: Hub, zoo: Path, tmp_path: Path) -> None:
    import datasets

    add_dataset(hub, "org/good", tmp_path)
    rows = datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"))
    rows = rows.cast_column("image", datasets.Image(decode=False))
    damaged = [{"bytes": b"GIF89a", "path": None} if i == 4 else row["image"]
               for i, row in enumerate(rows)]  # fmt: skip
    label = datasets.ClassLabel(names=list(CLASSES))
    bad = datasets.Dataset.from_dict(
        {"image": damaged, "label": rows["label"]},
        features=datasets.Features({"image": datasets.Image(), "label": label}),
    )
    bad.to_parquet(tmp_path / "bad.parquet")
    hub.add_repo("org/bad", {"test.parquet": tmp_path / "bad.parquet"}, kind="datasets")
    report = hf_tsv.evaluate(zoo / "base", {"bad": "org/bad", "good": "org/good"}, batch_size=5)
    assert list(report.tasks) == ["good"] and list(report.errors) == ["bad"]
    assert report.errors["bad"].startswith("bad: image 4 of the split test cannot be read")


def test_labels_may_be_yes_or_no(tmp_path: Path, zoo: Path) -> None:
    import datasets

    parquet(tmp_path, count=6)
    rows = datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet")).remove_columns("label")
    rows.add_column("label", [True, False] * 3).to_parquet(tmp_path / "tumours.parquet")
    task = EvaluationTask("a", str(tmp_path / "tumours.parquet"), classes=("healthy", "tumour"))
    found = hf_tsv.evaluate(zoo / "base", [task]).tasks["a"]
    assert [sum(row) for row in found["confusion"]] == [3, 3]


def test_columns_and_names_on_the_command_line(hub: Hub, zoo: Path, tmp_path: Path) -> None:
    add_dataset(hub, "org/data", tmp_path, image="picture", label="kind", names=("0", "1", "2"))
    names = tmp_path / "names.txt"
    names.write_text("\n".join(CLASSES) + "\n")
    words = ["--task", "a=org/data", "--image-column", "picture", "--label-column", "kind",
             "--classes", names, "--json"]  # fmt: skip
    found = run("evaluate", zoo / "base", *words).json["tasks"]["a"]
    assert found["classes"] == list(CLASSES) and found["images"] == 12
    base = ("--base-model", zoo / "base")
    done = run("sweep", *base, "--reference", f"a={zoo / 'vision'}", *words)
    assert done.code == 0 and list(done.json["tasks"]) == ["a"], done.err
    file = tmp_path / "rows.parquet"  # the same rows, which are no test images there
    merge = [zoo / "vision", zoo / "flat", *base, "-o", tmp_path / "merged", *words]
    merge[merge.index("a=org/data")] = f"a={file}"
    tuning = run("tune", *merge, "--alphas", "0:1:1", "--split", "test").json["tuning"]
    assert list(tuning["images"]) == ["a"]
    names.write_text("cat\n\ndog\n")
    done = run("evaluate", zoo / "base", *words)
    assert done.code == 2 and "names.txt is empty or has an empty line" in done.err


# Suites

PAPER = {"source": "the paper", "origin": "arXiv 1", "fine_tunes": "its", "comparable": False}


@pytest.fixture
def fake_suite(hub: Hub, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A suite of two tasks, which lie on the loopback Hub."""
    hub.add_repo("org/base", zoo / "base")
    for seed, task in enumerate(("pets", "birds"), start=3):
        folder = clips.make_fine_tune(zoo / "base", tmp_path / task, seed)
        hub.add_repo(f"org/clip_{task}", folder)
        add_dataset(hub, f"org/{task}", tmp_path, seed=100 * seed, count=10 * seed)
    folder = tmp_path / "suites"
    folder.mkdir()
    task = {"split": "test", "templates": ["a {}.", "the {}."], "classes": list(CLASSES)}
    tasks = {name: {"dataset": f"org/{name}", **task} for name in ("pets", "birds")}
    (folder / "tasks.yaml").write_text(yaml.safe_dump(tasks))
    bench = {"source": "A bench", "origin": "org/bench", "fine_tunes": "org/*", "comparable": True}
    published = {
        1: {"bench": {"TSV-Merge": 81.25}, "paper": {"TSV-Merge": [90.5, 99.25]}},
        2: {"paper": {"zero-shot": 12.5}},
    }
    model = {"base_model": "org/base", "fine_tunes": "org/clip_{}", "published": published}
    sources = {"bench": bench, "paper": PAPER}
    content = {"sources": sources, "tasks": ["pets", "birds"], "models": {"tiny": model}}
    (folder / "suites.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(suites, "FOLDER", folder)
    return folder


def test_a_suite_names_tasks_base_and_fine_tunes(fake_suite: Path) -> None:
    report = hf_tsv.evaluate("org/clip_pets", suite="tiny-2", limit=7)
    assert list(report.tasks) == ["pets", "birds"]
    found = report.tasks["pets"]
    assert found["reference"]["ref"] == "org/clip_pets" and found["normalised"] == 1.0
    assert (found["images"], found["total"], found["templates"]) == (7, 30, ["a {}.", "the {}."])
    assert report.suite == {
        "name": "tiny-2",
        "tasks": ["pets", "birds"],
        "accuracy": report.accuracy,
        "normalised": report.normalised,
        "published": [PAPER | {"rows": {"zero-shot": {"accuracy": 0.125}}}],
    }


def test_a_task_beside_a_suite_does_not_count_in_its_means(fake_suite: Path) -> None:
    more = EvaluationTask("more", "org/birds", classes=("emu", "cat", "dog"))
    report = hf_tsv.evaluate("org/clip_pets", [more], suite="tiny-1", references={})
    assert list(report.tasks) == ["pets", "more"] and report.normalised is None
    assert report.suite is not None
    assert report.suite["accuracy"] == report.tasks["pets"]["accuracy"]
    rows = {"TSV-Merge": {"accuracy": 0.905, "normalised": 0.9925}}
    assert report.suite["published"][1] == PAPER | {"rows": rows}


def test_the_benchmark_merges_evaluates_and_prints_ours_beside_the_rows_that_compare(
    fake_suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tiny-1", "--limit", "9", "--folder", str(tmp_path / "out")]
    paper.main(words)
    parts = [part.splitlines() for part in capsys.readouterr().out.split("\n\n")]
    bench, others = (part for part in parts if part[0].startswith("Published by "))
    assert bench[0] == (
        "Published by A bench (org/bench) for the fine-tunes of this suite (org/*);"
        " the rows to compare with:"
    )
    assert bench[3].split() == ["TSV-Merge", "81.2%"]
    assert bench[5].startswith("this model, 9 images of each  ") and bench[5].count("%") == 2
    assert others[0] == (
        "Published by the paper (arXiv 1) for other fine-tunes (its); not to compare with directly:"
    )
    assert others[3].split() == ["TSV-Merge", "90.5%", "99.2%"] and len(others) == 4
    assert (tmp_path / "out" / "tiny-1-tsv" / "model.safetensors").exists()
    assert (tmp_path / "out" / "tiny-1-tsv-results" / "evaluation.json").exists()


@pytest.mark.parametrize("model", ["vit-b-32", "vit-b-16", "vit-l-14"])
def test_suites_that_are_shipped(model: str) -> None:
    counts = {"vit-b-32": "base-patch32", "vit-b-16": "base-patch16", "vit-l-14": "large-patch14"}
    tasks: tuple[EvaluationTask, ...] = ()
    for count in (8, 14, 20):
        suite = suites.named(f"{model}-{count}")
        assert suite.base_model == f"openai/clip-vit-{counts[model]}"
        assert len(suite.tasks) == len(suite.references) == count
        assert suite.tasks[: len(tasks)] == tasks  # the larger suites add to the smaller
        tasks = suite.tasks
        for task in tasks:
            assert suite.references[task.name].endswith(f"{counts[model]}_{task.name}")
            assert len(set(task.classes)) == len(task.classes) > 1 and task.templates and task.split
        bench, paper = suite.published
        assert (bench.comparable, paper.comparable) == (True, False)
        assert all(r.startswith(bench.fine_tunes[:-1]) for r in suite.references.values())
        rows = paper.rows
        assert len(rows) == 7 and rows["TSV-Merge"]["normalised"] > rows["TSV-Merge"]["accuracy"]
        for rows in (bench.rows, paper.rows):  # every merge is between the two
            lowest, highest = rows["zero-shot"]["accuracy"], rows["fine-tuned"]["accuracy"]
            assert all(lowest <= row["accuracy"] <= highest for row in rows.values())
    assert len(next(t for t in tasks if t.name == "sun397").classes) == 397


def test_a_merge_of_the_public_fine_tunes_has_rows_of_its_own() -> None:
    found = {
        (name, source.source): source.rows["TSV-Merge"]["accuracy"]
        for name in ("vit-b-32-8", "vit-b-32-20", "vit-l-14-8")
        for source in suites.named(name).published
        if "TSV-Merge" in source.rows
    }
    assert found == {
        ("vit-b-32-8", "FusionBench"): 0.8306,
        ("vit-b-32-8", "the paper"): 0.8586,
        ("vit-b-32-20", "FusionBench"): 0.7323,
        ("vit-b-32-20", "the paper"): 0.7707,
        ("vit-l-14-8", "the paper"): 0.9298,  # nobody published one for the public fine-tunes
    }


def test_a_suite_that_is_not_there_names_those_that_are(zoo: Path) -> None:
    with pytest.raises(RecipeError, match=r"no suite 'vit-b-32-9'.*vit-b-32-8, .*vit-l-14-20"):
        hf_tsv.evaluate(zoo / "base", suite="vit-b-32-9")
    with pytest.raises(HfTsvError, match=r"dtd is given twice"):
        hf_tsv.evaluate(zoo / "base", {"dtd": "org/x"}, suite="vit-b-32-8")


def test_a_suite_needs_a_model() -> None:
    done = run("evaluate", "--suite", "vit-b-32-8")
    assert done.code == 2 and "REF" in done.err and done.out == ""
