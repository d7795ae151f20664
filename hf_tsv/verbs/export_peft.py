"""`hf_tsv.export_peft`: one task as a LoRA adapter that PEFT loads."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path

from hf_tsv.checkpoints.sources import Access
from hf_tsv.recipes.compressing import Options, RankRule
from hf_tsv.reports.compression import CompressReport
from hf_tsv.runs.target import Target
from hf_tsv.verbs.compress import run


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
    factor_dtype: str = "float32",
    dense: bool = True,
    model_class: str | None = None,
    device: str | None = None,
    force: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    subfolder: str | None = None,
    stream: bool = False,
    report: bool = False,
    progress: bool | None = None,
) -> CompressReport:
    """Compress a fine-tuned CLIP checkpoint into a LoRA adapter that PEFT loads without hf-tsv.

    Args:
        checkpoint (`str`): `org/name`, `org/name@revision`, `hf://…` or a folder.
        base_model (`str`, *optional*): W0; default: the one the checkpoint's card names.
        output (`str` or `Path`, *optional*): folder to write.
        push_to (`str`, *optional*): repository to upload to.
        rank_fraction (`float`, *optional*): share of k = min(d_out, d_in) kept; default 0.1.
        rank (`int`, *optional*): triplets kept of every weight instead.
        energy (`float`, *optional*): share of the squared singular values kept instead.
        budget (`str` or `int`, *optional*): bytes spent instead: `"10%"`, `"35MB"` or a number.
        factor_dtype (`str`): `float32`, `bfloat16` or `float16`.
        dense (`bool`): store what is no matrix of a linear layer too; without it stock PEFT can
            combine the adapter with others.
        model_class (`str`, *optional*): the class it will be loaded into; default: that of the
            checkpoint.
        device (`str`, *optional*): default: the one accelerate chooses.
        force (`bool`): replace an output folder that hf-tsv wrote.
        private (`bool`, *optional*): make a new repository private.
        revision (`str`, *optional*): branch to push to.
        create_pr (`bool`): push as a pull request.
        commit_message (`str`, *optional*): of the upload.
        token (`str`, *optional*): default: the one the Hub client is logged in with.
        cache_dir (`str` or `Path`, *optional*): default: the Hub client's cache.
        subfolder (`str`, *optional*): where the checkpoint lies in its repository or folder, unless
            it says so itself: `org/name/subfolder`.
        stream (`bool`): read tensors from the Hub when they are needed, without a copy on disk.
        report (`bool`): put table and picture of what is kept into the card.
        progress (`bool`, *optional*): show bars; default: on a terminal.

    Returns:
        [`CompressReport`]: what was done; `left_out` names what an adapter has no place for.

    Raises:
        [`HfTsvError`]: with the reason and what to do; nothing is written or pushed then.

    Example:
        >>> import hf_tsv
        >>> hf_tsv.export_peft("org/clip-a", output="lora", rank=16)  # doctest: +SKIP
    """
    options = Options(
        RankRule(rank_fraction, rank, energy, budget),
        factor_dtype,  # type: ignore[arg-type]
        format="peft",
        dense=dense,
        model_class=model_class,
        report=report,
    )
    place = None if output is None else Path(output)
    target = Target(place, push_to, force, private, revision, create_pr, commit_message)
    return run(
        fspath(checkpoint),
        None if base_model is None else fspath(base_model),
        options,
        target,
        device=device,
        access=Access.of(token, cache_dir, subfolder, stream=stream),
        progress=progress,
    )
