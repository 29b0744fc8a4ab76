"""Goals and plot of `pairs.py`, and its tables for the docs; nothing is measured here."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pictures
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

#: Diagnostic, outcome, and what the outcome says.
DRAWN_PANELS = (
    ("overlap8", BESIDE_LIVE, "stored run minus live run, both with 16 draws"),
    ("reverse_kl", BESIDE_SFT, "stored run minus SFT continued"),
)
#: Kind of pair -> name, colour and mark.
KINDS = {"sums": ("pairs on sums", pictures.RATIO, "o"), "real": ("SmolLM2 and a part of it", pictures.TRL, "D")}


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
        rule, wrong = fit(pairs, wanted), left_out(pairs, wanted)
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
    return advise(pair["tail"])[0]


def draw(rows: Sequence[Row], path: Path) -> None:
    """What a live teacher adds to a stored run, and a stored run to more SFT, against what is known before the first step."""
    found, pairs = correlations(pairs_of(rows)), pairs_of(rows)
    known = {(diagnostic, outcome): rho for diagnostic, outcome, rho in found}
    figure, panels = pictures.panels(1, 2, 4.0)
    for axes, (diagnostic, outcome, says) in zip(panels, DRAWN_PANELS, strict=True):
        for kind, (label, color, mark) in KINDS.items():
            mine = [pair for pair in pairs if pair["kind"] == kind]
            at = [pair[diagnostic] for pair in mine]
            axes.plot(at, [OUTCOMES[outcome](pair) for pair in mine], mark, color=color, label=label, markersize=6)
        pictures.rule(axes, y=0)
        rho = known[diagnostic, outcome]
        axes.set(
            xlabel=f"{TITLES[diagnostic]}, before the first step",
            ylabel="share of the first KL",
            xscale="log" if diagnostic == "reverse_kl" else "linear",
        )
        axes.set_title(f"{says}\nrank correlation {rho.rho:+.2f} ({rho.low:+.2f} to {rho.high:+.2f})")
    pictures.legend(figure, 2)
    pictures.save(figure, path)


def words(rows: Sequence[Row]) -> list[str]:
    """What was found, in sentences."""
    pairs, goals = pairs_of(rows), find_goals(rows)
    kinds = {kind: [pair for pair in pairs if pair["kind"] == kind] for kind in KINDS}
    counts = " and ".join(f"{len(mine)} {KINDS[kind][0]} ({_seeds(mine)})" for kind, mine in kinds.items() if mine)
    best = {verdict: sum(best_of(pair) == verdict for pair in pairs) for verdict in ("offline", *VERDICTS)}
    lines = [
        f"{len(pairs)} pairs were measured: {counts}.",
        "What would have been best: " + ", ".join(f"{v} {n}" for v, n in best.items()) + ".",
        "",
    ]
    for goal in goals:
        if "low" in goal:
            said = "confirmed" if goal["met"] else "not confirmed"
            lines.append(f"- {goal['name']}: {goal['measured']:+.2f} ({goal['low']:+.2f} to {goal['high']:+.2f}), {said} here.")
        elif "right" in goal:
            lines.append(
                f"- {goal['name']}: {goal['measured']} of {len(pairs)}, where {goal['right']} are so and the goal is {goal['goal']}."
            )
    return lines


def _seeds(pairs: Sequence[Row]) -> str:
    counts = sorted({pair["seeds"] for pair in pairs})
    return " to ".join(map(str, {counts[0], counts[-1]})) + (" seed" if counts == [1] else " seeds")
