"""Model cards: front matter the Hub reads, text that cannot break out of its place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from names import prose

from hf_tsv.checkpoints.formats.description import FactorsConfig, Origin, StoredWeight
from hf_tsv.checkpoints.reference import card_datasets, card_license, task_name
from hf_tsv.checkpoints.storage.dtypes import DTYPES
from hf_tsv.recipes.recipe import PinnedInput, Recipe
from hf_tsv.recipes.settings import Settings
from hf_tsv.reports.cards import CardInput, MergeCard, common_license, render
from hf_tsv.reports.compressed_cards import AdapterCard, FactorsCard, ReconstructedCard
from hf_tsv.reports.templates import code, plain, templates
from hf_tsv.runs.publishing import named

SHA = "0123456789abcdef0123456789abcdef01234567"
BASE = CardInput("org/base", SHA)
HOSTILE = [
    "line\nbreak",
    "carriage\r\nreturn\n---\nlicense: mit\n---",
    "``` fence",
    "`` ` ```` ticks `",
    "{{ 7 * 7 }}{% for a in b %}{# #}",
    "key: [value, {a: b}] # comment",
    "'quote\" \\",
    "<script>alert(1)</script><!--",
    "a|b||c",
    "[text](https://example.com) ![](x)",
    "*bold* _it_ # heading ~~x~~",
    "]($(touch x))",
    "é 層 \u202e\u2028",
    "- list",
    "!!python/object:os.system",
    "",
]


def card_of(
    inputs: Sequence[CardInput],
    base: CardInput = BASE,
    *,
    choice: Settings | None = None,
    **said: Any,
) -> str:
    """Card of a merge of a whole CLIP; `said` is what else there is to say."""
    recipe = Recipe(
        PinnedInput(base.ref, base.revision),
        tuple(PinnedInput(item.ref, item.revision, weight=item.weight) for item in inputs),
        choice or Settings(),
    )
    fields: dict[str, Any] = {
        "model_type": "clip",
        "dtype": "float32",
        "full_model": True,
        "out_format": "transformers",
        "counts": {"decomposed": 12, "averaged": 3, "copied": 5},
        "left_out": {},
    }
    return render(MergeCard(recipe=recipe, base=base, inputs=inputs, **(fields | said)))


def hub(*names: str, license: str | None = None) -> list[CardInput]:
    return [CardInput(name, SHA, license) for name in names]


def front_matter(card: str) -> dict[str, Any]:
    return ModelCard(card).data.to_dict()  # type: ignore[no-untyped-call]


# Front matter


def test_the_front_matter_says_what_the_hub_needs() -> None:
    assert front_matter(card_of(hub("org/a", "org/b", license="mit"))) == {
        "base_model": ["org/base", "org/a", "org/b"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["merge", "task-singular-vectors", "hf-tsv", "clip"],
    }


def test_the_datasets_of_the_fine_tunes_are_in_the_front_matter() -> None:
    inputs = [CardInput("org/a", SHA, datasets=("mnist", "org/x")), *hub("org/b")]
    inputs += [CardInput("org/c", SHA, datasets=("org/x",))]
    assert front_matter(card_of(inputs))["datasets"] == ["mnist", "org/x"]
    assert card_datasets({"datasets": ["org/x", "a b", 3, "../x/y/z", None]}) == ("org/x",)
    assert card_datasets({"datasets": "mnist"}) == ("mnist",) and card_datasets({}) == ()


def test_one_tower_is_for_features() -> None:
    card = card_of(hub("org/a"), full_model=False)
    assert front_matter(card)["pipeline_tag"] == "image-feature-extraction"
    assert "AutoModel.from_pretrained" in card and "pipeline(" not in card


def test_a_folder_is_no_base_model() -> None:
    local = CardInput("/data/secret/clip-a", None)
    assert front_matter(card_of([local, *hub("org/b")]))["base_model"] == ["org/base", "org/b"]
    data = front_matter(card_of([local], CardInput("./base", None)))
    assert "base_model" not in data and "base_model_relation" not in data


def test_a_repository_that_is_used_twice_is_named_once() -> None:
    assert front_matter(card_of(hub("org/a", "org/a")))["base_model"] == ["org/base", "org/a"]


@pytest.mark.parametrize(
    ("licenses", "common"),
    [
        (["mit", "mit"], "mit"),
        (["mit"], "mit"),
        (["mit", "apache-2.0"], None),
        (["mit", None], None),
        ([None, None], None),
    ],
)
def test_a_licence_is_named_only_if_all_inputs_agree(
    licenses: list[str | None], common: str | None
) -> None:
    inputs = [CardInput(f"org/{i}", SHA, name) for i, name in enumerate(licenses)]
    assert common_license(inputs) == common
    assert front_matter(card_of(inputs)).get("license") == common


@pytest.mark.parametrize(
    ("value", "name"), [("mit", "mit"), (["mit"], None), (None, None), (3, None), ({}, None)]
)
def test_a_licence_is_one_identifier(value: Any, name: str | None) -> None:
    assert card_license({"license": value}) == name
    assert card_license({}) is None


# Content


def test_the_card_links_every_checkpoint_at_its_commit() -> None:
    card = card_of([CardInput("org/a", SHA, weight=0.5), CardInput("/data/secret/b", None)])
    url = f"https://huggingface.co/org/a/tree/{SHA}"
    assert f"| task 1 | [`org/a`]({url}) at `{SHA[:12]}` | 0.5 |" in card
    assert "| task 2 | `b` (a local folder) | 1 |" in card
    assert f"| base model | [`org/base`](https://huggingface.co/org/base/tree/{SHA})" in card


def test_the_card_holds_the_recipe_as_it_is() -> None:
    inputs = hub("org/a", "org/b")
    card = card_of(inputs, choice=Settings(alpha=0.3))
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    recipe = Recipe.from_yaml(block)
    assert recipe.settings.alpha == 0.3
    assert [item.ref for item in recipe.inputs] == ["org/a", "org/b"]
    assert "null" not in block and "<details><summary>The recipe</summary>" in card


@pytest.mark.parametrize("full_model", [True, False])
@pytest.mark.parametrize("repo_id", [None, "me/merged"])
def test_the_code_of_the_card_is_python_that_loads_the_result(
    full_model: bool, repo_id: str | None
) -> None:
    card = card_of(hub("org/a"), full_model=full_model)
    card = card if repo_id is None else named(card, repo_id)
    (block,) = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    compile(block, "card", "exec")
    loaded = re.findall(r'(?:from_pretrained\(|model=)"([^"]*)"', block)
    assert loaded == [repo_id or "."] * (2 if full_model else 1)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("tsv", "[TSV-Merge](https://arxiv.org/abs/2412.00081)"),
        ("average", "with the method `average`"),
        ("task-arithmetic", "with the method `task-arithmetic`"),
    ],
)
def test_the_card_names_the_method(method: Any, said: str) -> None:
    card = card_of(hub("org/a", "org/b"), choice=Settings(method=method))
    assert said in card
    how = "summed" if method == "task-arithmetic" else "averaged"
    name = "TSV-Merge" if method == "tsv" else f"`{method}`"
    assert (
        f"12 weight matrices were merged with {name}; 3 other tensors (biases, norms, …) were"
        in card
    )
    assert f" were {how}; 5 unchanged tensors come from the base model." in card


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (Settings(), "α = 1, 50% of the singular directions of each task, weights in float32"),
        (Settings(alpha=0.5, rank=16), "α = 0.5, rank 16 for each task, weights in float32"),
        (Settings(method="task-arithmetic"), "α = 0.3, weights in float32"),
        (Settings(method="average"), "α = 1, weights in float32"),
    ],
)
def test_the_card_names_the_parameters(choice: Settings, said: str) -> None:
    assert f"\nParameters: {said}.\n" in card_of(hub("org/a", "org/b"), choice=choice)


def test_one_tensor_is_singular() -> None:
    card = card_of(hub("org/a"), counts={"decomposed": 1, "averaged": 1, "copied": 1})
    assert "1 weight matrix was merged with TSV-Merge; 1 other tensor (bias, norm, …) was" in card
    assert "1 unchanged tensor comes from the base model." in card
    assert "This is a merge of 1 fine-tuned CLIP checkpoint, made" in card


def test_a_sum_with_masks_is_not_offered_as_a_model() -> None:
    choice = Settings(method="tall-mask")
    card = card_of(hub("org/a", "org/b"), choice=choice, masks=["masks/a", "masks/b"])
    assert "pipeline_tag" not in front_matter(card) and "transformers import" not in card
    assert "**The weights of this repository alone are not a usable model:**" in card
    (block,) = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    compile(block, "card", "exec")
    assert set(re.findall(r'"(\.[^"]*)"', named(block, "."))) == {"./masks/a"}
    assert 'load_model("me/x/masks/a")' in named(card, "me/x")


def test_the_licence_has_a_paragraph() -> None:
    assert "The license is `mit`, as the cards of all fine-tunes say." in card_of(
        hub("org/a", license="mit")
    )
    assert "No license is given here: the cards of the fine-tunes name none" in card_of(
        hub("org/a")
    )


@pytest.mark.parametrize(
    ("names", "title"),
    [
        ("a", "# Merge of a alone"),
        ("ab", "# Merge of a and b"),
        ("abcd", "# Merge of a, b, c and d"),
        ("abcdef", "# Merge of a, b, c and 3 more"),
    ],
)
def test_the_title_names_the_inputs(names: str, title: str) -> None:
    assert f"\n{title}\n" in card_of(hub(*(f"org/{name}" for name in names)))


def test_task_heads_and_warnings_are_listed() -> None:
    card = card_of(
        hub("org/a"),
        left_out={"org/a": ["classifier.bias", "classifier.weight"]},
        warnings=["The first *warning*.", "The second."],
    )
    assert "\n- `org/a`: `classifier.bias`, `classifier.weight`\n" in card
    assert "\n- The first \\*warning\\*.\n- The second.\n" in card
    assert "Warnings" not in card_of(hub("org/a")) and "left out" not in card_of(hub("org/a"))


def test_the_card_ends_in_one_newline_and_leaves_no_template_behind() -> None:
    card = card_of(hub("org/a", "org/b"), warnings=["w"], left_out={"org/a": ["h"]})
    assert card.endswith("```\n") and not card.endswith("\n\n")
    for every in (card, *compressed_cards(described()).values()):
        assert "\n\n\n" not in every and "| | |" not in every and " %" not in every
    assert not re.search(r"\{\{|\{%|%\}", card)


def test_the_templates_are_found() -> None:
    assert (templates() / "merge.md.jinja").is_file()


# Compressed tasks


def described(
    text: str = "fc1", *, local: bool = False, head: Sequence[str] = (), weights: int = 1
) -> FactorsConfig:
    """Of a matrix as factors, a bias, and an unchanged weight; `text` wherever it may come from."""
    matrix = StoredWeight("factors", (64, 32), DTYPES["F32"], 3, 32, 0.5, 2.0, 1164, "0" * 64)
    bias = StoredWeight("dense", (64,), DTYPES["F32"], 0, 0, 1.0, 1.0, 256, "1" * 64)
    none = StoredWeight("none", (64,), DTYPES["F32"], 0, 0, 1.0, 0.0, 0, "2" * 64)
    base = Origin(f"/data/{text}") if local else Origin("org/base", SHA)
    source = Origin(f"/data/{text}", None, text) if local else Origin("org/clip-a", SHA, "mit")
    matrices = {f"{text}.{i}.weight": matrix for i in range(weights)}
    rule = {"budget": text if local else "10%"}
    weights_of = {**matrices, f"{text}.bias": bias, f"{text}.scale": none}
    return FactorsConfig(
        base_model=base, source=source, rank_rule=rule, factor_dtype=DTYPES["F32"],
        compress_conv=False, checkpoint_bytes=10_000, base_bytes=10_000, factors_bytes=1420,
        update_error=0.25, weights=weights_of, task_head=tuple(head), model_config={},
        left_out=(text,) if local else (),
    )  # fmt: skip


def compressed_cards(config: FactorsConfig) -> dict[str, str]:
    said: dict[str, Any] = {"config": config, "full_model": True, "datasets": ["mnist"]}
    return {
        "factors": render(FactorsCard(**said)),
        "adapter": render(AdapterCard(**said, model_class="CLIPModel", dense=True)),
        "reconstructed": reconstruction(config),
    }


def reconstruction(config: FactorsConfig, **said: Any) -> str:
    fields: dict[str, Any] = {
        "factors": CardInput.of(config.source),
        "full_model": True,
        "datasets": ["mnist"],
        "out_format": "transformers",
    }
    return render(ReconstructedCard(config=config, **(fields | said)))


def test_the_front_matter_of_compressed_tasks() -> None:
    common = {"license": "mit", "datasets": ["mnist"]}
    common |= {"pipeline_tag": "zero-shot-image-classification"}
    tags = ["task-singular-vectors", "hf-tsv", "clip"]
    found = {kind: front_matter(card) for kind, card in compressed_cards(described()).items()}
    assert found == {
        "factors": {
            **common,
            "base_model": ["org/base", "org/clip-a"],
            "base_model_relation": "adapter",
            "library_name": "hf-tsv",
            "tags": ["task-singular-vectors", "task-factors", "hf-tsv", "clip"],
        },
        "adapter": {
            **common,
            "base_model": "org/base",
            "base_model_relation": "adapter",
            "library_name": "peft",
            "tags": ["lora", *tags],
        },
        "reconstructed": {
            **common,
            "base_model": ["org/base", "org/clip-a"],
            "base_model_relation": "finetune",
            "library_name": "transformers",
            "tags": tags,
        },
    }
    for card in compressed_cards(described(local=True)).values():
        assert "base_model" not in front_matter(card)
        assert "base_model_relation" not in front_matter(card)


@pytest.mark.parametrize(
    ("head", "full_model", "pipeline"),
    [
        (["classifier.weight"], True, "image-classification"),
        ([], True, "zero-shot-image-classification"),
        ([], False, "image-feature-extraction"),
    ],
)
def test_a_reconstruction_names_the_pipeline_that_it_fits(
    head: list[str], full_model: bool, pipeline: str
) -> None:
    card = reconstruction(described(head=head), full_model=full_model)
    assert front_matter(card)["pipeline_tag"] == pipeline
    assert ("CLIPForImageClassification" in card) == bool(head)


def test_the_card_of_factors_says_what_is_kept() -> None:
    card = compressed_cards(described(head=["classifier.weight"]))["factors"]
    first = card.split("\n# ")[1].splitlines()[2]
    assert first.startswith("**14.2% of the size of the fine-tuned checkpoint** (1.4 kB instead of")
    assert "with 93.8% of the energy of its fine-tuning update (relative error 0.25)" in first
    assert "1 low-rank matrix, 1 tensor in full, 1 unchanged or left out, in float32" in card
    assert "| `fc1.0.weight` | 64 × 32 | factors | 3 | 50.0% |" in card
    assert "**Task head:** `classifier.weight`\n" in card
    assert 'hf_tsv.pipeline("image-classification", ".")' in card
    command = f"hf-tsv compress org/clip-a@{SHA} \\\n    --base-model org/base@{SHA} \\\n"
    assert f"\n{command}    --budget 10% --dtype float32 -o compressed\n```" in card


def test_the_card_of_factors_lists_the_largest_updates_only() -> None:
    assert (
        "All updates, as in `tsv_config.json`" in compressed_cards(described(weights=8))["factors"]
    )
    card = compressed_cards(described(weights=40))["factors"]
    assert "The 10 largest updates" in card and card.count("| 64 × 32 |") == 10


@pytest.mark.parametrize("repo_id", [None, "me/a-tsv"])
def test_the_code_of_compressed_tasks_is_python_that_loads_them(repo_id: str | None) -> None:
    for kind, local in compressed_cards(described()).items():
        card = local if repo_id is None else named(local, repo_id)
        blocks = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
        for block in blocks:
            compile(block, kind, "exec")
        assert f'"{repo_id or "."}"' in blocks[0], kind


@pytest.mark.parametrize(
    ("model_class", "unfit", "loads_with"),
    [
        ("CLIPVisionModel", "`CLIPModel` or `AutoModel`", "`transformers>=5`"),
        ("CLIPModel", "`CLIPVisionModel`", "transformers 4 and 5"),
    ],
)
def test_the_card_of_an_adapter_leads_with_auto_peft_and_says_what_it_does_not_fit(
    model_class: str, unfit: str, loads_with: str
) -> None:
    said: dict[str, Any] = {"config": described(), "full_model": True, "dense": True}
    card = render(AdapterCard(**said, model_class=model_class))
    (block,) = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    compile(block, "card", "exec")
    assert (
        block.startswith("from peft import AutoPeftModel\n")
        and "PeftModel.from_pretrained(base" not in card
    )
    assert f"On {unfit} the adapter has\n**no effect**" in card
    assert f"- **Loads with:** {loads_with}" in card


def test_paths_of_local_folders_are_in_no_card() -> None:
    local = CardInput("/data/secret/clip-a", None)
    texts = [card_of([local], CardInput("./private/base", None)).split("<details>")[0]]
    texts += compressed_cards(described("secret/clip-a", local=True)).values()
    for text in texts:
        assert "/data" not in text and "private" not in text


def test_the_command_of_a_recipe_names_the_folders_that_it_needs() -> None:
    inputs = [CardInput("/data/clip-a", None), CardInput("org/b", SHA)]
    card = named(card_of(inputs, CardInput("/data/my base", None)), "me/x")
    assert "\nhf-tsv merge --recipe me/x clip-a 'my base' -o merged\n" in card
    assert "It needs the local folders" in card
    assert "local folders" not in card_of(hub("org/a", "org/b")).partition("## Recipe")[2]


def test_a_card_says_where_a_base_model_that_is_a_folder_is_looked_for() -> None:
    here, there = (compressed_cards(described(local=local)) for local in (True, False))
    said = "PEFT looks for the base model in the folder"
    assert said in here["adapter"] and said not in there["adapter"]
    assert "downloads" in there["factors"] and "downloads" not in here["factors"]


NOTE = '  # "." is this folder'


@pytest.mark.parametrize(
    ("line", "published"),
    [
        (f'model = load("."){NOTE}', 'model = load("me/x")'),
        (f'model = load("./masks/a"){NOTE}', 'model = load("me/x/masks/a")'),
        (f'open_clip.create("local-dir:."){NOTE}', 'open_clip.create("hf-hub:me/x")'),
        (
            f"hf-tsv merge . another-task -o merged{NOTE}",
            "hf-tsv merge me/x another-task -o merged",
        ),
        (f'task(".", head="a.b"){NOTE}\r', 'task("me/x", head="a.b")\r'),
        ('open(".")  # mine', 'open(".")  # mine'),
        ('"." is this folder.', '"." is this folder.'),
    ],
)
def test_only_marked_lines_of_a_card_get_the_name_of_the_repository(
    line: str, published: str
) -> None:
    assert named(f"a\n{line}\nb .\n", "me/x") == f"a\n{published}\nb .\n"


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        ("me/clip-sun397-tsv@main", "clip-sun397"),
        ("hf://me/a", "a"),
        ("./folder/b-tsv/", "b"),
        ("-tsv", "-tsv"),
    ],
)
def test_a_task_is_called_like_its_repository(ref: str, name: str) -> None:
    assert task_name(ref) == name


def test_a_task_in_this_folder_is_called_like_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clip-a-tsv").mkdir()
    monkeypatch.chdir(tmp_path / "clip-a-tsv")
    assert task_name(".") == "clip-a"


# Text from elsewhere


def skeleton(card: str) -> list[str]:
    """What a Markdown reader would make structure of: headings, fences, rows, list items."""
    lines: list[str] = []
    fence = None
    for line in card.splitlines():
        mark = re.match(r"(`{3,})(\w*)", line)
        if fence is None and mark:
            fence = mark[1]
            lines.append(f"fence {mark[2]}")
        elif fence is not None and line == fence:
            fence = None
        elif fence is None and re.match(r"#+ ", line):
            lines.append(re.sub("(?<=# ).*" if line.startswith("# ") else "$", "", line))
        elif fence is None and line.startswith("|"):
            bars = re.findall(r"(?<!\\)\|", line)
            lines.append(f"row of {len(bars)}")
        elif fence is None and line.startswith("- "):
            lines.append("item")
    assert fence is None
    return lines


LINK = r"https://(huggingface\.co/(org/[^\s()<>]*|docs/peft)|arxiv\.org/abs/2412\.00081)"


def hostile_card(text: str) -> str:
    inputs = [CardInput(f"/data/{text}", None, text), *hub("org/b", license=text)]
    return card_of(
        inputs, left_out={text: [text, "classifier.weight"]}, warnings=[f"A {text} b.", text]
    )


PLAIN_CARD = hostile_card("plain")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_changes_nothing_but_itself(text: str) -> None:
    card = hostile_card(text)
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert skeleton(body) == skeleton(PLAIN_CARD.removeprefix("---\n").partition("\n---\n")[2])
    data = yaml.safe_load(head)
    assert data == front_matter(card)
    expected = {**front_matter(PLAIN_CARD), "license": text}
    assert {key: data.get(key) for key in expected} == expected
    assert "49" not in body.replace("2049", "")


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("kind", ["factors", "adapter", "reconstructed"])
def test_hostile_text_stays_in_its_place_in_cards_of_compressed_tasks(
    kind: str, text: str, local: bool
) -> None:
    def made(text: str) -> str:
        config = described(text, local=True, head=[text])
        if not local:
            origin = Origin(f"org/{text}", f"{text} {SHA}", text)
            config = replace(config, base_model=origin, source=origin)
        return compressed_cards(config)[kind]

    card, other = made(text), made("plain")
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert skeleton(body) == skeleton(other.removeprefix("---\n").partition("\n---\n")[2])
    expected = {**front_matter(other), "license": text}
    if not local:
        expected["base_model"] = f"org/{text.partition('/')[0]}"  # the rest is a subfolder
    assert yaml.safe_load(head) == expected
    links = re.findall(r"\]\(([^)]*)\)", prose(body))
    assert links and all(re.fullmatch(LINK, link) for link in links), links
    assert "49" not in body.replace("249", "")
    blocks = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    for block in blocks:
        compile(block, kind, "exec")


@pytest.mark.parametrize("text", [*HOSTILE, "next\x85line"])
def test_a_recipe_with_hostile_names_is_read_back_from_the_card(text: str) -> None:
    card = hostile_card(text)
    fence, block = re.findall(r"^(`{3,})yaml\n(.*?)^\1$", card, re.DOTALL | re.MULTILINE)[0]
    assert fence
    assert Recipe.from_yaml(block).inputs[0].ref == f"/data/{text}"


@settings(max_examples=40, deadline=None, database=None)
@given(text=st.text(alphabet="`|ab \n\\*<>[]()#{}%-\t", max_size=15))
def test_any_text_stays_in_its_place(text: str) -> None:
    body = hostile_card(text).removeprefix("---\n").partition("\n---\n")[2]
    assert skeleton(body) == skeleton(PLAIN_CARD.removeprefix("---\n").partition("\n---\n")[2])


@given(text=st.text(max_size=30))
def test_code_is_one_line_between_ticks_that_it_does_not_contain(text: str) -> None:
    found = code(text)
    assert "\n" not in found
    fence = re.match("`+", found)
    assert fence and found.endswith(fence[0])
    inside = found[len(fence[0]) : len(found) - len(fence[0])]
    assert fence[0] not in re.findall("`+", inside)


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a_b*c", r"a\_b\*c"),
        ("<b>&amp;", r"\<b\>\&amp;"),
        ("[x](y)", r"\[x\]\(y\)"),
        ("a|b", r"a\|b"),
        ("a\n# b", r"a \# b"),
        ("`x`", r"\`x\`"),
        ("v1.0-α/x: y", "v1.0-α/x: y"),
        (Path("a/b"), "a/b"),
    ],
)
def test_plain_text_is_escaped_where_markdown_would_act(text: object, escaped: str) -> None:
    assert plain(text) == escaped
