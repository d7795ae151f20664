"""Tokens, passwords and signatures: in no line, no file, no repository, and at no foreign host."""

from __future__ import annotations

import base64
import dataclasses
import errno
import importlib
import math
import os
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from cli import Result, ended, hf_tsv
from forks import fork
from home import HF_HOME
from hub import Hub, User
from labelled import add_dataset

import hf_tsv as api
from hf_tsv.merging import pipeline
from hf_tsv.system.errors import HfTsvError
from hf_tsv.system.text import redacted

TOKEN = "hf_QmXwZvKtPyLrNsDgJbHcFqVeTuAiOxSk"
SIGNATURE = "?X-Amz-Signature=c0ffee5157c0ffee&Expires=3600"
PASSWORD = "Tr0ub4dor"
STORED = "/[0-9a-f]{64}/"


def disguises(secret: str) -> list[bytes]:
    """What to search for: the secret, its core, and that within base64 at any of three places."""
    core = secret[4:-2].encode()
    cores = [base64.b64encode(b"x" * shift + core)[4:-4] for shift in range(3)]
    return [secret.encode(), core, *cores]


@dataclass
class Traces:
    """Where a run may have left something: a home, temporary files, work, and a Hub."""

    hub: Hub
    place: Path
    said: list[str] = dataclasses.field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """Of a process whose every file is searched."""
        home, temporary = str(self.place / "home"), str(self.place / "tmp")
        return {**os.environ, "HF_TOKEN": TOKEN, "HF_HOME": home, "TMPDIR": temporary}

    def process(self, *words: str | Path, **environment: str) -> Result:
        """Run hf-tsv, or with `-c` Python, in a process of its own."""
        variables = {**self.environment, **environment}
        done = ended(fork(*words, cwd=self.place / "work", environment=variables))
        self.said += [done.out, done.err]
        return done

    def command(self, *words: str | Path, token: str | None = TOKEN) -> Result:
        """The same in this process."""
        done = hf_tsv(*words, cwd=self.place / "work", HF_TOKEN=token)
        self.said += [done.out, done.err]
        return done

    def everything(self) -> Iterator[tuple[str, bytes]]:
        """All that a run has said, written, pushed and sent, with where it is."""
        yield from (("said", text.encode()) for text in self.said)
        for top in (self.place, Path(HF_HOME)):
            for path in top.rglob("*"):
                yield f"name {path}", str(path.relative_to(top)).encode()
                if path.is_file():
                    yield str(path), path.read_bytes()
        for repo in self.hub.repos.values():
            for commit in repo.commits.values():
                about = f"{commit.message} {commit.description} {commit.author}"
                yield repo.id, f"{repo.id} {about} {list(commit.files)} {list(repo.refs)}".encode()
                for name, blob in commit.files.items():
                    yield f"{repo.id}/{name}", blob.read()
            yield from ((f"{repo.id} storage", blob.read()) for blob in repo.lfs.values())
        for request in self.hub.requests:
            headers = dict(request.headers)
            if request.origin == "api":
                assert headers.pop("authorization", f"Bearer {TOKEN}") == f"Bearer {TOKEN}"
            line = f"{request.method} {request.path} {headers}"
            yield f"request {line}", line.encode()
            yield f"query {line}", request.query.encode()
            yield f"body {line}", request.body

    def hold(self, *secrets: str, but: str = "nothing") -> list[str]:
        """Where something of these secrets was found."""
        wanted = [part for secret in secrets for part in disguises(secret)]
        return [
            where
            for where, content in self.everything()
            if not where.startswith(but) and any(part in content for part in wanted)
        ]


@pytest.fixture
def traces(world: Path, hub: Hub, tmp_path: Path) -> Traces:
    """Private repositories, a storage that signs its addresses, and one user with the token."""
    hub.users = {TOKEN: User("me", orgs=["org"], role="write")}
    hub.signature = SIGNATURE
    for repo in hub.repos.values():
        repo.private = True
    for name in ("home", "tmp"):
        (tmp_path / name).mkdir()
    return Traces(hub, tmp_path)


def assert_nothing_leaked(traces: Traces) -> None:
    assert not traces.hold(TOKEN)
    assert any(r.headers.get("authorization") for r in traces.hub.requests)  # it was used
    for request in traces.hub.requests:
        assert request.origin == "api" or "authorization" not in request.headers
    assert not [t for t in traces.said if "c0ffee5157" in t]
    files = [where for where, content in traces.everything() if b"c0ffee5157" in content]
    assert not [where for where in files if not where.startswith("query ")]


# Real processes, with everything that HF_DEBUG=1 adds


def test_a_merge_that_is_pushed(traces: Traces) -> None:
    words = ["merge", "org/vision", "org/flat", "-o", "merged", "--push-to", "me/new", "--report"]
    done = traces.process(*words, "--json", HF_DEBUG="1")
    assert done.code == 0, done.err
    assert "authorization: <TOKEN>" in done.err  # the client does tell its requests
    assert {r.origin for r in traces.hub.requests} == {"api", "cdn"}
    assert_nothing_leaked(traces)


def test_an_upload_that_the_storage_refuses(traces: Traces) -> None:
    traces.hub.multipart_above = 30_000
    traces.hub.fail("/upload/.*/2$", 403, method="PUT", times=math.inf)
    done = traces.process("compress", "org/vision", "--push-to", "me/new", HF_DEBUG="1")
    assert done.code == 1 and "Traceback" in done.err and "The result is complete in" in done.err
    assert any(traces.place.rglob("unpushed/*/*/task_factors.safetensors"))
    assert_nothing_leaked(traces)


def test_an_error_that_nobody_knows(traces: Traces) -> None:
    code = f"""
import sys
from hf_tsv import cli
from hf_tsv.runs import target
def upload(folder, target, token, *, show):
    raise ZeroDivisionError("unforeseen")
target.upload = upload
words = ["merge", "org/vision", "--push-to", "me/new", "--stream"]
sys.argv = ["hf-tsv", *words, "--token", {TOKEN!r}]
cli.main()
"""
    done = traces.process("-c", code, HF_DEBUG="1", HF_TOKEN="hf_other")
    assert done.code == 1 and "ZeroDivisionError: unforeseen" in done.err
    assert "Warning: The result is complete in " in done.err
    assert_nothing_leaked(traces)


# Runs that end well, and badly


def test_what_a_run_writes_with_a_token_as_an_option(traces: Traces) -> None:
    for words in (
        ["merge", "org/vision", "org/flat", "-o", "merged", "--report"],
        ["compress", "org/vision", "-o", "out", "--push-to", "me/factors"],
        ["push", "merged", "me/new", "--json"],
        ["reconstruct", "me/factors", "-o", "full", "--stream"],
        ["interference", "org/vision", "org/flat", "-o", "report"],
        ["inspect", "me/new", "--json"],
    ):
        done = traces.command(*words, "--token", TOKEN, token=None)
        assert done.code == 0, done.err
    assert_nothing_leaked(traces)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|multiprocess|dill).*")
def test_what_an_evaluation_writes(traces: Traces, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    add_dataset(traces.hub, "org/data", tmp_path / "rows")
    traces.hub.repos["datasets/org/data"].private = True
    traces.hub.commit("org/base", {"README.md": "---\nlicense: mit\n---\n"})
    done = traces.command("evaluate", "org/base", "--task", "a=org/data", "--card", "-o", "eval")
    assert done.code == 0, done.err
    assert b"model-index" in traces.hub.files("org/base")["README.md"]
    assert_nothing_leaked(traces)


def forbidden(hub: Hub) -> None:
    hub.users[TOKEN] = User("me", role="read")


FAILURES: dict[str, tuple[Any, list[str]]] = {
    "403": (forbidden, ["merge", "org/vision", "--push-to", "org/new"]),
    "401": (lambda hub: hub.fail("/api/", 401, times=math.inf), ["merge", "org/vision", "-o", "m"]),
    "unknown": (lambda hub: None, ["merge", "org/nope", "-o", "m"]),
    "refused": (
        lambda hub: hub.fail("/commit/", 400, times=math.inf),
        ["merge", "org/vision", "-o", "m", "--push-to", "me/new"],
    ),
    "echoed": (
        lambda hub: hub.fail("/api/models/org/vision", 400, body=b"no", times=math.inf),
        ["merge", "org/vision", "-o", "m"],
    ),
    "cut": (
        lambda hub: hub.fail(STORED, drop_after=10, times=math.inf, after=3),
        ["merge", "org/vision", "-o", "m"],
    ),
    "storage": (
        lambda hub: hub.fail(STORED, 503, times=math.inf, after=2),
        ["merge", "org/vision", "-o", "m"],
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_run_that_fails(traces: Traces, sleeps: list[float], name: str) -> None:
    disturb, words = FAILURES[name]
    disturb(traces.hub)
    done = traces.command(*words)
    assert done.code == 1 and "Error: " in done.err, done.err
    assert_nothing_leaked(traces)


def test_what_a_run_that_stopped_goes_on_from(
    traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_one, calls = pipeline.merge_one, count()

    def merge_some(*args: Any, **options: Any) -> Any:
        if next(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return merge_one(*args, **options)

    monkeypatch.setattr(pipeline, "merge_one", merge_some)
    words = ["merge", "org/vision", "org/flat", "-o", "merged", "--stream", "--token", TOKEN]
    assert "Progress saved (" in traces.command(*words, token=None).err
    assert (traces.place / "work" / ".merged.hf-tsv" / "job.json").is_file()
    assert_nothing_leaked(traces)


def test_an_exception_of_the_api(traces: Traces) -> None:
    traces.hub.fail("/commit/", 403, times=math.inf)
    with pytest.raises(HfTsvError) as error:
        api.merge(["org/vision"], push_to="me/new", token=TOKEN)
    parts, seen = [error.value], []
    while parts:  # and whatever it came from
        seen.append(part := parts.pop())
        parts += [e for e in (part.__cause__, part.__context__) if e is not None and e not in seen]
    traces.said += [f"{part!r} {part} {vars(part)}" for part in seen[:1]]
    traces.said += [str(part) for part in seen]
    assert_nothing_leaked(traces)


# Where the token goes


@pytest.mark.parametrize("flags", [[], ["--stream"]], ids=["download", "stream"])
def test_a_foreign_host_gets_no_token(traces: Traces, flags: list[str]) -> None:
    oid = traces.hub.repos["org/vision"].resolve("main").files["model.safetensors"].oid
    place = f"{traces.hub.foreign}/org/vision/{oid}/model.safetensors"
    traces.hub.fail(f"org/vision/{oid}", 302, headers={"Location": place}, times=math.inf)
    done = traces.command("merge", "org/vision", "-o", "merged", *flags)
    assert done.code != 0  # every request there is redirected, the redirected one as well
    traces.hub.heal()
    words: dict[str, Any] = {"headers": {"Location": place}, "times": math.inf}
    traces.hub.fail("^/org/vision/resolve/.*safetensors", 302, method="GET", **words)
    done = traces.command("merge", "org/vision", "-o", "merged", *flags)
    assert done.code == 0, done.err
    assert "foreign" in {r.origin for r in traces.hub.requests}
    assert_nothing_leaked(traces)


@pytest.mark.parametrize("token", ["hf_a\x01b", "hf_ä", "hf_a b"])
def test_a_token_that_no_header_can_hold_is_not_told(traces: Traces, token: str) -> None:
    for words in (["inspect", "org/vision"], ["merge", "org/vision", "--push-to", "me/new"]):
        done = traces.command(*words, token=token)
        assert done.code == 1 and "Traceback" not in done.err
        assert "Error: The token is empty or has characters that no token has." in done.err
        assert token not in done.err and repr(token)[1:-1] not in done.err
    assert traces.hub.requests == []


# What holds a secret, and does not show it


def test_no_dataclass_shows_its_token() -> None:
    modules = [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(api.__path__, "hf_tsv.")
        if not module.name.endswith("__main__")
    ]
    found = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type)
        and dataclasses.is_dataclass(value)
        and value.__module__.startswith("hf_tsv")
    }
    named = [f for kind in found for f in dataclasses.fields(kind) if "token" in f.name]
    assert len(named) >= 3
    assert not [field for field in named if field.repr]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"GET http://me:{PASSWORD}@proxy:80/a/b failed", "GET http://proxy:80/a/b failed"),
        (f"'https://{TOKEN}@huggingface.co/me/a'", "'https://huggingface.co/me/a'"),
        (f"https://me:{PASSWORD}@x@host", "https://host"),
        (f"at https://s3.aws/a{SIGNATURE}, twice: https://s3.aws/b{SIGNATURE}",
         "at https://s3.aws/a twice: https://s3.aws/b"),
        ("https://huggingface.co/org/name@v1 me@example.org", None),
    ],
)  # fmt: skip
def test_addresses_are_told_without_their_secrets(text: str, shown: str | None) -> None:
    assert redacted(text) == (text if shown is None else shown)


def test_an_endpoint_with_a_password_does_not_show_it(traces: Traces) -> None:
    endpoint = traces.hub.endpoint.replace("//", f"//me:{PASSWORD}@")
    proxy = f"http://me:{PASSWORD}@127.0.0.1:9"
    done = traces.process("merge", "org/vision", "--push-to", "me/new", HF_ENDPOINT=endpoint)
    assert done.code == 1 and "Error: " in done.err
    done = traces.process("inspect", "org/vision", HTTP_PROXY=proxy, NO_PROXY="", no_proxy="")
    assert done.code == 1 and "Error: " in done.err
    assert not [text for text in traces.said if PASSWORD in text]
