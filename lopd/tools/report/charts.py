"""Small charts as points for a template that draws them (a histogram, means with a band, values by step), and the page that a template makes.

Every text that goes into a page is escaped.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import field, frozen
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from numpy.typing import NDArray

from lopd.errors import StoreWriteError, printable
from lopd.records.paths import local_path

WIDTH, HEIGHT = 340, 150
#: Most points of a curve over steps; of a longer run each point is the mean of several steps.
MOST_POINTS = 1000
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
        said: what there is to see, in a few words.
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
    said: str = ""
    width: int = WIDTH
    height: int = HEIGHT


@frozen
class Scale:
    """From values between `low` and `high` to pixels between `start` and `stop`."""

    low: float
    high: float
    start: float
    stop: float

    @classmethod
    def of(cls, low: float, high: float, start: float, stop: float) -> "Scale":
        """Return a scale that is not empty, also where all values are the same."""
        room = 0.0 if high > low else abs(high) * 0.1
        return cls(low - room, high + room, start, stop) if high > low or room else cls(0.0, 1.0, start, stop)

    def pixel(self, value: float) -> float:
        """Return where this value is."""
        return self.start + (self.stop - self.start) * (value - self.low) / (self.high - self.low)

    def marks(self, label: Callable[[float], str] | None = None, least: float = 0.0) -> list[tuple[float, str]]:
        """Return (pixel, label) of a few round values, at least `least` apart; labels have the digits that tell them apart."""
        rough = max((self.high - self.low) / _MARKS, least)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        values = [i * step for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]
        plain = digits <= 4 and max(abs(self.low), abs(self.high)) < 1e6
        named = label or (lambda value: f"{value:,.{digits}f}" if plain else f"{value:.2g}")
        return [(self.pixel(value), named(value)) for value in values]


def histogram(title: str, x: str, values_M: NDArray[Any], limit: float, bins: int = 41) -> Chart:
    """Return counts between -limit and limit, on a logarithmic scale: a tail of one token in a thousand is what to look for."""
    counts, borders = np.histogram(values_M, bins=bins, range=(-limit, limit))
    tall = np.log10(counts + 1)
    top = max(float(tall.max()), 1.0)
    width = WIDTH / bins
    bars = [(i * width, HEIGHT - HEIGHT * t / top, width * 0.9, HEIGHT * t / top) for i, t in enumerate(tall.tolist())]
    x_marks = [(WIDTH * i / 4, signed(-limit + limit * i / 2)) for i in range(5)]
    marked = [10**power for power in range(int(top) + 1) if np.log10(10**power + 1) <= top]
    y_marks = [(HEIGHT - HEIGHT * float(np.log10(count + 1)) / top, f"{count:,}") for count in marked]
    rows = [[f"{a:+.2f} to {b:+.2f}", f"{n:,}"] for a, b, n in zip(borders, borders[1:], counts.tolist(), strict=False) if n]
    return Chart(title, x, "tokens, logarithmic", x_marks, y_marks, [["advantage", "tokens"], *rows], bars=bars)


def curves(title: str, series: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], bins: int, *, band: bool) -> Chart:
    """Return means of values by place (0 to 1), where there are any, one line for each series; the band holds the middle 80 %."""
    found = {name: _by_bin(place, values, bins) for name, (place, values) in series.items()}
    drawn = np.concatenate([table if band else table[:1] for table in found.values()], axis=1)
    low, high = min(float(np.nanmin(drawn)), 0.0), max(float(np.nanmax(drawn)), 0.0)
    y, places_B = Scale.of(low, high, HEIGHT, 0), WIDTH * (np.arange(bins) + 0.5) / bins
    lines = [
        Line(name, _points(places_B, mean, y), f"{_points(places_B, lower, y)} {_points(places_B[::-1], upper[::-1], y)}" if band else "")
        for name, (mean, lower, upper) in found.items()
    ]
    x_marks = [(WIDTH * i / 4, f"{i / 4:.0%}") for i in range(5)]
    header = ["position", *found]
    there = np.flatnonzero(np.isfinite([table[0] for table in found.values()]).any(0)).tolist()
    cells = {i: ["" if np.isnan(table[0, i]) else f"{table[0, i]:+.3f}" for table in found.values()] for i in there}
    rows = [[f"{i / bins:.0%}", *row] for i, row in cells.items()]
    return Chart(title, "position", "mean advantage, nats", x_marks, y.marks(signed), [header, *rows], lines=lines, zero=y.pixel(0.0))


def over_steps(title: str, unit: str, steps: Sequence[int], series: Mapping[str, Sequence[float]]) -> Chart:
    """Return values by optimizer step, one line for each series; values that are not finite are in the table alone.

    Args:
        title: the chart's title.
        unit: unit of the values.
        steps: their numbers, ascending, at least one.
        series: name -> one value a step.
    """
    groups = np.array_split(np.arange(len(steps)), min(len(steps), MOST_POINTS))
    steps_B = np.array([np.mean(np.take(steps, group)) for group in groups])
    found = {name: np.array([np.mean(np.take(values, group)) for group in groups]) for name, values in series.items()}
    every = np.concatenate(list(found.values()))
    finite = every[np.isfinite(every)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    # a range that begins at 0 shows how much of a value has changed, unless the values are far from 0
    low, high = min(low, 0.0) if low < high / 2 else low, max(high, 0.0) if high > low / 2 else high
    y, x = Scale.of(low, high, HEIGHT, 0), Scale.of(steps_B[0], max(steps_B[-1], steps_B[0] + 1), 0, WIDTH)
    lines = [Line(name, _points(np.array([x.pixel(step) for step in steps_B]), values, y)) for name, values in found.items()]
    rows = [[f"{step:g}", *(f"{values[i]:.4g}" for values in found.values())] for i, step in enumerate(steps_B.tolist())]
    most = max(len(group) for group in groups)
    words = "step" if most == 1 else f"step, means of {most}"
    zero = y.pixel(0.0) if low < 0 else None
    x_marks = x.marks(least=1.0)
    said = "; ".join(f"{name} from {values[0]:.3g} to {values[-1]:.3g}" for name, values in found.items())
    return Chart(title, words, unit, x_marks, y.marks(), [["step", *found], *rows], lines=lines, zero=zero, said=said)


def signed(value: float) -> str:
    """Return the number with two digits and a sign; 0 as plain 0."""
    return f"{value:+.2g}" if abs(value) > 1e-9 else "0"


def _points(places_B: NDArray[Any], values_B: NDArray[Any], y: Scale) -> str:
    pairs = zip(places_B.tolist(), values_B.tolist(), strict=True)
    return " ".join(f"{place:.1f},{y.pixel(value):.1f}" for place, value in pairs if np.isfinite(value))


def _by_bin(place_M: NDArray[Any], values_M: NDArray[Any], bins: int) -> NDArray[np.float64]:
    """Return (3, bins): mean, 10 % and 90 % quantile; NaN where there is no token."""
    bin_M = np.minimum((place_M * bins).astype(np.int64), bins - 1)
    table = np.full((3, bins), np.nan)
    for i in np.unique(bin_M):
        inside = values_M[bin_M == i]
        table[:, i] = inside.mean(), *np.quantile(inside, (0.1, 0.9))
    return table


def _shown(value: Any) -> Any:
    """Return text without marks of direction, which would rearrange the page; a string that is markup already is ours."""
    return printable(value) if type(value) is str else value


_ENVIRONMENT = Environment(
    loader=PackageLoader("lopd.tools.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_shown
)
#: A line may break before a space, which is shown as a dot.
_ENVIRONMENT.globals["breaks"] = lambda text: Markup("<wbr>") if text.startswith("·") else ""


def write_page(path: str | Path, template: str, parts: Mapping[str, Any]) -> None:
    """Fill a template with these parts, and write it.

    Raises:
        StoreWriteError: the operating system refuses.
    """
    page = _ENVIRONMENT.get_template(template).render(parts)
    try:
        local_path("Report", path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise StoreWriteError(
            f"Report {path}: it cannot be written ({error}); check the folder, its permissions and the free space."
        ) from error
