"""The part of RESULTS.md on the claims: tables, and words that depend on what was measured."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from attrs import frozen
from claims_plots import draw_ablations, draw_claims, draw_failure
from claims_readings import claims_readings
from claims_summary import (
    BY_20,
    ENDS,
    MARGIN,
    PAPER,
    SPREAD,
    TIMES,
    Interval,
    Row,
    Runs,
    accuracy,
    change,
    ended,
    farthest,
    mismatch,
    passed,
    path_mean,
    ratio_path,
    ratios,
    reverse_kl,
    show_measured,
    spent,
    started,
    taught,
)
from results_page import Part, undecided
from testbed.arms import ABLATIONS, MAIN, ONLINE, PLAIN, RATIO, TOP_K
from testbed.trl_peer import ARM as TRL


@frozen(eq=False)
class Report:
    """What the sections read.

    Args:
        result: the result file.
        claim: name of the setting in the paper's regime.
        fall: name of the one in which Lightning falls.
    """

    result: Mapping[str, Any]
    claim: str
    fall: str

    @property
    def runs(self) -> Runs:
        """All runs."""
        return Runs.of(self.result["rows"])

    @property
    def settings(self) -> list[str]:
        """In the order in which they were run."""
        return [row["name"] for row in self.result["rows"] if row["kind"] == "setting"]

    @property
    def limit(self) -> Interval:
        """All that online OPD costs over its training: what a store saves at most, if training costs it the same."""
        return self.runs.mean(self.runs.where(self.claim, ONLINE.name), lambda row: row["cpu_s"]["all"] / row["cpu_s"]["training"])

    @property
    def before(self) -> Interval:
        """How far from 1 the mean ratio of Lightning is at step 20."""
        return self.runs.mean(self.runs.where(self.claim, PLAIN.name), lambda row: abs(path_mean(ratio_path(row), BY_20) - 1))

    @property
    def lengths(self) -> list[str]:
        """Settings that differ in the length of SFT."""
        return [name for name in self.settings if name.startswith("doubt")]

    def goal(self, start: str) -> dict[str, Any]:
        """Return the goal whose name begins with `start`."""
        return next(goal for goal in self.result["goals"] if goal["name"].startswith(start))

    def holds(self, start: str) -> str:
        """Return the verdict on that goal, in words."""
        goal = self.goal(start)
        return "holds" if goal["met"] else "was not shown" if undecided(goal) else "does not hold"


def claims_part(result: Mapping[str, Any], folder: str, *, claim: str, fall: str) -> Part:
    """Make the part of the page that reports `claims.json`, with its pictures in a folder."""
    found = Report(result, claim, fall)
    draws = {"claims": draw_claims, "claims_failure": draw_failure, "claims_ablations": draw_ablations}
    pictures = {name: partial(draw, rows=result["rows"], claim=claim, fall=fall) for name, draw in draws.items()}
    links = {name: f"{folder}/{name}.png" for name in pictures}
    sections = [_testbed(found), _accuracy(found, links), _cost(found), _mismatch(found), _ratio(found), _gap(found)]
    sections += [_failure(found, links), _ablations(found, links), _recommendation(found), _LIMITS]
    weak = [name for name in found.lengths if not found.runs.mean(found.runs.where(name, PLAIN.name), change).positive]
    online = " and ".join(found.runs.mean(found.runs.where(name, ONLINE.name), change).show("+.3f") for name in weak)
    told = {"limit": found.limit.show(".2f"), "before": found.before.show(), "online": online, "elsewhere": _elsewhere(found)}
    readings = claims_readings(claim, fall, **told)
    return Part("The claims of the paper on small models", result, readings, _meaning(found), sections, pictures, "claims.py")


def _elsewhere(found: Report) -> str:
    """Return how far from 1 the mean ratio of Lightning is at its farthest in settings that no goal is on, by the lowest and highest seed."""
    seeds = {name: [farthest(row) for row in found.runs.where(name, PLAIN.name).values()] for name in found.settings if name != found.claim}
    said = ", ".join(f"{min(away):.2f} to {max(away):.2f} on *{name}*" for name, away in seeds.items() if away)
    return f"by seed, and not judged: {said}" if said else "the one setting that was run"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def _testbed(found: Report) -> list[str]:
    def line(name: str) -> list[str]:
        cell = found.runs.where(name, PLAIN.name)
        said = [statistics.mean(row[key] for row in cell.values()) for key in ("advantage_mean", "advantage_size", "tail")]
        low, middle, high = (statistics.mean(row["advantage_quantiles"][i] for row in cell.values()) for i in (0, 2, 4))
        starts = [found.runs.mean(cell, lambda row, key=key: row[key]).show() for key in ("start", "start_greedy")]
        return [name, *starts, f"{said[0]:+.2f}", f"{said[1]:.2f}", f"{low:+.1f} / {middle:+.2f} / {high:+.1f}", f"{said[2]:.1%}"]

    head = ("teacher, student", "SFT student, sampled", "greedy", "mean A", "mean abs A", "1 / 50 / 99 % of A", "below -5")
    return [
        "### The testbed",
        "",
        f"{len({row['seed'] for row in found.runs.rows})} seeds, each its own problems, teachers and students; ± is half of a 95 % interval over",
        "them (Student's t), and differences are taken seed by seed.  Paper: Lightning OPD, arXiv 2604.13010v2.",
        "",
        "Sums of two numbers with the working written out (`benchmarks/testbed/task.py`); Llama models of 2 layers, trained from scratch.  A teacher",
        "learns from workings in which none, 3 % or 10 % of the digits are slips (certain, some doubt, doubt); a student is fine-tuned on what the",
        "teacher samples, for so many steps.  Problems of SFT, of OPD and held-out ones are disjoint.  Accuracy is that of sampled responses",
        "(temperature 1) on held-out problems unless greedy is said.  A: advantage in nats, before training, on the stored rollouts.",
        "",
        *_table(head, map(line, found.settings)),
        "",
        f'"{found.claim}" is nearest to the paper\'s regime, and the claims are tested there; "{found.fall}" is where the method fails.',
    ]


def _accuracy(found: Report, links: dict[str, str]) -> list[str]:
    runs, names = found.runs, [*(arm.name for arm in (*MAIN, TOP_K)), TRL]
    cells = {name: runs.where(found.claim, name) for name in names}
    rows = [["SFT", *started(cells[ONLINE.name]), "", "", ""]]
    for name, cell in cells.items():
        gained = runs.mean(cell, change).show("+.3f")
        beside = [runs.difference(cell, cells[ONLINE.name], value).show("+.3f") for value in (accuracy, reverse_kl)]
        rows.append([name, *ended(cell), gained, *(["", ""] if name == ONLINE.name else beside)])
    rows.append(["the teacher", *taught(found.result["rows"], found.claim), "", "", ""])
    return [
        f"### Accuracy (table 1), {found.claim}",
        "",
        "The reverse KL is over the whole vocabulary, in nats a token, on fresh responses to the held-out prompts.",
        "",
        *_table(("", *ENDS, "gain over SFT", "minus online OPD", "its KL, likewise"), rows),
        "",
        f"That online OPD beats SFT **{found.holds('online OPD gains')}**.",
        f"That Lightning ends at most {MARGIN:g} below online OPD **{found.holds('Lightning minus')}**",
        f"({show_measured(found.goal('Lightning minus'))}).  With the importance ratio to the reference policy it",
        f"**{found.holds('Lightning, ratio to ref minus')}** ({show_measured(found.goal('Lightning, ratio to ref minus'))}).",
        "",
        f"![Accuracy, cost, teachers, ratio and SFT length]({links['claims']})",
    ]


def _cost(found: Report) -> list[str]:
    runs, parts = found.runs, ("sampling", "scoring", "training", "all")
    rows = []
    for name in [*(arm.name for arm in (*MAIN, TOP_K)), TRL]:
        cell = runs.where(found.claim, name)
        times = [t.show(".2f") for t in ratios(runs, found.claim, ONLINE.name, name).values()]
        split = [runs.mean(cell, lambda row, part=part: row["cpu_s"][part]).show(".2f") for part in parts]
        rows.append([name, *split, *(["1"] * len(times) if name == ONLINE.name else times)])
    stored, trained = passed(found.result["rows"], found.claim, PLAIN.name)
    above = runs.difference(runs.where(found.claim, TRL), runs.where(found.claim, TOP_K.name), accuracy).show("+.3f")
    peer = [
        ratios(runs, found.claim, TRL, arm.name)[what].show(".2f") for arm in (PLAIN, TOP_K) for what in ("equal steps", "equal accuracy")
    ]
    return [
        "### Cost (table 2)",
        "",
        "CPU seconds of one thread for the whole OPD stage, all methods at the same prompts, batch, rate and number of steps.",
        f"A store has {stored:,} rollouts, sampled and scored once and passed over {trained / stored:.1f} times; online OPD and TRL sample and",
        f"score {trained:,} of them.  A part of what a store saves is that: with one pass it would save less.  Training is all",
        "that is neither sampling nor scoring: reading, collating and drift included.  The last columns say how many times as much online OPD costs:",
        "at equal steps, until both have the accuracy with which the worse of them ends, and until both have half of what online OPD gains;",
        "they are geometric means, with intervals of their logarithms.",
        "",
        *_table(("", *parts, "equal steps", "equal accuracy", "half of the gain"), rows),
        "",
        f"That online OPD costs {TIMES:g} times as much **{found.holds(f'online OPD over {PLAIN.name}, cost of the OPD stage at equal s')}** here.",
        "Offline OPD saves sampling and scoring, never training.  If training costs it what it costs online, it saves at most all over training of",
        f"online OPD, {found.limit.show('.2f')} in this testbed; rounds make the training of online OPD dearer, so a store can pass this.",
        f"In the paper online OPD takes {PAPER.online:g} GPU-hours and Lightning {PAPER.total:g}, {PAPER.training:g} of them training (table 2, 8B):",
        "long responses of a large model, decoded token by token, and a larger teacher cost far more than a training step; here responses have",
        "10 tokens and the teacher is nearly as small as the student.",
        "",
        "TRL's trainer samples and scores at every step, as online OPD does; its loss is the reverse KL over the whole vocabulary.  Of its",
        "teacher the layers count as scoring, the head and its log-softmax as training.  It costs",
        f"{peer[0]} times as much as Lightning at equal steps, and {peer[1]} times at equal accuracy; beside the same divergence on the stored",
        f"top {TOP_K.support.top_k} tokens it costs {peer[2]} and {peer[3]} times as much,",
        f"and ends {above} above it in accuracy.",
    ]


def _mismatch(found: Report) -> list[str]:
    runs, pairs = found.runs, [(sft, opd) for sft in "AB" for opd in "AB"]
    cells = {pair: [runs.where(found.claim, arm.name, pair) for arm in MAIN] for pair in pairs}
    rows = [
        [sft, opd, *(runs.mean(cell, accuracy).show() + f" ({runs.mean(cell, change).mean:+.3f})" for cell in cells[sft, opd])]
        for sft, opd in pairs
        if all(cells[sft, opd])
    ]
    if len(rows) < len(pairs):
        return []
    lost = [Interval.of([*mismatch(runs, found.claim, arm.name).values()]).show() for arm in (PLAIN, ONLINE)]
    return [
        "### Teacher consistency (table 4)",
        "",
        "Two teachers of like skill write the working in different orders.  In brackets the change against SFT.",
        "",
        *_table(("SFT teacher", "OPD teacher", *(arm.name for arm in MAIN)), rows),
        "",
        f"Another teacher costs Lightning {lost[0]} of accuracy and online OPD {lost[1]}; in the paper 6.8 and 3.7 points (8B, AIME 2024).",
        f"That it costs Lightning more **{found.holds('another teacher')}** ({show_measured(found.goal('another teacher'))}).",
        "The styles are further apart than two large models of one family: what the other teacher writes is nearly impossible to each.",
    ]


def _ratio(found: Report) -> list[str]:
    runs, rows = found.runs, []
    for setting in (found.claim, found.fall):
        for arm in (PLAIN, RATIO):
            paths = [ratio_path(row) for row in runs.where(setting, arm.name).values()]
            at = [statistics.mean(path[step][0] for path in paths) for step in (4, 19, 49, 99)]
            spread = statistics.mean(path[99][1] for path in paths)
            rows.append([setting, arm.name, *(f"{mean:.3f}" for mean in at), f"{spread:.3f}"])
    lengths = []
    for setting in found.lengths:
        cells = [runs.where(setting, arm.name) for arm in MAIN]
        lengths.append([setting, runs.mean(cells[0], lambda row: row["start"]).show(), *(runs.mean(c, accuracy).show() for c in cells)])
    return [
        "### The ratio to the reference policy (figure 3a), and SFT length (figure 3c)",
        "",
        *_table(("setting", "", "mean at step 5", "20", "50", "100", "its spread at 100"), rows),
        "",
        f"A plateau after step 20 **{found.holds('Lightning: the mean ratio moves')}** (the paper: 0.94 from step 20 on), and a spread of at most",
        f"{SPREAD:g}, as there, **{found.holds('Lightning: the spread')}** ({show_measured(found.goal('Lightning: the spread'))}).",
        "In the first setting the step at which the mean is farthest from 1 (of the first 20 and of every fifth later) is",
        f"{show_measured(found.goal('Lightning: the mean ratio of any'))} away.",
        "Over fresh draws it is 1 for every student: on stored ones it shows probability that left their tokens, and not a distance.",
        "",
        *_table(("teacher, SFT steps", "SFT", *(arm.name for arm in MAIN)), lengths),
    ]


def _gap(found: Report) -> list[str]:
    gaps = [row for row in found.result["rows"] if row["kind"] == "gap"]
    rows = []
    for setting, arm, step in dict.fromkeys((row["setting"], row["arm"], row["step"]) for row in gaps):
        cell = [row for row in gaps if (row["setting"], row["arm"], row["step"]) == (setting, arm, step)]
        values = [Interval.of([row[name] for row in cell]).show(".2f") for name in ("online_gradient", "gap", "bound")]
        rows.append([setting, arm, str(step), *values, f"{Interval.of([row['chi2'] for row in cell]).mean:.3g}"])
    return [
        "### The gradient gap and its bound (theorem 3.5)",
        "",
        "Norms of the online gradient and of its difference to the offline one, on all OPD prompts (the square estimated without bias from two",
        "halves), and the bound G σ_A √χ² with G the largest score norm among 64 tokens.  At step 0 both policies are one, and what is measured",
        "is the noise of two samples.  The theorem is on the gradient of the plain loss: that of the ratio stands beside it, and is not judged.",
        "",
        *_table(("setting", "", "step", "online gradient", "gap", "bound", "χ²"), rows),
    ]


def _failure(found: Report, links: dict[str, str]) -> list[str]:
    runs, rows = found.runs, []
    for setting in found.settings:
        cells = [runs.where(setting, arm.name) for arm in MAIN]
        spoke = [row["watch_spoke_at"] + 1 for row in cells[0].values() if row["watch_spoke_at"] is not None]
        warned = f"{len(spoke)} of {len(cells[0])}" + (f", after step {statistics.median(spoke):.0f}" if spoke else "")
        tail = statistics.mean(row["tail"] for row in cells[0].values())
        rows.append([setting, f"{tail:.1%}", *(runs.mean(cell, change).show("+.3f") for cell in cells), warned])
    return [
        "### Where offline OPD breaks",
        "",
        "Change of accuracy against SFT; the last column: in how many of the Lightning runs `watch_drift` spoke, and when (median).",
        "",
        *_table(("teacher, student", "A below -5", *(arm.name for arm in MAIN), "the watch on Lightning"), rows),
        "",
        f"![Change of accuracy against the tail of the advantages, and the gradient gap]({links['claims_failure']})",
    ]


def _ablations(found: Report, links: dict[str, str]) -> list[str]:
    runs = found.runs
    lines = [(name, arm.name) for name, arms in {"": MAIN, **ABLATIONS}.items() for arm in arms if runs.where(found.claim, arm.name)]

    def cell(setting: str, arm: str, value: Callable[[Row], float], form: str) -> str:
        found_cell = runs.where(setting, arm)
        return runs.mean(found_cell, value).show(form) if found_cell else ""

    rows = [
        [name, arm, cell(found.claim, arm, change, "+.3f"), cell(found.claim, arm, spent, ".1f"), cell(found.fall, arm, change, "+.3f")]
        for name, arm in lines
    ]
    return [
        "### What the paper lacks",
        "",
        "Change of accuracy against SFT, and CPU seconds of the OPD stage.",
        "",
        *_table(("", "", found.claim, "CPU s", found.fall), rows),
        "",
        f"![Change of accuracy of every ablation]({links['claims_ablations']})",
    ]


def _recommended(found: Report) -> tuple[str, dict[str, float], Interval]:
    """Return the loss to start with, the worst mean change of both over all settings, and what the ratio changes where Lightning works."""
    runs = found.runs
    worst = {arm.name: min(runs.mean(runs.where(setting, arm.name), change).mean for setting in found.settings) for arm in (PLAIN, RATIO)}
    beside = runs.difference(runs.where(found.claim, RATIO.name), runs.where(found.claim, PLAIN.name), accuracy)
    better = worst[RATIO.name] > worst[PLAIN.name] and not beside.negative
    return "`FusedOPDLoss(ratio_to_ref=True)`" if better else "`FusedOPDLoss()`, the paper's,", worst, beside


def _meaning(found: Report) -> str:
    """Return the third sentence."""
    loss, *_ = _recommended(found)
    fallen = found.runs.where(found.fall, PLAIN.name)
    tail, moved = statistics.mean(row["tail"] for row in fallen.values()), found.runs.mean(fallen, change).show("+.3f")
    return (
        f"with one stored number a token start with {loss}; look at the advantages before you train (with {tail:.0%} of them below -5 nats the "
        f"plain loss changed accuracy by {moved}); and expect a store to save what sampling and scoring cost you, not training."
    )


def _recommendation(found: Report) -> list[str]:
    runs, (name, worst, beside) = found.runs, _recommended(found)
    sentences = [
        f"Over all settings the worst mean change of plain Lightning is {worst[PLAIN.name]:+.3f}, with the ratio {worst[RATIO.name]:+.3f};",
        f"where Lightning works, the ratio changes accuracy by {beside.show('+.3f')}.  So lopd recommends {name} as the loss to start with.",
        "Both need the same stored columns, and their gradients are equal at the first step.",
    ]
    cells = {arm.name: cell for arm in ABLATIONS["top-k"] if (cell := runs.where(found.claim, arm.name))}
    more = {name: runs.difference(cell, runs.where(found.claim, RATIO.name), accuracy) for name, cell in cells.items()}
    if more:
        said = {better: [f"{n} ({m.show('+.3f')})" for n, m in more.items() if m.positive == better] for better in (True, False)}
        worth, other = ("; ".join(names or ["none"]) for names in said.values())
        sentences += [
            f"Where the teacher's most likely tokens can be stored, worth it beside the ratio ({found.claim}, accuracy at the end): {worth};",
            f"not: {other}.",
        ]
    return ["### Which loss", "", *sentences]


_LIMITS = [
    "### What this does not show",
    "",
    "One task, models of about 50,000 parameters, responses of 10 tokens, one machine without a GPU.  Signs and orders of magnitude may carry",
    "over to large models, the figures do not.  Intervals are over seeds of problems, models and samples; the learning rate and the lengths of",
    "SFT were chosen on other seeds.",
]
