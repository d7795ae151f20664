"""`hf-tsv inspect`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

from hf_tsv.cli import options
from hf_tsv.cli.groups import Only
from hf_tsv.cli.output import Out, pinned, table
from hf_tsv.system.text import human_bytes

if TYPE_CHECKING:
    from hf_tsv.verbs.inspect import InspectReport

EXAMPLES = """\
`hf-tsv inspect org/clip-a`
`hf-tsv inspect me/clip-abc`  (the recipe it came from)
`hf-tsv inspect me/clip-a-tsv --json | jq .factors`
"""


def inspect(
    reference: Annotated[str, "REF", "org/name, org/name@revision, or a local folder."],
    *,
    source: Annotated[options.SourceOptions, Only("subfolder")],
    run: Annotated[options.RunOptions, Only("as_json")],
    access: Annotated[options.AccessOptions, Only("token", "cache_dir")],
) -> None:
    """Say what a checkpoint, a merge or task factors hold, from headers alone.

    Reads the beginning of the weight files by HTTP range, and no weights.
    """
    out = Out(as_json=run.as_json)
    from hf_tsv.verbs import inspect as inspect_

    report = inspect_.inspect(
        reference, token=access.token, cache_dir=access.cache_dir, subfolder=source.subfolder
    )
    out.result(_text(report), report.to_dict())


def _text(report: InspectReport) -> str:
    rows = [
        (report.kind, pinned({"ref": report.ref, "revision": report.revision})),
        ("class", report.model_class or report.model_type or "unknown"),
        ("layout", report.layout or "unknown"),
        ("base model", ", ".join(report.base_model) or "not said"),
        ("license", report.license or "not said"),
        *(("file", f"{name}  {human_bytes(size)}") for name, size in report.files.items()),
        ("parameters", f"{report.parameters:,}"),
        *(
            (name, f"{counts['tensors']} tensors, {human_bytes(counts['bytes'])}")
            for name, counts in (report.dtypes | report.parts).items()
        ),
    ]
    done = Counter(entry["merge"] for entry in report.tensors.values() if "merge" in entry)
    if done:
        rows.append(("merge", ", ".join(f"{count} {name}" for name, count in done.items())))
    if report.recipe is not None:
        inputs = report.recipe["inputs"]
        rows.append(("made by", f"{report.recipe['settings']['method']} of {len(inputs)} tasks"))
        rows += [("task", pinned(entry)) for entry in inputs]
        base = report.recipe["base_model"]
        rows += [("from", pinned(base))] if base else []
    if report.heads:
        rows.append(("heads", ", ".join(report.heads)))
    if report.factors is not None:
        found = report.factors
        stored = Counter(entry["stored"] for entry in report.tensors.values())
        ranks = [entry["rank"] for entry in report.tensors.values() if entry["rank"]]
        energies = [e["energy"] for e in report.tensors.values() if e["rank"]] or [1.0]
        rows += [
            ("task", pinned(found["source"])),
            ("stored", ", ".join(f"{count} {name}" for name, count in stored.items())),
            ("ranks", f"{min(ranks)} … {max(ranks)}" if ranks else "none"),
            ("energy", f"{min(energies):.1%} … {max(energies):.1%} of an update kept"),
            ("size", f"{human_bytes(found['bytes'])}, {found['ratio']:.1%} of the checkpoint"),
            ("error", f"{found['update_error']:.3g} of the update"),
        ]
    rows += [("unknown", text) for text in report.unknown]
    return table(rows)
