"""`hf_tsv.export_peft`: one task as a LoRA adapter that PEFT loads."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path

from hf_tsv.checkpoints.sources import Access
from hf_tsv.linalg.choices import AnyDevice, AnyDtype
from hf_tsv.recipes.compressing import Options, RankRule
from hf_tsv.reports.compression import CompressReport
from hf_tsv.runs.target import Target
from hf_tsv.system.errors import public
from hf_tsv.verbs.compress import run


@public
def export_peft(
    checkpoint: str | PathLike[str],
    *,
    base_model: str | PathLike[str] | None = None,
    output: str | Path | None = None,
    push_to: str | None = None,
    rank_fraction: float | None = None,
    rank: int | None = None,
    energy: float | None = None,
    budget: str | int | None = None,
    dtype: AnyDtype = "float32",
    dense: bool = True,
    model_class: str | None = None,
    allow_other_base: bool = False,
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
    report: bool = False,
    dry_run: bool = False,
    progress: bool | None = None,
) -> CompressReport:
    """Compress a fine-tuned CLIP checkpoint into a LoRA adapter that PEFT loads without hf-tsv.

    Args:
        checkpoint, base_model, rank_fraction, rank, energy, budget, dtype, report: as in
            [`compress`].
        dense (`bool`): store what is no matrix of a linear layer too; without it stock PEFT can
            combine the adapter with others.
        model_class (`str`, *optional*): the class it will be loaded into; default: that of the
            checkpoint.
        allow_other_base, output, push_to, device, force, private, revision, create_pr,
            commit_message, collection, token, cache_dir, subfolder, stream, dry_run, progress: as
            in [`merge`].

    Returns:
        [`CompressReport`]: results; `left_out` names what an adapter has no place for.

    Raises:
        [`HfTsvError`]: with the reason and what to do; nothing is written or pushed then.

    Example:
        >>> import hf_tsv
        >>> hf_tsv.export_peft("org/clip-a", output="lora", rank=16)  # doctest: +SKIP
    """
    options = Options(
        RankRule(rank_fraction, rank, energy, budget),
        dtype,  # type: ignore[arg-type]
        out_format="peft",
        dense=dense,
        model_class=model_class,
        report=report,
        allow_other_base=allow_other_base,
    )
    place = None if output is None else Path(output)
    target = Target(place, push_to, force, private, revision, create_pr, commit_message, collection)
    return run(
        fspath(checkpoint),
        None if base_model is None else fspath(base_model),
        options,
        target,
        device=device,
        access=Access.of(token, cache_dir, subfolder, stream=stream),
        dry_run=dry_run,
        progress=progress,
    )
