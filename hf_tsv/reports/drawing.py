"""The drawing kit: figures, axes, colours and names that every picture shares."""

from __future__ import annotations

import io
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

from hf_tsv.system.progress import logger
from hf_tsv.system.text import first_line, one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")

MISSING = "No pictures: matplotlib is not installed. Run `pip install matplotlib`."
BROKEN = "No pictures: matplotlib is installed, but {} failed."
TEXT = "#7a7a7a"  # half way between white and black, as the background is transparent
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#c46fa0", "#3d9bd6", TEXT)
"""Colours after Okabe and Ito: distinct for any colour vision, contrast ≥ 3 on white and black."""

HEAT = "cividis"
WIDTH = 8.0  # inches, about as wide as a card on a screen
DPI = 200

LONGEST_NAME = 21
NUMBERED = 10  # most rows of a heat map that shows its numbers
NAMED = len(COLOURS)  # most tasks whose lines all have a colour of their own


@dataclass(frozen=True)
class Picture:
    """Picture of a report, with `alt`, a description for readers who cannot see it."""

    file: str
    title: str
    alt: str
    png: bytes


def attempted(draw: Callable[[], T]) -> T | None:
    """Result of drawing; None, with a warning, if it fails: what was computed must not be lost."""
    try:
        with _plain_style():
            return draw()
    except ImportError:
        logger.warning(MISSING if find_spec("matplotlib") is None else BROKEN.format("it"))
    except Exception as error:  # fonts, settings and versions of the user's can fail in any way
        logger.warning(BROKEN.format(f"it ({first_line(error)})"))
    return None


@contextmanager
def _plain_style() -> Iterator[None]:
    """Use matplotlib's defaults, whatever the user has set for other plots."""
    backend = os.environ.pop("MPLBACKEND", None)  # set by notebooks; may not even be installed
    try:
        import matplotlib

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            yield
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


# Appearance


def new_figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def to_png(figure: Figure) -> bytes:
    """PNG of the figure with a transparent background, which suits any page."""
    for axes in figure.axes:
        axes.xaxis.label.set_color(TEXT)
        axes.yaxis.label.set_color(TEXT)
        axes.tick_params(colors=TEXT)
        axes.spines[:].set_color(TEXT)
        axes.patch.set_alpha(0)
    out = io.BytesIO()
    with warnings.catch_warnings():  # the font lacks some scripts
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(out, dpi=DPI, transparent=True, metadata={"Software": None})
    return out.getvalue()


def frame_axes(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=TEXT, alpha=0.25, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5)


def percent_text(axes: Axes) -> None:
    frame_axes(axes)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.xaxis.set_major_formatter("{x:.0%}")


def heat_map(
    axes: Axes,
    values: Any,
    named: Callable[[float], str],
    *,
    low: float = 0.0,
    top: float = 1.0,
    **bar: Any,
) -> None:
    """Draw a matrix, with its numbers if it is small; NaN stays empty."""
    import numpy as np

    image = axes.imshow(
        values, cmap=HEAT, vmin=low, vmax=top, aspect="auto", interpolation="nearest"
    )
    axes.spines[:].set_visible(False)
    if len(values) <= NUMBERED:
        for (i, j), value in np.ndenumerate(values):
            if not math.isnan(value):
                colour = "black" if value - low > 0.6 * (top - low) else "white"
                axes.text(j, i, named(value), ha="center", va="center", fontsize=8.5, color=colour)
    scale = axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, **bar)
    scale.outline.set_visible(False)
    scale.ax.tick_params(colors=TEXT, labelsize=8)


def name_rows_and_columns(axes: Axes, names: Sequence[str], size: float, **turned: Any) -> None:
    axes.set_xticks(range(len(names)), names, fontsize=size, parse_math=False, **turned)
    axes.set_yticks(range(len(names)), names, fontsize=size, parse_math=False)
    axes.tick_params(length=0)


def legend_outside(figure: Any, axes: Axes, place: str, columns: int = 2, **style: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc=f"outside {place} center", ncols=columns,
                           frameon=False, labelcolor=TEXT, fontsize=9, **style)  # fmt: skip
    literal(legend)


def literal(legend: Any) -> None:
    """Show names as they are, whatever they have of TeX."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def short_names(names: Sequence[str]) -> list[str]:
    """Names without common beginnings and ends, shortened, all distinct."""
    names = [one_line(name) for name in names]
    for turn in (slice(None), slice(None, None, -1)):
        turned = [name[turn] for name in names]
        common = re.match(r".*[-_/. ]|", os.path.commonprefix(turned))  # noqa: RUF071
        shared = len(common[0]) if common and len(names) > 1 else 0
        names = [(name[shared:] or name)[turn] for name in turned]
    half = LONGEST_NAME // 2
    names = [n if len(n) <= 2 * half + 1 else f"{n[:half]}…{n[-half:]}" for n in names]
    return [f"{i + 1}: {n}" if names.count(n) > 1 else n for i, n in enumerate(names)]


def number_text(value: float, largest: float | None = None) -> str:
    """Number with about three digits; with `largest`, as many decimals as that number has."""
    size = abs(value if largest is None else largest)
    if value == 0:
        return "0"
    if not 1e-3 <= size < 1e5:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    if size >= 1e4:
        return f"{value / 1e3:.1f}k"
    return f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}"
