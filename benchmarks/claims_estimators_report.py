"""The part of RESULTS.md on estimators: goals, table, words and a plot, out of what `claims_estimators.py` measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from claims_readings import estimators_readings
from claims_summary import (
    ENDS,
    MARGIN,
    NO_WORSE,
    Interval,
    Row,
    Runs,
    accuracy,
    as_goal,
    change,
    ended,
    no_fall,
    ratios,
    reverse_kl,
    spent,
    steps_to,
)
from docs_tables import table
from pictures import band, intervals, label_ends, panels, rule, save
from results_page import Part
from testbed.arms import ONLINE, TOP_K
from testbed.estimator_arms import BEST, CURVES, FALLEN, FAST, FASTER, LIVE, STORED, faster
from testbed.trl_peer import ARM as TRL

TITLE = "What a store can do beside a live teacher"
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

    def at_its_rate(self, name: str, other: str) -> str:
        """Return the run of another arm that a run is compared with: the one at the rate of the latter, where that was run."""
        return faster(other) if name.endswith(faster("")) and faster(other) in self.names else other

    def beside(self, name: str, other: str, value: Callable[[Row], float] = accuracy) -> Interval:
        """Return how much more accurate one ends than another, or how much more it has of another value."""
        return self.runs.difference(self.runs.where(self.claim, name), self.runs.where(self.claim, other), value)

    def share(self, name: str, other: str) -> dict[str, Interval]:
        """Return its cost as a share of another's: at equal steps, and until both have the accuracy with which the worse ends."""
        return ratios(self.runs, self.claim, name, other)


def find_goals(rows: Sequence[Row], claim: str, fall: str) -> list[dict[str, Any]]:
    """Judge every goal, at the rate of the claims and at the higher one; goals of what was not run are left out."""
    found = Found(Runs.of(rows), claim, fall)
    goals = []
    for best, peer, *online in ((BEST.name, TRL, *(arm.name for arm in LIVE)), (faster(BEST.name), faster(TRL), faster(ONLINE.name))):
        for other, limit, at in ((peer, OF_TRL, "equal steps"), *((name, OF_ONLINE, "equal accuracy") for name in online)):
            if {best, other} <= set(found.names):
                more, cost = found.beside(best, other), found.share(best, other)[at]
                goals.append(as_goal(f"{best}, minus {other}: accuracy", NO_WORSE, more, more.at_least(-MARGIN)))
                goals.append(as_goal(f"{best}, as a share of {other}: cost at {at}", f"<= {limit}", cost, cost.at_most(limit)))
    return goals + [no_fall(arm.name, found.runs, cell, f" on {fall}") for arm in FALLEN if (cell := found.runs.where(fall, arm.name))]


def estimators_part(result: Mapping[str, Any], folder: str, *, claim: str, fall: str, claims: Sequence[Row] = ()) -> Part:
    """Make the part of the page that reports `claims_estimators.json`, with its pictures in a folder; `claims` are the rows of `claims.json`."""
    found, known = Found(Runs.of(result["rows"]), claim, fall), Runs.of(claims)
    pictures = {"claims_estimators": partial(_draw_curves, found=found), "claims_estimators_ends": partial(_draw_ends, found=found)}
    curves, ends = (f"{folder}/{name}.png" for name in pictures)
    lines = [
        f"{len({row['seed'] for row in found.runs.rows})} seeds, {_of_the_claims(found, known)}; prompts, batch and steps are the",
        "same.  The arm of the goals was chosen on other seeds.",
        f"A stored arm goes {_passes(result, claim):.1f} times over its rollouts, and {_passes(result, claim) / BEST.prompts:.1f} times where it has",
        "half of the prompts; a live one samples new ones for each step.",
        "",
        "Candidates are the tokens that the policy finds most likely, kept while it samples; drawn ones are drawn from it besides; top-K ones are",
        "the teacher's.  All are scored by the teacher, once.  A residual is the term that removes the bias of a support;",
        "a window is the ratio of the 8 tokens before, which moves stored states towards the student's.",
        "The KL is the reverse one over the whole vocabulary, in nats a token, on fresh responses to the held-out prompts.",
        "Costs are CPU seconds of one thread for the whole OPD stage, sampling and scoring with what they keep included.  A share is the arm's cost",
        "over that of another (geometric means): at equal steps, then until both have the accuracy with which the worse of them ends.",
        f"Arms at {FASTER:g} times the rate are compared with live runs at that rate.",
        *_clock(found, known),
        "",
        *table(
            ("", *ENDS, "minus online OPD", "minus TRL", "KL minus TRL's", f"gain on {fall}"),
            (
                [
                    name,
                    *ended(found.runs.where(claim, name)),
                    *(_unless(name, peer, found.beside(name, peer).show("+.3f")) for peer in _peers(found, name)),
                    *(_unless(name, peer, found.beside(name, peer, reverse_kl).show("+.3f")) for peer in _peers(found, name)[1:]),
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
        f"![Gain over steps and over CPU time, at both rates]({curves})",
        "",
        f"![Difference of every arm to TRL at its rate at the end]({ends})",
    ]
    return Part(TITLE, result, estimators_readings(BEST.name, fall, faster("")), _meaning(found), [lines], pictures, "claims_estimators.py")


def _passes(result: Mapping[str, Any], claim: str) -> float:
    """Return how often a run of this setting goes over a rollout of each prompt."""
    setting = next(row for row in result["rows"] if row["kind"] == "setting" and row["name"] == claim)
    return float(setting["opd_steps"] * setting["batch"] / setting["opd_prompts"])


def _of_the_claims(found: Found, claims: Runs) -> str:
    """Name the seeds; they are those of the claims where every run begins as accurate as there, for models may have been built again."""
    starts = {(row["setting"], row["seed"], row["sft_teacher"]): row["start"] for row in claims.rows}
    same = all(starts.get((row["setting"], row["seed"], row["sft_teacher"])) == row["start"] for row in found.runs.rows)
    again = "the numbers of the claims', with models built again: they differ from those above"
    return "those of the claims, with the same models" if same else again


def _clock(found: Found, claims: Runs) -> list[str]:
    """Say how much dearer or cheaper the same run was in the claims: seconds of two files are not to be compared."""
    there, here = (runs.where(found.claim, ONLINE.name) for runs in (claims, found.runs))
    if not there:
        return []
    seconds = [Interval.of([spent(row) for row in cell.values()]).show(".2f") for cell in (there, here)]
    return [
        f"The same run of online OPD took {seconds[0]} of them in the claims and {seconds[1]} here, at another commit and another load of the",
        "machine: the clock does not count while a thread waits, but neighbours slow it while it runs.  So seconds are compared within a file.",
    ]


def _meaning(found: Found) -> str:
    """Return the third sentence."""
    more, cost = found.beside(BEST.name, ONLINE.name), found.share(BEST.name, ONLINE.name)["equal steps"]
    return (
        f"where a store may hold more of a token than one number, keep a support: *{BEST.name}* ended {more.show('+.3f')} beside "
        f"online OPD with the sampled token, at {cost.show('.2f')} of its cost; supports hardly differ there "
        "([which one](../docs/decisions/0008-recommended-loss.md))."
    )


def _peers(found: Found, name: str) -> list[str]:
    return [found.at_its_rate(name, other) for other in (ONLINE.name, TRL)]


def _unless(name: str, other: str, shown: str) -> str:
    return "" if name == other else shown


def _costs(found: Found) -> Iterator[list[str]]:
    for name in found.names:
        cell = found.runs.where(found.claim, name)
        split = [
            found.runs.mean(cell, lambda row, part=part: row["cpu_s"][part]).show(".2f")
            for part in ("sampling", "scoring", "training", "all")
        ]
        shares = [(peer, found.share(name, peer)) for peer in _peers(found, name)]
        yield [
            name,
            *split,
            *(_unless(name, other, share[at].show(".2f")) for other, share in shares for at in ("equal steps", "equal accuracy")),
        ]


def _reasons(found: Found) -> list[str]:
    """Return sentences on what the costs of the goals are made of."""
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


def _draw_curves(path: Path, found: Found) -> None:
    """Draw the gain over steps and over seconds of some arms, at both rates."""
    names = [name for name in CURVES if name in found.names]
    figure, axes = panels(2, 2, height=7.5, sharey=True)
    for row, title, at_rate in ((axes[:2], "rate of the claims", False), (axes[2:], f"rate x {FASTER:g}", True)):
        for name in (name for name in names if name.endswith(faster("")) == at_rate):
            curves = np.array([run["curve"] for run in found.runs.where(found.claim, name).values()])
            for panel, at in zip(row, (0, 2), strict=True):
                band(
                    panel,
                    curves[:, :, at].mean(0),
                    curves[:, :, 1] - curves[:, :1, 1],
                    name.removesuffix(faster("")),
                    line="--" if name == TOP_K.name else "-",
                )
        for panel, label in zip(row, ("optimizer step", "CPU seconds of the OPD stage"), strict=True):
            panel.set(title=f"Gain in accuracy, {title}", xlabel=label)
    for panel in axes:
        label_ends(panel)
    save(figure, path)


def _draw_ends(path: Path, found: Found) -> None:
    """Draw how much more accurate each arm ends than TRL at its rate."""
    others = [name for name in found.names if found.at_its_rate(name, TRL) != name]
    figure, (ends,) = panels(1, 1, height=0.3 * len(others) + 0.8)
    intervals(ends, others, {name: found.beside(name, found.at_its_rate(name, TRL)) for name in others})
    rule(ends, x=0)
    ends.set(title="Accuracy at the end, minus TRL's at the same rate")
    save(figure, path)
