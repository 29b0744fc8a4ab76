"""Goals and plot of `pairs.py`, and its tables for the docs; nothing is measured here."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pairs_rule import (
    BESIDE_LIVE,
    BESIDE_SFT,
    CHOICES,
    CONSTANT,
    OUTCOMES,
    VERDICTS,
    best_of,
    correlations,
    errors,
    fit,
    left_out,
    pairs_of,
)
from pairs_runs import ARMS

from lopd.guards import advise

Row = dict[str, Any]

TITLES = {
    "reverse_kl": "reverse KL",
    "overlap8": "overlap@8",
    "outside": "mass outside the support",
    "tail": "advantages below -5",
    "overlap1": "overlap@1",
    "overlap4": "overlap@4",
    "size50": "\\|A\\|, 50 %",
    "size90": "\\|A\\|, 90 %",
    "size99": "\\|A\\|, 99 %",
    "heaviest": "share of \\|A\\| in 1 % of tokens",
}


def find_goals(rows: Sequence[Row]) -> list[Row]:
    """What was asked, and what was found."""
    pairs = pairs_of(rows)
    found = {(diagnostic, outcome): rho for diagnostic, outcome, rho in correlations(pairs)}
    goals = [_goal("pairs of teacher and student", ">= 16", len(pairs), len(pairs) >= 16)]
    for name, outcome, sign in (("overlap8", BESIDE_LIVE, "below"), ("reverse_kl", BESIDE_SFT, "below")):
        rho = found[name, outcome]
        said = f"rank correlation of {TITLES[name]} with the share of the KL removed by {outcome} (Semi-OPD)"
        goals.append({**_goal(said, f"interval {sign} 0", rho.rho, rho.high < 0), "low": _number(rho.low), "high": _number(rho.high)})
    for verdict in VERDICTS:
        wanted = [best_of(pair) == verdict for pair in pairs]
        rule, wrong = fit(pairs, wanted), sum(left_out(pairs, wanted))
        constant = min(errors(each, pairs, wanted) for each in CONSTANT)
        said = f"{verdict!r} by one threshold: pairs that are wrong when they are left out of the fit (all: {rule.shown()})"
        goals.append(_goal(said, f"< {constant}, the better constant rule", wrong, wrong < constant) | {"right": sum(wanted)})
    return goals


def _goal(name: str, goal: str, measured: float, met: bool) -> Row:
    return {"name": name, "goal": goal, "measured": _number(measured), "met": bool(met)}


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def correlation_titles() -> Sequence[str]:
    """Of a table of rank correlations."""
    return "before the first step", *OUTCOMES


def correlation_lines(rows: Sequence[Row]) -> Iterator[Sequence[str]]:
    """A line for each diagnostic, with a cell for each outcome; bold where 0 is outside of the interval."""
    found = {(diagnostic, outcome): rho for diagnostic, outcome, rho in correlations(pairs_of(rows))}
    for name, title in TITLES.items():
        yield title, *(found[name, outcome].shown() for outcome in OUTCOMES)


def pair_titles() -> Sequence[str]:
    """Of a table of pairs."""
    return "teacher, student", *(TITLES[name] for name in CHOICES), "accuracy", *(arm.name for arm in ARMS), "best", "`advise`"


def pair_lines(rows: Sequence[Row]) -> Iterator[Sequence[str]]:
    """A line for each pair: diagnostics, the share of the KL that each arm removed, the best verdict, and that of `advise`."""
    for pair in sorted(pairs_of(rows), key=lambda pair: (pair["kind"] == "real", pair["reverse_kl"])):
        known = [f"{pair[name]:.3g}" for name in CHOICES]
        shares = [f"{pair['arms'][arm.name]['removed']:+.2f}" if arm.name in pair["arms"] else "" for arm in ARMS]
        yield pair["pair"], *known, f"{pair['accuracy']:.2f}" if "accuracy" in pair else "", *shares, best_of(pair), advised(pair)


def advised(pair: Row) -> str:
    """What `lopd.guards.advise` says of it."""
    return advise(pair["reverse_kl"], pair["tail"], pair.get("overlap64"))[0]


def draw(rows: Sequence[Row], path: Path) -> None:
    """What a live teacher adds, and what OPD adds to SFT, against what is known before."""
    pairs = pairs_of(rows)
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (diagnostic, outcome) in zip(figure.subplots(1, 2), (("overlap8", BESIDE_LIVE), ("reverse_kl", BESIDE_SFT)), strict=True):
        _scatter(axes, pairs, diagnostic, outcome)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, transparent=True)


def _scatter(axes: Axes, pairs: Sequence[Row], diagnostic: str, outcome: str) -> None:
    for kind, color, label in (("sums", "tab:blue", "sums"), ("real", "tab:orange", "SmolLM2")):
        mine = [pair for pair in pairs if pair["kind"] == kind]
        xs, ys = [pair[diagnostic] for pair in mine], [OUTCOMES[outcome](pair) for pair in mine]
        axes.scatter(xs, ys, color=color, label=label)
    axes.axhline(0, color="tab:gray", linewidth=0.8)
    axes.set(xlabel=TITLES[diagnostic], ylabel=f"{outcome},\nshare of the KL removed")
    axes.spines[["top", "right"]].set_visible(False)
