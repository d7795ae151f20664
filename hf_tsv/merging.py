"""The verb `merge`: from references to a merged checkpoint in a folder or on the Hub."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hf_tsv import cards, hub, stream
from hf_tsv.checkpoints import base_model, companions, layout
from hf_tsv.checkpoints.files import HubFiles, LocalFiles
from hf_tsv.checkpoints.reader import Checkpoint, open_checkpoint
from hf_tsv.checkpoints.reference import PinnedCheckpoint, parse, pin
from hf_tsv.checkpoints.writer import (
    ShardWriter,
    check_free_space,
    check_output_folder,
    disk_errors,
    whole_folder,
)
from hf_tsv.errors import CheckpointError, OutputError, RecipeError, RepoError
from hf_tsv.plan import MergePlan, make_plan
from hf_tsv.progress import bar, human_bytes, logger, visible_by_default
from hf_tsv.recipe import RECIPE_FILE, PinnedInput, Recipe, Settings, current_versions

SAME_UPDATE = 0.999
"""Cosine from which two updates are one checkpoint under two names."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, or with `dry_run` would do.

    Args:
        output (`str`, *optional*): the folder written, if it is kept.
        base_model (`dict[str, str | None]`): `ref` and `revision` of W0.
        inputs (`list[dict[str, str | None]]`): the same of every task.
        weights (`dict[str, int]`): tensors `decomposed`, `averaged` (or summed), `copied`.
        output_bytes (`int`): size of the weight files.
        seconds (`float`): wall time.
        warnings (`list[str]`): what the user should know.
        method (`str`): see [`Settings`].
        treatments (`dict[str, dict]`): per weight its treatment, rank and reason.
        left_out (`dict[str, list[str]]`): task heads not merged, by checkpoint.
        download_bytes (`int`): fetched from the Hub; what the cache held does not count.
        peak_memory_bytes (`int`): estimate, on top of the interpreter and its libraries.
        device (`str`, *optional*): type of device computed on.
        url (`str`, *optional*): commit or pull request on the Hub.
        dry_run (`bool`): nothing was written.
    """

    output: str | None
    base_model: dict[str, str | None]
    inputs: list[dict[str, str | None]]
    weights: dict[str, int]
    output_bytes: int
    seconds: float
    warnings: list[str]
    method: str
    treatments: dict[str, dict[str, Any]]
    left_out: dict[str, list[str]]
    download_bytes: int
    peak_memory_bytes: int
    device: str | None = None
    url: str | None = None
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return asdict(self)


@dataclass(frozen=True)
class _Target:
    """Where the result goes."""

    output: Path | None
    push_to: str | None
    force: bool
    private: bool | None
    revision: str | None
    create_pr: bool
    commit_message: str | None


@dataclass(frozen=True)
class _Job:
    """A merge whose references are resolved and whose headers fit."""

    base: Checkpoint
    inputs: tuple[Checkpoint, ...]
    scales: tuple[float, ...]
    settings: Settings
    plan: MergePlan
    warnings: list[str]
    token: str | None = field(repr=False)
    expected: tuple[str | None, ...] = ()  # fingerprints of local folders in a recipe; base last


def merge(
    checkpoints: Sequence[str] = (),
    *,
    base_model: str | None = None,
    output: str | Path | None = None,
    push_to: str | None = None,
    recipe: str | Path | Recipe | None = None,
    method: str = Settings.method,
    orthogonalizer: str = Settings.orthogonalizer,
    alpha: float = Settings.alpha,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    rank_fraction: float | None = None,
    exclude: Sequence[str] = Settings.exclude,
    qkv: str = Settings.qkv,
    dtype: str | None = None,
    max_shard_size: int | str = Settings.max_shard_size,
    device: str | None = None,
    force: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
) -> MergeReport:
    """Merge fine-tuned CLIP checkpoints into one multi-task checkpoint (TSV-Merge).

    Args:
        checkpoints (`Sequence[str]`): `org/name`, `org/name@revision`, `hf://…` or folders.
        base_model (`str`, *optional*): W0; default: the one the checkpoints' cards agree on.
        output (`str` or `Path`, *optional*): folder to write.
        push_to (`str`, *optional*): repository to upload to.
        recipe (`str`, `Path` or [`Recipe`], *optional*): repeat a merge; instead of
            `checkpoints`, `base_model` and the settings.
        method (`str`): `tsv`, `low-rank`, `orthogonal`, `task-arithmetic` or `average`.
        orthogonalizer (`str`): `procrustes` or `whitening`.
        alpha (`float`): α, scale of the merged update.
        weights (`Sequence[float]`, *optional*): factor of each task's update.
        rank (`int`, *optional*): triplets kept of each task; default ⌊k/T⌋.
        rank_fraction (`float`, *optional*): the same as a share of k.
        exclude (`Sequence[str]`): globs of weights that are averaged instead.
        qkv (`str`): `split` or `fused` attention projections.
        dtype (`str`, *optional*): of the output; default as the base.
        max_shard_size (`int` or `str`): bytes of an output file, or `"5GB"`.
        device (`str`, *optional*): default: the one accelerate chooses.
        force (`bool`): replace an output folder that hf-tsv wrote.
        private (`bool`, *optional*): make a new repository private.
        revision (`str`, *optional*): branch to push to.
        create_pr (`bool`): push as a pull request.
        commit_message (`str`, *optional*): of the upload.
        token (`str`, *optional*): default: the one the Hub client is logged in with.
        cache_dir (`str` or `Path`, *optional*): default: the Hub client's cache.
        dry_run (`bool`): plan only; touches neither disk nor Hub.
        progress (`bool`, *optional*): show bars; default: on a terminal.

    Returns:
        [`MergeReport`]: what was done.

    Raises:
        [`HfTsvError`]: with the reason and what to do; nothing is written or pushed then.

    Example:
        >>> import hf_tsv
        >>> hf_tsv.merge(["org/clip-a", "org/clip-b"], output="merged")  # doctest: +SKIP
    """
    started = time.monotonic()
    show = visible_by_default() if progress is None else progress
    target = _Target(
        None if output is None else Path(output).expanduser().absolute(),
        push_to, force, private, revision, create_pr, commit_message,
    )  # fmt: skip
    settings = Settings(
        method, orthogonalizer, alpha, rank, rank_fraction,  # type: ignore[arg-type]
        tuple(exclude), qkv, dtype, max_shard_size,  # type: ignore[arg-type]
    )  # fmt: skip
    if recipe is not None:
        if checkpoints or base_model is not None or weights is not None or settings != Settings():
            raise RecipeError(
                "A recipe already names the checkpoints and every setting.",
                "Give a recipe, or checkpoints and settings.",
            )
        loaded = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    else:
        loaded = None
    target = _checked_target(target, token, dry_run=dry_run)
    cache = None if cache_dir is None else str(cache_dir)
    job = _prepare(checkpoints, base_model, weights, settings, loaded, token, cache)
    if dry_run:
        return _report(job, target, started, dry_run=True)
    return _execute(job, target, device, show, started)


def _checked_target(target: _Target, token: str | None, *, dry_run: bool) -> _Target:
    """Refuse now what would fail after the work: a taken folder, a token that cannot write."""
    if target.output is None and target.push_to is None and not dry_run:
        raise OutputError("There is no place for the result.", "Add -o DIR or --push-to REPO_ID.")
    if target.output is not None:
        check_output_folder(target.output, RECIPE_FILE, force=target.force)
    if target.push_to is None:
        return target
    repo_id = hub.writable_repo_id(target.push_to, token=token, create_pr=target.create_pr)
    return replace(target, push_to=repo_id)


def _prepare(
    checkpoints: Sequence[str],
    base_ref: str | None,
    scales: Sequence[float] | None,
    settings: Settings,
    recipe: Recipe | None,
    token: str | None,
    cache_dir: str | None,
) -> _Job:
    """Resolve every reference once, read every header, and plan."""
    expected: tuple[str | None, ...] = ()
    warnings: list[str] = []
    if recipe is not None:
        checkpoints = [_pinned_text(item) for item in recipe.inputs]
        base_ref = _pinned_text(recipe.base_model)
        settings, scales = recipe.settings, [item.weight for item in recipe.inputs]
        expected = tuple(item.fingerprint for item in (*recipe.inputs, recipe.base_model))
        warnings += _version_warnings(recipe)
    if not checkpoints:
        raise RecipeError("There is nothing to merge.", "Name at least one checkpoint.")
    scales = [1.0] * len(checkpoints) if scales is None else list(scales)
    if len(scales) != len(checkpoints):
        raise RecipeError(
            f"There are {len(scales)} weights for {len(checkpoints)} checkpoints.",
            "Give one weight for each checkpoint.",
        )
    references = [parse(text) for text in checkpoints]
    base_reference = None if base_ref is None else parse(base_ref)
    everything = [*references, *([] if base_reference is None else [base_reference])]
    pinned = _in_parallel(lambda ref: pin(ref, token=token, cache_dir=cache_dir), everything)
    if base_reference is None:
        found, speakers = base_model.infer(pinned)
        logger.info("Base model: %s, named by %s.", found, ", ".join(speakers))
        pinned.append(pin(parse(found), token=token, cache_dir=cache_dir))
    *tasks, base = pinned
    warnings += _check_distinct(tasks, base)
    *opened, opened_base = _in_parallel(open_checkpoint, [*tasks, base])
    plan = make_plan(opened_base, opened, settings)
    warnings += plan.warnings
    warnings += companions.warnings(opened_base)
    for warning in warnings:
        logger.warning(warning)
    return _Job(
        opened_base, tuple(opened), tuple(map(float, scales)), settings, plan, warnings, token,
        expected,
    )  # fmt: skip


def _in_parallel(call: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(call, items))


def _pinned_text(item: PinnedInput) -> str:
    return item.ref if item.revision is None else f"{item.ref}@{item.revision}"


def _version_warnings(recipe: Recipe) -> list[str]:
    here = current_versions()
    different = [
        f"{name} {version} (here {here[name]})"
        for name, version in recipe.versions.items()
        if here.get(name, version) != version
    ]
    if not different:
        return []
    return [f"The recipe was made with {', '.join(different)}: the bytes may differ."]


def _check_distinct(tasks: Sequence[PinnedCheckpoint], base: PinnedCheckpoint) -> list[str]:
    """An input that is the base is an error; one that is given twice a warning."""

    def identity(item: PinnedCheckpoint) -> tuple[str, str | None]:
        return (str(Path(item.ref).resolve()) if item.is_local else item.ref, item.revision)

    warnings = []
    seen: dict[tuple[str, str | None], PinnedCheckpoint] = {}
    for item in tasks:
        if identity(item) == identity(base):
            raise _equals_base(str(item), str(base))
        if identity(item) in seen:
            warnings.append(f"{item} is given twice: its update counts double.")
        seen[identity(item)] = item
    return warnings


def _equals_base(name: str, base: str) -> CheckpointError:
    return CheckpointError(
        f"{name} equals the base model {base}: it has no update to merge.",
        "Leave it out, or name the right --base-model.",
    )


def _execute(
    job: _Job, target: _Target, device_name: str | None, show: bool, started: float
) -> MergeReport:
    device = stream.pick_device(device_name)
    wanted = _wanted_files(job)
    size = sum(repo.sizes[n] for repo, _, names in wanted for n in hub.uncached(repo, names))
    if target.output is not None:
        check_free_space(target.output, job.plan.shards.total_bytes)
    if size:
        check_free_space(_cache_folder(job), size)
        logger.info("Downloading %s.", human_bytes(size))
    job = _downloaded(job, wanted, show)
    try:
        _refuse_unchanged(job)
        with _final_folder(target) as (final, keep):
            with whole_folder(final) as staging:
                findings, warnings = _merge_into(staging, job, target, device, show)
            url = _pushed(final, target, job.token) if target.push_to is not None else None
            report = _report(job, target, started, findings=findings, warnings=warnings)
            output = str(final) if keep else None
            return replace(
                report, output=output, url=url, device=device.type, download_bytes=size,
                seconds=round(time.monotonic() - started, 3),
            )  # fmt: skip
    finally:
        for item in (job.base, *job.inputs):
            if isinstance(item.pinned.files, LocalFiles):
                item.pinned.files.close()


def _wanted_files(job: _Job) -> list[tuple[hub.RepoSnapshot, str | None, list[str]]]:
    """What has to be on disk: weights and config of all, companion files of the base."""
    wanted = []
    for item in (*job.inputs, job.base):
        if not isinstance(item.pinned.files, HubFiles):
            continue
        repo = item.pinned.files.repo
        names = ["config.json", *item.weight_files]
        if "README.md" in repo.sizes:  # an offline run infers the base from it
            names.append("README.md")
        if item is job.base:
            names += companions.present(item)
        wanted.append((repo, item.pinned.asked_revision, names))
    return wanted


def _cache_folder(job: _Job) -> Path:
    from huggingface_hub import constants

    repos = [
        item.pinned.files.repo
        for item in (*job.inputs, job.base)
        if isinstance(item.pinned.files, HubFiles)
    ]
    return Path(repos[0].cache_dir or constants.HF_HUB_CACHE)


def _downloaded(
    job: _Job, wanted: Sequence[tuple[hub.RepoSnapshot, str | None, list[str]]], show: bool
) -> _Job:
    """The job, reading from the cached copies of its repositories."""
    folders = iter(hub.download(wanted, visible=show))

    def local(item: Checkpoint) -> Checkpoint:
        if not isinstance(item.pinned.files, HubFiles):
            return item
        return item.reading_from(LocalFiles(next(folders)))

    inputs = tuple(local(item) for item in job.inputs)
    return replace(job, inputs=inputs, base=local(job.base))


def _refuse_unchanged(job: _Job) -> None:
    """Find inputs that equal the base before the first decomposition: smallest weights first."""
    names = [w.names for w in job.plan.weights if w.treatment != "copied"]
    flat = sorted((n for group in names for n in group), key=lambda n: job.base.tensors[n].nbytes)
    for item in job.inputs:
        if not any(
            not torch.equal(item.read(name).float(), job.base.read(name).float())
            for name in flat
            if name in item.tensors
        ):
            raise _equals_base(str(item), str(job.base))


def _merge_into(
    folder: Path, job: _Job, target: _Target, device: torch.device, show: bool
) -> tuple[stream.Findings, list[str]]:
    """Write a complete checkpoint into `folder`: weights, config, companions, recipe, card."""
    writer = ShardWriter(folder, job.plan.shards)
    try:
        weights = job.plan.weights
        logger.info(
            "Merging %d weights of %d checkpoints on %s.",
            len(weights), len(job.inputs), device.type,
        )  # fmt: skip
        with bar("Merging", len(weights), visible=show) as advance:
            findings = stream.merge_weights(
                job.plan, job.base, job.inputs, job.scales, job.settings, writer,
                device=device, advance=advance,
            )  # fmt: skip
        writer.close()
    finally:
        writer.abandon()
    _check_fingerprints(job, findings)
    warnings = [*job.warnings, *_finding_warnings(job, findings)]
    recipe = _recipe(job, findings, device)
    with disk_errors(folder):
        companions.copy(job.base, folder)
        config = companions.output_config(job.base, {s.dtype for s in job.plan.specs.values()})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
        card = _card(job, target, recipe, findings, warnings)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return findings, warnings


def _finding_warnings(job: _Job, findings: stream.Findings) -> list[str]:
    warnings = []
    cosines = findings.cosines()
    for i, first in enumerate(job.inputs):
        for j in range(i + 1, len(job.inputs)):
            cosine = float(cosines[i, j])
            if abs(cosine) > SAME_UPDATE and str(first) != str(job.inputs[j]):
                what = "the same update" if cosine > 0 else "opposite updates"
                warnings.append(
                    f"{first} and {job.inputs[j]} are {what} (cosine {cosine:.4f}):"
                    " directions they share exactly are merged once."
                )
    if findings.null_directions and not warnings:
        warnings.append(
            f"Tasks share directions exactly in {len(findings.null_directions)} weights; these are"
            " merged once."
        )
    for warning in warnings:
        logger.warning(warning)
    return warnings


def _check_fingerprints(job: _Job, findings: stream.Findings) -> None:
    """A recipe's local folders must still hold what they held."""
    for index, (item, wanted) in enumerate(
        zip((*job.inputs, job.base), job.expected or [None] * (len(job.inputs) + 1), strict=True)
    ):
        key = -1 if item is job.base else index
        if wanted is not None and key in findings.digests and findings.fingerprint(key) != wanted:
            raise CheckpointError(
                f"{item} is not what it was when the recipe was written.",
                "Restore the folder, or merge anew without the recipe.",
            )


def _recipe(job: _Job, findings: stream.Findings, device: torch.device) -> Recipe:
    def pinned(item: Checkpoint, key: int, scale: float) -> PinnedInput:
        fingerprint = findings.fingerprint(key) if item.pinned.is_local else None
        return PinnedInput(item.pinned.ref, item.pinned.revision, fingerprint, scale)

    inputs = tuple(
        pinned(item, i, scale)
        for i, (item, scale) in enumerate(zip(job.inputs, job.scales, strict=True))
    )
    return Recipe(pinned(job.base, -1, 1.0), inputs, job.settings, device.type)


def _card(
    job: _Job,
    target: _Target,
    recipe: Recipe,
    findings: stream.Findings,
    warnings: Sequence[str],
) -> str:
    def card_input(item: Checkpoint, scale: float = 1.0) -> cards.CardInput:
        pinned = item.pinned
        return cards.CardInput(pinned.ref, pinned.revision, cards.card_license(pinned.card), scale)

    return cards.merge_card(
        recipe,
        card_input(job.base),
        [card_input(*pair) for pair in zip(job.inputs, job.scales, strict=True)],
        full_model=layout.is_full_model(job.base.tensors),
        repo_id=target.push_to,
        counts=job.plan.counts(frozenset(findings.frozen)),
        left_out={item.pinned.ref: item.left_out for item in job.inputs if item.left_out},
        warnings=warnings,
    )


@contextmanager
def _final_folder(target: _Target) -> Iterator[tuple[Path, bool]]:
    """Where the result is assembled, and whether it stays; a failed push keeps it."""
    if target.output is not None:
        yield target.output, True
        return
    parent = Path(tempfile.mkdtemp(prefix="hf-tsv-"))
    final = parent / str(target.push_to).rsplit("/", 1)[-1]
    try:
        yield final, False
    except BaseException:
        if not final.exists():
            shutil.rmtree(parent, ignore_errors=True)
        raise
    shutil.rmtree(parent, ignore_errors=True)


def _pushed(folder: Path, target: _Target, token: str | None) -> str:
    repo_id = str(target.push_to)
    logger.info("Uploading to %s.", repo_id)
    try:
        return hub.push(
            folder,
            repo_id,
            token=token,
            private=target.private,
            revision=target.revision,
            create_pr=target.create_pr,
            commit_message=target.commit_message or "Upload model merged with hf-tsv",
        )
    except BaseException as error:
        if isinstance(error, RepoError):
            error.hint = (
                f"The merged model is complete in {folder}; push it later with"
                f" `hf upload {repo_id} {folder}`. {error.hint or ''}".rstrip()
            )
        else:
            logger.warning("The merged model is complete in %s, but was not uploaded.", folder)
        raise


def _report(
    job: _Job,
    target: _Target,
    started: float,
    *,
    findings: stream.Findings | None = None,
    warnings: Sequence[str] | None = None,
    dry_run: bool = False,
) -> MergeReport:
    ranks = {} if findings is None else findings.ranks
    frozen = frozenset() if findings is None else frozenset(findings.frozen)
    treatments: dict[str, dict[str, Any]] = {}
    for weight in job.plan.weights:
        entry: dict[str, Any] = {"treatment": weight.treatment}
        if weight.label in frozen:
            entry = {"treatment": "copied", "reason": "equal to the base in every checkpoint"}
        elif weight.treatment == "decomposed":
            entry["rank"] = weight.rank
            if weight.label in ranks:
                entry["ranks"] = list(ranks[weight.label])
        elif weight.reason:
            entry["reason"] = weight.reason
        treatments[weight.label] = entry
    return MergeReport(
        output=None if target.output is None else str(target.output),
        base_model=_pinned_entry(job.base),
        inputs=[_pinned_entry(item) for item in job.inputs],
        weights=job.plan.counts(frozen),
        output_bytes=job.plan.shards.total_bytes,
        seconds=round(time.monotonic() - started, 3),
        warnings=list(job.warnings if warnings is None else warnings),
        method=job.settings.method,
        treatments=treatments,
        left_out={str(item): list(item.left_out) for item in job.inputs if item.left_out},
        download_bytes=sum(
            repo.sizes[name]
            for repo, _, names in _wanted_files(job)
            for name in hub.uncached(repo, names)
        ),
        peak_memory_bytes=job.plan.peak_memory_bytes,
        dry_run=dry_run,
    )


def _pinned_entry(item: Checkpoint) -> dict[str, str | None]:
    return {"ref": item.pinned.ref, "revision": item.pinned.revision}
