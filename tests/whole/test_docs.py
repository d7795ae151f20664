"""README and docs: their commands and snippets run, their links lead somewhere, their facts hold.

A block that cannot be run says why in the line before it: `<!-- needs the network -->`, or
`<!-- not run: REASON -->`. The commands run in bash, on a Hub that serves tiny models under the
public names; `hf-tsv` there is a small client of this process, which has imported torch already.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import public_names
import pytest
import yaml
from cli import Result, hf_tsv, hf_tsv_process
from hub import Hub

from benchmarks.speed import start

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

import hooks  # noqa: E402
import pictures  # noqa: E402

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted(DOCS.glob("*.md")),
]
GENERATED = {"index.md", "contributing.md", "changelog.md", "cli.md", "api.md", "errors.md"}
EXCUSE = re.compile(r"<!-- (needs the network|not run: \S.+) -->$")

HF = Path(sys.executable).with_name("hf")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|multiprocess|dill).*")

CLIENT = """\
#!{python} -SE
import json, os, socket, sys
given = {{name: os.environ[name] for name in os.environ if name.startswith(("HF_", "COLUMNS"))}}
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    with server.makefile("rw") as line:
        print(json.dumps([sys.argv[1:], os.getcwd(), given]), file=line, flush=True)
        code, out, err = json.loads(line.readline())
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int
    excuse: str | None


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text("utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        if not (fence := re.match(r"\s*```(\w*)", line)):
            continue
        if start is None:
            start, language = number, fence[1]
            continue
        before = EXCUSE.match(lines[start - 1].strip()) if start else None
        text = "\n".join(lines[start + 1 : number]) + "\n"
        yield Block(language, text, start + 1, before[1] if before else None)
        start = None
    assert start is None, f"{page.name}:{start} is not closed"


def runnable(page: Path) -> list[Block]:
    return [b for b in blocks(page) if b.language in ("bash", "python") and not b.excuse]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return public_names.make(tmp_path_factory.mktemp("public"))


@pytest.fixture
def desk(hub: Hub, models: Path, tmp_path: Path) -> Path:
    """An empty folder of a reader, whose Hub has the public names."""
    public_names.serve(hub, models, tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    public_names.photo(work)
    return work


class Shell:
    """Bash, in which `hf-tsv` is run by this process."""

    def __init__(self, folder: Path) -> None:
        address = str(folder / "socket")
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(address)
        self.server.listen()
        self.server.settimeout(0.02)
        (folder / "bin").mkdir()
        script = folder / "bin" / "hf-tsv"
        script.write_text(CLIENT.format(python=sys.executable, address=address))
        script.chmod(0o755)
        (folder / "bin" / "hf").symlink_to(HF)
        self.environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}

    def run(self, text: str, cwd: Path) -> Result:
        bash = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=cwd, env=self.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while bash.poll() is None:
            try:
                connection, _ = self.server.accept()
            except TimeoutError:
                continue
            with connection, connection.makefile("rw") as line:
                words, folder, given = json.loads(line.readline())
                changed = {k: v for k, v in given.items() if os.environ.get(k) != v}
                run = hf_tsv_process if changed else hf_tsv
                done = run(*words, cwd=Path(folder), **changed)
                print(json.dumps([done.code, done.out, done.err]), file=line, flush=True)
        out, err = bash.communicate()
        return Result(bash.returncode, out, err)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    made = Shell(tmp_path)
    yield made
    made.server.close()


def run_page(page: Path, desk: Path, shell: Shell) -> list[Result]:
    """Run the blocks of a page one after another; what its commands said."""
    namespace: dict[str, Any] = {"__name__": "snippet"}
    results = []
    for block in runnable(page):
        place = f"{page.name}:{block.line}"
        if block.language == "bash":
            done = shell.run(block.text, desk)
            assert done.code == 0, f"{place}\n{done.out}\n{done.err}"
            results.append(done)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(compile(block.text, place, "exec"), namespace)
    return results


README, *OTHERS = (page for page in PAGES if runnable(page))


@pytest.mark.parametrize("page", OTHERS, ids=lambda page: page.name)
def test_every_command_and_snippet_runs(
    page: Path, desk: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk)
    run_page(page, desk, shell)


def test_the_commands_of_the_readme_do_what_it_says(
    desk: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new reader's path: merge, evaluate, compress, classify."""
    monkeypatch.chdir(desk)
    (done,) = run_page(README, desk, shell)
    assert {path.name for path in desk.iterdir()} >= {"merged", "dtd-small"}
    assert str(desk / "merged") in done.out and "dtd" in done.out and "%" in done.out
    inside = {path.name for path in (desk / "merged").iterdir()}
    assert {"model.safetensors", "config.json", "README.md", "hf_tsv_recipe.yaml"} <= inside
    recipe = yaml.safe_load((desk / "merged" / "hf_tsv_recipe.yaml").read_text())
    named = [entry["ref"] for entry in recipe["inputs"]]
    assert named == [public_names.fine_tune(task) for task in public_names.TASKS]


def test_blocks_that_are_not_run_are_few_and_say_why() -> None:
    excused = [b for page in PAGES for b in blocks(page) if b.excuse]
    run = [b for page in PAGES for b in runnable(page)]
    assert len(run) > 25 and len(excused) < len(run)


def code_of(page: Path) -> Iterator[str]:
    """Lines of commands, whole ones, and code within sentences."""
    for block in blocks(page):
        if block.language == "bash":
            yield from block.text.replace("\\\n", " ").splitlines()
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"`([^`\n]+)`", text)


def test_options_that_are_named_exist() -> None:
    from hf_tsv import cli

    options = {
        name: {o for p in cli._command(name).params for o in (*p.opts, *p.secondary_opts)}
        for name in cli.COMMANDS
    }
    every = set().union(*options.values(), {"--help", "--install-completion", "--version", "-V"})
    jobs = {" ".join(words): hf_options("jobs", *words) for words in HF_JOBS}
    wrong = []
    for page in PAGES:
        for code in code_of(page):
            ours = re.search(rf"hf[-_]tsv ({'|'.join(options)})\b(.*)", code)
            theirs = re.match(rf"hf jobs ({'|'.join(jobs)})\b(.*?)( bash -c | -- |$)", code)
            said = []
            if ours:
                said.append((options[ours[1]] | {"--help"}, ours[2].partition(" #")[0]))
            if theirs:
                said.append((jobs[theirs[1]], theirs[2].partition(" #")[0]))
            elif not ours and code.startswith("--") and page.name != "benchmarks.md":
                said.append((every.union(*(jobs.values() if page == JOBS else ())), code))
            for known, rest in said:
                given = re.findall(r"(?<![\w-])(--?[a-z][\w-]*)", rest, re.IGNORECASE)
                wrong += [(page.name, code, flag) for flag in given if flag not in known]
    assert wrong == []


# Jobs

HF_JOBS = [("uv", "run"), ("run",), ("ps",), ("hardware",), ("logs",), ("stats",), ("wait",),
           ("inspect",), ("cancel",)]  # fmt: skip
JOBS = DOCS / "jobs.md"
INSTALLED = "hf-tsv @ git+https://github.com/OWNER/hf-tsv"
LARGE = "openai/clip-vit-large-patch14"


def hf_options(*words: str) -> set[str]:
    """Options of a command of `hf`, with those that it has from click."""
    from huggingface_hub.cli.hf import app
    from typer import Context

    command: Any = app
    for word in words:
        command = command.get_command(Context(command), word)
    return {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}


def words_in_job(job: dict[str, Any]) -> list[str]:
    """Words of the command of hf-tsv that a job runs, after its installation."""
    command = job["command"]
    if command[:2] == ["bash", "-c"]:
        install, _, text = command[2].partition(" &&")
        assert shlex.split(install) == ["pip", "install", INSTALLED]
        done = subprocess.run(
            ["bash", "-c", f"printf '%s\\0' {text.strip()}"], capture_output=True, check=True
        )
        return done.stdout.decode().split("\0")[:-1]
    assert command[:4] == ["uv", "run", "--with", INSTALLED]
    return command[4:]


def test_the_jobs_of_the_page_are_what_it_says(
    hub: Hub, models: Path, desk: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the client sends them; the merge on a CPU is made, of tiny models of these names."""
    from hf_tsv import cli
    from hf_tsv.evaluation.suites import named as suite

    monkeypatch.chdir(desk)
    run_page(JOBS, desk, shell)
    cpu, gpu, small = hub.jobs
    for job, flavour, seconds in ((cpu, "cpu-basic", 7200), (gpu, "l4x1", 7200),
                                  (small, "cpu-basic", 3600)):  # fmt: skip
        assert (job["flavor"], job["timeoutSeconds"]) == (flavour, seconds)
        assert job["secrets"] == {"HF_TOKEN": "hf_write"}
        assert "hf_write" not in repr({**job, "secrets": None})
        program, verb, *words = words_in_job(job)
        assert (program, verb) == ("hf-tsv", "merge")
        given = cli._command("merge").make_context("merge", list(words)).params
        assert given["stream"] and given["push_to"].startswith("me/") and given["output"] is None
    assert cpu["dockerImage"] == "python:3.12"
    assert cpu["environment"] == {"PIP_EXTRA_INDEX_URL": "https://download.pytorch.org/whl/cpu"}
    named = words_in_job(cpu)[2:22]
    assert named == words_in_job(gpu)[2:22]
    assert named == list(suite("vit-l-14-20").references.values())

    for number, name in enumerate(named):
        folder = models / public_names.TASKS[number % len(public_names.TASKS)]
        files = {file.name: file for file in folder.iterdir()}
        hub.add_repo(name, {**files, "README.md": f"---\nbase_model: {LARGE}\n---\n"})
    hub.add_repo(LARGE, models / "base")
    done = shell.run(shlex.join(words_in_job(cpu)), desk)
    assert done.code == 0 and "Merged 20 checkpoints" in done.err, done.err
    assert "model.safetensors" in hub.files("me/clip-vit-large-20-tasks")


def test_a_job_can_be_watched_and_stopped(
    hub: Hub, desk: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk)
    run_page(JOBS, desk, shell)
    (block,) = (b for b in blocks(JOBS) if "JOB_ID" in b.text)
    done = shell.run(block.text.replace("JOB_ID", "job1"), desk)
    assert done.code == 0 and "COMPLETED" in done.out, (done.out, done.err)
    assert hub.jobs[0]["status"]["stage"] == "CANCELED"


# Links


def slug(heading: str) -> str:
    """Anchor of a heading, as GitHub and mkdocs make it."""
    text = re.sub(r"<[^>]*>|[`*]|\[|\]\([^)]*\)", "", heading).strip().lower()
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", text))


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    return found | set(re.findall(r'<a id="([\w-]+)"></a>', text))


def links(page: Path) -> set[str]:
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "", text)
    return set(re.findall(r"\]\(([^)\s]+)\)", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    wrong = []
    for link in links(page):
        if link.startswith(("http", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if target.parent == DOCS and target.name in GENERATED:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


def test_programs_that_are_named_are_there() -> None:
    named = {
        path
        for page in PAGES
        for path in re.findall(
            r"(?:tests|benchmarks|docs)/[\w/]+\.(?:py|sh)\b", page.read_text("utf-8")
        )
    }
    assert named and all((ROOT / path).is_file() for path in named), named


def test_pages_are_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    named = set(re.findall(r"[\w-]+\.md", text))
    assert named == {page.name for page in DOCS.glob("*.md")} | GENERATED


def test_the_owner_is_named_alike_everywhere() -> None:
    owner = hooks.repository().split("/")[-2]
    files = [
        *PAGES,
        ROOT / "CITATION.cff",
        *(ROOT / ".github").rglob("*.yml"),
        ROOT / "pyproject.toml",
        *(ROOT / "space" / name for name in ("README.md", "requirements.txt")),
    ]
    named = {
        found
        for file in files
        for pair in re.findall(
            r"github\.com/([\w-]+)/hf-tsv|([\w-]+)\.github\.io/hf-tsv", file.read_text("utf-8")
        )
        for found in pair
        if found
    }
    assert named == {owner}


# Facts


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_no_page_tells_to_install_what_is_not_released() -> None:
    for page in PAGES:
        text = page.read_text("utf-8").replace("`pip install hf-tsv`", "")
        assert not re.search(r"(pip|pipx|uv tool) install '?\"?hf-tsv(?!(\[[\w,]+\])? @)", text), (
            page
        )


def test_published_and_measured_numbers_are_those_of_the_files() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    published, measured = (
        next(line for line in text.splitlines() if line.startswith(start))
        for start in ("| published", "| measured here")
    )
    found = [float(n) for n in re.findall(r"(?<!\()\b(\d+\.\d+)%", published)]
    assert found == list(pictures.published().values())
    found = [float(n) for n in re.findall(r"(?<!\()\b(\d+\.\d+)%", measured)]
    *merges, fine_tuned = (round(value, 1) for value in pictures.measured())
    assert found == [*merges, round(mean(routing()["8"]["routed"]["accuracy"]), 1), fine_tuned]
    assert (DOCS / "results.svg").read_text("utf-8") == pictures.picture()


def routing() -> dict[str, Any]:
    """Results of routing, by number of tasks and row."""
    text = (ROOT / "benchmarks/accuracy/results/routing.json").read_text("utf-8")
    found: dict[str, Any] = json.loads(text)["accuracy"]
    return found


def test_the_table_of_routing_is_that_of_the_benchmark() -> None:
    page, readme = (DOCS / "routing.md").read_text("utf-8"), (ROOT / "README.md").read_text("utf-8")
    titles = {
        "tsv-default": "TSV-Merge, α = 1", "alone": "best merge of each seed, without images",
        "images": "best merge of each seed, with validation images", "routed": "**routed**",
        "routed-nearest": "routed, nearest task only", "routed-own": "each task by its own factors",
        "routed-classes": "routed, with class names",
    }  # fmt: skip
    for name, title in titles.items():
        (line,) = (x for x in page.splitlines() if x.startswith(f"| {title}"))
        rows = [routing()[count][name]["normalised"] for count in ("8", "14", "20")]
        expected = [f"{mean(row):.1f} ± {stdev(row):.1f}" for row in rows]
        assert re.findall(r"\d+\.\d ± \d+\.\d", line) == expected
    least = min(
        one - max(pair)
        for rows in routing().values()
        for one, *pair in zip(
            *(rows[kind]["normalised"] for kind in ("routed", "alone", "images")), strict=True
        )
    )
    assert f"{least:.1f} points or more above them" in page
    for count in ("8", "20"):
        assert f"{mean(routing()[count]['routed-classes']['normalised']):.1f}%" in readme


def test_the_measured_table_is_that_of_the_benchmark() -> None:
    results = (ROOT / "benchmarks/accuracy/results/accuracy.md").read_text("utf-8")
    table = results.split("## Methods")[1].split("## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "±" in line]
    page = (DOCS / "benchmarks.md").read_text("utf-8")
    assert len(rows) > 10 and all(row in page for row in rows)


def test_the_table_of_the_start_is_that_of_the_benchmark() -> None:
    results = json.loads((start.RESULTS / "start.json").read_text("utf-8"))
    page = (DOCS / "benchmarks.md").read_text("utf-8")
    assert all(row in page for row in start.rows(results["commands"]))


def test_every_kind_of_error_and_warning_is_explained() -> None:
    known = anchors(DOCS / "troubleshooting.md")
    assert {kind.lower() for kind in hooks.error_kinds()} - {"hftsverror"} <= known
    source = (ROOT / "hf_tsv/merging/diagnosis.py").read_text("utf-8")
    kinds = set(re.findall(r'Diagnosis\(\s*"([\w-]+)"', source))
    assert len(kinds) >= 7 and kinds <= anchors(DOCS / "interference.md")


def test_the_page_of_errors_has_the_messages_of_the_source() -> None:
    raised = hooks.errors_raised()
    told = [r for r in raised if len(r.message.replace(hooks.HOLE, "").strip()) > 8]
    assert len(told) > 0.85 * len(raised) > 200
    page = hooks.errors_page()
    assert all(f'<a id="{hooks.slug(r.message)}"></a>' in page for r in told)
    assert "is gated and this token has no access" in page


def test_the_reference_has_every_command_and_option() -> None:
    from hf_tsv import cli

    page = hooks.cli_page()
    for name in cli.COMMANDS:
        section = page.split(f"## hf-tsv {name} {{")[1].split("\n## ")[0]
        options = {o for p in cli._command(name).params for o in p.opts if o.startswith("--")}
        assert all(re.search(rf"{option}[ `,]", section) for option in options)
    api = hooks.api_page()
    import hf_tsv as package

    assert all(f"::: hf_tsv.{name}\n" in api for name in package.__all__ if name[0] != "_")


def test_every_variable_that_is_read_is_documented() -> None:
    page = (DOCS / "environment.md").read_text("utf-8")
    read = {
        name
        for file in (ROOT / "hf_tsv").rglob("*.py")
        for name in re.findall(r'environ(?:\.get\(|\[)"(\w+)"', file.read_text("utf-8"))
    }
    assert read and {name for name in read if f"`{name}" not in page} <= {"MPLBACKEND"}


def test_the_metadata_of_the_repository_is_valid() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert {"Documentation", "Repository", "Issues", "Changelog"} <= project["urls"].keys()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    version = (ROOT / "hf_tsv/system/version.py").read_text("utf-8")
    assert f'"{citation["version"]}"' in version
    for file in (ROOT / ".github").rglob("*.yml"):
        assert yaml.safe_load(file.read_text("utf-8")), file
