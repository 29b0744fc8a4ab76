"""Small charts as points for a template that draws them: a histogram, and means with a band."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from attrs import field, frozen
from numpy.typing import NDArray

WIDTH, HEIGHT = 420, 170
_MARKS = 5


@frozen
class Line:
    """One curve: `points` of its means, and of a `band` around them if it has one, as SVG wants them."""

    name: str
    points: str
    band: str = ""


@frozen
class Chart:
    """A chart, and the numbers in it for those who cannot see it.

    Args:
        title, x, y: words.
        bars: (x, y, width, height) of each bar, in pixels.
        lines: curves.
        x_marks, y_marks: (pixel, label).
        zero: pixel of y = 0, or None.
        table: header, and rows.
    """

    title: str
    x: str
    y: str
    x_marks: list[tuple[float, str]]
    y_marks: list[tuple[float, str]]
    table: list[list[str]]
    bars: list[tuple[float, float, float, float]] = field(factory=list)
    lines: list[Line] = field(factory=list)
    zero: float | None = None
    width: int = WIDTH
    height: int = HEIGHT


def histogram(title: str, x: str, values_M: NDArray[Any], limit: float, bins: int = 41) -> Chart:
    """Counts between -limit and limit, on a logarithmic scale: a tail of one token in a thousand is what to look for."""
    counts, borders = np.histogram(values_M, bins=bins, range=(-limit, limit))
    tall = np.log10(counts + 1)
    top = max(float(tall.max()), 1.0)
    width = WIDTH / bins
    bars = [(i * width, HEIGHT - HEIGHT * t / top, width * 0.9, HEIGHT * t / top) for i, t in enumerate(tall.tolist())]
    x_marks = [(WIDTH * i / 4, signed(-limit + limit * i / 2)) for i in range(5)]
    y_marks = [(HEIGHT - HEIGHT * power / top, f"{10**power:,}") for power in range(int(top) + 1)]
    rows = [[f"{a:+.2f} to {b:+.2f}", f"{n:,}"] for a, b, n in zip(borders, borders[1:], counts.tolist(), strict=False) if n]
    return Chart(title, x, "tokens, logarithmic", x_marks, y_marks, [["advantage", "tokens"], *rows], bars=bars)


def curves(title: str, series: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], bins: int, *, band: bool) -> Chart:
    """Means of values by place (0 to 1), one line for each series; the band holds the middle 80 %."""
    found = {name: _by_bin(place, values, bins) for name, (place, values) in series.items()}
    drawn = np.concatenate([table if band else table[:1] for table in found.values()], axis=1)
    low, high = min(float(np.nanmin(drawn)), 0.0), max(float(np.nanmax(drawn)), 0.0)
    low, high = (low, high) if high > low else (low - 1, high + 1)

    def pixel(value: float) -> float:
        return HEIGHT * (high - value) / (high - low)

    def points(values: NDArray[Any], order: int = 1) -> str:
        places = [(WIDTH * (i + 0.5) / bins, pixel(v)) for i, v in enumerate(values.tolist()) if np.isfinite(v)]
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in places[::order])

    lines = [
        Line(name, points(mean), f"{points(lower)} {points(upper, -1)}" if band else "") for name, (mean, lower, upper) in found.items()
    ]
    x_marks = [(WIDTH * i / 4, f"{i / 4:.0%}") for i in range(5)]
    y_marks = [(pixel(v), signed(v)) for v in np.linspace(low, high, _MARKS)]
    header = ["position", *found]
    rows = [[f"{i / bins:.0%}", *(f"{table[0, i]:+.3f}" for table in found.values())] for i in range(bins)]
    return Chart(title, "position", "mean advantage, nats", x_marks, y_marks, [header, *rows], lines=lines, zero=pixel(0.0))


def signed(value: float) -> str:
    """Two digits and a sign; nothing is plain 0."""
    return f"{value:+.2g}" if abs(value) > 1e-9 else "0"


def _by_bin(place_M: NDArray[Any], values_M: NDArray[Any], bins: int) -> NDArray[np.float64]:
    """(3, bins): mean, 10 % and 90 % quantile; NaN where there is no token."""
    bin_M = np.minimum((place_M * bins).astype(np.int64), bins - 1)
    table = np.full((3, bins), np.nan)
    for i in np.unique(bin_M):
        inside = values_M[bin_M == i]
        table[:, i] = inside.mean(), *np.quantile(inside, (0.1, 0.9))
    return table
