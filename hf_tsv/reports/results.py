"""Table of evaluation results in the body of a card, from the results in its front matter."""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub import ModelCard

from hf_tsv.reports.templates import environment
from hf_tsv.system.version import __version__

TASK = "zero-shot-image-classification"
BEGIN, END = "<!-- results of hf-tsv evaluate -->", "<!-- end of the results -->"
SECTION = re.compile(rf"{BEGIN}.*?{END}", re.DOTALL)
FOLLOWING = re.compile(r"^## (Limitations|Recipe|Made with|License|Citation)\b", re.MULTILINE)


def with_table(text: str) -> str:
    """Text of a card with a table of its results, which replaces an earlier one.

    A new table is placed before the sections that end our cards, in another card at the end.
    """
    data: Any = ModelCard(text, ignore_metadata_errors=True).data
    results = data.eval_results or []
    ours = [
        (one, one.metric_args or {})
        for one in results
        if (one.task_type, one.metric_type) == (TASK, "accuracy")
    ]
    prompts = {tuple(args.get("templates", ())) for _, args in ours}
    section = (
        environment()
        .get_template("_results.jinja")
        .render(
            results=ours,
            prompts=prompts.pop() if len(prompts) == 1 else (),
            begin=BEGIN,
            end=END,
            version=__version__,
        )
    )
    line = "\r\n" if text.partition("\n")[0].endswith("\r") else "\n"
    section = section.replace("\n", line)
    if SECTION.search(text):
        return SECTION.sub(lambda _: section, text, count=1)
    if found := FOLLOWING.search(text):
        return f"{text[: found.start()]}{section}{line * 2}{text[found.start() :]}"
    return f"{text.rstrip()}{line * 2}{section}{line}"
