"""Bars of accuracy for the README: `python docs/pictures.py` writes `docs/results.svg`.

The left half is what the paper publishes (`hf_tsv/evaluation/suites/suites.yaml`), the right half
what `python -m benchmarks.accuracy` measured on tiny models. Text and bars follow the colour scheme
of the reader.
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PUBLISHED = {
    "zero-shot": "base, zero-shot", "weight averaging": "weight averaging",
    "task arithmetic": "task arithmetic", "consensus TA": "consensus",
    "TSV-Merge": "TSV-Merge", "fine-tuned": "fine-tuned, 8 models",
}  # fmt: skip
MEASURED = ("base", "average", "task-arithmetic", "consensus", "tsv-default", "fine-tuned")
WIDTH, BAR, GAP, LEFT, FULL = 900, 22, 10, 165, 200

STYLE = """
text { font: 14px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f }
.title { font-weight: 600; font-size: 16px }
.note { font-size: 12.5px; fill: #57606a }
.bar { fill: #afb8c1 } .best { fill: #4051b5 }
.bound { fill: none; stroke: #8c959f; stroke-dasharray: 4 3 }
.strong { font-weight: 600 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .note { fill: #9198a1 }
  .bar { fill: #57606a } .best { fill: #8c9eff } .bound { stroke: #9198a1 }
}
"""


def published() -> dict[str, float]:
    """Accuracies of the paper in per cent: ViT-B/32, eight tasks."""
    text = (ROOT / "hf_tsv/evaluation/suites/suites.yaml").read_text("utf-8")
    rows = yaml.safe_load(text)["models"]["vit-b-32"]["published"][8]["paper"]
    return {name: rows[name][0] if isinstance(rows[name], list) else rows[name]
            for name in PUBLISHED}  # fmt: skip


def measured() -> list[float]:
    """Accuracies measured here in per cent: tiny CLIPs, eight tasks, mean over the seeds."""
    results = json.loads((ROOT / "benchmarks/accuracy/results/accuracy.json").read_text("utf-8"))
    rows = [results["methods"]["8"][name]["accuracy"] for name in MEASURED]
    return [sum(row) / len(row) for row in rows]


def panel(x: int, title: str, note: str, values: list[float]) -> list[str]:
    """One half of the picture."""
    lines = [f'<text class="title" x="{x}" y="24">{title}</text>']
    lines.append(f'<text class="note" x="{x}" y="44">{note}</text>')
    for i, (label, value) in enumerate(zip(PUBLISHED.values(), values, strict=True)):
        y, start = 60 + i * (BAR + GAP), x + LEFT
        kind = {"TSV-Merge": "best"}.get(label, "bound" if label.startswith("fine") else "bar")
        strong = ' class="strong"' if kind == "best" else ""
        width = value / 100 * FULL
        lines += [
            f'<text x="{start - 8}" y="{y + 16}" text-anchor="end"{strong}>{label}</text>',
            f'<rect class="{kind}" x="{start}" y="{y}" width="{width:.1f}" height="{BAR}" rx="3"/>',
            f'<text x="{start + width + 8:.1f}" y="{y + 16}"{strong}>{value:.1f}%</text>',
        ]
    return lines


def picture() -> str:
    """The whole picture as SVG."""
    height = 60 + len(PUBLISHED) * (BAR + GAP)
    label = "Accuracy of merges of eight fine-tunes, published and measured; TSV-Merge is highest"
    body = [
        *panel(0, "Published", "ViT-B/32, 8 tasks; the paper's own fine-tunes",
               list(published().values())),
        *panel(WIDTH // 2, "Measured here", "tiny CLIPs trained in this repository, 8 tasks",
               measured()),
    ]  # fmt: skip
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"'
        f' aria-label="{label}"><style>{STYLE}</style>\n' + "\n".join(body) + "\n</svg>\n"
    )


if __name__ == "__main__":
    (ROOT / "docs" / "results.svg").write_text(picture(), encoding="utf-8")
