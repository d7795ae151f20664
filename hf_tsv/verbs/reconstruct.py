"""The verb `reconstruct`: task factors and their base model become a whole checkpoint again."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path

from hf_tsv.checkpoints import layout
from hf_tsv.checkpoints.formats.task import pinned_entry, published_entry
from hf_tsv.checkpoints.names import RECONSTRUCTION_FILE
from hf_tsv.checkpoints.reference import card_datasets
from hf_tsv.checkpoints.sources import Access, Sources
from hf_tsv.linalg.choices import AnyDevice, AnyDtype
from hf_tsv.merging.building import built, follow
from hf_tsv.merging.plan import lay_out, spec_of
from hf_tsv.merging.work import Merge, Merged, prepare
from hf_tsv.recipes.settings import Settings
from hf_tsv.reports import cards, compressed_cards
from hf_tsv.reports.report import Report
from hf_tsv.runs.lifecycle import Run, underway
from hf_tsv.runs.target import Target
from hf_tsv.system import processes
from hf_tsv.system.errors import public
from hf_tsv.system.progress import logger
from hf_tsv.system.version import __version__


@dataclass(frozen=True, repr=False)
class ReconstructReport(Report):
    """Account of a reconstruction, or with `dry_run` of what it would do.

    Args:
        output (`str`, *optional*): the folder written, if it is kept.
        base_model (`dict[str, str | None]`): `ref` and `revision` of W0.
        factors (`dict[str, str | None]`): the same of the task factors.
        source (`dict[str, str | None]`): the same of the checkpoint that was compressed.
        update_error (`float`): ‖Δ − stored‖ / ‖Δ‖ of the factors.
        output_bytes (`int`): size of the weight files.
        seconds (`float`): wall time.
        warnings (`list[str]`): what the user should know.
        download_bytes (`int`): fetched from the Hub; what the cache held does not count.
        peak_memory_bytes (`int`): estimate, on top of the interpreter and its libraries.
        device (`str`, *optional*): type of device computed on.
        url (`str`, *optional*): commit or pull request on the Hub.
        dry_run (`bool`): nothing was written.
    """

    output: str | None
    base_model: dict[str, str | None]
    factors: dict[str, str | None]
    source: dict[str, str | None]
    update_error: float
    output_bytes: int
    seconds: float
    warnings: list[str]
    download_bytes: int
    peak_memory_bytes: int
    device: str | None = None
    url: str | None = None
    dry_run: bool = False


@public
def reconstruct(
    factors: str | PathLike[str],
    *,
    base_model: str | PathLike[str] | None = None,
    output: str | Path | None = None,
    push_to: str | None = None,
    dtype: AnyDtype | None = None,
    max_shard_size: int | str = Settings.max_shard_size,
    device: AnyDevice | None = None,
    force: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    collection: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    subfolder: str | None = None,
    stream: bool = False,
    max_memory: int | str | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
) -> ReconstructReport:
    """Make a whole checkpoint of task factors: W0 + U diag(σ) Vh, weight by weight.

    The result is the complete base model with the task in it, and the task head if there was one.

    Args:
        factors (`str`): `org/name`, `org/name@revision`, `hf://…` or a folder.
        base_model (`str`, *optional*): W0; default: the one the factors were made from.
        output, push_to, dtype, max_shard_size, device, force, private, revision, create_pr,
            commit_message, collection, token, cache_dir, subfolder, stream, max_memory, dry_run,
            progress: as in [`merge`].

    Returns:
        [`ReconstructReport`]: what was done.

    Raises:
        [`HfTsvError`]: with the reason and what to do; nothing is written or pushed then.

    Example:
        >>> import hf_tsv
        >>> hf_tsv.reconstruct("me/clip-sun397-tsv", output="full")  # doctest: +SKIP
    """
    dtype = None if dtype == "auto" else dtype
    started = time.monotonic()
    access = Access.of(token, cache_dir, subfolder, stream=stream)
    with processes.joined() as group:
        if group.rank:
            report: ReconstructReport = follow(group, device, access)
            return report
        with group.leading():
            target = Target(
                None if output is None else Path(output),
                push_to, force, private, revision, create_pr, commit_message, collection,
            )  # fmt: skip
            settings = Settings(exclude=(), dtype=dtype, max_shard_size=max_shard_size)  # type: ignore[arg-type]
            target = target.checked(token, dry_run=dry_run)
            base_ref = None if base_model is None else fspath(base_model)
            work, sources = prepare(
                [fspath(factors)], base_ref, None, settings, access, only_factors=True
            )
            work = _with_head(work, sources).within(max_memory, sources)
            merged = None
            with underway(sources, target, progress) as run:
                if not dry_run:
                    with built(run, work, device, group) as (folder, merged):
                        _describe(folder, merged)
            report = _report(run, work, merged, started)
            group.dismiss(report)
            return report


def _report(run: Run, planned: Merge, done: Merged | None, started: float) -> ReconstructReport:
    """Tell what was done, or of a dry run what was planned."""
    plan, (item,) = planned.plan, run.sources.inputs
    config = item.description
    assert config is not None  # checked by prepare
    return ReconstructReport(
        output=None if run.target.output is None else str(run.target.output),
        base_model=pinned_entry(run.sources.base),
        factors=pinned_entry(item),
        source={"ref": config.source.ref, "revision": config.source.revision},
        update_error=config.update_error,
        output_bytes=plan.shards.total_bytes,
        seconds=round(time.monotonic() - started, 3),
        warnings=list(planned.warnings) if done is None else done.warnings,
        download_bytes=run.download_bytes,
        peak_memory_bytes=planned.peak_memory(run.sources),
        device=None if done is None else done.device.type,
        url=run.url,
        dry_run=done is None,
    )


def _with_head(work: Merge, sources: Sources) -> Merge:
    """The same reconstruction with a place for the task head in its output files."""
    config, base = sources.inputs[0].model_config, sources.base.model_config
    if layout.is_clip(config) and (own := layout.saved_class(config)) != layout.saved_class(base):
        whole = "The result is the whole base model with the task in it"
        logger.info("%s; the fine-tune was a %s.", whole, own)
    head = {n: spec_of(info, work.settings) for n, info in sources.inputs[0].head.items()}
    specs = work.plan.specs | head
    plan = replace(work.plan, specs=specs, shards=lay_out(specs, sources.base, work.settings))
    return replace(work, plan=plan, task_head=True, verb="Reconstructing")


def _describe(folder: Path, done: Merged) -> None:
    """Write origin and card of a reconstruction."""
    (item,), base, settings = done.sources.inputs, done.sources.base, done.merge.settings
    config = item.description
    assert config is not None  # checked by prepare
    fingerprint = done.findings.fingerprint(0) if item.pinned.is_local else None
    origin = {
        "hf_tsv_version": __version__,
        "factors": {**published_entry(item), "fingerprint": fingerprint},
        "base_model": published_entry(base),
        "source": {"ref": config.source.ref, "revision": config.source.revision},
        "dtype": settings.dtype,
    }
    text = json.dumps(origin, indent=2, ensure_ascii=False) + "\n"
    (folder / RECONSTRUCTION_FILE).write_text(text, encoding="utf-8")
    card = compressed_cards.ReconstructedCard(
        config=config,
        datasets=card_datasets(item.pinned.card),
        factors=cards.CardInput(item.pinned.name, item.pinned.revision),
        full_model=layout.is_full_model(base.tensors),
        out_format=settings.out_format or base.format,
    )
    (folder / "README.md").write_text(cards.render(card), encoding="utf-8")
