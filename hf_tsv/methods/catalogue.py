"""The merging methods, one row each; imports no torch.

A method is a row and a function, its rule. Packages add methods of their own by entry points of the
group `hf_tsv.methods`, each of which names a row.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hf_tsv.system.progress import logger
from hf_tsv.system.text import one_line

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "hf_tsv.methods"
"""Group of the entry points by which other packages add methods."""

MethodName = Literal[
    "tsv", "ada", "low-rank", "orthogonal", "task-arithmetic", "average", "ties", "consensus",
    "iso-c", "iso-cts", "dc", "wudi", "tall-mask",
]  # fmt: skip
"""Names of our own methods; packages add more."""

Treatment = Literal["decomposed", "averaged", "summed", "combined"]

TREATMENTS: dict[str, Treatment] = {
    "matrices": "decomposed", "entries": "combined", "sum": "summed", "mean": "averaged",
}  # fmt: skip
"""Treatment of a weight by a method's own rule, by what the rule is of."""


@dataclass(frozen=True)
class Method:
    """How one weight is merged.

    Args:
        name (`str`): value of `--method`: small letters, digits and hyphens.
        rule (`str`): function that merges the updates of one weight, as `module:function`; imported
            when it is first used. See [`Rule`].
        does (`str`): one line for `--help` and the README.
        source (`str`): arXiv number of the paper; empty if there is none.
        of (`str`): what the rule is given: `matrices` (what is no matrix is averaged), `entries`
            (weights of any shape, all tasks at once), `sum` or `mean` (of any shape, one task at a
            time; a `mean` is over the tasks that left the weight unchanged too).
        ranks (`str`, *optional*): triplets kept of each task: `share` (⌊k/T⌋, or fewer if they are
            chosen), `free` (as chosen, ⌊k/T⌋ by default), `all`; None: none are kept.
        alpha (`float`, *optional*): default of α; None: the method has no α.
        alpha_of_adapters (`float`, *optional*): default of α where all inputs are adapters; None:
            the same.
        vectors (`str`, *optional*): singular vectors of the tasks that `--report` measures: `kept`
            as they are, or made `orthogonal`; None: the rule returns none.
        before (`str`): pass over all weights before the first is merged, as `module:function`; what
            it returns is in [`Updates`] as `known`. See [`PassBefore`].
        beside (`str`): mask of a task in one weight, as `module:function` of Δ and of ΣΔ; the masks
            of all tasks are written beside the merge.
        forms (`str`, *optional*): matrices that the rule forms besides, which the plan counts:
            `projections` of each task on the orthonormal vectors of all, the `covariance` of the
            inputs, or `remainders` of all tasks outside what they share.
        calibrates (`str`, *optional*): least ratio of a merged response to that of a task that
            `calibrate` takes, of a rule whose singular values may be calibrated: `one`, or `share`
            for 1/T. See [`hf_tsv.methods.calibration`].
        learns (`bool`): a coefficient of each task in each weight is learned on images first, for
            shares that are those of TSV-Merge.
        options (`tuple[str, ...]`): settings that no other method has.
        card (`str`): what the card says after “merged by hf-tsv”; by default the name.
        package (`str`): `NAME==VERSION` of the package it comes from; empty for a method of ours.
    """

    name: str
    rule: str
    does: str
    source: str = ""
    of: Literal["matrices", "entries", "sum", "mean"] = "matrices"
    ranks: Literal["share", "free", "all"] | None = None
    alpha: float | None = 1.0
    alpha_of_adapters: float | None = None
    vectors: Literal["kept", "orthogonal"] | None = None
    before: str = ""
    beside: str = ""
    forms: Literal["projections", "covariance", "remainders"] | None = None
    calibrates: Literal["one", "share"] | None = None
    learns: bool = False
    options: tuple[str, ...] = ()
    card: str = ""
    package: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.name):
            raise ValueError(f"{self.name!r} is no name of a method")
        if self.of not in TREATMENTS or self.ranks not in (None, "share", "free", "all"):
            raise ValueError(f"of is {self.of!r} and ranks is {self.ranks!r}")

    @property
    def says(self) -> str:
        """Line for `--help`: what it does, and α where the default is not 1."""
        alphas = [] if self.alpha in (None, 1) else [f"α = {self.alpha:g}"]
        if self.alpha_of_adapters is not None:
            alphas.append(f"{'' if alphas else 'α = '}{self.alpha_of_adapters:g} for adapters")
        return f"{self.does} ({', '.join(alphas)})" if alphas else self.does

    @property
    def treatment(self) -> Treatment:
        """Treatment of the weights that the rule merges."""
        return TREATMENTS[self.of]


BUILT_IN = (
    Method(
        "tsv", "hf_tsv.methods.tsv:orthogonal",
        "leading singular vectors of each task, made orthogonal",
        source="2412.00081", ranks="share", vectors="orthogonal", calibrates="one",
        card=" with [TSV-Merge](https://arxiv.org/abs/2412.00081): the leading singular vectors of"
        " every task's\nweight update are kept, made orthogonal to those of the other tasks, and"
        " added to the base model.",
    ),
    Method(
        "ada", "hf_tsv.methods.tsv:orthogonal",
        "tsv with a coefficient of each task in each weight, learned on images",
        source="2310.02575", ranks="share", vectors="orthogonal", learns=True,
        card=" with [TSV-Merge](https://arxiv.org/abs/2412.00081) and a\ncoefficient of every task"
        " in every weight, learned as in [AdaMerging](https://arxiv.org/abs/2310.02575).",
    ),
    Method(
        "low-rank", "hf_tsv.methods.tsv:low_rank",
        "leading singular vectors of each task, summed",
        source="2412.00081", ranks="free", alpha=0.3, vectors="kept", calibrates="share",
    ),
    Method(
        "orthogonal", "hf_tsv.methods.tsv:orthogonal",
        "all singular vectors of each task, made orthogonal",
        source="2412.00081", ranks="all", vectors="orthogonal", calibrates="one",
    ),
    Method(
        "task-arithmetic", "hf_tsv.methods.sums:total", "sum of updates",
        source="2212.04089", of="sum", alpha=0.3, calibrates="share",
    ),
    Method("average", "hf_tsv.methods.sums:mean", "mean of updates", of="mean"),
    Method(
        "ties", "hf_tsv.methods.ties:ties",
        "largest fifth of each task's entries, mean of those that agree in sign",
        source="2306.01708", of="entries", before="hf_tsv.methods.ties:thresholds",
        calibrates="share",
    ),
    Method(
        "consensus", "hf_tsv.methods.tall_masks:consensus",
        "sum of updates, where at least two tasks need it",
        source="2405.07813", of="entries", alpha=0.3, calibrates="share",
    ),
    Method(
        "iso-c", "hf_tsv.methods.isotropic:iso_c",
        "sum of updates with all singular values made equal",
        source="2502.04959", alpha_of_adapters=2.0,
    ),
    Method(
        "iso-cts", "hf_tsv.methods.isotropic:iso_cts",
        "iso-c with a fifth of its directions for each task's own",
        source="2502.04959", alpha=1.3, alpha_of_adapters=2.0, forms="remainders",
    ),
    Method(
        "dc", "hf_tsv.methods.dc:dc",
        "tsv, keeping only what tasks agree on",
        source="2603.05957", ranks="share", alpha=2.0, alpha_of_adapters=0.7,
        forms="projections", calibrates="one",
    ),
    Method(
        "wudi", "hf_tsv.methods.wudi:wudi",
        "answers on the inputs that each task's update shows",
        source="2503.08099", alpha_of_adapters=0.2, forms="covariance", calibrates="one",
        options=("wudi_filter",),
    ),
    Method(
        "tall-mask", "hf_tsv.methods.sums:total",
        "sum of updates, and a mask of each task beside it: one task at a time",
        source="2405.07813", of="entries", alpha=None,
        beside="hf_tsv.methods.tall_masks:tall_mask",
        card=" with [TALL-masks](https://arxiv.org/abs/2405.07813): the weights are the sum of all"
        " updates,\nof which each task has a mask; load one task at a time.",
    ),
)  # fmt: skip
"""Methods of this package. The scale α of sums in which tasks add up where they agree is what task
arithmetic takes without validation images (Ilharco et al., ICLR 2023). That of Iso-CTS and of
DC-Merge, and those of adapters, were the best of a few values on the validation images of
`benchmarks.accuracy`, on average."""


def installed(points: Sequence[EntryPoint]) -> Iterator[Method]:
    """Methods of other packages; one that cannot be used is left out with a warning.

    The module of a row should import little, since every command loads it.
    """
    found: dict[str, list[Method]] = defaultdict(list)
    for point in points:
        package = f"{point.dist.name}=={point.dist.version}" if point.dist else point.value
        try:
            row = point.load()
            if not isinstance(row, Method):
                raise TypeError(f"{point.value} is no Method")
        except (Exception, SystemExit) as error:
            reason = one_line(f"{type(error).__name__}: {error}")
            logger.warning("The method %s of %s is left out: %s.", point.name, package, reason)
        else:
            found[row.name].append(replace(row, package=package))
    ours = {row.name for row in BUILT_IN}
    for name, rows in found.items():
        owners = ["hf-tsv"] * (name in ours) + sorted(row.package for row in rows)
        if len(owners) == 1:
            yield rows[0]
            continue
        used = "none is used. Uninstall all but one of them."
        if name in ours:
            used = "that of hf-tsv is used."
        logger.warning("Methods of %s are called %s: %s", " and ".join(owners), name, used)


def entry_points() -> Sequence[EntryPoint]:
    """Entry points of other packages that name methods.

    The files that declare entry points are searched first: without a match, as almost everywhere,
    no command has to import `importlib.metadata`, which takes longer than all else of this module.
    """
    files = (file for path in sys.path for file in Path(path).glob("*-info/entry_points.txt"))
    try:
        found = any(GROUP.encode() in file.read_bytes() for file in files)
    except OSError:  # that the files cannot be read is not known to be harmless
        found = True
    if not found:
        return ()
    from importlib import metadata

    try:
        return tuple(metadata.entry_points(group=GROUP))
    except Exception as error:  # one damaged file is enough
        reason = one_line(f"{type(error).__name__}: {error}")
        logger.warning("Methods of other packages are left out: %s.", reason)
        return ()


METHODS = {row.name: row for row in (*BUILT_IN, *installed(entry_points()))}
"""All methods by name, those of other packages last."""
