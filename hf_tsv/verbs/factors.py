"""`hf_tsv.TaskFactors`: the handle on a compressed task that users hold, with what publishes it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from hf_tsv.checkpoints.formats.description import StoredWeight
from hf_tsv.checkpoints.formats.factors import Factors, open_factors
from hf_tsv.checkpoints.names import COMPRESSION, CONFIG_FILE, FACTORS_CONFIG
from hf_tsv.checkpoints.reference import PinnedCheckpoint, card_datasets, parse, pin
from hf_tsv.checkpoints.storage.files import LocalFiles
from hf_tsv.hub import Wanted, download
from hf_tsv.linalg.updates import Update
from hf_tsv.reports import cards, compressed_cards
from hf_tsv.reports.cards import FEATURES
from hf_tsv.reports.compression import CompressReport
from hf_tsv.reports.kept import KeptSection
from hf_tsv.runs.target import Target, collect, upload
from hf_tsv.system.errors import CheckpointError, public
from hf_tsv.system.folders import whole_folder
from hf_tsv.system.progress import visible_by_default
from hf_tsv.system.text import counted, human_bytes


@dataclass(frozen=True, repr=False)
class TaskFactors(Factors):
    """A compressed task: a handle on its files, which are read one weight at a time.

    Args:
        report ([`CompressReport`], *optional*): of the compression that made them just now; None
            after [`from_pretrained`], where `config` says how much is kept (`factors_bytes`,
            `checkpoint_bytes`, `update_error`). The others are those of [`Factors`].

    Like a dictionary it has names of weights (`len`, `in`, iteration, `keys()`), and
    `factors[name]` reads an update; `weights` says of each how it is stored.

    Example:
        >>> factors = TaskFactors.from_pretrained("me/clip-sun397-tsv")  # doctest: +SKIP
        >>> factors.update("visual_projection.weight").rank  # doctest: +SKIP
        51
    """

    report: CompressReport | None = field(default=None, kw_only=True)

    @property
    def weights(self) -> Mapping[str, StoredWeight]:
        """Form, rank, energy and bytes of every weight, by name."""
        return self.config.weights

    def keys(self) -> Iterable[str]:
        """Names of the weights."""
        return self.weights.keys()

    def __len__(self) -> int:
        return len(self.weights)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __getitem__(self, name: str) -> Update | None:
        return self.update(name)

    def __repr__(self) -> str:
        size, whole = self.config.factors_bytes, self.config.checkpoint_bytes
        share = f"{size / whole:.1%} of the checkpoint" if whole else "empty"
        told = f"{str(self)!r}, {counted(len(self), 'weight')}, {human_bytes(size)}, {share}"
        return f"TaskFactors({told})"

    @classmethod
    @public
    def from_pretrained(
        cls,
        reference: str | Path,
        *,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        progress: bool | None = None,
    ) -> TaskFactors:
        """Open factors from the Hub (downloaded into the client's cache) or from a folder.

        Args:
            reference (`str` or `Path`): `org/name`, `org/name@revision`, `hf://…` or a folder.
            token, cache_dir, progress: as in [`merge`].

        Raises:
            [`HfTsvError`]: unknown repository, no factors, or damaged ones.
        """
        cache = None if cache_dir is None else str(cache_dir)
        pinned = pin(parse(str(reference)), token=token, cache_dir=cache)
        if pinned.files.size(FACTORS_CONFIG) is None:
            raise CheckpointError(
                f"{pinned} has no {FACTORS_CONFIG}, so it holds no task factors.",
                "Make some with `hf-tsv compress`.",
            )
        factors = cls.opened(pinned)
        if pinned.files.downloads is None:
            return factors
        names = tuple(map(pinned.files.path, factors.needed_files))
        wanted = Wanted(pinned.files.downloads, pinned.asked_revision, names)
        show = visible_by_default() if progress is None else progress
        (folder,) = download([wanted], visible=show)
        local = LocalFiles(folder / pinned.files.subfolder)
        return replace(factors, pinned=replace(pinned, files=local))

    def read(self, name: str) -> Tensor:
        """One tensor of the task head, as stored, by its name in the fine-tuned checkpoint."""
        return self.head_tensor(name)

    @classmethod
    def opened(cls, pinned: PinnedCheckpoint, report: CompressReport | None = None) -> TaskFactors:
        """Factors of a commit or folder, with the report of the run that made them."""
        return cls(**vars(open_factors(pinned)), report=report)

    @public
    def save_pretrained(self, folder: str | Path, *, force: bool = False) -> None:
        """Write the files and their card into a folder that appears whole.

        The folder must not exist, or be empty; with `force` it may be one that hf-tsv wrote.
        """
        target = Target(Path(folder), force=force).checked(None, dry_run=False)
        target.refuse_inputs([self.pinned])
        assert target.output is not None  # checked above
        self._copy(target.output)

    @public
    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        collection: str | None = None,
        token: str | None = None,
        progress: bool | None = None,
    ) -> str:
        """Upload the files and their card as one commit.

        Args:
            repo_id (`str`): `org/name`; created if needed.
            private, revision, create_pr, commit_message, collection, token, progress: as in
                [`merge`].

        Returns:
            `str`: address of the commit or pull request.
        """
        show = visible_by_default() if progress is None else progress
        target = Target(
            None, repo_id, False, private, revision, create_pr, commit_message, collection
        )
        target = target.checked(token, dry_run=False)
        for origin in (self.config.source, self.config.base_model):
            if origin.revision is not None:
                made_from = replace(self.pinned, ref=origin.ref, revision=origin.revision)
                target.refuse_inputs([replace(made_from, asked_revision=None)])
        with tempfile.TemporaryDirectory(prefix="hf-tsv-") as parent:
            folder = Path(parent) / "factors"
            self._copy(folder)
            pushed = upload(folder, target, token, show=show)
        collect(target, pushed, token)
        return pushed.url

    def _copy(self, folder: Path) -> None:
        files = self.pinned.files
        if files.folder is None:
            raise CheckpointError(f"{self} is not downloaded.", "Use TaskFactors.from_pretrained.")
        with whole_folder(folder) as staging:
            for name in self.needed_files:
                shutil.copyfile(files.folder / name, staging / name)
            kept = None
            if files.size(COMPRESSION) is not None and not files.is_elsewhere(COMPRESSION):
                shutil.copyfile(files.folder / COMPRESSION, staging / COMPRESSION)
                kept = KeptSection.of(self.config, COMPRESSION)
            (staging / CONFIG_FILE).write_text(self.config.model_json(), encoding="utf-8")
            card = compressed_cards.FactorsCard(
                config=self.config,
                full_model=self.pinned.card.get("pipeline_tag") != FEATURES,
                datasets=card_datasets(self.pinned.card),
                kept=kept,
            )
            (staging / "README.md").write_text(cards.render(card), encoding="utf-8")
