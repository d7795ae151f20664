"""Models that route: the rule against NumPy, the towers against merges, the folder and its file."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import clips
import numpy as np
import pytest
import torch
from cli import copied, ended
from cli import hf_tsv as run
from forks import fork
from hub import Hub
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file

import hf_tsv
from hf_tsv.checkpoints.formats.routing import Routing
from hf_tsv.checkpoints.names import ROUTING_FILE
from hf_tsv.compression import beside
from hf_tsv.models.routed import Router
from hf_tsv.routing import scores
from hf_tsv.routing.rule import Rule, chosen_layers, default_layers
from hf_tsv.system.errors import CheckpointError, HfTsvError, UsageError

SEEDS = {"a": 11, "b": 12, "c": 13, "d": 14}
Z = "zero-shot-image-classification"


@pytest.fixture(scope="module")
def world_of_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and four full fine-tunes of it."""
    return clips.make_tasks(tmp_path_factory.mktemp("tasks"), SEEDS, "full", "vision")


@pytest.fixture(scope="module")
def routed(world_of_tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("routed") / "routed"
    hf_tsv.route([world_of_tasks / name for name in SEEDS], base_model=world_of_tasks / "base",
                 output=output, temperature=3, threshold=0.28, progress=False)  # fmt: skip
    return output


@pytest.fixture(scope="module")
def model(routed: Path) -> Any:
    return hf_tsv.load_model(routed, progress=False)


@torch.no_grad()
def features(model: Any, images: torch.Tensor) -> torch.Tensor:
    return model.get_image_features(pixel_values=images).pooler_output


def tokens_of(base: Path, images: torch.Tensor) -> dict[str, np.ndarray]:
    """Class tokens at the inputs of the layers of the base model, from transformers' own outputs.

    In float64: layer norms and MLPs are computed here from the hidden states.
    """
    from transformers import CLIPModel

    tower = clips.load(CLIPModel, base).double().vision_model.eval()
    with torch.no_grad():
        states = tower(pixel_values=images.double(), output_hidden_states=True).hidden_states
        found = {}
        for i, block in enumerate(tower.encoder.layers):
            name, state = f"vision_model.encoder.layers.{i}", states[i]
            queries = block.layer_norm1(state)
            found[f"{name}.self_attn.q_proj"] = queries
            state = state + block.self_attn(queries, attention_mask=None)[0]
            found[f"{name}.mlp.fc1"] = inner = block.layer_norm2(state)
            found[f"{name}.mlp.fc2"] = block.mlp.activation_fn(block.mlp.fc1(inner))
    return {name: token[:, 0].numpy() for name, token in found.items()}


def test_the_scores_are_the_equations_in_float64(
    world_of_tasks: Path, routed: Path, model: Any
) -> None:
    images = clips.patterned(9)
    said = json.loads((routed / ROUTING_FILE).read_text())
    tokens, total = tokens_of(world_of_tasks / "base", images), 0.0
    for layer in said["rule"]["layers"]:
        x = tokens[layer] / np.linalg.norm(tokens[layer], axis=1, keepdims=True)
        residuals = []
        for task in said["tasks"]:
            factors = load_file(routed / task["folder"] / "task_factors.safetensors")
            V = factors[f"{layer}.weight.Vh"].double().numpy()[: min(x.shape[1], 32) // 4]
            residuals.append(np.linalg.norm(x - x @ V.T @ V, axis=1))
        R = np.stack(residuals, axis=1)
        total = total + (R - R.mean(axis=1, keepdims=True)) / R.std(axis=1, keepdims=True)
    powers = np.exp(-total / said["rule"]["temperature"])
    expected = powers / powers.sum(axis=1, keepdims=True)
    found = model.route(images)
    np.testing.assert_allclose(found.scores.numpy(), expected, atol=1e-4)
    for row, own in zip(expected, found.chosen, strict=True):
        best = np.argsort(-row)[:3]
        assert own == tuple(sorted(i for n, i in enumerate(best) if n == 0 or row[i] >= 0.28))


def test_every_image_goes_through_the_merge_of_its_tasks(
    world_of_tasks: Path, routed: Path, model: Any, tmp_path: Path
) -> None:
    """One task, two and three, each against `hf_tsv.merge` of the factors beside the model."""
    images = clips.patterned(40)
    route, found = model.route(images), features(model, images)
    sets = set(route.tasks)
    assert {len(own) for own in sets} >= {1, 2}
    merged: dict[tuple[str, ...], Any] = {}
    for row, own in enumerate(route.tasks):
        if own not in merged:
            folder = tmp_path / "-".join(own)
            factors = [routed / "tasks" / name for name in own]
            if len(own) == 1:
                hf_tsv.reconstruct(factors[0], output=folder, progress=False)
            else:
                hf_tsv.merge(factors, output=folder, progress=False)
            merged[own] = hf_tsv.load_model(folder, progress=False)
        expected = features(merged[own], images[row : row + 1])[0]
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-5)


def test_a_batch_gives_what_single_images_give(model: Any) -> None:
    images = clips.patterned(12, 1)
    together, route = features(model, images), model.route(images)
    assert len(set(route.chosen)) > 1
    for i in range(len(images)):
        one = images[i : i + 1]
        assert model.route(one).chosen == [route.chosen[i]]
        torch.testing.assert_close(features(model, one)[0], together[i], rtol=0, atol=1e-5)


def test_all_outputs_are_in_the_order_of_the_images(model: Any) -> None:
    images = clips.patterned(6, 2)
    with torch.no_grad():
        found = model.get_image_features(pixel_values=images, output_hidden_states=True)
        for i in range(6):
            own = model.get_image_features(
                pixel_values=images[i : i + 1], output_hidden_states=True
            )
            assert found.tasks[i] == own.tasks[0]
            for state, alone in zip(found.hidden_states, own.hidden_states, strict=True):
                torch.testing.assert_close(state[i], alone[0], rtol=0, atol=1e-5)


def test_all_tasks_are_served_by_the_merge(routed: Path, tmp_path: Path) -> None:
    folder = copied(routed, tmp_path / "routed")
    said = json.loads((folder / ROUTING_FILE).read_text())
    said["rule"] |= {"threshold": 0, "max_tasks": 4}
    (folder / ROUTING_FILE).write_text(json.dumps(said))
    from transformers import CLIPModel

    model, images = hf_tsv.load_model(folder, progress=False), clips.patterned(3)
    plain = clips.load(CLIPModel, folder)
    torch.testing.assert_close(features(model, images), features(plain, images))
    assert model.router.kept == []


def test_transformers_alone_loads_the_merge(
    world_of_tasks: Path, routed: Path, model: Any, tmp_path: Path
) -> None:
    from transformers import CLIPModel, pipeline

    hf_tsv.merge([world_of_tasks / name for name in SEEDS], output=tmp_path / "merged",
                 base_model=world_of_tasks / "base", progress=False)  # fmt: skip
    plain, merged = load_file(routed / "model.safetensors"), tmp_path / "merged"
    for name, tensor in load_file(merged / "model.safetensors").items():
        assert torch.equal(plain[name], tensor), name
    loaded = clips.load(CLIPModel, routed)
    text = {"input_ids": torch.tensor([[256, 3, 4, 257]])}
    with torch.no_grad():
        ours = model.get_text_features(**text).pooler_output
        torch.testing.assert_close(loaded.get_text_features(**text).pooler_output, ours)
    answers = pipeline(Z, model=str(routed))(picture(), candidate_labels=["a", "b"])
    assert {answer["label"] for answer in answers} == {"a", "b"}


def picture(seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_answers_of_the_pipeline_name_the_tasks(routed: Path, batch_size: int) -> None:
    pipe = hf_tsv.pipeline(Z, routed, progress=False)
    images = [picture(seed) for seed in range(5)]
    answers = pipe(images, candidate_labels=["x", "y"], batch_size=batch_size)
    shown = pipe.image_processor(images, return_tensors="pt")["pixel_values"]
    for answer, own in zip(answers, pipe.model.route(shown).tasks, strict=True):
        assert [entry["tasks"] for entry in answer] == [list(own)] * 2
        assert sum(entry["score"] for entry in answer) == pytest.approx(1)


def test_features_of_the_vision_tower(routed: Path, model: Any) -> None:
    tower = hf_tsv.load_model(routed, kind="image-feature-extraction", progress=False)
    images = clips.patterned(4)
    with torch.no_grad():
        found = tower(pixel_values=images)
        expected = model.get_image_features(pixel_values=images).last_hidden_state
    torch.testing.assert_close(found.last_hidden_state, expected)
    assert found.tasks == model.route(images).tasks
    pipe = hf_tsv.pipeline("image-feature-extraction", routed, progress=False)
    assert len(pipe(picture())[0][0]) == 32


def test_the_cache_holds_the_towers_used_last(routed: Path) -> None:
    model = hf_tsv.load_model(routed, progress=False)
    router: Router = model.router
    router.max_towers = 2
    seen = []
    for image in clips.patterned(20, 3).split(1):
        features(model, image)
        (own,) = model.route(image).tasks
        seen = [*(name for name in seen if name != own), own]
        assert router.kept == seen[-2:]
    assert len(set(seen)) > 2
    router.max_towers = 1
    assert router.kept == seen[-1:]
    model.to(torch.float64)
    assert router.kept == []
    with pytest.raises(ValueError, match="max_towers"):
        router.max_towers = 0


def test_towers_that_are_kept_have_a_number_of_bytes_too(
    routed: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(weight.nbytes for weight in model.router.first.parameters())
    for most, count in ((10 * size, 8), (3 * size - 1, 2), (size - 1, 1)):
        monkeypatch.setattr("hf_tsv.models.routed.MAX_BYTES", most)
        assert hf_tsv.load_model(routed, progress=False).router.max_towers == count


def test_a_model_that_is_moved_to_another_type_routes_alike(routed: Path, model: Any) -> None:
    images = clips.patterned(5)
    double = hf_tsv.load_model(routed, dtype="float32", progress=False).to(torch.float64)
    assert double.route(images).chosen == model.route(images).chosen
    found = features(double, images.double())
    torch.testing.assert_close(found.float(), features(model, images), rtol=0, atol=1e-5)


def test_towers_made_while_nothing_is_recorded_can_be_used_later(routed: Path) -> None:
    model, image = hf_tsv.load_model(routed, progress=False), clips.patterned(1).requires_grad_()
    with torch.inference_mode():
        features(model, image)
    model.get_image_features(pixel_values=image).pooler_output.sum().backward()
    assert image.grad is not None


def test_images_of_another_size(model: Any) -> None:
    large = torch.nn.functional.interpolate(clips.patterned(3), 48)
    with torch.no_grad():
        found = model.get_image_features(large, True)
        for i, own in enumerate(found.tasks):
            tower = model.router.tower(tuple(map(list(SEEDS).index, own)))
            alone = tower(large[i : i + 1], interpolate_pos_encoding=True)
            torch.testing.assert_close(found.pooler_output[i], alone.pooler_output[0])


def test_a_copy_routes_by_itself(model: Any) -> None:
    images = clips.patterned(4)
    expected, kept = features(model, images), list(model.router.kept)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.router.kept == [] and model.router.kept == kept
        torch.testing.assert_close(features(twin, images), expected)
        twin.router.max_towers = 1
    assert model.router.kept == kept


def test_a_routed_model_is_saved_as_its_folder(model: Any, tmp_path: Path) -> None:
    for call in (lambda: model.save_pretrained(tmp_path / "saved"), lambda: model.push_to_hub("x")):
        with pytest.raises(UsageError, match="copy its folder"):
            call()
    assert not (tmp_path / "saved").exists()


def test_a_copy_holds_no_token(routed: Path) -> None:
    secret = "hf_not_to_be_seen"
    model = hf_tsv.load_model(routed, token=secret, progress=False)
    assert secret.encode() not in pickle.dumps(model)


def test_a_loaded_model_goes_with_the_process_anywhere(
    routed: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = clips.patterned(6)
    monkeypatch.chdir(routed.parent)
    here = hf_tsv.load_model(routed.name, progress=False)
    monkeypatch.chdir("/")
    for one in (here, copy.deepcopy(here)):
        torch.testing.assert_close(features(one, images), features(model, images))


def test_the_same_command_gives_the_same_bytes(
    world_of_tasks: Path, routed: Path, tmp_path: Path
) -> None:
    hf_tsv.route([world_of_tasks / name for name in SEEDS], base_model=world_of_tasks / "base",
                 output=tmp_path / "again", temperature=3, threshold=0.28,
                 progress=False)  # fmt: skip
    names = {p.relative_to(routed) for p in routed.rglob("*") if p.is_file()}
    again = {p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*")}
    assert names <= again and not any(name.name.startswith(".") for name in again)
    for name in names:
        assert (routed / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_the_report_counts_the_bytes_of_the_folder(world_of_tasks: Path, tmp_path: Path) -> None:
    """Weights of the merge, and r (m + n + 1) numbers of two bytes for each matrix and task."""
    done = hf_tsv.route([world_of_tasks / name for name in "abc"], output=tmp_path / "r",
                        base_model=world_of_tasks / "base", progress=False)  # fmt: skip
    expected = (tmp_path / "r" / "model.safetensors").stat().st_size
    assert done.merged_bytes == expected
    for task in done.tasks.values():
        config = json.loads((tmp_path / "r" / task["folder"] / "tsv_config.json").read_text())
        own = 0
        for weight in config["weights"].values():
            if weight["stored"] == "factors":
                m, n = weight["shape"]
                assert weight["rank"] == min(m, n) // 3
                own += 2 * weight["rank"] * (m + n + 1)
            elif weight["stored"] == "dense":
                own += 2 * int(np.prod(weight["shape"]))
        stored = load_file(tmp_path / "r" / task["folder"] / "task_factors.safetensors")
        assert task["bytes"] == own == sum(tensor.nbytes for tensor in stored.values())
        expected += own
    assert done.output_bytes == expected


def test_task_factors_are_copied_and_the_rest_is_compressed(
    world_of_tasks: Path, tmp_path: Path
) -> None:
    hf_tsv.compress(world_of_tasks / "a", base_model=world_of_tasks / "base", rank=5,
                    output=tmp_path / "a-tsv", progress=False)  # fmt: skip
    done = hf_tsv.route([tmp_path / "a-tsv", world_of_tasks / "b"], output=tmp_path / "routed",
                        base_model=world_of_tasks / "base", progress=False)  # fmt: skip
    assert list(done.tasks) == ["a", "b"]
    for name in ("tsv_config.json", "task_factors.safetensors"):
        copy = tmp_path / "routed" / "tasks" / "a" / name
        assert copy.read_bytes() == (tmp_path / "a-tsv" / name).read_bytes()
    said = json.loads((tmp_path / "routed" / "tasks" / "b" / "tsv_config.json").read_text())
    assert said["rank_rule"] == {"rank_fraction": 0.5} and said["factor_dtype"] == "BF16"
    assert done.tasks["b"]["bytes"] == said["factors_bytes"]
    model = hf_tsv.load_model(tmp_path / "routed", progress=False)
    assert model.router.directions_0.shape[1] == 5  # as many of each task
    factors = hf_tsv.TaskFactors.from_pretrained(tmp_path / "routed" / "tasks" / "b")
    assert factors.update("vision_model.encoder.layers.0.mlp.fc1.weight").rank > 0


def test_to_and_from_the_hub(world: Path, hub: Hub) -> None:
    hf_tsv.route(["org/vision", "org/full", "org/flat"], push_to="me/routed", progress=False)
    files = hub.files("me/routed")
    assert {f"tasks/{n}/task_factors.safetensors" for n in ("vision", "full", "flat")} <= set(files)
    said = json.loads(files[ROUTING_FILE])
    assert said["base_model"]["ref"] == "org/base" and len(said["base_model"]["revision"]) == 40
    assert said["tasks"][0]["source"]["ref"] == "org/vision"
    model = hf_tsv.load_model("me/routed", progress=False)
    assert features(model, clips.patterned(2)).shape == (2, 24)
    assert 'pipeline("zero-shot-image-classification", "me/routed")' in files["README.md"].decode()
    hf_tsv.route(["org/vision", "org/full"], output=world / "r", progress=False)
    hf_tsv.push(world / "r", "me/routed", progress=False)
    assert "tasks/flat/task_factors.safetensors" not in hub.files("me/routed")  # of the first one


def test_factors_on_the_hub_need_not_be_copied(world: Path, hub: Hub, tmp_path: Path) -> None:
    for name in ("vision", "full"):
        hf_tsv.compress(f"org/{name}", push_to=f"me/{name}-tsv", progress=False)
    refs = ["me/vision-tsv", "me/full-tsv", "org/flat"]
    done = hf_tsv.route(refs, push_to="me/routed", reference_factors=True, progress=False)
    copied_ = hf_tsv.route(refs, output=tmp_path / "copied", progress=False)
    commit = done.inputs[0]["revision"]
    assert done.tasks["vision"]["folder"] is None
    assert done.tasks["vision"]["factors"] == f"me/vision-tsv@{commit}"
    assert done.tasks["flat"]["folder"] == "tasks/flat"
    lacking = sum(copied_.tasks[name]["bytes"] for name in ("vision", "full"))
    assert done.output_bytes == copied_.output_bytes - lacking
    assert (done.elsewhere_bytes, copied_.elsewhere_bytes) == (lacking, 0)
    assert done.ratio == copied_.ratio
    files = hub.files("me/routed")
    assert [n for n in files if n.endswith("tsv_config.json")] == ["tasks/flat/tsv_config.json"]
    said = json.loads(files[ROUTING_FILE])["tasks"]
    assert said[0]["factors"] == {"ref": "me/vision-tsv", "revision": commit}
    assert "folder" not in said[0]
    assert f"me/vision-tsv@{commit}, not copied" in files["README.md"].decode()
    model, images = hf_tsv.load_model("me/routed", progress=False), clips.patterned(5)
    other = hf_tsv.load_model(tmp_path / "copied", base_model="org/base", progress=False)
    assert model.route(images).tasks == other.route(images).tasks
    torch.testing.assert_close(features(model, images), features(other, images))
    hf_tsv.route(refs, output=tmp_path / "r", reference_factors=True, progress=False)
    hf_tsv.push(tmp_path / "r", "me/pushed", progress=False)
    assert hub.files("me/pushed")[ROUTING_FILE] == files[ROUTING_FILE]


def test_factors_that_are_finished_are_not_made_again(
    zoo: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, whole = [], beside.compressed

    def noting(job: Any, work: Path, *rest: Any, **more: Any) -> Any:
        made.append(job.options.dtype)
        return whole(job, work, *rest, **more)

    monkeypatch.setattr(beside, "compressed", noting)
    refs, more = [zoo / "vision", zoo / "full"], {"base_model": zoo / "base", "progress": False}
    for dtype, count in (("bfloat16", 2), ("bfloat16", 0), ("float16", 2)):
        made.clear()
        hub.fail("/commit/", 403)
        with pytest.raises(HfTsvError, match="complete in"):
            hf_tsv.route(refs, push_to="me/r", dtype=dtype, **more)
        assert made == [dtype] * count
    made.clear()
    hub.fail("/commit/", 403)
    (waiting,) = (Path(constants.HF_HOME) / "hf-tsv" / "unpushed").glob("*/r/tasks")
    weights = waiting / "full" / "task_factors.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(HfTsvError, match="complete in"):
        hf_tsv.route(refs, push_to="me/r", dtype="float16", **more)
    assert made == ["float16"]  # what has been damaged
    made.clear()
    (waiting,) = (Path(constants.HF_HOME) / "hf-tsv" / "unpushed").glob("*/r/tasks")
    (waiting / "other").mkdir()
    (waiting / ".DS_Store").write_bytes(b"0")
    (waiting / "other" / "tsv_config.json").write_text("{}")
    hf_tsv.route(refs, push_to="me/r", dtype="float16", **more)
    assert made == []
    hf_tsv.route(refs, output=tmp_path / "r", dtype="float16", **more)
    pushed = hub.files("me/r")
    assert not any(name.startswith("tasks/other") for name in pushed)
    assert not list(waiting.parents[1].glob("*"))
    for path in (tmp_path / "r" / "tasks").rglob("*.safetensors"):
        assert pushed[path.relative_to(tmp_path / "r").as_posix()] == path.read_bytes()


def test_a_warm_cache_serves_an_offline_run(world: Path, hub: Hub) -> None:
    hf_tsv.route(["org/vision", "org/full"], push_to="me/routed", progress=False)
    names = hf_tsv.load_model("me/routed", progress=False).router.names
    code = (
        "import hf_tsv, torch\n"
        "model = hf_tsv.load_model('me/routed', progress=False)\n"
        "model.get_image_features(torch.zeros(1, 3, 32, 32))\n"
        "print(','.join(model.router.names))"
    )
    done = ended(fork("-c", code, environment={**os.environ, "HF_HUB_OFFLINE": "1"}))
    assert done.code == 0, done.err
    assert done.out.split() == [",".join(names)]


def test_evaluate_routes(world_of_tasks: Path, routed: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for label in ("a", "b"):
        (data / label).mkdir(parents=True)
        for i in range(3):
            picture(i + 10 * (label == "a")).save(data / label / f"{i}.png")
    report = hf_tsv.evaluate(routed, {"it": str(data)}, templates=["{}"], progress=False)
    assert report.tasks["it"]["images"] == 6
    pipe = hf_tsv.pipeline(Z, routed, progress=False)
    images = [picture(i + 10 * (label == "a")) for label in ("a", "b") for i in range(3)]
    route = pipe.model.route(pipe.image_processor(images, return_tensors="pt")["pixel_values"])
    sent = Counter(" + ".join(own) for own in route.tasks)
    assert report.tasks["it"]["sent_to"] == sent
    done = run("evaluate", routed, "--task", f"it={data}", "--template", "{}")
    most = sent.most_common(1)[0]
    assert f"{most[0]} {most[1] / 6:.0%}" in done.out, done.out


# The command line


def test_the_command(world_of_tasks: Path, tmp_path: Path) -> None:
    refs = [world_of_tasks / name for name in ("a", "b")]
    words = ["route", *refs, "--base-model", world_of_tasks / "base", "-o", tmp_path / "r"]
    words += ["--layer", "*.mlp.fc1", "--max-tasks", "1"]
    plan = run(*words, "--dry-run")
    assert plan.code == 0 and not (tmp_path / "r").exists(), plan.err
    assert "a  " in plan.out and "tasks/a" in plan.out
    done = run(*words, "--json")
    assert done.code == 0, done.err
    assert done.json["rule"]["layers"] == [
        f"vision_model.encoder.layers.{i}.mlp.fc1" for i in (0, 1)
    ]
    assert done.json["rule"]["max_tasks"] == 1
    assert done.json["tasks"]["a"]["folder"] == "tasks/a"
    found = run("inspect", tmp_path / "r")
    assert found.code == 0 and "tasks/a" in found.out and "routed merge" in found.out, found.out
    told = run("inspect", tmp_path / "r", "--json").json
    assert told["kind"] == "merge"
    assert [task["name"] for task in told["routing"]["tasks"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--temperature", "0"], "--temperature must be at least 1e-06"),
        (["--threshold", "1"], "--threshold must be from 0 to below 1"),
        (["--max-tasks", "0"], "--max-tasks must be at least 1"),
        (["--layer", "7.mlp.fc1"], "matches none of"),
    ],
)
def test_wrong_options(world_of_tasks: Path, tmp_path: Path, words: list[str], said: str) -> None:
    refs = [world_of_tasks / name for name in ("a", "b")]
    base = ["--base-model", world_of_tasks / "base", "-o", tmp_path / "r"]
    done = run("route", *refs, *base, *words)
    assert done.code == 2 and said in done.err, done.err
    assert list(tmp_path.iterdir()) == []


def test_one_task_is_no_choice(world_of_tasks: Path, tmp_path: Path) -> None:
    done = run("route", world_of_tasks / "a", "-o", tmp_path / "r")
    assert done.code == 2 and "there is 1" in done.err


def test_text_towers_are_not_routed(zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Not every task has factors"):
        hf_tsv.route([zoo / "text", zoo / "vision"], base_model=zoo / "base",
                     output=tmp_path / "r", progress=False)  # fmt: skip
    assert list(tmp_path.iterdir()) == []


# The rule


def test_layers_by_default_are_in_the_upper_two_thirds() -> None:
    kinds = ("self_attn.k_proj", "mlp.fc2", "self_attn.q_proj", "mlp.fc1")
    layers = [f"vision_model.encoder.layers.{i}.{kind}" for i in range(12) for kind in kinds]
    found = default_layers(layers)
    assert [name.split(".", 3)[3] for name in found[:4]] == [
        "4.self_attn.q_proj", "4.mlp.fc1", "4.mlp.fc2", "5.self_attn.q_proj",
    ]  # fmt: skip
    assert len(found) == 24
    assert chosen_layers(["9.mlp.fc1"], layers) == ("vision_model.encoder.layers.9.mlp.fc1",)
    with pytest.raises(UsageError, match="matches none of 48 layers"):
        chosen_layers(["mlp"], layers)


def test_a_layer_that_tells_no_tasks_apart_is_nothing() -> None:
    equal, other = torch.full((2, 3), 0.5), torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])
    both = scores.scores([equal + 1e-9, other], 1.0)
    torch.testing.assert_close(both, scores.scores([other], 1.0))
    assert scores.choose(both, 0.0, 2) == [(0, 1), (1, 2)]


# The file


def damaged(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with another value at a path, or without it where the value is `...`."""
    made = json.loads(json.dumps(content))
    *steps, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = made
    for step in steps:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return made


LAYER = "vision_model.encoder.layers.0.mlp.fc1"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format", "x"), ("format", ...), ("format_version", 0), ("format_version", 2),
        ("format_version", True), ("base_model", ...), ("base_model.ref", 3),
        ("base_model.revision", "main"), ("tasks", ...), ("tasks", {}), ("tasks.0", "a"),
        ("tasks.0.name", ""), ("tasks.0.name", "a/b"), ("tasks.0.name", "x" * 300),
        ("tasks.0.name", "a\x1b[0m"), ("tasks.0.name", "b"), ("tasks.0.folder", "../a"),
        ("tasks.0.folder", "/etc"), ("tasks.0.folder", "tasks/../.."), ("tasks.0.folder", "tasks"),
        ("tasks.0.folder", "tasks/a/b"), ("tasks.0.folder", "tasks/.."),
        ("tasks.0.folder", "tasks/.hidden"), ("tasks.0.folder", "tasks\\a"),
        ("tasks.0.factors", {}), ("tasks.0.factors", {"ref": "org/a", "revision": None}),
        ("tasks.0.factors", {"ref": "org/a", "revision": "main"}), ("tasks.0.factors", "org/a"),
        ("tasks.0.folder", "tasks/b"), ("tasks.0.source", ...), ("rule", ...), ("rule", []),
        ("rule.layers", []), ("rule.layers", LAYER), ("rule.layers", [LAYER, LAYER]),
        ("rule.layers", ["text_model.encoder.layers.0.mlp.fc1"]), ("rule.layers", [1]),
        ("rule.layers", ["vision_model.encoder.layers.00.mlp.fc1"]),
        ("rule.temperature", 0), ("rule.temperature", "1"), ("rule.temperature", True),
        ("rule.temperature", float("inf")), ("rule.temperature", 10**400),
        ("rule.threshold", -0.1), ("rule.threshold", 1), ("rule.threshold", None),
        ("rule.label_temperature", 0), ("rule.label_temperature", ...),
        ("rule.max_tasks", 0), ("rule.max_tasks", 1.5), ("rule.max_tasks", ...),
    ],
)  # fmt: skip
def test_a_hostile_description_is_refused(routed: Path, path: str, value: Any) -> None:
    said = json.loads((routed / ROUTING_FILE).read_text())
    with pytest.raises(CheckpointError, match=r"^owner"):
        Routing.from_dict(damaged(said, path, value), "owner")
    assert Routing.from_dict(said, "owner").names == tuple(SEEDS)


def test_an_unknown_key_is_ignored_and_one_task_is_refused(routed: Path) -> None:
    said = json.loads((routed / ROUTING_FILE).read_text())
    assert Routing.from_dict({**said, "later": 1}, "x") == Routing.from_dict(said, "x")
    with pytest.raises(CheckpointError, match="tasks in"):
        Routing.from_dict({**said, "tasks": said["tasks"][:1]}, "x")
    assert json.loads(Routing.from_dict(said, "x").to_json()) == said


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": "hf-tsv routing"}', "[" * 3000])
def test_what_is_no_description_is_refused(routed: Path, tmp_path: Path, text: str) -> None:
    folder = copied(routed, tmp_path / "r")
    (folder / ROUTING_FILE).write_text(text)
    for call in (hf_tsv.load_model, hf_tsv.inspect):
        with pytest.raises(HfTsvError):
            call(folder)


def test_a_layer_that_is_not_stored_as_factors_is_refused(routed: Path, tmp_path: Path) -> None:
    folder = copied(routed, tmp_path / "r")
    said = json.loads((folder / ROUTING_FILE).read_text())
    said["rule"]["layers"] = ["vision_model.encoder.layers.9.mlp.fc1"]
    (folder / ROUTING_FILE).write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match="is not stored as factors"):
        hf_tsv.load_model(folder, progress=False)


def test_lost_tasks_and_other_base_models_are_named(
    world_of_tasks: Path, routed: Path, tmp_path: Path
) -> None:
    folder = copied(routed, tmp_path / "r")
    shutil.rmtree(folder / "tasks" / "b")
    with pytest.raises(HfTsvError, match="tasks/b"):
        hf_tsv.load_model(folder, progress=False)
    with pytest.raises(CheckpointError, match="has lost"):
        hf_tsv.push(folder, "me/x", progress=False)
    other = clips.make_base(tmp_path / "other", seed=5)
    with pytest.raises(CheckpointError, match="belongs to the base model base"):
        hf_tsv.load_model(routed, base_model=other, progress=False)


@pytest.mark.parametrize("numbers", [{"temperature": -1}, {"threshold": 2}, {"max_tasks": "3"}])
def test_numbers_that_no_rule_can_have(numbers: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Rule((LAYER,), **numbers)
