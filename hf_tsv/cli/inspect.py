"""`hf-tsv inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from hf_tsv.cli import options
from hf_tsv.cli.groups import Only
from hf_tsv.cli.output import Out, kept, method_text, pinned, table
from hf_tsv.system.text import counted, human_bytes

if TYPE_CHECKING:
    from hf_tsv.verbs.inspect import InspectReport

USAGE = ("REF", "[OPTIONS]")
MISSING = "Name a checkpoint, a merge, task factors or an adapter."
EXAMPLES = (
    f"hf-tsv inspect {options.SUN397}",
    "hf-tsv inspect ./merged",
    "hf-tsv inspect me/clip-sun397-tsv --json | jq .factors",
)


def inspect(
    reference: Annotated[str, "REF", "org/name, org/name@revision, or a local folder."],
    *,
    source: Annotated[options.SourceOptions, Only("subfolder")],
    run: Annotated[options.RunOptions, Only("as_json", "quiet", "verbose")],
    access: Annotated[options.AccessOptions, Only("token", "cache_dir")],
) -> None:
    """Show what a checkpoint, a merge or task factors contain, without a download.

    Reads small files and the headers of the weight files. For a repository also the cards of the
    models it descends from.
    """
    out = Out(as_json=run.as_json, quiet=run.quiet, verbose=run.verbose)
    from hf_tsv.verbs import inspect as inspect_

    report = inspect_.inspect(
        reference, token=access.token, cache_dir=access.cache_dir, subfolder=source.subfolder
    )
    out.result(_text(report), report.to_dict())


KINDS = {
    "factors": "task factors", "adapter": "LoRA adapter", "mask": "TALL-mask of a task",
    "other": "not a checkpoint that hf-tsv reads",
}  # fmt: skip


def _text(report: InspectReport) -> str:
    rows = [
        ("reference", pinned({"ref": report.ref, "revision": report.revision})),
        ("kind", "routed merge" if report.routing else KINDS.get(report.kind, report.kind)),
        ("class", report.model_class or report.model_type or "unknown"),
        ("layout", report.layout or "unknown"),
        ("base model", ", ".join(report.base_model) or "unknown"),
        *_descent(report),
        ("license", report.license or "unknown"),
        *(("file", f"{name}  {human_bytes(size)}") for name, size in report.files.items()),
        ("parameters", f"{report.parameters:,}"),
        *(
            (name, f"{counted(counts['tensors'], 'tensor')}, {human_bytes(counts['bytes'])}")
            for name, counts in (report.dtypes | report.parts).items()
        ),
    ]
    done = Counter(entry["merge"] for entry in report.tensors.values() if "merge" in entry)
    if done and report.recipe is None:
        rows.append(("in a merge", ", ".join(f"{count} {name}" for name, count in done.items())))
    if report.recipe is not None:
        inputs = report.recipe["inputs"]
        rows.append(("method", method_text(report.recipe["settings"])))
        rows += [("task", pinned(entry)) for entry in inputs]
        base = report.recipe["base_model"]
        rows += [("made from", pinned(base))] if base else []
    if report.routing is not None:
        tasks, rule = report.routing["tasks"], report.routing["rule"]
        rows += [
            (t["name"], f"{t['folder'] or pinned(t['factors'])}, of {pinned(t['source'])}")
            for t in tasks
        ]
        named = [f"{t['name']} ({len(t['classes'])})" for t in tasks if t["classes"]]
        rows += [("class names", ", ".join(named))] if named else []
        most = counted(rule["max_tasks"], "task")
        rows.append(("routing", f"{counted(len(rule['layers']), 'layer')}, at most {most}"))
    if report.heads:
        rows.append(("heads", ", ".join(report.heads)))
    if report.adapter is not None:
        rows += [
            ("rank", str(report.adapter["rank"])),
            ("modules", _modules(report.adapter["target_modules"])),
        ]
    if report.factors is not None:
        found = report.factors
        from hf_tsv.reports.kept import stored_text

        stored = stored_text(entry["stored"] for entry in report.tensors.values())
        ranks = [entry["rank"] for entry in report.tensors.values() if entry["rank"]]
        energies = [e["energy"] for e in report.tensors.values() if e["rank"]] or [1.0]
        rows += [
            ("task", pinned(found["source"])),
            ("stored", f"{stored}, in {found['factor_dtype']}"),
            ("ranks", f"{min(ranks)} to {max(ranks)}" if ranks else "none"),
            ("size", f"{human_bytes(found['bytes'])}, {found['ratio']:.1%} of the checkpoint"),
            ("kept", kept(found["update_error"]).removeprefix("keeps ")),
            ("by matrix", f"{min(energies):.1%} to {max(energies):.1%} of its update's energy"),
        ]
    rows += [("note", text) for text in report.unknown]
    return table(rows)


def _descent(report: InspectReport) -> list[tuple[str, str]]:
    """Rows of a tree, if there is more to tell than the base models."""
    from hf_tsv.checkpoints.base_model import NOT_ASKED

    rows: list[str] = []

    def add(ancestors: Sequence[Mapping[str, Any]], depth: int) -> None:
        for one in ancestors:
            name, why = one["ref"], one["reason"] or ""
            why = why.removeprefix(f"{name} ").removesuffix(".")
            rows.append("  " * depth + name + (f"  ({why})" if why else ""))
            add(one["parents"], depth + 1)

    add(report.lineage, 0)
    known = report.base_model == [one["ref"] for one in report.lineage]
    told = any(one["parents"] or one["reason"] not in (None, NOT_ASKED) for one in report.lineage)
    return [("descends from", row) for row in rows] if told or not known else []


def _modules(names: Sequence[str]) -> str:
    """Kinds of the modules that an adapter changes, and how many they are."""
    kinds = sorted({name.rpartition(".")[2] for name in names})
    return ", ".join(kinds) + (f" ({len(names)} in all)" if len(names) > len(kinds) else "")
