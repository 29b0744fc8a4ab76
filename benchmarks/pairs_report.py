"""Goals and plot of `pairs.py`, and its tables for the docs; nothing is measured here."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pictures
from pairs_rule import (
    BESIDE_LIVE,
    BESIDE_SFT,
    CHOICES,
    CONSTANT,
    LEAST_KL,
    LITTLE_GAIN,
    LIVE,
    MARGIN,
    NATS,
    OUTCOMES,
    STORED,
    VERDICTS,
    Correlation,
    best_of,
    correlations,
    errors,
    fit,
    gains_little,
    judged,
    labels,
    left_out,
    pairs_of,
)
from pairs_runs import ARMS

from lopd.guards import advise
from lopd.records.estimates import Estimate, mean

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

#: What Semi-OPD (arXiv 2610.11291) finds: a live teacher wins where the overlap is high, and neither way where a student is weak.
SEMI_OPD = (("overlap8", BESIDE_LIVE), ("reverse_kl", STORED), ("reverse_kl", LIVE))
#: Diagnostic, outcome, and what the outcome means.
DRAWN_PANELS = (
    ("overlap8", BESIDE_LIVE, "stored run minus live run, both with 16 draws"),
    ("reverse_kl", STORED, "stored run with 16 draws, against its start"),
)
#: Kind of pair -> name, colour and mark.
KINDS = {"sums": ("sums", pictures.RATIO, "o"), "real": ("SmolLM2 and a part of it", pictures.TRL, "D")}

_NATS = (0.2, 0.5, 1, 2, 4)


def find_goals(rows: Sequence[Row]) -> list[Row]:
    """Judge every goal."""
    pairs, goals = judged(rows), []
    for name, outcome in SEMI_OPD:
        for measure, of in (("shares of the KL removed", OUTCOMES), ("nats removed", NATS)):
            rho = Correlation.of([pair[name] for pair in pairs], [of[outcome](pair) for pair in pairs])
            said = f"Semi-OPD: rank correlation of {TITLES[name]} with {outcome}, in {measure}"
            goals.append(_with_interval(said, "interval below 0", rho.rho, rho, met=rho.high < 0))
    for outcome, least in ((BESIDE_LIVE, -MARGIN), (BESIDE_SFT, 0.0)):
        share = mean([OUTCOMES[outcome](pair) for pair in pairs])
        said = f"{outcome}: share of the KL removed, mean over pairs"
        goals.append(_with_interval(said, f"interval above {least:g}", share.mean, share, met=share.low > least))
    asked = {title: is_so for title, is_so in labels().items() if any(map(is_so, pairs))}  # what is never so needs no threshold
    return [*goals, *(_of_rule(pairs, title, is_so) for title, is_so in asked.items()), _of_advice(pairs)]


def _of_rule(pairs: Sequence[Row], title: str, is_so: Callable[[Row], bool]) -> Row:
    """Judge how often a threshold that is fitted to the others is wrong."""
    wanted = [is_so(pair) for pair in pairs]
    said = f"{title}, by one threshold ({fit(pairs, wanted).shown()} for all): pairs that are wrong when they are left out of the fit"
    return _against_constant(said, left_out(pairs, wanted), pairs, wanted)


def _of_advice(pairs: Sequence[Row]) -> Row:
    """Judge how often `advise` is wrong, whose threshold was fitted to other starts."""
    wanted = [gains_little(pair) for pair in pairs]
    wrong = sum((advised(pair) == "more SFT first") != want for pair, want in zip(pairs, wanted, strict=True))
    said = f"`advise`, whose threshold is that of the claims, says 'more SFT first' where {LITTLE_GAIN}: pairs that are wrong"
    return _against_constant(said, wrong, pairs, wanted)


def _against_constant(name: str, wrong: int, pairs: Sequence[Row], wanted: Sequence[bool]) -> Row:
    constant = min(errors(rule, pairs, wanted) for rule in CONSTANT)
    return _goal(name, f"< {constant}, the better constant rule", wrong, met=wrong < constant) | {"right": sum(wanted)}


def _goal(name: str, goal: str, measured: float, *, met: bool) -> Row:
    return {"name": name, "goal": goal, "measured": _number(measured), "met": bool(met)}


def _with_interval(name: str, goal: str, measured: float, ends: Correlation | Estimate, *, met: bool) -> Row:
    return {**_goal(name, goal, measured, met=met), "low": _number(ends.low), "high": _number(ends.high)}


def _number(value: float) -> float | None:
    """Return the number, or None for NaN, which JSON does not have."""
    return value if math.isfinite(value) else None


def correlation_titles() -> Sequence[str]:
    """Return the titles of a table of rank correlations."""
    return "before the first step", *OUTCOMES


def correlation_lines(rows: Sequence[Row]) -> Iterator[Sequence[str]]:
    """Yield a line for each diagnostic, with a cell for each outcome; bold where 0 is outside of the interval."""
    found = {(diagnostic, outcome): rho for diagnostic, outcome, rho in correlations(judged(rows))}
    for name, title in TITLES.items():
        yield title, *(found[name, outcome].shown() for outcome in OUTCOMES)


def pair_titles() -> Sequence[str]:
    """Return the titles of a table of pairs."""
    return "teacher, student", *(TITLES[name] for name in CHOICES), "accuracy", *(arm.name for arm in ARMS), "best", "`advise`"


def pair_lines(rows: Sequence[Row]) -> Iterator[Sequence[str]]:
    """Yield a line for each pair: diagnostics, the share of the KL that each arm removed, the best verdict, and that of `advise`."""
    for pair in sorted(pairs_of(rows), key=lambda pair: (pair["kind"] == "real", pair["reverse_kl"])):
        known = [f"{pair[name]:.3g}" for name in CHOICES]
        shares = [f"{pair['arms'][arm.name]['removed']:+.2f}" if arm.name in pair["arms"] else "" for arm in ARMS]
        yield (
            pair["pair"],
            *known,
            f"{pair['accuracy']:.2f}" if "accuracy" in pair else "",
            *shares,
            best_of(pair) if pair["held_out_kl"] >= LEAST_KL else "not judged",
            advised(pair),
        )


def advised(pair: Row) -> str:
    """Return the verdict of `lopd.guards.advise` on a pair."""
    return advise(pair["tail"])[0]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw what a live teacher adds to a stored run, and a stored run to more SFT, against what is known before the first step."""
    found, pairs = correlations(judged(rows)), judged(rows)
    known = {(diagnostic, outcome): rho for diagnostic, outcome, rho in found}
    figure, panels = pictures.panels(1, 2, 4.0)
    for axes, (diagnostic, outcome, says) in zip(panels, DRAWN_PANELS, strict=True):
        for kind, (label, color, mark) in KINDS.items():
            mine = [pair for pair in pairs if pair["kind"] == kind]
            at = [pair[diagnostic] for pair in mine]
            axes.plot(at, [OUTCOMES[outcome](pair) for pair in mine], mark, color=color, label=label, markersize=6)
        pictures.rule(axes, y=0)
        rho = known[diagnostic, outcome]
        axes.set(xlabel=f"{TITLES[diagnostic]}, before the first step", ylabel="share of the KL removed")
        if diagnostic == "reverse_kl":
            axes.set_xscale("log")
            axes.set_xticks(_NATS, map(str, _NATS))
            axes.minorticks_off()
        axes.set_title(f"{says}\nrank correlation {rho.rho:+.2f} ({rho.low:+.2f} to {rho.high:+.2f})")
    pictures.legend(figure, 2)
    pictures.save(figure, path)


def words(rows: Sequence[Row]) -> list[str]:
    """Return what was found, in sentences."""
    every, pairs, goals = pairs_of(rows), judged(rows), find_goals(rows)
    kinds = {kind: [pair for pair in every if pair["kind"] == kind] for kind in KINDS}
    counts = " and ".join(f"{len(mine)} of {KINDS[kind][0]} ({_seeds(mine)} each)" for kind, mine in kinds.items() if mine)
    best = {verdict: sum(best_of(pair) == verdict for pair in pairs) for verdict in ("offline", *VERDICTS)}
    lines = [
        f"{len(every)} pairs were measured: {counts}.",
        f"{len(every) - len(pairs)} of them began within {LEAST_KL:g} nats a token of the teacher, with nothing to learn, and are not judged.",
        "Judgements pool both kinds of pairs, as one of them has too few for one of its own.",
        "What would have been best: " + ", ".join(f"{verdict} {count}" for verdict, count in best.items()) + ".",
        "",
    ]
    confirmed = {name: all(goal["met"] for goal in goals if goal["name"].startswith(name)) for name in map(_claim, goals)}
    for goal in goals:
        if goal.get("low") is not None:
            judgement = ", confirmed here" if confirmed[_claim(goal)] else f", {'but ' if goal['met'] else ''}not confirmed here"
            said = judgement if "Semi-OPD" in goal["name"] else ""
            lines.append(f"- {goal['name']}: {goal['measured']:+.2f} ({goal['low']:+.2f} to {goal['high']:+.2f}){said}.")
        elif "right" in goal:
            lines.append(f"- {_told(goal, len(pairs))}")
    return lines


def _told(goal: Row, count: int) -> str:
    """Return in a sentence or two how often a rule is wrong."""
    said, _, rule = goal["name"].rpartition(": pairs that are wrong")[0].partition(", by one threshold (")
    constant = f"the better of 'always' and 'never' is wrong on {goal['goal'].removeprefix('< ').split(',')[0]}"
    if not rule:
        return f"{said}: wrong on {goal['measured']} of {count} pairs; {constant}."
    best = " was best" if said in map(repr, VERDICTS) else ""
    fitted = f"fitted without the pair that it judges (to all of them it is: {rule.removesuffix(' for all)')})"
    return f"On {goal['right']} of {count} pairs {said}{best}.  A threshold on one diagnostic, {fitted}, is wrong on {goal['measured']}; {constant}."


def _claim(goal: Row) -> str:
    """Return what a goal judges, without the measure: a claim is confirmed where every measure shows it."""
    return str(goal["name"]).rpartition(", in ")[0]


def _seeds(pairs: Sequence[Row]) -> str:
    counts = sorted({pair["seeds"] for pair in pairs})
    return " to ".join(map(str, {counts[0], counts[-1]})) + (" seed" if counts == [1] else " seeds")
