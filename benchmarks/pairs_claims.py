"""The starts of the claims (`benchmarks/results/claims.json`) as pairs of teacher and student: nothing is run again.

They have no overlap and no held-out KL, but five seeds and outcomes in accuracy.  Each seed is a pair: students of one setting differ much.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import mean
from typing import Any

from claims_summary import MARGIN
from pairs_rule import CONSTANT, Rule, errors, fit, left_out
from testbed.arms import ONLINE, PLAIN, RATIO

from lopd.guards.start import MAX_WEAK_TAIL
from lopd.guards.watch import MAX_TAIL

Row = dict[str, Any]

#: What a rule may look at here.
CHOICES = ("tail", "reverse_kl")
#: Accuracy that is almost no gain.
LITTLE = MARGIN


def starts_of(rows: Sequence[Row]) -> list[Row]:
    """Return what was known of each start with a consistent teacher, and what each main arm gained."""
    runs = {(row["setting"], row["seed"], row["arm"]): row for row in rows if row["kind"] == "run" and _consistent(row)}
    found = []
    for (setting, seed, arm), row in runs.items():
        if arm == PLAIN.name:
            gains = {name: runs[setting, seed, name]["accuracy"] - row["start"] for name in (PLAIN.name, RATIO.name, ONLINE.name)}
            known = {"tail": row["tail"], "reverse_kl": -row["advantage_mean"], "accuracy": row["start"]}
            found.append({"pair": f"{setting}, seed {seed}", "setting": setting, **known, "gains": gains})
    return found


def _consistent(row: Row) -> bool:
    return bool(row["sft_teacher"] == row["opd_teacher"] == "A")


#: Verdict -> whether it would have been right for a start.
_LITTLE_GAIN = f"nothing gains more than {LITTLE:g}"
WANTED = {
    _LITTLE_GAIN: lambda start: max(start["gains"].values()) <= LITTLE,
    f"{PLAIN.name} falls below its start": lambda start: start["gains"][PLAIN.name] < 0,
}


#: Borders between the rows of the table, shares of advantages below -5 nats.
BORDERS = (0.0, MAX_TAIL, MAX_WEAK_TAIL, 1.0)


def table_titles() -> Sequence[str]:
    """Return the titles of the table of starts."""
    names = (
        f"{PLAIN.name} lost more than {LITTLE / 2:g}",
        f"{RATIO.name} lost more than {LITTLE / 2:g}",
        f"nothing gained more than {LITTLE:g}",
    )
    return "advantages below -5 nats", "starts", *names, f"{RATIO.name} minus {ONLINE.name}"


def table_lines(rows: Sequence[Row]) -> Iterator[Sequence[str]]:
    """Yield a line for each range of the tail.

    It has the number of starts, how many fell or stayed, and the mean and the range of what a live teacher adds to the ratio.
    """
    for low, high in pairwise(BORDERS):
        mine = [start["gains"] for start in starts_of(rows) if low <= start["tail"] < high]
        fell = (sum(gains[arm.name] < -LITTLE / 2 for gains in mine) for arm in (PLAIN, RATIO))
        gaps = [gains[RATIO.name] - gains[ONLINE.name] for gains in mine]
        shown = f"{mean(gaps):+.3f} ({min(gaps):+.3f} to {max(gaps):+.3f})"
        stayed = sum(max(gains.values()) <= LITTLE for gains in mine)
        yield f"{low:.0%} to {high:.0%}", str(len(mine)), *map(str, fell), str(stayed), shown


def words(goals: Sequence[Row]) -> list[str]:
    """Return what the threshold of `lopd.guards.advise` was fitted to, and how often it is wrong where it was not, out of `pairs.json`."""
    goal = next(goal for goal in goals if _LITTLE_GAIN in goal["name"])
    constant = goal["goal"].split(",")[0].removeprefix("< ")
    return [
        "Its threshold was fitted to 40 starts of the testbed (8 settings, 5 seeds each), to tell those from which nothing gains more than",
        f"{LITTLE:g} in accuracy.  On the {goal['of']} starts of the claims, which have the same settings and other seeds",
        f"(`benchmarks/results/claims.json`), it is wrong on {goal['rounded']}.  A threshold that is fitted to these, without the setting that it is",
        f"judged on, is wrong on {goal['measured']} (the better constant answer: {constant}; `benchmarks/results/pairs.json`, its goals).",
    ]


def find_goals(rows: Sequence[Row]) -> list[Row]:
    """Judge how often one threshold is wrong, for each of these."""
    starts, goals = starts_of(rows), []
    for said, is_so in WANTED.items():
        wanted = [is_so(start) for start in starts]
        constant = min(errors(rule, starts, wanted) for rule in CONSTANT)
        alone, together = (left_out(starts, wanted, CHOICES, by) for by in ("pair", "setting"))
        name = f"starts of the claims, {said!r} by one threshold: wrong when their setting is left out of the fit"
        measured = {"name": name, "goal": f"< {constant}, the better constant rule", "measured": together, "met": together < constant}
        rule = fit(starts, wanted, CHOICES)
        goals.append(
            {
                **measured,
                "left_out_alone": alone,
                "by_reverse_kl": left_out(starts, wanted, ("reverse_kl",), "setting"),
                "of": len(starts),
                "right": sum(wanted),
                "rule": rule.shown(),
                "threshold": rule.threshold,
                "fitted": errors(rule, starts, wanted),
                "rounded": errors(Rule("tail", MAX_WEAK_TAIL), starts, wanted),
            }
        )
    return goals
