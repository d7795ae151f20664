"""Report on ranks and variants of TSV-Merge, and on compression."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from benchmarks.accuracy.runs import VARIANTS, Seed
from benchmarks.accuracy.scores import Found, row, spread, table

SETTINGS = {
    "procrustes": "TSV-Merge by SVDs (`--precision exact`)",
    "whitening": "TSV-Merge by whitening",
    "fused": "TSV-Merge, attention stacked (`--qkv fused`)",
    "task-arithmetic-1": "task arithmetic",
    "low-rank-1": "low rank only",
    "orthogonal-1": "orthogonal only",
    "orthogonal-fused": "orthogonal only, attention stacked",
}


def found(kept: Sequence[Found], seeds: Sequence[Seed], counts: Sequence[int]) -> Found:
    """Summary of variants, ranks and compression.

    Args:
        kept: results of the runs of each seed.
        seeds: the seeds.
        counts: numbers of tasks merged.
    """
    return {
        "variants": {
            str(count): {name: row(kept, seeds, count, name) for name in VARIANTS}
            for count in counts
        },
        "ranks": {str(count): _ranks(kept, seeds, count) for count in counts},
        "compression": {
            str(count): {
                name: row(kept, seeds, count, name) | {"share": _shares(kept, count, name)}
                for name in ("factors", "tall-mask")
            }
            for count in counts
        },
        "sweep": {
            "fractions": kept[0]["sweep"]["fractions"],
            "mean": [
                100 * statistics.mean(column)
                for column in zip(*(run["sweep"]["mean"] for run in kept), strict=True)
            ],
            "full": 100 * statistics.mean(run["sweep"]["full"] for run in kept),
            "stored": kept[0]["sweep"]["stored"],
        },
    }


def _ranks(kept: Sequence[Found], seeds: Sequence[Seed], count: int) -> Found:
    names = [n for n in kept[0] if n.startswith("rank-") and n.endswith(f"-{count}")]
    shares = {name: name.split("-")[1] for name in names}
    rows = {share: row(kept, seeds, count, f"rank-{share}") for share in shares.values()}
    return rows | {"k/T": row(kept, seeds, count, "tsv-default")}


def _shares(kept: Sequence[Found], count: int, name: str) -> list[float]:
    """Bytes of all tasks, base included, over the bytes of their checkpoints."""
    return [
        run[f"{name}-{count}"]["bytes"] / run[f"factors-{count}"]["checkpoint_bytes"]
        for run in kept
    ]


def sections(found: Found) -> list[str]:
    """Sections of the report, in Markdown."""
    counts = list(found["variants"])
    head = ["", *(f"{count} tasks" for count in counts)]
    ranks = list(dict.fromkeys(share for count in counts for share in found["ranks"][count]))

    def by_count(rows: Callable[[str], Found], what: str = "normalised") -> list[str]:
        return [spread(rows(count)[what], 2) for count in counts]

    return [
        "## Rank",
        "TSV-Merge, α = 1, with fewer singular vectors of each task than k/T: normalised accuracy.",
        table(
            ["share of k", *head[1:]],
            (
                [
                    share,
                    *(
                        spread(found["ranks"][c][share]["normalised"])
                        if share in found["ranks"][c]
                        else ""
                        for c in counts
                    ),
                ]
                for share in ranks
            ),
        ),
        "## α = 1",
        "Solvers, stacked attention projections, and the paper's ablation without a choice of α:"
        " normalised accuracy.",
        table(
            head,
            (
                [SETTINGS[name], *by_count(lambda count, n=name: found["variants"][count][n])]  # type: ignore[misc]
                for name in VARIANTS
            ),
        ),
        "## Compression",
        "Each task on its own, of factors of rank k/T and of TALL-masks: normalised accuracy; and"
        " bytes of all tasks, base model included, in per cent of their vision towers.",
        table(
            head,
            (
                [
                    f"{title}, {what}",
                    *(
                        spread([scale * x for x in found["compression"][count][name][key]], digits)
                        for count in counts
                    ),
                ]
                for name, title in (("factors", "TSV-Compress"), ("tall-mask", "TALL-masks"))
                for what, key, scale, digits in (
                    ("accuracy", "normalised", 1, 2),
                    ("bytes", "share", 100, 1),
                )
            ),
        ),
        "All 20 tasks, by share of the singular values kept (accuracy in per cent, mean over tasks"
        " and seeds):",
        table(
            ["", *(f"{share:g}" for share in found["sweep"]["fractions"]), "fine-tunes"],
            [
                [
                    "accuracy",
                    *(f"{value:.1f}" for value in found["sweep"]["mean"]),
                    f"{found['sweep']['full']:.1f}",
                ],
                [
                    "numbers stored of an update",
                    *(f"{100 * share:.0f} %" for share in found["sweep"]["stored"]),
                    "100 %",
                ],
            ],
        ),
    ]
