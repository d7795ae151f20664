"""Pieces of the page as HTML; all text in them is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from hf_tsv.system.text import counted, human_bytes, one_line, rough_time


def state(text: str, more: str = "", *, kind: str = "", share: float | None = None) -> str:
    """A line on how things are, with a bar if a share of the work is done.

    Args:
        text (`str`): what happens or happened.
        more (`str`): a second, smaller line.
        kind (`str`): `error` or `done`.
        share (`float`, *optional*): 0 to 1.
    """
    bar = "" if share is None else f'<progress value="{share:.4f}" max="1"></progress>'
    small = f"<br><small>{escape(more)}</small>" if more else ""
    role = "alert" if kind == "error" else "status"
    return (
        f'<div class="hf-tsv-state hf-tsv-{kind or "plain"}" role="{role}">{escape(text)}{bar}'
        f"{small}</div>"
    )


def linked(text: str, address: str) -> str:
    """A line on what is done, with the address of a page."""
    link = f'<a href="{escape(address)}" target="_blank" rel="noopener">{escape(address)}</a>'
    return f'<div class="hf-tsv-state hf-tsv-done" role="status">{escape(text)} {link}</div>'


def rows(pairs: Iterable[tuple[str, str]]) -> str:
    """A table of two columns, of which the first names the second."""
    body = "".join(
        f'<tr><th scope="row">{escape(one_line(name))}</th><td>{escape(one_line(text))}</td></tr>'
        for name, text in pairs
    )
    return f'<div class="hf-tsv-rows"><table>{body}</table></div>' if body else ""


def plan(found: Mapping[str, Any]) -> str:
    """Table of what a merge would do, by its dry run."""
    weights = [f"{count:,} {name}" for name, count in found["weights"].items() if count]
    seconds = found.get("expected_seconds")
    pairs = [
        ("Base model", _pinned(found["base_model"])),
        *((f"Task {i}", _pinned(entry)) for i, entry in enumerate(found["inputs"], start=1)),
        ("Weights", ", ".join(weights)),
        ("Download", human_bytes(found["download_bytes"])),
        ("Result", human_bytes(found["output_bytes"])),
        ("Memory", f"about {human_bytes(found['peak_memory_bytes'])}, beside the libraries"),
        *([("Time", f"{rough_time(seconds)}, besides the download")] if seconds else []),
        *((f"Left out of {name}", ", ".join(heads)) for name, heads in found["left_out"].items()),
        *(("Warning", text) for text in found["warnings"]),
    ]
    return rows(pairs)


def not_mergeable(models: Sequence[Mapping[str, Any]]) -> str:
    """Table of models that were found and cannot be merged, with the reasons."""
    return rows((model["ref"], model["reason"]) for model in models if not model["mergeable"])


def choice(model: Mapping[str, Any]) -> str:
    """A model that was found, in one line."""
    facts = [human_bytes(model["download_bytes"]), model["form"], model["license"]]
    facts += ["private"] * model["private"] + ["gated"] * bool(model["gated"])
    if model["warnings"]:
        facts.append(counted(len(model["warnings"]), "warning"))
    return one_line(f"{model['ref']} · {' · '.join(filter(None, facts))}")


def page(html: str) -> str:
    """A page in a frame of its own, which can reach nothing outside of it."""
    return (
        f'<iframe class="hf-tsv-page" title="Task interference" sandbox="allow-scripts"'
        f' srcdoc="{escape(html)}"></iframe>'
    )


def _pinned(entry: Mapping[str, str | None]) -> str:
    revision = entry["revision"]
    return f"{entry['ref']} @ {revision[:8]}" if revision else str(entry["ref"])
