"""What a reference holds, from headers alone, as API and command line."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import copied
from cli import hf_tsv as run
from cli import hf_tsv_process as run_process
from hub import Hub
from safetensors.torch import load_file, save_file

import hf_tsv


def sizes(folder: Path) -> tuple[int, int]:
    """Parameters and bytes of a checkpoint."""
    state = load_file(folder / "model.safetensors")
    return sum(t.numel() for t in state.values()), sum(t.nbytes for t in state.values())


@pytest.mark.parametrize(
    "kind, model_class, parts",
    [
        ("vision", "CLIPVisionModel", {"vision_model"}),
        ("flat", "CLIPVisionModel", {"vision_model"}),
        ("text", "CLIPTextModel", {"text_model"}),
        ("projection", "CLIPVisionModelWithProjection", {"vision_model", "visual_projection"}),
        ("base", "CLIPModel", {"vision_model", "text_model", "visual_projection",
                               "text_projection", "logit_scale"}),
    ],
)  # fmt: skip
def test_a_checkpoint_is_described(zoo: Path, kind: str, model_class: str, parts: set[str]) -> None:
    found = hf_tsv.inspect(zoo / kind)
    parameters, nbytes = sizes(zoo / kind)
    assert (found.kind, found.model_class) == ("checkpoint", model_class)
    assert found.parameters == parameters and set(found.parts) == parts
    assert sum(part["parameters"] for part in found.parts.values()) == parameters
    assert sum(counts["bytes"] for counts in found.dtypes.values()) == nbytes
    assert found.files == {"model.safetensors": (zoo / kind / "model.safetensors").stat().st_size}
    assert found.recipe is None and found.factors is None and found.unknown == []


def test_what_a_merge_would_do_is_what_it_does(zoo: Path) -> None:
    planned = hf_tsv.merge([zoo / "full", zoo / "vision"], base_model=zoo / "base", dry_run=True)
    found = hf_tsv.inspect(zoo / "base")
    assert set(found.tensors) == set(planned.treatments)
    for name, entry in planned.treatments.items():
        if entry.get("reason", "").startswith(("not a matrix", "excluded")):
            assert found.tensors[name]["reason"] == entry["reason"]
        if name.startswith("vision_model."):
            assert found.tensors[name]["merge"] == entry["treatment"]


def test_a_task_head_is_left_out(zoo: Path) -> None:
    found = hf_tsv.inspect(zoo / "classifier")
    assert found.model_class == "CLIPForImageClassification"
    assert found.tensors["classifier.weight"]["merge"] == "left out"
    assert found.parts["classifier"]["tensors"] == 2


def test_a_merge_shows_its_recipe(zoo: Path, tmp_path: Path) -> None:
    tasks = [zoo / "vision", zoo / "full"]
    hf_tsv.merge(tasks, base_model=zoo / "base", output=tmp_path / "m", alpha=0.5, progress=False)
    done = run_process("inspect", tmp_path / "m", "--json")
    assert done.code == 0, done.err
    assert done.json["kind"] == "merge"
    assert [item["ref"] for item in done.json["recipe"]["inputs"]] == ["vision", "full"]
    assert done.json["recipe"]["settings"]["alpha"] == 0.5
    text = run("inspect", tmp_path / "m")
    assert "tsv, α = 0.5" in text.out and "vision" in text.out


def test_factors_show_ranks_energy_and_bytes(zoo: Path, tmp_path: Path) -> None:
    made = hf_tsv.compress(
        zoo / "vision", base_model=zoo / "base", output=tmp_path / "f", rank=3, progress=False
    )
    found = hf_tsv.inspect(tmp_path / "f")
    assert (found.kind, found.base_model) == ("factors", ["base"])
    assert found.factors is not None
    assert found.factors["source"]["ref"] == "vision"
    assert found.factors["update_error"] == made.config.update_error
    for name, weight in made.config.weights.items():
        entry = found.tensors[name]
        assert (entry["stored"], entry["rank"]) == (weight.stored, weight.rank)
        assert entry["energy"] == weight.energy and entry["bytes"] == weight.bytes
    assert found.factors["bytes"] == sum(e["bytes"] for e in found.tensors.values())
    text = run("inspect", tmp_path / "f").out
    assert re.search(r"\bvision\b", text) and "of its update's energy" in text
    rows = [row.split(maxsplit=1) for row in text.splitlines()]
    assert ["stored", "13 low-rank matrices, 26 tensors in full, in F32"] in rows


def big(folder: Path) -> Path:
    """A vision checkpoint of 8 MB."""
    folder.mkdir()
    names = [f"vision_model.encoder.layers.{i}.mlp.fc1.weight" for i in range(2)]
    save_file({name: torch.zeros(1024, 1024) for name in names}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "clip_vision_model"}')
    return folder


def test_only_headers_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("org/big", big(tmp_path / "big"))
    hub.requests.clear()
    done = run("inspect", "org/big", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.json["parameters"] == 2 * 1024 * 1024 and len(done.json["revision"]) == 40
    assert sum(request.body_sent for request in hub.requests) < 200_000
    weights = [r for r in hub.requests if r.path.endswith(".safetensors") and r.body_sent]
    assert weights and all("range" in request.headers for request in weights)
    assert [path.name for path in tmp_path.iterdir()] == ["big"]


def test_repositories_show_card_and_license(world: Path) -> None:
    done = run("inspect", "org/vision", "--json", cwd=world)
    assert (done.json["base_model"], done.json["license"]) == (["org/base"], "mit")
    assert done.json["ref"] == "org/vision"


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    done = run("inspect", tmp_path)
    assert done.code == 1 and "has no model: there are no weight files" in done.err


def test_an_adapter_tells_its_rank_modules_and_class(zoo: Path, tmp_path: Path) -> None:
    hf_tsv.export_peft(zoo / "vision", base_model=zoo / "base", output=tmp_path / "lora", rank=3)
    found = hf_tsv.inspect(tmp_path / "lora")
    assert found.adapter is not None and found.adapter["rank"] == 3
    assert any(name.endswith("q_proj") for name in found.adapter["target_modules"])
    assert found.model_class == "CLIPVisionModel"
    rows = [row.split() for row in run("inspect", tmp_path / "lora").out.splitlines()]
    assert ["rank", "3"] in rows
    assert any(row[0] == "modules" and row[-3:] == ["(12", "in", "all)"] for row in rows)


def test_a_merge_tells_its_own_treatment_alone(zoo: Path, tmp_path: Path) -> None:
    hf_tsv.merge([zoo / "vision", zoo / "full"], base_model=zoo / "base", output=tmp_path / "m")
    rows = [row.split("  ")[0] for row in run("inspect", tmp_path / "m").out.splitlines()]
    assert rows.count("method") == 1 and not {"merge", "in a merge"} & set(rows)
    assert "in a merge" in run("inspect", zoo / "vision").out


def test_only_methods_that_have_an_alpha_show_it(zoo: Path, tmp_path: Path) -> None:
    inputs, base = [zoo / "vision", zoo / "full"], zoo / "base"
    for method, said in (("tall-mask", "tall-mask"), ("ties", "ties, α = 1")):
        hf_tsv.merge(inputs, base_model=base, method=method, output=tmp_path / method)
        rows = [row.split(maxsplit=1) for row in run("inspect", tmp_path / method).out.splitlines()]
        assert ["method", said] in rows and ["license", "unknown"] in rows
        assert not any("no model card" in row[1] for row in rows)  # there is one


def test_pickles_are_not_loaded(zoo: Path, tmp_path: Path) -> None:
    """The file would write another one if it were."""
    folder = copied(zoo / "vision", tmp_path / "pickled")
    (folder / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "exploded",)

    torch.save({"weight": Bomb()}, folder / "pytorch_model.bin")
    found = hf_tsv.inspect(folder)
    assert (found.kind, found.tensors) == ("other", {})
    assert list(found.files) == ["pytorch_model.bin"]
    assert any("pytorch_model.bin is a pickle" in text for text in found.unknown)
    assert not (tmp_path / "exploded").exists()
    done = run("inspect", folder)
    assert done.code == 0 and "is a pickle" in done.out


def test_other_safetensors_are_listed_by_their_names(tmp_path: Path) -> None:
    """As OpenCLIP stores them: no config of transformers, a file of another name."""
    save_file(
        {"visual.transformer.resblocks.0.attn.in_proj_weight": torch.zeros(6, 2)},
        tmp_path / "open_clip_model.safetensors",
    )
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {}}')
    found = hf_tsv.inspect(tmp_path)
    assert (found.kind, found.layout, found.parameters) == ("other", "open_clip", 12)
    (entry,) = found.tensors.values()
    assert entry == {"shape": [6, 2], "dtype": "F32", "bytes": 48}
    assert found.unknown


def test_another_architecture_is_said(tmp_path: Path) -> None:
    save_file({"encoder.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    found = hf_tsv.inspect(tmp_path)
    assert (found.kind, found.layout) == ("checkpoint", "transformers")
    assert found.model_type == "bert"
    assert any("Not CLIP but 'bert'" in text for text in found.unknown)


def test_a_damaged_recipe_is_said_and_the_rest_shown(zoo: Path, tmp_path: Path) -> None:
    folder = copied(zoo / "vision", tmp_path / "odd")
    (folder / "hf_tsv_recipe.yaml").write_text("[")
    found = hf_tsv.inspect(folder)
    assert found.kind == "checkpoint" and found.parameters == sizes(zoo / "vision")[0]
    assert any("hf_tsv_recipe.yaml" in text for text in found.unknown)


def test_text_of_a_repository_reaches_no_terminal(hub: Hub, zoo: Path, tmp_path: Path) -> None:
    files = {file.name: file for file in (zoo / "vision").iterdir()}
    card = '---\nbase_model: "org/\\e[31mbase"\nlicense: "mit\\a"\n---\n'
    hub.add_repo("org/odd", {**files, "README.md": card})
    done = run("inspect", "org/odd", cwd=tmp_path)
    assert done.code == 0, done.err
    assert all(c.isprintable() or c == "\n" for c in done.out)


def test_sharded_checkpoints_count_every_file(zoo: Path, tmp_path: Path) -> None:
    hf_tsv.merge(
        [zoo / "vision", zoo / "full"], base_model=zoo / "base", output=tmp_path / "m",
        max_shard_size="40KB", progress=False,
    )  # fmt: skip
    found = hf_tsv.inspect(tmp_path / "m")
    assert len(found.files) > 2
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == len(found.tensors)
    assert found.parameters == sum(math.prod(e["shape"]) for e in found.tensors.values())


def test_a_hub_that_fails_is_an_error(hub: Hub, zoo: Path, tmp_path: Path) -> None:
    """Not a repository of another kind."""
    hub.add_repo("org/a", zoo / "vision")
    hub.fail("model.safetensors", status=403)
    done = run("inspect", "org/a", cwd=tmp_path)
    assert done.code == 1 and "Error: " in done.err, done.out


def test_tensors_of_one_name_in_two_files_both_count(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"w": torch.zeros(4)}, tmp_path / f"{name}.safetensors")
    found = hf_tsv.inspect(tmp_path)
    assert found.parameters == 8 and set(found.tensors) == {"w", "w in two.safetensors"}


def test_a_line_break_forges_no_row(hub: Hub, zoo: Path, tmp_path: Path) -> None:
    files = {file.name: file for file in (zoo / "vision").iterdir()}
    card = '---\nlicense: "mit\\nmethod      somebody"\n---\n'
    hub.add_repo("org/odd", {**files, "README.md": card})
    done = run("inspect", "org/odd", cwd=tmp_path)
    assert not any(row.startswith("method") for row in done.out.splitlines())


@pytest.mark.parametrize(("name", "code"), [("org/absent", 1), ("./nowhere", 2), ("a/b/c/d", 1)])
def test_what_is_not_there_is_one_clear_line(
    hub: Hub, tmp_path: Path, name: str, code: int
) -> None:
    done = run("inspect", name, cwd=tmp_path)
    assert done.code == code and "Error: " in done.err and "Hint: " in done.err
    assert "Traceback" not in done.err and done.out == ""
