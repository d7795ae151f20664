"""The page: its parts, and what happens when they are used."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr
from huggingface_hub import constants

from hf_tsv.methods.catalogue import METHODS
from hf_tsv.system.text import counted, human_bytes
from hf_tsv.ui import fragments
from hf_tsv.ui.commands import TRYING, Command, CommandError
from hf_tsv.ui.desk import INTERFERENCE, MERGED, TRIAL_BYTES, Desk, Visitor
from hf_tsv.ui.form import Form

BASE = "openai/clip-vit-base-patch32"
TITLE = "Merge fine-tuned CLIP models"
ABOUT = (
    "Choose fine-tunes of one base model. They become one model that does all their tasks,"
    " without training and without data."
)
MOST_LABELS, LONGEST_LABEL = 100, 200
LABELS = f"Write up to {MOST_LABELS} labels that the image may have, between commas."
METHOD_CHOICES = [
    (f"{row.name}: {row.says}", row.name)
    for row in METHODS.values()
    if not row.learns and not row.beside
]
TOGETHER = 25  # merges that run or wait, and handlers that do little
SHORT_TOGETHER = 3  # commands that take no turn


Given = dict[Any, Any]
"""Values by the parts of the page that they were filled in."""


class Page:
    """The page of one server.

    Args:
        desk ([`Desk`]): its visitors.
        account (`str`, *optional*): name of the machine's own account, where strangers do not come.
    """

    def __init__(self, desk: Desk, account: str | None = None) -> None:
        self.desk, self.account = desk, account
        with gr.Blocks(
            title="hf-tsv", analytics_enabled=False, delete_cache=(600, 3600)
        ) as self.blocks:
            self._account()
            self._models()
            self._method()
            self._merging()
            self._trial()
            self._keeping()
            self._wire()

    # Parts

    def _account(self) -> None:
        gr.Markdown(f"# {TITLE}\n{ABOUT}")
        if self.desk.limits.public:
            gr.LoginButton(size="sm", elem_id="sign-in")
        else:
            signed = f"Signed in as **{self.account}**." if self.account else (
                "Not signed in: run `hf auth login` to push, or to read private models."
            )  # fmt: skip
            gr.Markdown(signed, elem_id="account")

    def _models(self) -> None:
        gr.Markdown("## 1. Models")
        self.base = gr.Textbox(
            BASE, label="Base model", info="org/name, org/name@revision", elem_id="base"
        )
        with gr.Row():
            self.author = gr.Textbox(label="Author (optional)", elem_id="author", min_width=140)
            self.search = gr.Textbox(
                label="Part of the name (optional)", elem_id="search", min_width=140
            )
            self.limit = gr.Slider(5, 100, 20, step=5, label="At most", min_width=140)
        self.find = gr.Button("Find fine-tunes", elem_id="find")
        self.found = gr.HTML(elem_id="found")
        self.ticked = gr.CheckboxGroup([], label="Can be merged", visible=False, elem_id="ticked")
        with gr.Accordion("Cannot be merged", open=False, visible=False) as self.others_box:
            self.others = gr.HTML()
        self.pasted = gr.Textbox(
            label="Further models", lines=2, elem_id="pasted",
            info="Names between spaces, commas or lines: fine-tunes, task factors or adapters.",
        )  # fmt: skip

    def _method(self) -> None:
        gr.Markdown("## 2. Method")
        with gr.Row():
            self.method = gr.Dropdown(
                METHOD_CHOICES, value="tsv", label="Method", elem_id="method", scale=3,
                min_width=220,
            )  # fmt: skip
            self.alpha = gr.Textbox(
                label="α (optional)", elem_id="alpha", min_width=120,
                info="Scale of the merged update",
            )  # fmt: skip
        with gr.Row():
            self.plan = gr.Button("Show the plan", elem_id="plan")
            self.measure = gr.Button("Measure interference", elem_id="measure")
        self.planned = gr.HTML(elem_id="planned")
        self.interference = gr.HTML(elem_id="interference")

    def _merging(self) -> None:
        gr.Markdown("## 3. Merge")
        with gr.Row():
            self.merge = gr.Button("Merge", variant="primary", elem_id="merge")
            self.stop = gr.Button("Stop", variant="stop", elem_id="stop", interactive=False)
        self.state = gr.HTML(elem_id="state")
        with gr.Accordion("Log", open=False):
            self.log = gr.Textbox(
                show_label=False, container=False, lines=6, max_lines=16, interactive=False,
                elem_id="log",
            )  # fmt: skip

    def _trial(self) -> None:
        gr.Markdown("## 4. Try it")
        with gr.Row():
            self.image = gr.Image(
                type="filepath", sources=["upload"], label="Image", height=260, elem_id="image",
                buttons=[],
            )  # fmt: skip
            with gr.Column():
                self.labels = gr.Textbox(
                    label="Labels", info="Between commas", lines=2, elem_id="labels",
                    placeholder="cat, dog, a house",
                )  # fmt: skip
                self.classify = gr.Button("Classify", elem_id="classify")
                self.tried = gr.HTML(elem_id="tried")
                self.answer = gr.Label(visible=False, show_label=False, elem_id="answer")

    def _keeping(self) -> None:
        gr.Markdown("## 5. Keep it")
        with gr.Row():
            self.repo_id = gr.Textbox(
                label="Repository", placeholder="me/clip-merged", elem_id="repo", scale=3,
                min_width=220, info="Created if needed, in your account or an organisation",
            )  # fmt: skip
            self.private = gr.Checkbox(False, label="Private", elem_id="private", min_width=120)
        self.push = gr.Button("Push to the Hub", elem_id="push")
        self.pushed = gr.HTML(elem_id="pushed")
        self.command = gr.Code(
            Form(BASE).shown("", private=False), language=None, label="The same in a terminal",
            interactive=False, wrap_lines=True, show_line_numbers=False, elem_id="command",
            buttons=["copy"],
        )  # fmt: skip

    def _wire(self) -> None:
        own: Any = {"api_visibility": "private", "concurrency_limit": TOGETHER}
        hidden: Any = {**own, "show_progress": "hidden"}
        short: Any = {**own, "concurrency_limit": SHORT_TOGETHER, "concurrency_id": "short",
                      "show_progress": "minimal"}  # fmt: skip
        fields: set[Any] = {self.base, self.ticked, self.pasted, self.method, self.alpha}
        all_fields: set[Any] = {*fields, self.repo_id, self.private}
        looked: set[Any] = {self.base, self.ticked, self.author, self.search, self.limit}
        lists = [self.found, self.ticked, self.others_box, self.others]
        self.find.click(self._find, looked, lists, **short)
        self.plan.click(self._plan, fields, [self.planned], **short)
        self.measure.click(self._measure, fields, [self.interference], **hidden)
        state = [self.state, self.log, self.merge, self.stop]
        self.merge.click(self._merge, fields, state, **hidden)
        self.stop.click(self._stop, None, None, **hidden)
        one: Any = {**hidden, "concurrency_limit": 1, "concurrency_id": "images"}
        undecoded = {**one, "preprocess": False}  # an image of a stranger may be of any size
        self.image.upload(self._uploaded, [self.image], None, **undecoded)
        tried = [self.tried, self.answer]
        self.classify.click(self._classify, [self.image, self.labels], tried, **undecoded)
        pushing = {**short, "concurrency_id": "pushes"}
        self.push.click(self._push, [self.repo_id, self.private], [self.pushed], **pushing)
        for part in all_fields:
            part.change(self._shown, all_fields, [self.command], **hidden)
        self.blocks.unload(self._leave)

    # What happens

    def _find(
        self, given: Given, request: gr.Request, token: gr.OAuthToken | None
    ) -> Iterator[tuple[Any, Any, Any, Any]]:
        """List fine-tunes; what was ticked stays ticked."""
        nothing = gr.update(), gr.update(), gr.update()
        base, ticked = given[self.base], given[self.ticked]
        yield fragments.state(f"Looking for fine-tunes of {base.strip()}…"), *nothing
        try:
            form = Form(base, only_hub=self.desk.limits.public)
            words = form.find(given[self.author], given[self.search], given[self.limit])
            models = self.desk.finished(self._visitor(request), words, _of(token))["models"]
        except CommandError as error:
            yield _failed(error), *nothing
            return
        good = [model for model in models if model["mergeable"]]
        listed = {model["ref"]: fragments.choice(model) for model in good}
        listed |= {ref: ref for ref in ticked if ref not in listed}
        choices = [(text, ref) for ref, text in listed.items()]
        yield (
            fragments.state(f"{len(good)} of {counted(len(models), 'model')} can be merged."),
            gr.update(choices=choices, value=list(ticked), visible=bool(choices)),
            gr.update(visible=len(good) < len(models)),
            fragments.not_mergeable(models),
        )

    def _plan(
        self, given: Given, request: gr.Request, token: gr.OAuthToken | None
    ) -> Iterator[str]:
        """Show what a merge would do."""
        yield fragments.state("Reading the headers of the files…")
        try:
            form = self._form(given)
            yield fragments.plan(self._dry_run(form, self._visitor(request), _of(token)))
        except CommandError as error:
            yield _failed(error)

    def _dry_run(self, form: Form, visitor: Visitor, token: str | None) -> dict[str, Any]:
        limits = self.desk.limits
        words = [*form.merge(MERGED), "--force", *limits.words(), "--dry-run", "--json"]
        plan = self.desk.finished(visitor, words, token)
        self.desk.check_size(plan)
        return plan

    def _measure(
        self, given: Given, request: gr.Request, token: gr.OAuthToken | None,
        profile: gr.OAuthProfile | None,
    ) -> Iterator[str]:  # fmt: skip
        """Show how much the tasks interfere."""
        try:
            visitor, form = self._visitor(request), self._form(given)
            words = [*form.interference(INTERFERENCE), "--force", *self.desk.limits.words()]
            with self.desk.turns.entered(self._person(profile)) as before:
                yield from _waited(visitor, before)
                with self.desk.running(visitor, [*words, "--json"], _of(token)) as command:
                    yield from _followed(command)
                    command.result()
            found = visitor.folder / INTERFERENCE / "interference.html"
            yield fragments.page(found.read_text(encoding="utf-8"))
        except CommandError as error:
            yield _failed(error)

    def _merge(
        self, given: Given, request: gr.Request, token: gr.OAuthToken | None,
        profile: gr.OAuthProfile | None,
    ) -> Iterator[tuple[Any, Any, Any, Any]]:  # fmt: skip
        """Merge when it is this person's turn, after a look at what it takes."""
        busy = gr.update(interactive=False), gr.update(interactive=True)
        idle = gr.update(interactive=True), gr.update(interactive=False)
        log: Any = gr.update()
        try:
            visitor, form = self._visitor(request), self._form(given)
            words = [*form.merge(MERGED), "--force", *self.desk.limits.words(), "--json"]
            with self.desk.turns.entered(self._person(profile)) as before:
                for text in _waited(visitor, before):
                    yield text, "", *busy
                if self.desk.limits.max_output is not None:
                    yield fragments.state("Reading the headers of the files…"), "", *busy
                    self._dry_run(form, visitor, _of(token))
                    _refuse_stopped(visitor)
                with self.desk.running(visitor, words, _of(token)) as command:
                    for text in _followed(command):
                        log = "\n".join(command.log)
                        yield text, log, *busy
                    report = command.result()
            size, tasks = human_bytes(report["output_bytes"]), len(report["inputs"])
            text = f"Merged {counted(tasks, 'model')} in {report['seconds']:.0f} s: {size}."
            then = "Try it below, and push it: it is removed when this window is closed."
            yield fragments.state(text, then, kind="done"), log, *idle
        except CommandError as error:
            yield _failed(error), log, *idle

    def _stop(self, request: gr.Request) -> None:
        self.desk.cancel(self._visitor(request))

    def _uploaded(self, image: dict[str, Any] | None, request: gr.Request) -> None:
        """Note an uploaded image, which goes with its visitor."""
        with suppress(CommandError):
            self._image(image, self._visitor(request))

    def _image(self, image: dict[str, Any] | None, visitor: Visitor) -> Path:
        """File of an uploaded image."""
        if not image:
            raise CommandError("There is no image.", "Upload one.")
        return self.desk.upload_of(visitor, str(image.get("path")))

    def _classify(
        self, image: dict[str, Any] | None, labels: str, request: gr.Request
    ) -> Iterator[tuple[Any, Any]]:
        """Classify an image by its labels with the merged model."""
        visitor, hidden = self._visitor(request), gr.update(visible=False)
        names = list(dict.fromkeys(filter(None, map(str.strip, labels.split(",")))))
        try:
            _refuse_unmerged(visitor)
            file = self._image(image, visitor)
            if not 0 < len(names) <= MOST_LABELS:
                raise CommandError(f"There are {len(names)} labels.", LABELS)
            yield fragments.state("Loading the model and looking at the image…"), hidden
            names = [name[:LONGEST_LABEL] for name in names]
            words = [f"./{MERGED}", str(file), str(TRIAL_BYTES), *names]
            scores = self.desk.finished(visitor, words, None, module=TRYING)
            yield "", gr.update(value=scores, visible=True)
        except CommandError as error:
            yield _failed(error), hidden

    def _push(
        self, repo_id: str, private: bool, request: gr.Request, token: gr.OAuthToken | None
    ) -> Iterator[str]:
        """Upload the merged model with its card and recipe."""
        visitor = self._visitor(request)
        try:
            _refuse_unmerged(visitor)
            if not repo_id.strip() or repo_id.strip().startswith("-"):
                raise CommandError("No repository is named.", "Write me/name.")
            if self.desk.limits.public and token is None:
                raise CommandError("You are not signed in.", "Sign in at the top of the page.")
            words = ["push", MERGED, repo_id.strip(), *(["--private"] if private else [])]
            with self.desk.running(visitor, [*words, "--json"], _of(token)) as command:
                yield from _followed(command)
                report = command.result()
            text = "Pushed." if report["changed"] else "The repository has all of it already."
            yield fragments.linked(text, _page_of(report))
        except CommandError as error:
            yield _failed(error)

    def _shown(self, given: Given) -> str:
        """The command that does the same."""
        return self._form(given).shown(given[self.repo_id], private=given[self.private])

    def _leave(self, request: gr.Request) -> None:
        self.desk.leave(str(request.session_hash))

    # Who asks, and for what

    def _visitor(self, request: gr.Request) -> Visitor:
        return self.desk.visitor(str(request.session_hash))

    def _person(self, profile: gr.OAuthProfile | None) -> str:
        """Who asks for a merge; on a public page they have signed in."""
        if self.desk.limits.public and profile is None:
            raise CommandError("You are not signed in.", "Sign in at the top of the page.")
        return "" if profile is None else profile.username

    def _form(self, given: Given) -> Form:
        """The form as it is filled in."""
        method = given[self.method] if given[self.method] in METHODS else ""
        ticked, public = tuple(given[self.ticked]), self.desk.limits.public
        return Form(given[self.base], ticked, given[self.pasted], method, given[self.alpha], public)


def _waited(visitor: Visitor, before: Callable[[], int]) -> Iterator[str]:
    """States of somebody who waits, until nobody is before them."""
    visitor.waiting = True
    while visitor.waiting and (number := before()):
        visitor.seen = time.monotonic()
        people = counted(number, "merge is", "merges are")
        yield fragments.state(f"Waiting: {people} before yours.")
        time.sleep(0.5)
    _refuse_stopped(visitor)


def _refuse_stopped(visitor: Visitor) -> None:
    if not visitor.waiting:
        raise CommandError("Stopped.")


def _followed(command: Command) -> Iterator[str]:
    """State of a command that runs, again and again."""
    state = fragments.state("Starting…", share=0.0)
    yield state
    for step in command.followed():
        if step is not None:
            text = f"{step.doing}: {step.share:.0%}"
            state = fragments.state(text, step.told, share=step.share)
        yield state  # also with a new line of the log


def _refuse_unmerged(visitor: Visitor) -> None:
    if not (visitor.folder / MERGED / "config.json").is_file():
        raise CommandError("There is no merged model yet.", "Merge first.")


def _of(token: gr.OAuthToken | None) -> str | None:
    return None if token is None else token.token


def _failed(error: CommandError) -> str:
    return fragments.state(error.message, error.hint, kind="error")


def _page_of(report: dict[str, Any]) -> str:
    """Address of the repository on the Hub."""
    address = report["url"] or f"{constants.ENDPOINT}/{report['repo_id']}"
    return str(address).partition("/commit/")[0]
