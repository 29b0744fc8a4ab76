"""What `evidence.py` found: means over seeds with their intervals, the stored run that goals are set for, and the goals."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from attrs import frozen
from claims_summary import Interval, as_goal
from evidence_arms import LIVE, ONLINE, RATIO, SFT, STORED, TRL
from evidence_bed import NEAR, Row, both_kl, mean_kl

#: Of the cost of a live run.
SHARE = 0.25
#: Nats a token: so much more KL than a live run is as good.  Set before a seed of the report was run, on the seed of choice: a third of what
#: plain online OPD gained there.  That an interval holds 0 is not enough, as that of two seeds nearly always does.
MARGIN = 0.01
#: What is compared, by its name in a point of a curve.
MEASURES = {"reverse_kl": "held-out reverse KL", "forward_kl": "forward KL on held-out text"}
#: The paper's regime: a student whose most likely tokens are those of its teacher, and little KL between them.
OVERLAP, START = 0.8, 0.5


@frozen(eq=False)
class Found:
    """Rows of the result file."""

    rows: Sequence[Row]

    def of(self, kind: str, student: str = NEAR.name) -> list[Row]:
        """Return the rows of a kind, on a student."""
        return [row for row in self.rows if row["kind"] == kind and row.get("student", student) == student]

    @property
    def plan(self) -> Row:
        """What was run."""
        return next(row for row in self.rows if row["kind"] == "plan")

    @property
    def best(self) -> str:
        """The stored arm that is run in several forms."""
        return str(self.plan["best"])

    @property
    def rival(self) -> str:
        """The live run that was chosen among lopd's."""
        return str(self.plan["rival"])

    def cell(self, arm: str, student: str = NEAR.name, kind: str = "run") -> dict[int, Row]:
        """Return the runs of an arm by seed."""
        return {row["seed"]: row for row in self.of(kind, student) if row["arm"] == arm and row["rate"] == self.rate(arm, student)}

    def rate(self, arm: str, student: str = NEAR.name) -> float:
        """Return the rate of an arm on the seeds of the report."""
        return float(next(row["rate"] for row in self.of("run", student) if row["arm"] == arm))

    def names(self, student: str = NEAR.name) -> list[str]:
        """Return the arms that were run, in the order of the tables."""
        names = list(dict.fromkeys(row["arm"] for row in self.of("run", student)))
        return sorted(names, key=lambda name: ("(" in name, name not in {arm.name for arm in STORED}))

    def pictured(self) -> list[str]:
        """Return the arms that are in the picture of cost, and in its table."""
        shown = {SFT.name, RATIO.name, self.best, *(arm.name for arm in LIVE)}
        return [name for name in self.names() if name.split(" (")[0] in shown]

    def mean(self, cell: dict[int, Row], value: Callable[[Row], float]) -> Interval:
        """Return the mean over seeds."""
        return Interval.of([value(row) for row in cell.values()])

    def paired(self, one: dict[int, Row], other: dict[int, Row], value: Callable[[Row, Row], float]) -> Interval:
        """Return the mean over seeds of the differences within a seed."""
        return Interval.of([value(one[seed], other[seed]) for seed in sorted(set(one) & set(other))])

    def starts(self, student: str = NEAR.name) -> dict[int, Row]:
        """Return the measured SFT students by seed."""
        return {row["seed"]: row for row in self.of("sft", student) if row["seed"] != self.plan["choice"]}

    def stores(self, student: str = NEAR.name) -> dict[int, Row]:
        """Return the stores by seed, with their diagnostics."""
        return {row["seed"]: row for row in self.of("store", student) if row["seed"] != self.plan["choice"]}

    def rivals(self) -> dict[str, str]:
        """Return the live runs that the goals compare with, by their titles: the usual ones, and the one that was chosen among lopd's."""
        usual = {name: name for name in (ONLINE.name, TRL.name) if self.cell(name)}
        return usual if self.rival in usual else {**usual, f"{self.rival} (lopd's best live run)": self.rival}

    def chosen_on(self) -> dict[str, list[Row]]:
        """Return the runs that choices were made on, by arm: those of the seed of choice; without one those of the report."""
        kind = "trial" if self.of("trial") else "run"
        return {name: list(self.cell(name, kind=kind).values()) for name in self.names()}

    def beside_trl(self) -> str:
        """Return what TRL has beside lopd's best live run, by the sum of both KLs, as it is not in that choice; nothing where it was not run."""
        cells, rival = self.chosen_on(), self.rival
        if not cells.get(TRL.name):
            return ""
        theirs, ours = (mean(cells[name], both_kl) for name in (TRL.name, rival))
        more = self.paired(self.cell(TRL.name), self.cell(rival), lambda one, other: both_kl(one) - both_kl(other)).show("+.3f")
        where = "in the report" if self.plan["choice"] is None else f"on seed {self.plan['choice']}"
        return (
            f"TRL is not in the choice of lopd's best live run by the sum of both KLs: its sum was {'lower' if theirs < ours else 'not lower'} "
            f"{where} ({theirs:.3f} beside {ours:.3f}), and on the seeds of the report it is {more} beside that run."
        )

    def form(self) -> str:
        """Return the stored run with the least KL among those that cost at most their share of online OPD and of TRL.

        If every one costs more, it is the cheapest.  All is judged on the seed of choice.

        Without a seed of choice, on the seeds of the report: then it is told too good.
        """
        cells = self.chosen_on()
        live = [mean(cells[name], cost) for name in (ONLINE.name, TRL.name) if cells.get(name)]
        costs = {name: mean(cells[name], cost) for name in self.names() if name.split(" (")[0] in {RATIO.name, self.best}}
        cheap = [name for name, spent in costs.items() if spent <= SHARE * min(live)]
        if not cheap:
            return min(costs, key=costs.__getitem__)
        return min(cheap, key=lambda name: mean(cells[name], both_kl))


def mean(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
    """Return the mean over rows."""
    return float(np.mean([value(row) for row in rows]))


def at(row: Row, step: int | None = None) -> Row:
    """Return a point of a run: after this step, or its end."""
    point: Row = row["curve"][-1] if step is None else next(point for point in row["curve"] if point["step"] == step)
    return point


def kl(row: Row, step: int | None = None) -> float:
    """Return the held-out reverse KL, nats a token."""
    return mean_kl(at(row, step))


def final(row: Row, kind: str) -> float:
    """Return a KL at the end, nats a token."""
    return mean_kl(at(row), kind)


def moved(row: Row) -> float:
    """Return how much reverse KL a run added at the tokens of its own answers, nats a token: beside that of the student after SFT there."""
    return final(row, "reverse_kl") - mean_kl({"at": at(row)["untrained_kl"]}, "at")


def length(row: Row) -> float:
    """Return the tokens of a held-out answer, at the end."""
    return float(np.mean(row["curve"][-1]["reverse_kl"]["counts"]))


def cost(row: Row, step: int | None = None, part: str = "all") -> float:
    """Return the CPU seconds of the whole stage until then."""
    return float(at(row, step)["cpu_s"][part])


def find_goals(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Judge every goal; one seed has no interval, so it meets no goal that needs one."""
    found = Found(rows)
    overlap = Interval.of([row["start"]["overlap"]["16"] for row in found.stores().values()])
    start = Interval.of([mean_kl(row) for row in found.starts().values()])
    goals = [
        as_goal("overlap@16 of the near student before training", f">= {OVERLAP}", overlap, overlap.at_least(OVERLAP)),
        as_goal("reverse KL of the near student before training (nats per token)", f"<= {START}", start, start.at_most(START)),
    ]
    form, rivals = found.form(), found.rivals()
    for name, rival in rivals.items():
        share = found.paired(found.cell(form), found.cell(rival), lambda ours, theirs: cost(ours) / cost(theirs))
        goals += _no_worse(found, form, form, name, rival)
        goals.append(as_goal(f"{form}, as a share of {name}: cost", f"<= {SHARE}", share, share.at_most(SHARE)))
    if form != found.best:
        for name, rival in rivals.items():
            goals += _no_worse(found, f"{found.best}, all of its steps", found.best, name, rival)
    return goals


def _no_worse(found: Found, called: str, form: str, name: str, rival: str) -> list[dict[str, Any]]:
    """Judge whether a stored run is no worse than a live one, by either KL."""
    goals = []
    for kind, words in MEASURES.items():
        more = found.paired(found.cell(form), found.cell(rival), lambda ours, theirs, k=kind: final(ours, k) - final(theirs, k))
        goals.append(as_goal(f"{called}, minus {name}: {words}", f"<= {MARGIN}", more, more.at_most(MARGIN)))
    return goals
