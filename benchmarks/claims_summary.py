"""Means over seeds with their intervals, and every goal of the claims, met or not."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Self

import numpy as np
from attrs import frozen
from testbed.arms import ABLATIONS, ONLINE, PLAIN, RATIO, TOP_K
from testbed.trl_peer import ARM as TRL

from lopd.records.estimates import t_quantile
from lopd.tools.plan.paper import TABLE_2

Row = dict[str, Any]

#: Accuracy that is little: a run that ends at most so much lower is as good, and a smaller gain is almost none.  Set after the runs of the claims,
#: which were judged by whether an interval held 0 before: that is the easier, the wider an interval is.
MARGIN = 0.02
NO_WORSE = f">= {-MARGIN:g}"
#: What the paper has for its 8B student, and how many times as much as Lightning online OPD costs there, at equal steps.
PAPER = TABLE_2["Qwen3-8B from Qwen3-32B"]
TIMES = PAPER.online / PAPER.total


@frozen
class Interval:
    """A mean over seeds, and half the width of its 95 % interval (Student's t)."""

    mean: float
    half: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Return the mean of these values, one a seed, with its interval."""
        n = len(values)
        with np.errstate(invalid="ignore"):  # a value may be infinite: then so is the mean, and there is no width
            half = t_quantile(0.975, n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
        return cls(float(np.mean(values)), half, n)

    @property
    def low(self) -> float:
        """Its lower end; NaN where one seed has no interval."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Its upper end."""
        return self.mean + self.half

    @property
    def positive(self) -> bool:
        """All of it is above 0."""
        return self.low > 0

    @property
    def negative(self) -> bool:
        """All of it is below 0."""
        return self.high < 0

    def at_least(self, wanted: float) -> bool:
        """Return whether all of it is at or above this; never where one seed has no interval."""
        return self.low >= wanted

    def at_most(self, wanted: float) -> bool:
        """Return whether all of it is at or below this."""
        return self.high <= wanted

    def show(self, form: str = ".3f") -> str:
        """Return the text that tables show.

        "never" stands for an infinite cost, that of an accuracy which is never reached; "below SFT" for that of one which is not above the start.
        """
        if not math.isfinite(self.mean):
            return "below SFT" if math.isnan(self.mean) else "never"
        return f"{self.mean:{form}}{'' if math.isnan(self.half) else self._show_half(form.lstrip('+'))}"

    def _show_half(self, form: str) -> str:
        return f" ± {self.half:{form}}"


@frozen
class Ratio(Interval):
    """A geometric mean over seeds, and half the width of the interval of its logarithm: of how many times as much, not of how much more."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Return the geometric mean of these positive values, one a seed, with its interval."""
        logs = Interval.of(np.log(values))
        return cls(math.exp(logs.mean), logs.half, logs.seeds)

    @property
    def low(self) -> float:
        """Its lower end; NaN where one seed has no interval."""
        return self.mean * math.exp(-self.half)

    @property
    def high(self) -> float:
        """Its upper end."""
        return self.mean * math.exp(self.half)

    def _show_half(self, form: str) -> str:
        return f" [{self.low:{form}} to {self.high:{form}}]"


@frozen(eq=False)
class Runs:
    """The rows of the runs."""

    rows: Sequence[Row]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Runs":
        """Return the runs among these rows."""
        return cls([row for row in rows if row["kind"] == "run"])

    def where(self, setting: str, arm: str, teachers: tuple[str, str] = ("A", "A")) -> dict[int, Row]:
        """Return the runs of an arm by seed."""
        key = (setting, arm, *teachers)
        return {row["seed"]: row for row in self.rows if (row["setting"], row["arm"], row["sft_teacher"], row["opd_teacher"]) == key}

    def mean(self, cell: dict[int, Row], value: Callable[[Row], float]) -> Interval:
        """Return the mean over the seeds of a cell."""
        return Interval.of([value(row) for row in cell.values()])

    def difference(self, one: dict[int, Row], other: dict[int, Row], value: Callable[[Row], float]) -> Interval:
        """Return the mean of the differences between two arms, seed by seed: what the models of a seed have in common cancels."""
        return Interval.of([value(one[seed]) - value(other[seed]) for seed in sorted(set(one) & set(other))])


def accuracy(row: Row) -> float:
    """Return the accuracy at the end."""
    return float(row["accuracy"])


def change(row: Row) -> float:
    """Return the change of accuracy against the SFT student."""
    return float(row["accuracy"] - row["start"])


#: What `ended`, `started` and `taught` show.
ENDS = ("accuracy", "greedy", "KL to the teacher")


def reverse_kl(row: Row) -> float:
    """Return the reverse KL to the teacher at the end, in nats a token, on fresh held-out responses."""
    return float(row["kl"])


def ended(cell: dict[int, Row]) -> list[str]:
    """Return what tables show of the ends of runs: accuracy, sampled and greedy, and the reverse KL to the teacher."""
    return _shown(cell, "accuracy", "greedy", "kl")


def started(cell: dict[int, Row]) -> list[str]:
    """Return the same of the students from which they start."""
    return _shown(cell, "start", "start_greedy", "start_kl")


def taught(rows: Sequence[Row], setting: str) -> list[str]:
    """Return the same of the teachers of a setting."""
    cell = {row["seed"]: row for row in rows if (row["kind"], row.get("setting")) == ("teacher", setting)}
    return [*_shown(cell, "accuracy", "greedy"), ""]


def _shown(cell: dict[int, Row], *names: str) -> list[str]:
    return [Interval.of([row[name] for row in cell.values()]).show() if cell else "" for name in names]


def passed(rows: Sequence[Row], setting: str, arm: str) -> tuple[int, int]:
    """Return how many rollouts an arm stores, and on how many it trains, each pass counted: so many are what online OPD samples and scores."""
    found = next(row for row in rows if row["kind"] == "setting" and row["name"] == setting)
    stored = {row["stored_rollouts"] for row in Runs.of(rows).where(setting, arm).values()}
    return int(min(stored)), int(found["batch"] * found["opd_steps"])


def spent(row: Row) -> float:
    """Return the CPU seconds of the whole OPD stage."""
    return float(row["cpu_s"]["all"])


def seconds_to(row: Row, target: float) -> float:
    """Return the CPU seconds at which the curve first reaches this accuracy, by straight lines between its points.

    They are those of its first point if it starts there or above, and infinite if it never does.
    """
    return _reached(row, target, 2)


def steps_to(row: Row, target: float) -> float:
    """Return the steps after which the curve first reaches this accuracy, as `seconds_to` does."""
    return _reached(row, target, 0)


def _reached(row: Row, target: float, by: int) -> float:
    if target <= row["curve"][0][1]:
        return float(row["curve"][0][by])
    for first, then in pairwise(row["curve"]):
        if first[1] < target <= then[1]:
            return float(first[by] + (then[by] - first[by]) * (target - first[1]) / (then[1] - first[1]))
    return math.inf


def ratios(runs: Runs, setting: str, base: str, arm: str) -> dict[str, Ratio]:
    """Return how many times as much as `arm` does `base` cost, seed by seed.

    At equal steps; until both have the accuracy with which the worse of them ends; and until both have half of what online OPD gains.
    Where that is not above the start in a seed, there is nothing to reach, and the figure is NaN; it is infinite where either never reaches it.
    """
    online, slow, fast = (runs.where(setting, name) for name in (ONLINE.name, base, arm))
    ended = {seed: min(accuracy(slow[seed]), accuracy(fast[seed])) for seed in fast}
    half = {seed: (online[seed]["start"] + online[seed]["accuracy"]) / 2 for seed in fast}

    def until(targets: dict[int, float]) -> Ratio:
        return Ratio.of([_over(slow[seed], fast[seed], targets[seed]) for seed in fast])

    steps = Ratio.of([spent(slow[seed]) / spent(fast[seed]) for seed in fast])
    return {"equal steps": steps, "equal accuracy": until(ended), "half of the gain": until(half)}


def _over(slow: Row, fast: Row, target: float) -> float:
    if target <= max(slow["start"], fast["start"]):
        return math.nan
    both = seconds_to(slow, target), seconds_to(fast, target)
    return math.inf if math.inf in both else both[0] / both[1]


def ratio_path(row: Row) -> dict[int, tuple[float, float]]:
    """Return step -> mean and spread of the importance ratio."""
    return {int(step): (mean, std) for step, mean, std, *_ in row["step_ratiomean_ratiostd_kl_gain_ess"]}


def farthest(row: Row) -> float:
    """Return how far from 1 the mean ratio is at the step at which it is farthest."""
    return max(abs(mean - 1) for mean, _ in ratio_path(row).values())


#: The paper's spread of the ratio (figure 3a).
SPREAD = 0.1
#: Steps that stand for the ratio at step 20.
BY_20 = range(15, 20)


def path_mean(path: dict[int, tuple[float, float]], steps: Sequence[int]) -> float:
    """Return the mean ratio over some steps."""
    return float(np.mean([path[step][0] for step in steps]))


def mismatch(runs: Runs, setting: str, arm: str) -> dict[int, float]:
    """Return how much less accuracy an arm gains by seed with a teacher that did not write the SFT text; nothing where that was not run."""
    same, other = ([runs.where(setting, arm, pair) for pair in pairs] for pairs in ((("A", "A"), ("B", "B")), (("A", "B"), ("B", "A"))))
    if not all(other):
        return {}
    return {seed: float(np.mean([change(c[seed]) for c in same]) - np.mean([change(c[seed]) for c in other])) for seed in other[0]}


def as_goal(name: str, goal: str, measured: Interval, met: bool) -> dict[str, Any]:
    """Return the goal as result files have it.

    JSON has neither infinity nor NaN, so a cost that is no number is null, with the word that tables show.  That of a ratio has both ends.
    """
    mean, half = (number if math.isfinite(number) else None for number in (measured.mean, measured.half))
    word = {} if mean is not None else {"shown": measured.show()}
    width = {"low": measured.low, "high": measured.high} if half is not None and isinstance(measured, Ratio) else {"ci95": half}
    return {"name": name, "goal": goal, "measured": mean, **word, **width, "seeds": measured.seeds, "met": bool(met)}


def show_measured(goal: dict[str, Any]) -> str:
    """Return the text that tables show."""
    if goal["measured"] is None:
        return str(goal["shown"])
    signed = not {"0", *NO_WORSE.split()[1:]}.isdisjoint(goal["goal"].split()) or ", minus " in goal["name"]
    form = "+.3f" if abs(goal["measured"]) < 1 and signed else ".2f"
    if "low" in goal:
        return f"{goal['measured']:.2f} [{goal['low']:.2f} to {goal['high']:.2f}]"
    half = "" if not goal["ci95"] else f" ± {goal['ci95']:{form.lstrip('+')}}"
    return f"{goal['measured']:{form}}{half}"


def find_goals(rows: Sequence[Row], claim: str, fall: str) -> list[dict[str, Any]]:
    """Judge every goal; goals of what was not run are left out."""
    runs, goals = Runs.of(rows), []

    def add(name: str, goal: str, measured: Interval, met: bool) -> None:
        goals.append(as_goal(name, goal, measured, met))

    cells = {arm.name: runs.where(claim, arm.name) for arm in (PLAIN, RATIO, ONLINE)}
    gain = runs.mean(cells[ONLINE.name], change)
    add("online OPD gains over SFT, accuracy (table 1)", "> 0", gain, gain.positive)
    for arm in (PLAIN, RATIO):
        gap = runs.difference(cells[arm.name], cells[ONLINE.name], accuracy)
        add(f"{arm.name} minus online OPD, accuracy (table 1)", NO_WORSE, gap, gap.at_least(-MARGIN))
    for arm in (PLAIN, RATIO):
        for what, times in ratios(runs, claim, ONLINE.name, arm.name).items():
            ours = "" if what != "equal steps" else " (table 2)"  # of the others the paper states nothing
            add(f"online OPD over {arm.name}, cost of the OPD stage at {what}{ours}", f">= {TIMES:g}", times, times.at_least(TIMES))
    if lost := mismatch(runs, claim, PLAIN.name):
        online = mismatch(runs, claim, ONLINE.name)
        more = Interval.of([lost[seed] - online[seed] for seed in lost])
        add("another teacher than that of SFT costs Lightning more than online OPD, accuracy (table 4)", "> 0", more, more.positive)
    paths = [ratio_path(row) for row in cells[PLAIN.name].values()]
    middle, end = ([path_mean(path, steps) for path in paths] for steps in (BY_20, (84, 89, 94, 99)))
    late = Interval.of([abs(after - before) - abs(before - 1) for before, after in zip(middle, end, strict=True)])
    add("Lightning: the mean ratio moves less after step 20 than before (figure 3a)", "< 0", late, late.negative)
    away = Interval.of([farthest(row) for row in cells[PLAIN.name].values()])
    add(f"Lightning: the mean ratio of any step is within 0.06 of 1 on stored tokens, on {claim}", "<= 0.06", away, away.at_most(0.06))
    spread = Interval.of([path[max(path)][1] for path in paths])
    add("Lightning: the spread of the ratio at the last step (figure 3a)", f"<= {SPREAD:g}", spread, spread.at_most(SPREAD))
    for setting in sorted({row["setting"] for row in runs.rows if row["setting"].startswith("doubt")}, key=_sft_steps):
        gained = runs.mean(runs.where(setting, PLAIN.name), change)
        add(f"Lightning gains over SFT at {_sft_steps(setting)} SFT steps (figure 3c)", "> 0", gained, gained.positive)
    gaps = [row for row in rows if row["kind"] == "gap" and row["arm"] == PLAIN.name]  # the theorem is on the gradient of the plain loss
    for setting, arm in dict.fromkeys((row["setting"], row["arm"]) for row in gaps):
        share = [row["gap"] / row["bound"] for row in gaps if (row["setting"], row["arm"]) == (setting, arm) and row["step"] > 0]
        largest = Interval(max(share), 0.0, len({row["seed"] for row in gaps}))
        add(f"{arm} on {setting}: largest gradient gap over its bound (theorem 3.5)", "<= 1", largest, largest.at_most(1))
    for arm in (PLAIN, RATIO, TOP_K):
        beside = runs.difference(runs.where(claim, arm.name), runs.where(claim, TRL), accuracy)
        add(f"{arm.name}, minus TRL: accuracy", NO_WORSE, beside, beside.at_least(-MARGIN))
        for what, times in ratios(runs, claim, TRL, arm.name).items():
            add(f"TRL over {arm.name}, cost at {what}", "> 1", times, times.low > 1)
    fallen = {arm: runs.where(fall, arm) for arm in (PLAIN.name, RATIO.name, *(a.name for arms in ABLATIONS.values() for a in arms))}
    return goals + [no_fall(arm, runs, cell, f" on {fall}") for arm, cell in fallen.items() if cell]


def no_fall(name: str, runs: Runs, cell: dict[int, Row], where: str = "") -> dict[str, Any]:
    """Judge whether an arm ends at most a margin below SFT."""
    moved = runs.mean(cell, change)
    return as_goal(f"{name} does not fall more than {MARGIN:g} below SFT{where}", NO_WORSE, moved, moved.at_least(-MARGIN))


def _sft_steps(setting: str) -> int:
    return int(setting.rsplit(" ", 1)[1])
