"""The verb `merge`: from references to a merged checkpoint in a folder or on the Hub."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never

import torch

from hf_tsv.checkpoints import companions, layout
from hf_tsv.checkpoints.fit import check_whole_clip
from hf_tsv.checkpoints.formats import heads
from hf_tsv.checkpoints.formats.description import Origin
from hf_tsv.checkpoints.formats.task import Task, pinned_entry
from hf_tsv.checkpoints.names import RECIPE_FILE, REPORT_FILE, Format
from hf_tsv.checkpoints.reference import listed
from hf_tsv.checkpoints.sources import Access, Sources
from hf_tsv.evaluation.finished import finished_tasks
from hf_tsv.linalg.choices import (
    AnyDevice,
    AnyDtype,
    LayerScale,
    Orthogonalizer,
    Precision,
    WudiFilter,
)
from hf_tsv.merging import scaling
from hf_tsv.merging.building import built, follow
from hf_tsv.merging.costs import expected_seconds
from hf_tsv.merging.findings import Findings
from hf_tsv.merging.masking import mask_bytes, mask_folders, write_masks
from hf_tsv.merging.work import (
    Merge,
    Merged,
    kept_heads,
    of_recipe,
    prepare,
    recipe_of,
    refuse_no_heads,
    with_own_alpha,
)
from hf_tsv.methods.catalogue import MethodName
from hf_tsv.recipes import repeating
from hf_tsv.recipes.learning import refuse_no_images
from hf_tsv.recipes.recipe import Recipe
from hf_tsv.recipes.searching import settings_of
from hf_tsv.recipes.settings import Qkv, refuse_no_report
from hf_tsv.reports import cards, drawing, pictures
from hf_tsv.reports.interference import InterferenceReport
from hf_tsv.reports.merging import MergeReport, treatments
from hf_tsv.runs.lifecycle import Run, underway
from hf_tsv.runs.target import Target
from hf_tsv.system import processes
from hf_tsv.system.errors import UsageError, public
from hf_tsv.system.progress import logger
from hf_tsv.verbs.interference import refuse_nothing_decomposed, summary

if TYPE_CHECKING:
    from hf_tsv.recipes.learning import Adaptation
    from hf_tsv.recipes.searching import Search


@public
def merge(
    checkpoints: str | PathLike[str] | Sequence[str | PathLike[str]] = (),
    *more: Never,
    base_model: str | PathLike[str] | None = None,
    output: str | Path | None = None,
    push_to: str | None = None,
    recipe: str | Path | Recipe | None = None,
    method: MethodName | str | None = None,
    adaptation: Adaptation | None = None,
    orthogonalizer: Orthogonalizer | None = None,
    precision: Precision | None = None,
    alpha: float | None = None,
    search: Search | None = None,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    rank: int | None = None,
    rank_fraction: float | None = None,
    exclude: str | Sequence[str] | None = None,
    scale: Mapping[str, float] | None = None,
    keep_base: str | Sequence[str] | None = None,
    qkv: Qkv | None = None,
    dtype: AnyDtype | None = None,
    max_shard_size: int | str | None = None,
    out_format: Format | None = None,
    keep_heads: bool = False,
    layer_scale: LayerScale | None = None,
    calibrate: bool | None = None,
    wudi_filter: WudiFilter | None = None,
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
    max_memory: int | str | None = None,
    report: bool = False,
    dry_run: bool = False,
    progress: bool | None = None,
) -> MergeReport:
    """Merge fine-tuned CLIP checkpoints into one multi-task checkpoint (TSV-Merge).

    Args:
        checkpoints (`Sequence[str]`): `org/name`, `org/name@revision`, `hf://…` or folders, of
            whole checkpoints or of task factors, which need no decomposition.
        base_model (`str`, *optional*): W0; default: the one the checkpoints' cards agree on.
        output (`str` or `Path`, *optional*): folder to write.
        push_to (`str`, *optional*): repository to upload to.
        recipe (`str`, `Path` or [`Recipe`], *optional*): merge to repeat: a file, an output folder,
            or `org/name@revision`. Settings given beside it replace its own; `checkpoints` are then
            the local folders that it names.
        method (`str`, *optional*): `tsv`, the default, `ada`, `low-rank`, `orthogonal`,
            `task-arithmetic`, `average`, `ties`, `consensus`, `iso-c`, `iso-cts`, `dc`, `wudi`, or
            `tall-mask`, whose tasks are loaded one by one; or the name of a method that another
            package adds.
        adaptation ([`Adaptation`], *optional*): images that the method `ada` learns a coefficient
            of each task in each weight on, and how.
        orthogonalizer (`str`, *optional*): `procrustes`, the default, or `whitening`; the same
            result up to rounding, and with `precision="fast"` the same computation.
        precision (`str`, *optional*): `fast`, the default: by Gram matrices in float64, each result
            checked, with a full SVD of what fails the check; `exact`: full float64 SVDs only.
        alpha (`float`, *optional*): α, scale of the merged update; default: 1, 0.3 for the sums
            `task-arithmetic`, `low-rank` and `consensus`, 1.3 for `iso-cts`, 2 for `dc`; of
            adapters alone 2 for `iso-c` and `iso-cts`, 0.7 for `dc`, 0.2 for `wudi`.
        search ([`Search`], *optional*): choose method, α and slope on validation images instead.
        weights (`Sequence[float]` or `Mapping[str, float]`, *optional*): factor of each task's
            update, in order, or by the names of some: `{"org/a": 0.7}`.
        rank (`int`, *optional*): triplets kept of each task; default ⌊k/T⌋.
        rank_fraction (`float`, *optional*): the same as a share of k.
        exclude (`Sequence[str]`, *optional*): globs of weights that are averaged instead; default:
            `text_projection.weight`.
        scale (`Mapping[str, float]`, *optional*): factors by `GLOB`, of α in the weights that
            match, or by `TASK:GLOB`, of one task's update there; where several match, their
            product.
        keep_base (`Sequence[str]`, *optional*): globs of weights that stay exactly the base's.
        qkv (`str`, *optional*): `split` or `fused` attention projections; default: as the base
            stores them.
        dtype (`str` or `torch.dtype`, *optional*): `float32`, `float16` or `bfloat16`, also as
            `"fp32"`, `"fp16"` or `"bf16"`; default and `"auto"`: as the base.
        max_shard_size (`int` or `str`, *optional*): bytes of an output file; default `"5GB"`.
        out_format (`str`, *optional*): `transformers` or `open_clip`; default: as the base.
        keep_heads (`bool`): write the task heads beside the merged encoder, one file each, for
            `hf_tsv.pipeline("image-classification", output, head=…)`.
        layer_scale (`str`, *optional*): `lines` scales the merged update by the depth of the block,
            from a factor for the first, chosen by the size of the updates, to α more for the last
            (LiNeS); it merges twice. `larv` scales each task in each matrix, by depth and by what
            its update is like (LARV). Default: `none`.
        calibrate (`bool`, *optional*): divide each singular value of the merged update by how much
            larger its response is than those of the tasks (singular value calibration).
        wudi_filter (`str`, *optional*): filter of the method `wudi`: `swudi-a`, the default,
            `swudi` or `tact`.
        allow_other_base (`bool`): merge even checkpoints that are so far from the base model (half
            its norm) that they seem to be fine-tunes of another.
        device (`str`, `int` or `torch.device`, *optional*): `"cuda:1"`, `0` (the first
            accelerator), `-1` (the CPU); default and `"auto"`: the one accelerate chooses.
        force (`bool`): replace an output folder that hf-tsv wrote.
        private (`bool`, *optional*): make a new repository private.
        revision (`str`, *optional*): branch to push to.
        create_pr (`bool`): push as a pull request.
        commit_message (`str`, *optional*): of the upload.
        collection (`str`, *optional*): slug (`owner/title-id`) or address of a collection on the
            Hub to add the repository to, after the upload.
        token (`str`, *optional*): default: the one the Hub client is logged in with.
        cache_dir (`str` or `Path`, *optional*): default: the Hub client's cache.
        subfolder (`str`, *optional*): where the checkpoints are in their repositories or folders,
            unless they say it themselves: `org/name/subfolder`.
        stream (`bool`): read tensors from the Hub when they are needed, without a copy on disk.
        max_memory (`int` or `str`, *optional*): bytes the process may use, or `"2GB"`; less goes
            on at a time then.
        report (`bool`): measure task interference too, from the same decompositions; table and
            picture in the card, and all of it in `interference.json` beside the weights.
        dry_run (`bool`): plan only; touches neither disk nor Hub.
        progress (`bool`, *optional*): show bars; default: on a terminal.

    Returns:
        [`MergeReport`]: what was done; the same in every process of a launch.

    Raises:
        [`HfTsvError`]: with the reason and what to do; nothing is written or pushed then.

    Example:
        >>> import hf_tsv
        >>> hf_tsv.merge(["org/clip-a", "org/clip-b"], output="merged")  # doctest: +SKIP
    """
    if more:
        problem = "Several checkpoints are one argument, a list."
        raise UsageError(problem, f"Write `merge({[checkpoints, *more]}, …)`.")
    dtype = None if dtype == "auto" else dtype
    started = time.monotonic()
    access = Access.of(token, cache_dir, subfolder, stream=stream)
    with processes.joined() as group, ExitStack() as stack:
        if group.rank:
            done: MergeReport = follow(group, device, access)
            return done
        with group.leading():
            references = listed(checkpoints)
            base_ref = None if base_model is None else fspath(base_model)
            target = Target(
                None if output is None else Path(output),
                push_to, force, private, revision, create_pr, commit_message, collection,
            )  # fmt: skip
            given: dict[str, Any] = {
                "method": method, "orthogonalizer": orthogonalizer, "alpha": alpha, "rank": rank,
                "rank_fraction": rank_fraction, "qkv": qkv, "dtype": dtype,
                "exclude": None if exclude is None else tuple(listed(exclude)), "scale": scale,
                "keep_base": None if keep_base is None else tuple(listed(keep_base)),
                "max_shard_size": max_shard_size, "precision": precision,
                "out_format": out_format, "keep_heads": keep_heads or None,
                "layer_scale": layer_scale, "calibrate": calibrate,
                "wudi_filter": wudi_filter,
            }  # fmt: skip
            given = {name: value for name, value in given.items() if value is not None}
            search, settings = settings_of(search, given, report=report)
            if recipe is not None and (subfolder or adaptation is not None or search):
                problem = "A recipe names subfolders and what was learned by itself."
                raise UsageError(problem, "Omit the recipe, or the other options.")
            target = target.checked(token, dry_run=dry_run)
            if recipe is not None:
                before, beside = repeating.load(recipe, access)
                found = repeating.changed(before, given, weights, base_ref)
                work, sources = of_recipe(repeating.placed(found, references, beside), access)
                is_own = found.settings.method != before.settings.method
            else:
                refuse_no_images(settings.row, adaptation)
                work, sources = prepare(references, base_ref, weights, settings, access)
                work, is_own = _learning(work, sources, search, adaptation), True
            work = with_own_alpha(work, sources.inputs) if is_own and alpha is None else work
            refuse_no_heads(work.settings, sources.inputs)
            if report:
                refuse_no_report(work.settings)
                refuse_nothing_decomposed(work.plan, sources.inputs)
            allowed = allow_other_base or work.allow_other_base
            work = replace(work, measure=report, allow_other_base=allowed).within(
                max_memory, sources
            )
            if search is not None and not dry_run:
                from hf_tsv.verbs.learning.searching import tuned

                target.refuse_inputs([item.pinned for item in sources.all()])
                finished = stack.enter_context(finished_tasks(target.output))
                work = tuned(work, search, sources, finished, device, group, progress)
            merged = None
            with underway(sources, target, progress) as run:
                if not dry_run:
                    with built(run, work, device, group, before=_learned) as (folder, merged):
                        _describe(folder, merged)
            done = _report(run, work, merged, started)
            group.dismiss(done)
            return done


def _learning(
    work: Merge, sources: Sources, search: Search | None, adaptation: Adaptation | None
) -> Merge:
    """The same merge, if its model can learn what is to be learned."""
    if search is not None:
        check_whole_clip(sources.base, "Choosing α")
        scaling.refuse_no_blocks(work.plan, search.slopes)
        return replace(work, tuning=search)
    if adaptation is None:
        return work
    from hf_tsv.verbs.learning.coefficients import adapting

    return adapting(work, sources, adaptation)


def _learned(merge: Merge, run: Run, device: torch.device) -> Merge:
    """The same merge with coefficients, where its method learns them."""
    if merge.adaptation is None or merge.coefficients:
        return merge
    from hf_tsv.verbs.learning.coefficients import adapted

    return adapted(merge, merge.adaptation, run, device)


def _describe(folder: Path, done: Merged) -> None:
    """Write recipe and card of a merge."""
    recipe, settings = recipe_of(done), done.merge.settings
    (folder / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    for file, item in kept_heads(settings, done.sources.inputs).items():
        tensors = {name: item.head_tensor(name) for name in item.head}
        heads.write(folder, file, tensors, companions.head_config(item.model_config, item.head))
    if settings.row.beside:
        logger.info("Computing the mask of each task.")
        write_masks(folder, done)
    measured = picture = None
    if done.merge.measure:
        measured = found = summary(done, done.findings.seconds.computing).public()
        (folder / REPORT_FILE).write_text(measured.to_json(), encoding="utf-8")
        picture = drawing.attempted(lambda: pictures.of_merge(found))
        if picture is not None:
            (folder / picture.file).write_bytes(picture.png)
    card = _card(done, recipe, measured, picture)
    (folder / "README.md").write_text(cards.render(card), encoding="utf-8")


def _card(
    done: Merged,
    recipe: Recipe,
    measured: InterferenceReport | None,
    picture: drawing.Picture | None,
) -> cards.MergeCard:
    merge, base, inputs = done.merge, done.sources.base, done.sources.inputs

    def card_input(item: Task, scale: float = 1.0) -> cards.CardInput:
        source = None if item.description is None else item.description.source
        return cards.CardInput.of(Origin.of(item.pinned), scale, item.pinned.card, source)

    specs = merge.plan.specs.values()
    dtypes = {spec.dtype.in_torch for spec in specs if spec.dtype.is_floating_point}
    return cards.MergeCard(
        recipe=recipe,
        base=card_input(base),
        inputs=[card_input(*pair) for pair in zip(inputs, merge.scales, strict=True)],
        model_type=str(base.model_config["model_type"]),
        full_model=layout.is_full_model(base.tensors),
        out_format=merge.settings.out_format or base.format,
        counts=merge.plan.counts(done.findings.frozen),
        dtype=" and ".join(sorted(dtypes)),
        left_out={card_input(item).name: item.left_out for item in _cut(merge, inputs)},
        heads=[Path(file).stem for file in kept_heads(merge.settings, inputs)],
        masks=mask_folders(merge.settings, inputs),
        tuning=merge.tuning,
        warnings=list(map(done.published, done.warnings)),
        interference=measured,
        picture=picture,
        selected=scaling.told(merge.plan, inputs, merge.settings, merge.factors),
    )


def _cut(merge: Merge, inputs: Sequence[Task]) -> list[Task]:
    """The tasks of which something is in no file of the output."""
    return [] if merge.settings.keep_heads else [item for item in inputs if item.left_out]


def _report(run: Run, planned: Merge, done: Merged | None, started: float) -> MergeReport:
    """Tell what was done, or of a dry run what was planned."""
    merge = planned if done is None else done.merge
    sources, settings, inputs = run.sources, merge.settings, run.sources.inputs
    findings = Findings(len(inputs), ()) if done is None else done.findings
    return MergeReport(
        output=None if run.target.output is None else str(run.target.output),
        base_model=pinned_entry(sources.base),
        inputs=[pinned_entry(item) for item in inputs],
        weights=merge.plan.counts(findings.frozen),
        output_bytes=merge.plan.shards.total_bytes,
        seconds=round(time.monotonic() - started, 3),
        warnings=list(merge.warnings) if done is None else done.warnings,
        method=settings.method,
        settings=asdict(settings),
        treatments=treatments(merge, findings),
        scales=list(merge.scales),
        selected=scaling.told(merge.plan, inputs, settings, merge.factors),
        left_out={str(item): list(item.left_out) for item in _cut(merge, inputs)},
        heads={file: str(item) for file, item in kept_heads(settings, inputs).items()},
        masks=dict(zip(mask_folders(settings, inputs), map(str, inputs), strict=False)),
        mask_bytes=mask_bytes(merge, sources, findings.frozen),
        tuning=None if merge.tuning is None else merge.tuning.to_dict(),
        adaptation=None if merge.adaptation is None else merge.adaptation.to_dict(),
        download_bytes=run.download_bytes,
        peak_memory_bytes=merge.peak_memory(sources),
        expected_seconds=expected_seconds(merge.plan.weights) if done is None else None,
        exact_decompositions=findings.exact,
        timings={} if done is None else findings.seconds.rounded(),
        device=None if done is None else done.device.type,
        url=run.url,
        dry_run=done is None,
    )
