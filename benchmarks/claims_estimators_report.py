"""The part of RESULTS.md on estimators: goals, table, words and a plot, out of what `claims_estimators.py` measured."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from claims_summary import Interval, Row, Runs, accuracy, as_goal, change, goal_lines, ratios, spent, steps_to
from docs_tables import table
from matplotlib.figure import Figure
from testbed.arms import ONLINE
from testbed.estimator_arms import BEST, CURVES, FALLEN, FAST, LIVE, STORED, faster
from testbed.trl_peer import ARM as TRL

#: Of the cost of TRL, and of online OPD at equal accuracy.
OF_TRL, OF_ONLINE = 0.55, 0.3


@frozen(eq=False)
class Found:
    """What was measured.

    Args:
        runs: all of them.
        claim: the setting in the paper's regime.
        fall: the one in which Lightning fails.
    """

    runs: Runs
    claim: str
    fall: str

    @property
    def names(self) -> list[str]:
        """Arms that were run, the live ones first."""
        known = [*(arm.name for arm in LIVE), TRL, *(arm.name for arm in STORED), *(arm.name for arm in FAST), faster(TRL)]
        return [name for name in known if self.runs.where(self.claim, name)]

    def beside(self, name: str, other: str) -> Interval:
        """How much more accurate one ends than another."""
        return self.runs.difference(self.runs.where(self.claim, name), self.runs.where(self.claim, other), accuracy)

    def share(self, name: str, other: str) -> dict[str, Interval]:
        """Which share of another's cost it has: at equal steps, and until both have the accuracy with which the worse ends."""
        return ratios(self.runs, self.claim, name, other)


def find_goals(rows: Sequence[Row], claim: str, fall: str) -> list[dict[str, Any]]:
    """Every goal, at the rate of the claims and at the higher one; those of what was not run are left out."""
    found = Found(Runs.of(rows), claim, fall)
    goals = []
    for best, peer, online in ((BEST.name, TRL, ONLINE.name), (faster(BEST.name), faster(TRL), faster(ONLINE.name))):
        for other, limit, at in ((peer, OF_TRL, "equal steps"), (online, OF_ONLINE, "equal accuracy")):
            if {best, other} <= set(found.names):
                more, cost = found.beside(best, other), found.share(best, other)[at]
                goals.append(as_goal(f"{best}, minus {other}: accuracy", "0 or more, within the interval", more, not more.negative))
                goals.append(as_goal(f"{best}, as a share of {other}: cost at {at}", f"<= {limit}", cost, cost.mean <= limit))
    for arm in FALLEN:
        if cell := found.runs.where(fall, arm.name):
            moved = found.runs.mean(cell, change)
            goals.append(as_goal(f"{arm.name} does not fall below SFT on {fall}", "interval not below 0", moved, not moved.negative))
    return goals


def write_part(result: Path, plots: Path, beside: Path, claim: str, fall: str) -> list[str]:
    """The lines, and the plot into a folder; links are from another folder."""
    said = json.loads(result.read_text())
    found = Found(Runs.of(said["rows"]), claim, fall)
    plots.mkdir(parents=True, exist_ok=True)
    _draw(plots / f"{result.stem}.png", found)
    machine, versions = (", ".join(f"{name} {value}" for name, value in said[key].items()) for key in ("machine", "versions"))
    seeds = len({row["seed"] for row in found.runs.rows})
    return [
        "## What a store can do beside a live teacher",
        "",
        f"Written by `benchmarks/claims_estimators.py`: commit {said['commit'][:12]}; {machine}; {versions}.",
        f"{seeds} seeds, those of the claims, with the same models, prompts, batch and steps.  The arm of the goals was chosen on other seeds.",
        "",
        *table(("goal", "", "measured", "met"), iter(goal_lines(said["goals"])), 2),
        "",
        "Candidates are the tokens that the policy finds most likely, kept while it samples; drawn ones are drawn from it besides; top-K ones are",
        "the teacher's.  All are scored by the teacher, once.  A residual is the term that removes the bias of a support.",
        "Costs are CPU seconds of one thread for the whole OPD stage, sampling and scoring with what they keep included.  A share is the arm's cost",
        "over that of another: at equal steps, then until both have the accuracy with which the worse of them ends.",
        "",
        *table(
            ("", "accuracy", "minus online OPD", "minus TRL", f"gain on {fall}"),
            (
                [
                    name,
                    found.runs.mean(found.runs.where(claim, name), accuracy).show(),
                    *(_unless(name, other, found.beside(name, other).show("+.3f")) for other in (ONLINE.name, TRL)),
                    found.runs.mean(cell, change).show("+.3f") if (cell := found.runs.where(fall, name)) else "",
                ]
                for name in found.names
            ),
        ),
        "",
        *table(
            ("", "sampling", "scoring", "training", "all", "share of online OPD", "at equal accuracy", "share of TRL", "at equal accuracy"),
            _costs(found),
        ),
        "",
        *_reasons(found),
        "",
        f"![Gain over steps and over CPU time, and difference to TRL]({os.path.relpath(plots / f'{result.stem}.png', beside)})",
    ]


def _unless(name: str, other: str, shown: str) -> str:
    return "" if name == other else shown


def _costs(found: Found) -> Iterator[list[str]]:
    for name in found.names:
        cell = found.runs.where(found.claim, name)
        split = [
            found.runs.mean(cell, lambda row, part=part: row["cpu_s"][part]).show(".2f")
            for part in ("sampling", "scoring", "training", "all")
        ]
        shares = [(other, found.share(name, other)) for other in (ONLINE.name, TRL)]
        yield [
            name,
            *split,
            *(_unless(name, other, share[at].show(".2f")) for other, share in shares for at in ("equal steps", "equal accuracy")),
        ]


def _reasons(found: Found) -> list[str]:
    """What the costs of the goals are made of."""
    best, online, peer = (found.runs.where(found.claim, name) for name in (BEST.name, ONLINE.name, TRL))
    before = Interval.of([row["curve"][0][2] for row in best.values()])
    steps = Interval.of([steps_to(row, min(accuracy(row), accuracy(online[seed]))) for seed, row in best.items()])
    training = Interval.of([row["cpu_s"]["training"] / spent(peer[seed]) for seed, row in best.items()])
    total = next(iter(best.values()))["steps"]
    return [
        f'What "{BEST.name}" pays before its first step is {before.show(".2f")} CPU s.  After {steps.show(".0f")} steps of {total} it has the',
        "accuracy with which online OPD ends, or its own if that is less.  A store saves nothing of training, and its training alone is",
        f"{training.show('.2f')} of all that TRL costs.",
    ]


def _draw(path: Path, found: Found) -> None:
    """Gain over steps and over seconds of some, and the difference to TRL of all."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    steps, seconds, ends = figure.subplots(1, 3)
    for name in [name for name in CURVES if name in found.names]:
        curves = np.array([row["curve"] for row in found.runs.where(found.claim, name).values()])
        gains = (curves[:, :, 1] - curves[:, :1, 1]).mean(0)
        for axes, at in ((steps, 0), (seconds, 2)):
            axes.plot(curves[:, :, at].mean(0), gains, marker=".", markersize=4, label=name)
    others = [name for name in found.names if name != TRL]
    for place, name in enumerate(others):
        more = found.beside(name, TRL)
        ends.errorbar([more.mean], [-place], xerr=[more.half], fmt="o", color="black", markersize=3)
    ends.axvline(0, color="black", linewidth=0.5)
    ends.set_yticks(-np.arange(len(others)), others, fontsize=7)
    steps.legend(frameon=False, fontsize=7)
    for axes, title, label in (
        (steps, "gain over SFT", "optimizer step"),
        (seconds, "gain over SFT", "CPU seconds of the OPD stage"),
        (ends, "accuracy minus TRL's", ""),
    ):
        axes.set(title=title, xlabel=label)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
