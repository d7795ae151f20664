"""A wrong base model: said by the cards before a download, measured before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import clips
import pytest
import yaml
from cli import hf_tsv, refused
from hub import Hub

import hf_tsv as api
from hf_tsv.checkpoints.names import RECIPE_FILE
from hf_tsv.system.errors import CheckpointError

TASKS = ["org/vision", "org/flat"]
SAID = "Warning: org/vision says it was fine-tuned from org/base, not org/base2."


@pytest.fixture
def other(world: Path, hub: Hub) -> str:
    """A base of the same shape with other weights."""
    hub.add_repo("org/base2", clips.make_base(world.parent / "base2", seed=5))
    return "org/base2"


@pytest.mark.parametrize("command", [["merge", *TASKS], ["compress", "org/vision"]])
def test_what_the_cards_contradict_is_said_before_any_download(
    world: Path, hub: Hub, other: str, command: list[str]
) -> None:
    done = hf_tsv(*command, "--base-model", other, "-o", "merged", "--dry-run", cwd=world)
    assert done.code == 0 and SAID in done.err
    done = hf_tsv(*command, "--base-model", other, "-o", "merged", cwd=world)
    refused(done, world, hub, SAID, "of the base model's norm away from org/base2")
    assert done.err.index(SAID) < done.err.index("Error: ")


def test_interference_refuses_it_too(world: Path, hub: Hub, other: str) -> None:
    done = hf_tsv("interference", *TASKS, "--base-model", other, cwd=world)
    refused(done, world, hub, SAID, "a fine-tune of another model")


def test_a_base_that_the_named_one_descends_from_is_no_contradiction(
    world: Path, hub: Hub, zoo: Path
) -> None:
    hub.add_repo("org/root", zoo / "base")
    card = "---\nbase_model: org/root\n---\n"
    hub.commit("org/base", {"README.md": card.encode()})
    found = api.merge(TASKS, base_model="org/root", dry_run=True, output=world / "m")
    assert found.warnings == []


def test_a_copy_of_the_base_is_no_contradiction(world: Path, zoo: Path) -> None:
    found = api.merge(TASKS, base_model=zoo / "base", dry_run=True, output=world / "m")
    assert found.warnings == []


def test_who_means_it_may_and_the_recipe_repeats_it(world: Path, other: str) -> None:
    words: dict[str, Any] = {"base_model": other, "progress": False}
    done = api.merge(TASKS, output=world / "m", allow_other_base=True, **words)
    assert sum("a fine-tune of another model" in text for text in done.warnings) == 2
    recipe = yaml.safe_load((world / "m" / RECIPE_FILE).read_text())
    assert recipe["allow_other_base"] is True
    api.merge(recipe=world / "m", output=world / "again", progress=False)
    assert (world / "again" / RECIPE_FILE).read_text() == (world / "m" / RECIPE_FILE).read_text()
    kept = api.compress("org/vision", output=world / "f", allow_other_base=True, **words)
    assert len(kept.config.weights) == 39


def test_it_is_recorded_only_where_it_was_needed(world: Path) -> None:
    api.merge(TASKS, output=world / "m", allow_other_base=True, progress=False)
    assert "allow_other_base" not in (world / "m" / RECIPE_FILE).read_text()


def test_what_the_first_look_does_not_see_is_refused_at_the_end(world: Path, zoo: Path) -> None:
    """The smallest matrices are as in the base; the others are not."""
    from safetensors.torch import load_file, save_file

    tensors, base = (load_file(zoo / n / "model.safetensors") for n in ("full", "base"))
    matrices = sorted((n for n in base if base[n].dim() == 2), key=lambda n: base[n].nbytes)
    for name in matrices[4:]:
        tensors[name] = 2.5 * base[name]
    for name in matrices[:4]:
        tensors[name] = base[name].clone()
    odd = world / "odd"
    odd.mkdir()
    (odd / "config.json").write_bytes((zoo / "full" / "config.json").read_bytes())
    save_file(tensors, odd / "model.safetensors", metadata={"format": "pt"})
    for run in (api.merge, api.compress):
        with pytest.raises(CheckpointError, match=r"1\.1 of the base model's norm"):
            run(str(odd), base_model="org/base", output=world / "m", progress=False)  # type: ignore[operator]
        assert {path.name for path in world.iterdir()} == {"odd"}


def test_alpha_that_adds_nothing_or_subtracts_is_a_warning(world: Path) -> None:
    for alpha, said in ((0, "α is 0: the result is the base model."), (-1, "subtracted")):
        found = api.merge(TASKS, alpha=alpha, dry_run=True, output=world / "m")
        assert len(found.warnings) == 1 and said in found.warnings[0]


def test_one_checkpoint_alone_is_remarked_on(world: Path) -> None:
    done = hf_tsv("merge", "org/vision", "-o", "m", "--dry-run", cwd=world)
    assert "org/vision is the only checkpoint" in done.err


def test_a_sum_is_not_called_an_average(world: Path) -> None:
    words = ("merge", *TASKS, "--method", "task-arithmetic", "-o", "m")
    done = hf_tsv(*words, cwd=world)
    assert "39 tensors summed" in done.err and "averaged" not in done.err
    card = (world / "m" / "README.md").read_text()
    assert "39 tensors were summed" in card and "averaged" not in card
    found = hf_tsv("inspect", "m", "--json", cwd=world).json
    assert not any("merge" in entry for entry in found["tensors"].values())


def test_a_budget_that_cannot_do_is_refused_before_the_work(world: Path, hub: Hub) -> None:
    words = ("compress", "org/vision", "-o", "out", "--budget")
    done = hf_tsv(*words, "1kB", cwd=world)
    refused(done, world, hub, "what is stored whole (biases, norms, …) alone takes 28.0 kB")
    assert "Compressing" not in done.err
    for given, meant in (("0.1", "10%"), ("10", "10%"), ("0.5", "50%")):
        done = hf_tsv(*words, given, cwd=world)
        assert done.code == 2 and f"Did you mean {meant}?" in done.err, done.err


def test_an_output_in_an_input_or_where_nothing_can_be_written_is_refused(
    world: Path, zoo: Path
) -> None:
    inside = zoo / "vision" / "out"
    with pytest.raises(api.OutputError, match="would be in the input"):
        api.merge([zoo / "vision", "org/flat"], base_model="org/base", output=inside)
    with pytest.raises(api.OutputError, match=r"/proc takes no new folder"):
        api.merge(TASKS, output="/proc/x")
    with pytest.raises(api.HfTsvError, match="No checkpoint given"):
        api.merge(None, output=world / "m")  # type: ignore[arg-type]


def test_a_reconstruction_says_what_it_is(world: Path) -> None:
    api.compress("org/vision", output=world / "f", progress=False)
    done = hf_tsv("reconstruct", "f", "-o", "c", cwd=world)
    assert "whole base model with the task in it; the fine-tune was a CLIPVisionModel." in done.err
