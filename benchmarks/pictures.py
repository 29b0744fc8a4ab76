"""The one style of every picture in the docs: readable on white and on dark pages, mean and band over seeds, labels beside the curves.

`panels` makes axes, `band` draws seeds, `label_ends` or `legend` names what was drawn, and `save` writes the file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lopd.records.estimates import t_quantile

if TYPE_CHECKING:
    from claims_summary import Interval

#: Inches; what the docs show is about 850 pixels wide, so text has 13 of them.
WIDTH, DPI = 9.0, 150
#: Pages that pictures are read on: white, GitHub's dark one, and slate of mkdocs-material.
PAGES = ("#ffffff", "#0d1117", "#1e2129")
#: The one grey (within a step or two) with a contrast of 4 to all of them.
TEXT = "#7f7f7f"
#: Colours with a fixed meaning.  Each has a contrast of 3 to every page.  They were found by a search for those that differ most, also to readers
#: who lack one kind of cone (Machado et al. 2009): any two are 22 or more apart in CIELAB, TEXT among them; `tests/test_pictures.py`.
OFFLINE, RATIO, SUPPORT, ONLINE, TRL, TEACHER, SFT = "#c5362a", "#1a6bc9", "#9b19fd", "#12a45c", "#da7c16", "#cb75be", TEXT

mpl.rcParams.update(dict.fromkeys(("text.color", "xtick.color", "ytick.color"), TEXT))
mpl.rcParams.update(dict.fromkeys(("axes.labelcolor", "axes.edgecolor", "axes.titlecolor"), TEXT))
mpl.rcParams.update(dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), "none"))
mpl.rcParams.update(dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False))
mpl.rcParams.update({"font.size": 10, "axes.titlesize": 10.5, "axes.titlelocation": "left"})
mpl.rcParams.update({"lines.linewidth": 1.6, "lines.markersize": 4, "legend.columnspacing": 1.2})
_LEADER = {"arrowstyle": "-", "linewidth": 0.6, "alpha": 0.6, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 2}


def color_of(name: str) -> str:
    """Return the colour of an arm, by its name; a stored arm without ratio and support has that of Lightning."""
    kinds = {TRL: ("TRL",), ONLINE: ("online",), SFT: ("SFT", "no teacher"), TEACHER: ("teacher",)}
    kinds |= {SUPPORT: ("top-", "candidate", "drawn", "draws", "support"), RATIO: ("ratio",)}
    return next((color for color, words in kinds.items() if any(word in name for word in words)), OFFLINE)


def wrap(name: str, width: int) -> str:
    """Break a name between words where a line has so many letters."""
    return fill(name, width, break_long_words=False)


def panels(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """Make a figure as wide as every other, and its axes, row by row; the height is in inches, options are those of `Figure.subplots`."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def band(axes: Axes, at: Any, values: Any, name: str, *, color: str | None = None, line: str = "-", mark: str = "o") -> None:
    """Draw mean and 95 % interval (Student's t) over seeds; `values` are (seeds, points)."""
    array, color = np.asarray(values, float), color or color_of(name)
    seeds, mean = len(array), array.mean(0)
    axes.plot(at, mean, color=color, label=name, marker=mark, linestyle=line)
    if seeds > 1:
        half = t_quantile(0.975, seeds - 1) * array.std(0, ddof=1) / seeds**0.5
        axes.fill_between(at, mean - half, mean + half, color=color, alpha=0.15, linewidth=0)


def intervals(axes: Axes, names: Sequence[str], found: "Mapping[str, Interval]") -> None:
    """Draw means with their intervals, one below the other, and all names; what was not found has none."""
    for place, name in enumerate(names):
        if name in found:
            axes.errorbar([found[name].mean], [place], xerr=[found[name].half], fmt="o", color=color_of(name))
    axes.set_yticks(range(len(names)), [wrap(name, 40) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)


def rule(axes: Axes, *, x: float | None = None, y: float | None = None) -> None:
    """Draw a thin line at a value that others are compared with."""
    at, line = (x, axes.axvline) if x is not None else (y, axes.axhline)
    line(at, color=TEXT, linewidth=0.8, linestyle="--", zorder=0)


def label_ends(axes: Axes, *, width: int = 17) -> None:
    """Write the name of each line to the right of its axes, at the height of its end, and as far apart as they must be; lines of `width` letters.

    Call it when everything is drawn and the limits are set.
    """
    axes.figure.draw_without_rendering()  # the scale is known from here on
    lines = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    ends = [axes.transAxes.inverted().transform(axes.transData.transform(line.get_xydata()[-1]))[1] for line in lines]
    names = [wrap(str(line.get_label()), width) for line in lines]
    line_height = 1.3 * mpl.rcParams["font.size"] * axes.figure.dpi / 72 / axes.bbox.height
    order = sorted(range(len(lines)), key=lambda i: ends[i])
    halves = [line_height * (1 + names[i].count("\n")) / 2 for i in order]
    for i, place in zip(order, _apart([ends[i] for i in order], halves), strict=True):
        color = lines[i].get_color()
        where = {"xytext": (1.03, place), "textcoords": "axes fraction", "va": "center", "arrowprops": {**_LEADER, "color": color}}
        axes.annotate(names[i], lines[i].get_xydata()[-1], color=color, fontsize=9, linespacing=1.1, **where)


def _apart(wanted: Sequence[float], halves: Sequence[float]) -> list[float]:
    """Return places near the wanted ones, which ascend.

    Each has a half-height, and none reaches into another or above 1 unless there is no room.
    """
    places: list[float] = []
    for i, place in enumerate(wanted):
        places.append(max(place, places[-1] + halves[i - 1] + halves[i]) if i else place)
    top = 1.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], top - halves[i])
        top = places[i] - halves[i]
    return places


def legend(where: Figure | Axes, columns: int) -> None:
    """Name every line and bar once, below a panel or below all of them."""
    named = [where] if isinstance(where, Axes) else where.axes
    known = {label: handle for axes in named for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    below: dict[str, Any] = {"loc": "outside lower center"}
    if isinstance(where, Axes):
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.5 / (where.bbox.height / where.figure.dpi))}
    where.legend(known.values(), known.keys(), ncols=columns, **below)


def save(figure: Figure, path: Path) -> None:
    """Write the picture; one that would lose a part of its text or lines is refused."""
    figure.draw_without_rendering()
    needed, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    if min(needed.x0, needed.y0, width - needed.x1, height - needed.y1) < -0.02:
        raise ValueError(f"{path.name}: it needs {needed.extents.round(2).tolist()} inches, expected at most [0, 0, {width}, {height}].")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
