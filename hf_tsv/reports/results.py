"""Table of evaluation results in the body of a card, from the results in its front matter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard

from hf_tsv.reports.templates import cell, environment, plain
from hf_tsv.system.version import __version__

TASK = "zero-shot-image-classification"
BEGIN, END = "<!-- results of hf-tsv evaluate -->", "<!-- end of the results -->"
SECTION = re.compile(rf"{BEGIN}.*?{END}", re.DOTALL)
FOLLOWING = re.compile(r"^## (Limitations|Recipe|Made with|License|Citation)\b", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """Row of the table: a result, and the arguments of its metric."""

    found: EvalResult
    args: dict[str, Any]

    @property
    def dataset(self) -> str:
        """Dataset with its configuration, and for one on the Hub a link to its commit."""
        name, config = str(self.found.dataset_type), self.found.dataset_config
        text = cell(f"{name}:{config}" if config else name)
        if not (revision := str(self.found.dataset_revision or "")):
            return text
        url = f"https://huggingface.co/datasets/{quote(name)}/tree/{quote(revision, safe='')}"
        return f"[{text}]({url}) at {cell(revision[:12])}"

    @property
    def images(self) -> str:
        """Number of images, if not all of the split."""
        images, total = self.args.get("images"), self.args.get("total")
        if images is None:
            return "all"
        return plain(images if total is None else f"{images} of {total}")

    @property
    def templates(self) -> list[str]:
        """All prompts, if it says which."""
        said = self.args.get("templates")
        return list(map(str, said)) if isinstance(said, list) else []

    @property
    def prompts(self) -> list[str]:
        """Prompts as code, of many the first and their number."""
        first, more = self.templates[:1], len(self.templates[1:])
        return [*map(cell, first), *([f"{more} more"] if more else [])]


def with_table(text: str) -> str:
    """Text of a card with a table of its results, which replaces an earlier one.

    A new table is placed before the sections that end our cards, in another card at the end.
    """
    data: Any = ModelCard(text, ignore_metadata_errors=True).data
    results = data.eval_results or []
    ours = [
        Row(one, one.metric_args if isinstance(one.metric_args, dict) else {})
        for one in results
        if (one.task_type, one.metric_type) == (TASK, "accuracy")
    ]
    prompts = {tuple(row.templates) for row in ours}
    section = (
        environment()
        .get_template("_results.jinja")
        .render(
            results=ours,
            prompts=next(iter(prompts)) if len(prompts) == 1 else (),
            differ=len(prompts) > 1,
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
