"""Who disturbs whom: the verb, as API and command line."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import clips
import numpy as np
import pytest
import torch
from cli import hf_tsv as run
from cli import hf_tsv_process as run_process
from hub import Hub
from reference import concatenation
from safetensors.torch import load_file, save_file

import hf_tsv
from hf_tsv.checkpoints.layout import block_and_kind
from hf_tsv.merging.diagnosis import COMPARABLE, FAR_ABOVE
from hf_tsv.system.errors import CheckpointError, RecipeError

TASKS = 3
KEYS = {
    "tasks", "base_model", "total", "total_after", "pairs", "weights", "blocks", "kinds",
    "spectra", "diagnoses", "warnings", "seconds", "timings", "device", "schema_version",
}  # fmt: skip
REPORT_FILES = [
    "blocks.png", "interference.html", "interference.json", "layers.png", "pairs.png", "ranks.png",
    "spectrum.png",
]  # fmt: skip
WEIGHT_KEYS = {"sti", "sti_after", "shape", "rank", "ranks", "pairs"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, zoo: Path) -> Path:
    """A base, three fine-tunes of its vision tower, and odd ones."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "base").symlink_to(zoo / "base")
    for seed, name in enumerate("abc", start=31):
        clips.make_fine_tune(zoo / "base", folder / name, seed, "vision")
    clips.make_fine_tune(zoo / "base", folder / "whole", 41, "full")
    return folder


def changed(tasks: Path, source: str, target: str, change: Any, dtype: Any = None) -> Path:
    """A copy of a fine-tune whose updates `change` maps to others."""
    base = load_file(tasks / "base" / "model.safetensors")
    state = load_file(tasks / source / "model.safetensors")
    new = {}
    for name, tensor in state.items():
        update = tensor - base[name] if name in base else None
        moved = tensor if update is None else base[name] + change(name, update)
        new[name] = moved.to(dtype or tensor.dtype).contiguous()
    (tasks / target).mkdir()
    save_file(new, tasks / target / "model.safetensors", metadata={"format": "pt"})
    (tasks / target / "config.json").write_text((tasks / source / "config.json").read_text())
    return tasks / target


def report(tasks: Path, names: str | list[str] = "abc", **options: Any) -> Any:
    return hf_tsv.interference(
        [tasks / name for name in names], base_model=tasks / "base", progress=False, **options
    )


@functools.cache
def report_on_three(tasks: Path) -> Any:
    """The report on `abc`, which many tests look at."""
    return report(tasks)


def by_definition(U: torch.Tensor, s: torch.Tensor, Vh: torch.Tensor) -> float:
    eye = torch.eye(len(s), dtype=torch.float64)
    return float(((U.T @ U - eye) @ s.diag() @ (Vh @ Vh.T - eye)).abs().sum())


def test_it_is_the_formula_on_the_stored_weights(tasks: Path) -> None:
    found = report_on_three(tasks)
    base = load_file(tasks / "base" / "model.safetensors")
    states = [load_file(tasks / name / "model.safetensors") for name in "abc"]
    assert found.weights
    total = 0.0
    for name, weight in found.weights.items():
        deltas = [state[name] - base[name] for state in states]
        rank = max(1, min(deltas[0].shape) // TASKS)
        factors = concatenation(deltas, [rank] * TASKS)
        assert weight["rank"] == rank
        assert weight["sti"] == pytest.approx(by_definition(*factors), rel=1e-4)
        assert weight["sti_after"] < 1e-6 * weight["sti"]
        pairs = torch.tensor(weight["pairs"])
        assert torch.equal(pairs, pairs.T) and not pairs.diagonal().any()
        one = concatenation([deltas[0], deltas[2]], [rank] * 2)
        assert weight["pairs"][0][2] == pytest.approx(by_definition(*one), rel=1e-4)
        total += weight["sti"]
    assert found.total == pytest.approx(total)
    for parts in (found.blocks, found.kinds):
        assert sum(part["sti"] for part in parts.values()) == pytest.approx(total)


def test_every_decomposed_matrix_is_measured(tasks: Path) -> None:
    planned = hf_tsv.merge(
        [tasks / n for n in "abc"], base_model=tasks / "base", dry_run=True
    ).treatments
    decomposed = {n for n, entry in planned.items() if entry["treatment"] == "decomposed"}
    vision = {name for name in decomposed if name.startswith("vision_model.")}
    found = report_on_three(tasks)
    assert vision <= set(found.weights) <= decomposed
    assert set(found.blocks) >= {"vision 0", "vision 1"}
    assert {"mlp.fc1", "self_attn.q_proj"} <= set(found.kinds)


def test_the_order_of_tasks_does_not_matter(tasks: Path) -> None:
    first, second = report_on_three(tasks), report(tasks, "cab")
    assert second.total == pytest.approx(first.total, rel=1e-6)
    assert second.pairs[0][1] == pytest.approx(first.pairs[2][0], rel=1e-6)
    assert [task["name"] for task in second.tasks] == ["c", "a", "b"]
    assert second.tasks[1]["share"] == pytest.approx(first.tasks[0]["share"], rel=1e-6)


def test_what_is_said_of_a_task(tasks: Path) -> None:
    found = report_on_three(tasks)
    base = load_file(tasks / "base" / "model.safetensors")
    state = load_file(tasks / "a" / "model.safetensors")
    updates = [state[name] - base[name] for name in state]
    norm = float(torch.cat([u.reshape(-1) for u in updates]).double().norm())
    task = found.tasks[0]
    assert (task["name"], task["ref"], task["revision"]) == ("a", str(tasks / "a"), None)
    assert task["norm"] == pytest.approx(norm, rel=1e-5)
    assert 0 < task["relative_norm"] < COMPARABLE
    assert 0 < task["energy"] < 1 < task["effective_rank"]
    assert sum(entry["share"] for entry in found.tasks) == pytest.approx(1.0)


def test_checkpoints_of_one_name_are_told_apart(tasks: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a").symlink_to(tasks / "b")
    found = hf_tsv.interference(
        [tasks / "a", tmp_path / "other" / "a", tasks / "c"], base_model=tasks / "base",
        progress=False,
    )  # fmt: skip
    assert [t["name"] for t in found.tasks] == [f"{tasks.name}/a", "other/a", "c"]
    with pytest.raises(RecipeError, match="is given twice"):
        report(tasks, "aac")


def largest(s: torch.Tensor) -> torch.Tensor:
    return s[0] ** 2


def squares(s: torch.Tensor) -> torch.Tensor:
    return s.square().sum()


def test_spectra_are_those_of_the_updates(tasks: Path) -> None:
    """All weights of a task together, against float64; a task that lacks a tower has its own."""
    found = report(tasks, ["a", "whole"])
    base = load_file(tasks / "base" / "model.safetensors")
    share = found.spectra["rank_share"]
    for place, name in enumerate(("a", "whole")):
        state = load_file(tasks / name / "model.safetensors")
        own = [n for n in found.weights if n in state and not torch.equal(state[n], base[n])]
        sigmas = [torch.linalg.svdvals((state[n] - base[n]).double()) for n in own]
        first, whole = (sum(float(f(s)) for s in sigmas) for f in (largest, squares))
        for x, sigma, energy in zip(
            share, found.spectra["singular_values"][place], found.spectra["energy"][place],
            strict=True,
        ):  # fmt: skip
            at = [np.interp(x * len(s), range(len(s) + 1), [*s.tolist(), 0.0]) for s in sigmas]
            assert sigma == pytest.approx(math.sqrt(sum(v * v for v in at) / first), rel=1e-4)
            sums = [np.concatenate([[0], np.cumsum(s.numpy() ** 2)]) for s in sigmas]
            kept = sum(np.interp(x * (len(c) - 1), range(len(c)), c) for c in sums)
            assert energy == pytest.approx(kept / whole, rel=1e-4)
    text = next(n for n in found.weights if n.startswith("text_model.encoder"))
    assert found.weights[text]["ranks"][0] == 0 < found.weights[text]["ranks"][1]


def test_what_factors_leave_out_counts_as_energy(tasks: Path, tmp_path: Path) -> None:
    hf_tsv.compress(
        tasks / "a", output=tmp_path / "a", base_model=tasks / "base", rank_fraction=0.1,
        progress=False,
    )  # fmt: skip
    found = hf_tsv.interference(
        [tmp_path / "a", tasks / "b"], base_model=tasks / "base", progress=False
    )
    assert found.spectra["energy"][0][-1] < 0.7 < found.spectra["energy"][1][-1]
    assert found.spectra["energy"][0][-1] == pytest.approx(found.tasks[0]["energy"], rel=1e-6)


def test_parts_add_up_after_as_before(tasks: Path) -> None:
    found = report_on_three(tasks)
    assert found.total_after < 1e-6 * found.total
    for parts in (found.weights, found.blocks, found.kinds):
        assert sum(p["sti_after"] for p in parts.values()) == pytest.approx(found.total_after)


def test_a_scaled_task_has_the_same_energy_and_rank(tasks: Path, tmp_path: Path) -> None:
    plain = report_on_three(tasks)
    hf_tsv.merge(
        [tasks / name for name in "abc"], base_model=tasks / "base", weights=[1, 2, 0],
        output=tmp_path / "m", report=True, progress=False,
    )  # fmt: skip
    found = json.loads((tmp_path / "m" / "interference.json").read_text())
    for place in (0, 1):
        for key in ("energy", "effective_rank"):
            assert found["tasks"][place][key] == pytest.approx(plain.tasks[place][key], rel=1e-6)
    assert (found["tasks"][2]["energy"], found["tasks"][2]["share"]) == (0.0, 0.0)
    assert "`c` least" not in (tmp_path / "m" / "README.md").read_text()


def test_the_effective_rank_of_a_task_is_weighted_by_energy(tasks: Path) -> None:
    found = report(tasks, "ab")
    base = load_file(tasks / "base" / "model.safetensors")
    state = load_file(tasks / "a" / "model.safetensors")
    total = weighted = 0.0
    for name in found.weights:
        if name in state and not torch.equal(state[name], base[name]):
            s = torch.linalg.svdvals((state[name] - base[name]).double())
            p = s / s.sum()
            square = float(s.square().sum())
            total += square
            weighted += square * float((-(p * p.log()).sum()).exp())
    assert found.tasks[0]["effective_rank"] == pytest.approx(weighted / total, rel=1e-4)


@pytest.mark.parametrize("names", ["abc", "a"])
def test_where_nothing_is_decomposed_there_is_nothing_to_report(
    tasks: Path, tmp_path: Path, names: str
) -> None:
    given = [*(tasks / name for name in names), "--base-model", tasks / "base"]
    flags = ["--exclude", "*"] if len(names) > 1 else []
    for command, more in (("interference", []), ("merge", ["--report"])):
        done = run(command, *given, *flags, *more, "-o", tmp_path / command)
        assert done.code in (1, 2) and not (tmp_path / command).exists()
        assert "No weight would be decomposed" in done.err or "compares tasks" in done.err


def test_a_merge_that_leaves_the_interference_says_no_after(tasks: Path, tmp_path: Path) -> None:
    hf_tsv.merge(
        [tasks / name for name in "abc"], base_model=tasks / "base", output=tmp_path / "m",
        method="low-rank", report=True, progress=False,
    )  # fmt: skip
    assert "orthogonalisation" not in (tmp_path / "m" / "README.md").read_text()


def test_orthogonal_tasks_do_not_interfere(tasks: Path) -> None:
    """Each changes rows and columns of its own."""

    def half(first: bool) -> Any:
        def change(name: str, update: torch.Tensor) -> torch.Tensor:
            if update.dim() != 2:
                return update
            rows, columns = (size // 2 for size in update.shape)
            kept = torch.zeros_like(update)
            where = (
                (slice(rows), slice(columns))
                if first
                else (slice(rows, None), slice(columns, None))
            )
            kept[where] = update[where]
            return kept

        return change

    changed(tasks, "a", "upper", half(True))
    changed(tasks, "b", "lower", half(False))
    found = report(tasks, ["upper", "lower"], rank=2)
    assert found.total < 1e-6 * report(tasks, "ab", rank=2).total


@pytest.mark.parametrize("rank", [1, 4])
def test_a_rank_can_be_chosen(tasks: Path, rank: int) -> None:
    found = report(tasks, rank=rank)
    assert {weight["rank"] for weight in found.weights.values()} == {rank}


def test_factors_and_checkpoints_are_measured_alike(tasks: Path, tmp_path: Path) -> None:
    for name in "abc":
        hf_tsv.compress(
            tasks / name, output=tmp_path / name, base_model=tasks / "base", rank_fraction=0.4
        )
    stored = hf_tsv.interference(
        [tmp_path / name for name in "abc"], base_model=tasks / "base", progress=False
    )
    whole = report_on_three(tasks)
    for name, weight in whole.weights.items():
        if name.startswith("vision_model.encoder"):
            assert stored.weights[name]["sti"] == pytest.approx(weight["sti"], rel=1e-4)


# Diagnoses


def only(found: Any, *parts: str) -> None:
    """One warning of the inputs, that says all of this."""
    said = [text for text in found.warnings if all(part in text for part in parts)]
    assert len(said) == 1, found.warnings


def test_ordinary_fine_tunes_are_nothing_to_warn_of(tasks: Path) -> None:
    assert report_on_three(tasks).warnings == []


def test_one_large_update_is_named_with_its_number(tasks: Path) -> None:
    large = changed(tasks, "c", "large", lambda _, update: update * 2 * FAR_ABOVE)
    names = ["a", "b", "large"]
    said = ("The update of", str(large), "times as large as those of the other tasks")
    found = report(tasks, names)
    only(found, *said)
    (diagnosis,) = found.diagnoses
    assert (diagnosis["kind"], diagnosis["tasks"]) == ("large-norm", (2,))
    assert diagnosis["value"] > diagnosis["threshold"] == FAR_ABOVE
    paths = [tasks / name for name in names]
    only(hf_tsv.merge(paths, base_model=tasks / "base", output=tasks / "m1", progress=False), *said)
    scaled = hf_tsv.merge(
        paths, base_model=tasks / "base", output=tasks / "m2", weights=[1, 1, 0.2], progress=False
    )
    assert not any("times as large" in text for text in scaled.warnings)


@pytest.mark.parametrize(
    ("kind", "below", "above", "dtype"),
    [
        ("large-norm", 2.9, 3.1, torch.float32),
        ("other-base", 0.28, 0.32, torch.float32),
        ("rounding", 0.08, 0.13, torch.bfloat16),
    ],
)
def test_where_a_warning_begins(
    tasks: Path, kind: str, below: float, above: float, dtype: torch.dtype
) -> None:
    """With numbers written here, not taken from the code."""
    plain = report_on_three(tasks).tasks
    usual = (plain[0]["norm"] + plain[1]["norm"]) / 2
    base_norm = plain[2]["norm"] / plain[2]["relative_norm"]
    for wanted in (below, above):
        norm = {
            "large-norm": wanted * usual,
            "other-base": wanted * base_norm,
            "rounding": 0.29 * 2**-7 * base_norm / wanted,
        }[kind]
        factor = norm / plain[2]["norm"]
        name = f"c-{kind}-{wanted}"
        changed(tasks, "c", name, lambda _, update, by=factor: update * by, dtype)
        found = report(tasks, ["a", "b", name])
        said = {d["kind"]: d for d in found.diagnoses if d["tasks"] == (2,)}
        assert (kind in said) == (wanted == above), (wanted, found.diagnoses)
        if kind in said:
            assert said[kind]["value"] == pytest.approx(wanted, rel=0.1)


def test_the_weight_it_advises_helps(tasks: Path) -> None:
    changed(tasks, "c", "advised", lambda _, update: update * 12)
    (text,) = report(tasks, ["a", "b", "advised"]).warnings
    weight = float(text.split("weight, ")[1].split(" ")[0])
    merged = hf_tsv.merge(
        [tasks / n for n in ("a", "b", "advised")], base_model=tasks / "base",
        weights=[1, 1, weight], output=tasks / "m4", progress=False,
    )  # fmt: skip
    assert merged.warnings == []


def test_a_fine_tune_of_another_model_is_named(tasks: Path, tmp_path: Path) -> None:
    other = clips.make_base(tmp_path / "other", seed=5)
    stranger = clips.make_fine_tune(other, tasks / "stranger", 40, "vision")
    with pytest.raises(CheckpointError, match=r"stranger is .* a fine-tune of another model"):
        report(tasks, ["a", "b", "stranger"])
    found = report(tasks, ["a", "b", "stranger"], allow_other_base=True)
    only(found, str(stranger), "a fine-tune of another model")


def test_a_low_rank_fine_tune_is_named(tasks: Path) -> None:
    def two(_: str, update: torch.Tensor) -> torch.Tensor:
        if update.dim() != 2:
            return torch.zeros_like(update)
        U, s, Vh = torch.linalg.svd(update, full_matrices=False)
        return U[:, :2] * s[:2] @ Vh[:2]

    lora = changed(tasks, "c", "lora", two)
    only(report(tasks, ["a", "b", "lora"]), str(lora), "at most 2 triplets", "LoRA")


def test_a_tower_that_one_task_left_is_named(tasks: Path) -> None:
    frozen = changed(
        tasks, "whole", "frozen",
        lambda name, update: update * (not name.startswith("text_model.")),
    )  # fmt: skip
    only(report(tasks, ["whole", "frozen"]), str(frozen), "left the text tower as it was")
    assert not any("tower" in warning for warning in report(tasks, "ab").warnings)


def test_coarse_storage_is_named(tasks: Path) -> None:
    coarse = changed(tasks, "c", "coarse", lambda _, update: update / 40, torch.bfloat16)
    only(report(tasks, ["a", "b", "coarse"]), str(coarse), "rounding to bfloat16")


def test_one_checkpoint_under_two_names_is_named(tasks: Path) -> None:
    changed(tasks, "a", "again", lambda _, update: update)
    found = report(tasks, ["a", "again", "b"])
    only(found, "are the same update", "cosine 1.0000")
    assert found.extremes()[0] == (0, 1)
    assert found.total_after > 1e-3 * found.total  # cannot be made orthogonal


def test_a_task_of_weight_zero_is_not_blamed(tasks: Path) -> None:
    done = hf_tsv.merge(
        [tasks / name for name in "abc"], base_model=tasks / "base", weights=[1, 1.6, 0],
        output=tasks / "m3", progress=False,
    )  # fmt: skip
    assert done.warnings == []


def test_towers_of_their_own_are_not_the_same_update(tasks: Path, zoo: Path) -> None:
    """All that both changed is one number."""
    for name, tower in (("eyes", "vision_model."), ("words", "text_model.")):
        clips.make_fine_tune(zoo / "base", tasks / f"{name}-source", 50, "full")
        changed(
            tasks, f"{name}-source", name,
            lambda key, update, tower=tower: update * key.startswith((tower, "logit_scale")),
        )  # fmt: skip
    found = report(tasks, ["eyes", "words"])
    assert not any("same update" in text or "opposite" in text for text in found.warnings)
    assert len([text for text in found.warnings if "tower as it was" in text]) == 2
    assert found.total < 1e-20  # rounding


def test_full_updates_that_rounding_hides_are_no_lora(tasks: Path) -> None:
    small = changed(tasks, "c", "small", lambda _, update: update / 10, torch.bfloat16)
    found = report(tasks, ["a", "small"])
    assert not any(str(small) in text and "LoRA" in text for text in found.warnings)


def test_an_update_is_compared_with_what_it_changed(tasks: Path) -> None:
    alone, beside = report(tasks, "ab"), report(tasks, ["a", "whole"])
    assert beside.tasks[0]["relative_norm"] == pytest.approx(alone.tasks[0]["relative_norm"])


# On the card of a merge


def test_a_merge_reports_what_the_command_measures(tasks: Path, tmp_path: Path) -> None:
    """From the same decompositions, and without changing a bit of the result."""
    names = [tasks / name for name in "abc"]
    for folder, flags in (("plain", []), ("told", ["--report"])):
        base = ("--base-model", tasks / "base")
        done = run("merge", *names, *base, "-o", tmp_path / folder, *flags)
        assert done.code == 0, done.err
    plain, told = (tmp_path / n / "model.safetensors" for n in ("plain", "told"))
    assert plain.read_bytes() == told.read_bytes()
    written = json.loads((tmp_path / "told" / "interference.json").read_text())
    found = report_on_three(tasks)
    assert set(written) == KEYS
    assert written["total"] == pytest.approx(found.total, rel=1e-9)
    assert written["pairs"] == [pytest.approx(row, rel=1e-9) for row in found.pairs]
    assert not (tmp_path / "plain" / "interference.json").exists()
    card = (tmp_path / "told" / "README.md").read_text()
    assert "## Task interference" in card and f"{found.total:.4g} before" in card
    rows = [row for row in card.splitlines() if row.startswith("| `") and row.endswith("% |")]
    assert len(rows) == TASKS and f"{100 * found.tasks[0]['share']:.1f}%" in rows[0]
    assert "](interference.png)" in card
    assert (tmp_path / "told" / "interference.png").read_bytes().startswith(b"\x89PNG")
    assert "Task interference" not in (tmp_path / "plain" / "README.md").read_text()
    assert not (tmp_path / "plain" / "interference.png").exists()


def test_an_odd_name_stays_in_its_cell(tasks: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a|b `c` <i>"
    odd.mkdir()
    for file in (tasks / "a").iterdir():
        (odd / file.name).symlink_to(file)
    hf_tsv.merge(
        [odd, tasks / "b", tasks / "c"], base_model=tasks / "base", output=tmp_path / "m",
        report=True, progress=False,
    )  # fmt: skip
    card = (tmp_path / "m" / "README.md").read_text()
    rows = [row for row in card.splitlines() if "a\\|b" in row and row.endswith("% |")]
    assert len(rows) == 1 and "<i>" not in rows[0].replace("`", "\0").split("\0")[0]


@pytest.mark.parametrize("method", ["average", "task-arithmetic"])
def test_what_decomposes_nothing_has_no_report(tasks: Path, tmp_path: Path, method: str) -> None:
    names = [tasks / name for name in "ab"]
    options = ("--base-model", tasks / "base", "-o", tmp_path / "m", "--method", method)
    done = run("merge", *names, *options, "--report")
    assert done.code == 2 and "uses no singular vectors" in done.err
    assert not (tmp_path / "m").exists()


# The command


def test_the_command_prints_which_tasks_interfere(tasks: Path) -> None:
    done = run("interference", *(tasks / n for n in "abc"), "--base-model", tasks / "base")
    assert done.code == 0, done.err
    rows = done.out.splitlines()
    assert rows[0].split()[:2] == ["task", "share"] and max(map(len, rows)) <= 80
    assert [row.split()[0] for row in rows[2:5]] == ["a", "b", "c"]
    said = {row.split()[0]: row for row in rows[6:]}
    assert {"interference", "mean", "most", "least", "weight"} == set(said)
    found = report_on_three(tasks)
    most = {found.tasks[i]["name"] for i in found.extremes()[0]}
    assert f"{found.per_pair:.3g} per pair of tasks in one weight matrix" in said["mean"]
    assert set(said["most"].split(":")[0].split()[1:]) - {"and"} == most


def test_json_has_the_keys_that_are_promised(tasks: Path, tmp_path: Path) -> None:
    base = ("--base-model", tasks / "base")
    words = ["interference", tasks / "a", tasks / "b", *base, "-o", tmp_path / "r"]
    done = run_process(*words, "--json")
    assert done.code == 0, done.err
    assert set(done.json) == KEYS
    assert set(next(iter(done.json["weights"].values()))) == WEIGHT_KEYS
    written = json.loads((tmp_path / "r" / "interference.json").read_text())
    found = done.json
    for entry in (*found["tasks"], found["base_model"]):  # a file names no local folder
        entry["ref"] = Path(entry["ref"]).name
    assert written == found
    page = (tmp_path / "r" / "interference.html").read_text()
    assert str(tasks.parent) not in page and "hf-tsv interference a b --base-model base" in page
    again = run(*words)
    assert again.code == 1 and "--force" in again.err
    forced = run(*words, "--force")
    assert forced.code == 0, forced.err
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == REPORT_FILES


def test_repositories_of_the_hub_are_measured(world: Path, hub: Hub) -> None:
    done = run("interference", "org/vision", "org/full", "--json", cwd=world)
    assert done.code == 0, done.err
    assert [task["name"] for task in done.json["tasks"]] == ["vision", "full"]
    assert all(len(task["revision"]) == 40 for task in done.json["tasks"])
    assert not any(request.method in ("POST", "PUT") for request in hub.requests)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "Name at least two checkpoints"),
        (["a"], "at least two"),
        (["a", "b", "--rank", "0"], "rank"),
        (["a", "nowhere"], "nowhere"),
        (["a", "b", "-o", "a"], "The output folder"),
        (["a", "b", "-o", "a/config.json/x"], "config.json"),
    ],
)
def test_bad_input_is_one_clear_line(tasks: Path, arguments: list[str], said: str) -> None:
    base = ["--base-model", "base"] if arguments else []
    before = sorted(tasks.iterdir())
    done = run("interference", *arguments, *base, cwd=tasks)
    assert done.code == (1 if "-o" in arguments else 2)
    assert said in done.out + done.err and "Traceback" not in done.err
    assert sorted(tasks.iterdir()) == before


@pytest.mark.parametrize(
    "label, expected",
    [
        ("text_model.encoder.layers.11.self_attn.{q,k,v}_proj.weight",
         ("text 11", "self_attn.{q,k,v}_proj")),
        ("vision_model.embeddings.position_embedding.weight", ("other", "position_embedding")),
        ("visual_projection.weight", ("other", "visual_projection")),
    ],
)  # fmt: skip
def test_weights_belong_to_blocks_and_kinds(label: str, expected: tuple[str, str]) -> None:
    assert block_and_kind(label) == expected


def test_a_report_replaces_only_reports(tasks: Path, tmp_path: Path) -> None:
    names, base = [tasks / n for n in "ab"], ("--base-model", tasks / "base")
    merged = run("merge", *names, *base, "-o", tmp_path / "merged", "--report")
    assert merged.code == 0, merged.err
    before = sorted(path.name for path in (tmp_path / "merged").iterdir())
    done = run("interference", *names, *base, "-o", tmp_path / "merged", "--force")
    assert done.code == 1 and "was not written by hf-tsv (it has no interference.html)" in done.err
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == before


def test_a_report_does_not_replace_its_inputs(tasks: Path, tmp_path: Path) -> None:
    """Not even where it lies around an earlier report."""
    for name in "ab":
        (tmp_path / "r").mkdir(exist_ok=True)
        (tmp_path / "r" / name).mkdir()
        for file in (tasks / name).iterdir():
            (tmp_path / "r" / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "r" / "interference.html").write_text("earlier")
    names, base = [tmp_path / "r" / n for n in "ab"], ("--base-model", tasks / "base")
    done = run("interference", *names, *base, "-o", tmp_path / "r", "--force")
    assert done.code == 1 and "would replace the input" in done.err
    assert (tmp_path / "r" / "a" / "model.safetensors").exists()


def test_the_picture_is_pushed_with_the_card(world: Path, hub: Hub) -> None:
    done = run("merge", "org/vision", "org/flat", "--base-model", "org/base", "--push-to", "me/m",
               "--report", cwd=world)  # fmt: skip
    assert done.code == 0, done.err
    files = hub.files("me/m")
    assert "](interference.png)" in files["README.md"].decode()
    assert files["interference.png"].startswith(b"\x89PNG")
    plain = run("merge", "org/vision", "org/flat", "--base-model", "org/base", "--push-to", "me/m",
                cwd=world)  # fmt: skip
    assert plain.code == 0, plain.err
    assert not {"interference.png", "interference.json"} & set(hub.files("me/m"))
