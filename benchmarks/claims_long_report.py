"""The part of RESULTS.md on long responses: goals, tables, words and a plot, out of what `claims_long.py` measured."""

import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from claims_summary import Interval, Row, Runs, accuracy, as_goal, change, goal_lines, ratios
from docs_tables import table
from matplotlib.figure import Figure
from testbed.arms import ONLINE
from testbed.long_arms import BEST, BEST_LIVE, LIVE, STORED
from testbed.trl_peer import ARM as TRL

#: How many times as much online OPD is to cost (the paper's figure), and the share of the limit that is to be reached.
TIMES, OF_LIMIT = 4.0, 0.85
_PARTS = ("sampling", "scoring", "training", "all")


@frozen(eq=False, slots=False)
class Found:
    """What was measured.

    Args:
        rows: all of them.
        setting: whose runs are read.
    """

    rows: Sequence[Row]
    setting: str

    @cached_property
    def runs(self) -> Runs:
        """Every run."""
        return Runs.of(self.rows)

    @property
    def names(self) -> list[str]:
        """Arms that were run, the live ones first."""
        known = [*(arm.name for arm in LIVE), TRL, *(arm.name for arm in STORED)]
        return [name for name in known if self.cell(name)]

    def cell(self, name: str) -> dict[int, Row]:
        """The runs of an arm by seed."""
        return self.runs.where(self.setting, name)

    def times(self, online: str, name: str, at: str) -> Interval:
        """How many times as much as an arm online OPD costs."""
        return ratios(self.runs, self.setting, online, name)[at]

    def of_limit(self, online: str, name: str, at: str) -> Interval:
        """The same as a share of the limit, seed by seed."""
        cells = {seed: row for seed, row in self.cell(online).items() if seed in self.cell(name)}
        one = [ratios(Runs([r for r in self.runs.rows if r["seed"] == seed]), self.setting, online, name)[at].mean for seed in cells]
        return Interval.of([times / limit(row) for times, row in zip(one, cells.values(), strict=True)])


def limit(row: Row) -> float:
    """How many times as much a run costs as its training alone: what a store saves at most, at equal steps."""
    return float(row["cpu_s"]["all"] / row["cpu_s"]["training"])


def find_goals(rows: Sequence[Row], setting: str) -> list[dict[str, Any]]:
    """Every goal, beside online OPD with the sampled token and with the support of the arm."""
    found, goals = Found(rows, setting), []
    online = found.cell(ONLINE.name)
    gain = found.runs.mean(online, change)
    goals.append(as_goal("online OPD gains over SFT, accuracy", "> 0", gain, gain.positive))
    for other in (ONLINE.name, BEST_LIVE.name):
        more = found.runs.difference(found.cell(BEST.name), found.cell(other), accuracy)
        goals.append(as_goal(f"{BEST.name}, minus {other}: accuracy", "0 or more, within the interval", more, not more.negative))
        times = found.times(other, BEST.name, "equal accuracy")
        goals.append(as_goal(f"{other} over {BEST.name}, cost at equal accuracy", f">= {TIMES:g}", times, times.mean >= TIMES))
        for at in ("equal accuracy", "equal steps"):
            share = found.of_limit(other, BEST.name, at)
            name = f"{other} over {BEST.name}, cost at {at} as a share of the limit"
            goals.append(as_goal(name, f">= {OF_LIMIT}", share, share.mean >= OF_LIMIT))
    return goals


def write_part(result: Path, plots: Path, beside: Path) -> list[str]:
    """The lines, and the plot into a folder; links are from another folder."""
    said = json.loads(result.read_text())
    setting = next(row for row in said["rows"] if row["kind"] == "setting")
    found = Found(said["rows"], setting["name"])
    plots.mkdir(parents=True, exist_ok=True)
    _draw(plots / f"{result.stem}.png", found)
    machine, versions = (", ".join(f"{name} {value}" for name, value in said[key].items()) for key in ("machine", "versions"))
    return [
        "## Long responses",
        "",
        f"Written by `benchmarks/claims_long.py`: commit {said['commit'][:12]}; {machine}; {versions}.",
        *_task(found, setting),
        "",
        *table(("goal", "", "measured", "met"), iter(goal_lines(said["goals"])), 2),
        "",
        "Costs are CPU seconds of one thread for the whole OPD stage.  The last columns say how many times as much online OPD costs, with the",
        "sampled token, at equal steps and until both have the accuracy with which the worse of them ends.",
        "",
        *table(("", "accuracy", "minus online OPD", *_PARTS, "online OPD, equal steps", "equal accuracy"), _arms(found)),
        "",
        *_limits(found),
        "",
        f"![Accuracy against CPU seconds]({os.path.relpath(plots / f'{result.stem}.png', beside)})",
    ]


def _task(found: Found, setting: Row) -> list[str]:
    online = found.cell(ONLINE.name)
    sft = found.runs.mean(online, lambda row: row["start"]).show()
    teacher = Interval.of([row["accuracy"] for row in found.rows if row["kind"] == "teacher"]).show()
    sizes = [f"{layers} layers of {hidden}" for hidden, layers in (setting["teacher_size"], setting["student_size"])]
    return [
        f"Products of two numbers of {setting['digits']} digits with their working (`benchmarks/testbed/products.py`): responses have",
        f"{setting['max_new_tokens']} tokens, and a slip in any of them can spoil the result.  {len(online)} seeds.",
        f"The teacher ({sizes[0]}) is right in {teacher} of what it samples, the SFT student ({sizes[1]}) in {sft}.",
        f"{setting['opd_steps']} steps of {setting['batch']} rollouts, so few that decoding is most of online OPD's bill, as it is with",
        "large models.  Sizes, rates and the arm of the goals were chosen on other seeds.",
    ]


def _arms(found: Found) -> Iterator[list[str]]:
    for name in found.names:
        cell = found.cell(name)
        more = found.runs.difference(cell, found.cell(ONLINE.name), accuracy).show("+.3f")
        split = [found.runs.mean(cell, lambda row, part=part: row["cpu_s"][part]).show(".1f") for part in _PARTS]
        times = [found.times(ONLINE.name, name, at).show(".2f") for at in ("equal steps", "equal accuracy")]
        beside = ["", "1", "1"] if name == ONLINE.name else [more, *times]
        yield [name, found.runs.mean(cell, accuracy).show(), beside[0], *split, *beside[1:]]


def _limits(found: Found) -> list[str]:
    """What the limit is, and what moves it."""
    splits = [row for row in found.rows if row["kind"] == "split"]
    names = dict.fromkeys(row["arm"] for row in splits)

    def lines() -> Iterator[list[str]]:
        for name in names:
            cell = {row["seed"]: row for row in splits if row["arm"] == name}
            shares = [
                found.runs.mean(cell, lambda row, part=part: row["cpu_s"][part] / row["cpu_s"]["all"]).show(".2f") for part in _PARTS[:3]
            ]
            yield [
                name,
                *shares,
                found.runs.mean(cell, lambda row: row["cpu_s"]["all"]).show(".2f"),
                found.runs.mean(cell, limit).show(".2f"),
            ]

    ends = [f"{found.runs.mean(found.cell(arm.name), limit).show('.2f')} ({arm.name})" for arm in LIVE if found.cell(arm.name)]
    return [
        "A store saves sampling and scoring, never training.  So at equal steps it saves at most what online OPD costs over its training alone:",
        f"that limit is {', '.join(ends)}.  What moves it, each changed alone: shares of a step of {BEST_LIVE.name},",
        "its CPU seconds, and the limit.",
        "",
        *table(("", "sampling", "scoring", "training", "CPU s a step", "limit"), lines()),
    ]


def _draw(path: Path, found: Found) -> None:
    """Accuracy over seconds: mean, and its interval over seeds."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for name in [name for name in (ONLINE.name, BEST_LIVE.name, TRL, BEST.name) if found.cell(name)]:
        curves = np.array([row["curve"] for row in found.cell(name).values()])
        at, points = curves[:, :, 2].mean(0), [Interval.of(values) for values in curves[:, :, 1].T]
        mean, half = (np.array([getattr(point, key) for point in points]) for key in ("mean", "half"))
        (line,) = axes.plot(at, mean, marker=".", label=name)
        axes.fill_between(at, mean - half, mean + half, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="CPU seconds of the OPD stage", ylabel="accuracy, sampled")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
