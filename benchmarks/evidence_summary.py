"""What `evidence.py` found: means over seeds with their intervals, the form of the stored run that goals are set for, and the goals."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from attrs import frozen
from claims_summary import Interval, as_goal
from evidence_arms import LIVE, ONLINE, RATIO, SFT, STORED, TRL
from evidence_bed import NEAR, Row, mean_kl

from lopd.records import Estimate, RolloutSums

#: Of the cost of a live run.
SHARE = 0.25
#: The paper's regime: a student whose most likely tokens are those of its teacher, and little KL between them.
OVERLAP, START = 0.8, 0.5


@frozen
class Form:
    """A run, ended after some of its steps.

    Args:
        arm: its name.
        step: its last.
    """

    arm: str
    step: int


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

    def over_prompts(self, one: dict[int, Row], other: dict[int, Row]) -> Estimate:
        """Return how much more reverse KL one ends with, over the held-out prompts of all seeds; the interval leaves out the variance of training."""
        seeds = sorted(set(one) & set(other))
        ours, theirs = ([cell[seed]["curve"][-1]["reverse_kl"] for seed in seeds] for cell in (one, other))
        return _joined(ours).minus(_joined(theirs))

    def starts(self, student: str = NEAR.name) -> dict[int, Row]:
        """Return the measured SFT students by seed."""
        return {row["seed"]: row for row in self.of("sft", student) if row["seed"] != self.plan["choice"]}

    def stores(self, student: str = NEAR.name) -> dict[int, Row]:
        """Return the stores by seed, with their diagnostics."""
        return {row["seed"]: row for row in self.of("store", student) if row["seed"] != self.plan["choice"]}

    def rivals(self) -> dict[str, Form]:
        """Return what the goals compare with, by its title: usual live runs at their ends, and the live form that was chosen."""
        ends = {name: Form(name, cell[min(cell)]["steps"]) for name in (ONLINE.name, TRL.name) if (cell := self.cell(name))}
        chosen = Form(self.plan["rival"], self.plan["until"])
        return {**ends, **({} if chosen in ends.values() else {f"{shown(chosen)} (the best live run)": chosen})}

    def form(self) -> Form:
        """Return the form with the least reverse KL among those that cost at most their share of online OPD and of TRL.

        If every form costs more, it is the cheapest.  All is judged on the seed of choice.

        Without a seed of choice, on the seeds of the report: then it is told too good.
        """
        kind = "trial" if self.of("trial") else "run"
        cells = {name: list(self.cell(name, kind=kind).values()) for name in self.names()}
        live = [mean(cells[name], cost) for name in (ONLINE.name, TRL.name) if cells.get(name)]
        names = [name for name in self.names() if name.split(" (")[0] in {RATIO.name, self.best}]
        forms = [Form(name, point["step"]) for name in names for point in cells[name][0]["curve"]]
        costs = {form: mean(cells[form.arm], lambda row, at=form.step: cost(row, at)) for form in forms}
        cheap = [form for form in forms if costs[form] <= SHARE * min(live)]
        if not cheap:
            return min(costs, key=costs.__getitem__)
        return min(cheap, key=lambda form: mean(cells[form.arm], lambda row: kl(row, form.step)))


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


def forward(row: Row) -> float:
    """Return the forward KL on the teacher's held-out text, nats a token, at the end."""
    sums = row["curve"][-1]["forward_kl"]
    return float(sum(sums["sums"]) / sum(sums["counts"]))


def length(row: Row) -> float:
    """Return the tokens of a held-out answer, at the end."""
    return float(np.mean(row["curve"][-1]["reverse_kl"]["counts"]))


def cost(row: Row, step: int | None = None, part: str = "all") -> float:
    """Return the CPU seconds of the whole stage until then."""
    return float(at(row, step)["cpu_s"][part])


def _joined(parts: Sequence[Row]) -> RolloutSums:
    return RolloutSums(*(np.concatenate([part[key] for part in parts]) for key in ("sums", "counts")))


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
        share = found.paired(
            found.cell(form.arm), found.cell(rival.arm), lambda ours, theirs, r=rival: cost(ours, form.step) / cost(theirs, r.step)
        )
        goals.append(_no_worse(found, shown(form), form, name, rival))
        goals.append(as_goal(f"{shown(form)}, as a share of {name}: cost", f"<= {SHARE}", share, share.at_most(SHARE)))
    end = Form(found.best, next(iter(found.cell(found.best).values()))["steps"])
    if form != end:
        goals += [_no_worse(found, f"{found.best}, all of its steps", end, name, rival) for name, rival in rivals.items()]
    return goals


def _no_worse(found: Found, called: str, form: Form, name: str, rival: Form) -> dict[str, Any]:
    """Judge whether a form is no worse; `at_most` is the largest loss in the interval, for few seeds can meet this goal by being uncertain."""
    more = found.paired(found.cell(form.arm), found.cell(rival.arm), lambda ours, theirs: kl(ours, form.step) - kl(theirs, rival.step))
    goal = as_goal(f"{called}, minus {name}: held-out reverse KL", "0 or less, within the interval", more, more.mean - more.half <= 0)
    return {**goal, "at_most": None if goal["ci95"] is None else more.mean + more.half}


def shown(form: Form) -> str:
    """Name a form in words."""
    return f"{form.arm}, {form.step} steps"
