"""The HTML report in a real browser."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clips
import pytest
from cli import hf_tsv as run
from names import NAMES, model_of_names

from hf_tsv.reports.templates import percent

pytestmark = pytest.mark.browser
HOSTILE = ["<img src=x onerror=alert(1)>", '"><script>alert(2)<\\script>', "&amp; {{ 7*7 }} `c`"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of tasks whose names are markup, with a warning that names one of them."""
    folder = tmp_path_factory.mktemp("tasks")
    clips.make_base(folder / "base")
    for seed, name in enumerate(HOSTILE, start=70):
        clips.make_fine_tune(folder / "base", folder / name, seed, "full")
    shutil.copytree(folder / HOSTILE[0], folder / "<b>again</b>".replace("/", "\\"))
    names = [*HOSTILE, "<b>again<\\b>"]
    base = ("--base-model", folder / "base")
    done = run("interference", *(folder / name for name in names), *base, "-o", folder / "report")
    assert done.code == 0, done.err
    assert f"The report is {folder / 'report' / 'interference.html'}." in done.err
    return folder / "report"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, without a head."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser")
    assert path is not None, "These tests need Chromium: apt-get install chromium"
    flags = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=path, args=flags, chromium_sandbox=os.geteuid() != 0
        )
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    """The report, opened; fails on anything it asks for, says or raises."""
    opened = browser.new_page(viewport={"width": 1100, "height": 800})
    opened.asked, opened.said = [], []
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.on("console", lambda message: opened.said.append(message.text))
    opened.on("pageerror", lambda error: opened.said.append(str(error)))
    opened.on("dialog", lambda dialog: (opened.said.append(dialog.message), dialog.dismiss()))
    opened.goto((report / "interference.html").as_uri())
    yield opened
    opened.close()


def test_it_asks_for_nothing_and_complains_of_nothing(page: Any) -> None:
    (own, *others) = page.asked
    assert own.endswith("/interference.html")
    assert all(url.startswith("data:image/png") for url in others)
    assert page.said == []
    assert page.locator("[src]:not([src^='data:']), link, iframe, object, form").count() == 0
    assert page.locator("[href]").count() == 0


def test_all_pictures_are_drawn(page: Any, report: Path) -> None:
    sizes = page.eval_on_selector_all("img", "all => all.map(i => i.naturalWidth)")
    assert len(sizes) == 5 and min(sizes) > 1000
    assert all(page.eval_on_selector_all("img", "all => all.map(i => i.alt)"))
    assert len(list(report.glob("*.png"))) == 5


def test_names_are_text(page: Any) -> None:
    shown = page.locator("#tasks tbody td:first-child").all_inner_texts()
    assert shown == [*HOSTILE, "<b>again<\\b>"]
    assert page.locator("script").count() == 1
    assert page.locator("td img, td b, .warnings img").count() == 0
    assert HOSTILE[0] in page.locator(".warnings").inner_text()
    assert page.said == []


def test_names_of_weights_are_text(browser: Any, tmp_path: Path) -> None:
    tasks = model_of_names(tmp_path)
    others = [path for path in sorted(tasks.iterdir()) if path.name != "base"]
    done = run("interference", *others, "--base-model", tasks / "base", "-o", tmp_path / "report")
    assert done.code == 0, done.err
    opened, said = browser.new_page(), list[str]()
    for event in ("console", "pageerror", "dialog"):
        opened.on(event, lambda what: said.append(str(what)))
    opened.goto((tmp_path / "report" / "interference.html").as_uri())
    shown = opened.locator("#weights tbody td:first-child").all_inner_texts()
    assert sorted(shown) == sorted(f"layers.{i}.{name}" for i, name in enumerate(NAMES))
    assert opened.locator("script").count() == 1 and not said
    assert opened.locator("td img, td script, td a, td b").count() == 0
    opened.close()


def test_nothing_but_its_own_script_runs(page: Any) -> None:
    ran = page.evaluate("""() => {
        const foreign = document.createElement("script");
        foreign.textContent = "window.ran = true";
        document.body.append(foreign);
        return window.ran === true;
    }""")
    assert not ran


def column(page: Any, place: int) -> list[str]:
    return page.locator(f"#weights tbody td:nth-child({place})").all_inner_texts()  # type: ignore[no-any-return]


def test_every_weight_is_in_the_table_and_sorts(page: Any, report: Path) -> None:
    content = json.loads((report / "interference.json").read_text())
    sti = {name: weight["sti"] for name, weight in content["weights"].items()}
    assert column(page, 1) == list(sti)
    head = page.locator("#weights th", has_text="STI")
    head.locator("button").click()
    assert column(page, 1) == sorted(sti, key=lambda name: -sti[name])
    assert head.get_attribute("aria-sort") == "descending"
    head.locator("button").press("Enter")  # by keyboard too
    assert column(page, 1) == sorted(sti, key=lambda name: sti[name])
    assert head.get_attribute("aria-sort") == "ascending"
    name = page.locator("#weights th", has_text="weight")
    name.locator("button").click()
    assert column(page, 1) == sorted(sti)
    assert head.get_attribute("aria-sort") is None


def test_cells_say_what_the_report_says(page: Any, report: Path) -> None:
    content = json.loads((report / "interference.json").read_text())
    names = [task["name"] for task in content["tasks"]]
    for place, key, shown in (
        (2, "share", percent), (3, "norm", "{:.4g}".format), (4, "relative_norm", percent),
        (5, "effective_rank", "{:.1f}".format), (6, "energy", percent),
    ):  # fmt: skip
        cells = page.locator(f"#tasks tbody td:nth-child({place})").all_inner_texts()
        wanted = [shown(task[key]) for task in content["tasks"]]
        assert cells == wanted, key
    weights = list(content["weights"].values())
    assert column(page, 5) == [f"{w['sti']:.4g}" for w in weights]
    assert column(page, 6) == [percent(w["sti"] / content["total"]) for w in weights]
    assert column(page, 7) == [f"{w['sti_after']:.2g}" for w in weights]
    for weight, said in zip(weights, column(page, 8), strict=True):
        pairs = {(i, j): row[j] for i, row in enumerate(weight["pairs"]) for j in range(i)}
        i, j = max(pairs, key=lambda pair: pairs[pair])
        assert said == f"{names[j]}, {names[i]}"
    shown = page.locator(".totals li").all_inner_texts()
    assert f"{content['total']:.4g}" in shown[0] and f"{content['total_after']:.2g}" in shown[1]
    flat = {(i, j): v for i, row in enumerate(content["pairs"]) for j, v in enumerate(row[:i])}
    for text, choose in ((shown[3], max), (shown[4], min)):
        pair = choose(flat, key=lambda pair: flat[pair])
        assert all(names[task] in text for task in pair)
    page.locator("summary").click()
    table = page.locator("#pairs tbody tr").all_inner_texts()
    for i, row in enumerate(table):
        numbers = [f"{v:.4g}" for j, v in enumerate(content["pairs"][i]) if j != i]
        assert [cell for cell in row.split("\t")[1:] if cell.strip()] == numbers


def test_blocks_sort_as_numbers(page: Any) -> None:
    page.evaluate("""() => { for (const [i, row] of [...document.querySelectorAll(
        "#weights tbody tr")].entries()) row.cells[1].textContent = "vision " + (12 - i % 12); }""")
    page.locator("#weights th", has_text="block").locator("button").click()
    numbers = [int(text.split()[1]) for text in column(page, 2)]
    assert numbers == sorted(numbers) and max(numbers) > 9


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1100])
def test_it_is_readable(page: Any, scheme: Any, width: int) -> None:
    """Text stands out from the page, and only tables are wider than a telephone."""
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    text, back = page.evaluate(
        "() => { const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]; }"
    )
    bright = [sum(map(int, c[c.index("(") + 1 : -1].split(",")[:3])) / 3 for c in (text, back)]
    assert (bright[0] < bright[1]) == (scheme == "light") and abs(bright[0] - bright[1]) > 150
