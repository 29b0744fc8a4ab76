"""The part of RESULTS.md on real weights: words, tables and a picture, out of what `evidence.py` measured."""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from claims_summary import Interval
from docs_tables import table
from evidence_arms import ONLINE, SFT, WHOLE
from evidence_bed import ALIKE, FAR, NEAR, Row, mean_kl
from evidence_summary import Found, cost, forward, kl, length
from pictures import SUPPORT, band, color_of, label_ends, panels, rule, save
from results_page import Goal, Part, Reading


def evidence_part(result: Mapping[str, Any], folder: str) -> Part:
    """Make the part of the page that reports `evidence.json`, with its picture in a folder."""
    found = Found(result["rows"])
    sections = [_plan(found), _frontier(found, f"{folder}/evidence.png"), _arms(found, NEAR.name), _arms(found, FAR.name), _limits(found)]
    pictures = {"evidence": partial(draw, found=found)}
    training = found.mean(found.cell(ONLINE.name), lambda row: cost(row, None, "training") / cost(row)).mean
    return Part(
        "Offline beside online on real weights", result, _readings(f"{training:.0%}"), _meaning(found), sections, pictures, "evidence.py"
    )


_REGIME, _CHEAP = "The near student is in the paper's regime", "A stored run ends no worse than a live one, at a quarter of its cost"


@frozen
class Compared(Reading):
    """A goal that is met where an interval holds 0: its words say what else the interval holds."""

    def say(self, goal: Goal) -> str:
        """Return the clause on a goal, with the largest loss that is not excluded.

        Two cannot be told apart, unless the mean is on the right side.
        """
        words = super().say(goal)
        most = goal["at_most"]
        if most is None or (goal["met"] and goal["measured"] > 0):
            words = re.sub("ends (no )?higher in reverse KL than", "cannot be told apart in reverse KL from", words)
        return words if most is None or most <= 0 else f"{words}, and may end {most:.3f} higher"


def _readings(training: str) -> list[Reading]:
    """Return the readings of the goals; `training` is the share of online OPD's cost that is spent on training."""
    return [
        Reading(
            _REGIME,
            r"^overlap@16 ",
            "of the 16 tokens that the near student finds most likely, {measured} are among its teacher's",
            "of the 16 tokens that the near student finds most likely, only {measured} are among its teacher's",
            "At temperature 1 this teacher spreads its mass over many tokens, and which of them come after the first few is decided by little.",
            told=".",
            open="of the 16 tokens that the near student finds most likely, {measured} are among its teacher's, not shown to be {bound}",
        ),
        Reading(
            _REGIME,
            r"^reverse KL of the near student",
            "its reverse KL to the teacher is {measured} nats a token before training",
            "its reverse KL to the teacher is as much as {measured} nats a token before training",
            open="its reverse KL to the teacher was not shown to be at most {bound} nats a token before training ({measured})",
        ),
        Compared(
            _CHEAP,
            r"^(?P<form>.+ \d+ steps), minus (?P<rival>.+): held-out",
            "*{form}* ends no higher in reverse KL than *{rival}* ({measured})",
            "*{form}* ends higher in reverse KL than *{rival}* ({measured})",
            f"A quarter of the cost pays for few steps: training, which a store does not save, is {training} of what online OPD spends here.",
            told=".",
        ),
        Reading(
            _CHEAP,
            r"^(?P<form>.+ \d+ steps), as a share of (?P<rival>.+): cost",
            "it costs {measured} of *{rival}*",
            "it costs as much as {measured} of *{rival}*",
            told=".",
            open="it was not shown to cost at most {bound} of *{rival}* ({measured})",
        ),
        Compared(
            "With all of its steps a stored run ends no worse than a live one",
            r"^(?P<form>.+), all of its steps, minus (?P<rival>.+): held-out",
            "with all of its steps *{form}* ends no higher in reverse KL than *{rival}* ({measured})",
            "with all of its steps *{form}* ends higher in reverse KL than *{rival}* ({measured})",
            told=".",
        ),
    ]


def _meaning(found: Found) -> str:
    form = found.form()
    stored, live = found.cell(form.arm), found.cell(ONLINE.name)
    share = found.paired(stored, live, lambda ours, theirs: cost(ours, form.step) / cost(theirs))
    gained = found.paired(stored, found.starts(), lambda ours, start: kl(ours, form.step) - mean_kl(start))
    whole = found.paired(live, found.starts(), lambda ours, start: kl(ours) - mean_kl(start))
    return (
        f"for {share.mean:.0%} of what online OPD costs, a store changes the reverse KL of such a student by {gained.show('+.3f')} nats a token, "
        f"and online OPD by {whole.show('+.3f')}."
    )


def _plan(found: Found) -> list[str]:
    size = found.plan
    chosen = "on them, so they are told too good" if size["choice"] is None else f"on seed {size['choice']}, which is not among them"
    return [
        "### What was run",
        "",
        f"The teacher is SmolLM2-135M-Instruct; the students are cut from it and fine-tuned on {size['sft_prompts']} of its answers.",
        f"Prompts are questions of TruthfulQA: {size['opd_prompts']} for OPD, {size['held_out']} held out.",
        f"Answers have at most {size['new_tokens']} tokens, and a step {size['batch']} of them.",
        f"Seeds: {len(found.starts())}, each with its own split, students and rollouts.",
        f"Rates, the arm that is run in several forms, the form of the goals and the best live run were chosen {chosen}.",
        _edges(found),
        "Intervals are those of Student's t over seeds, paired where two arms are compared.",
        "Seconds are CPU seconds of one thread; a store is sampled and scored in large batches, a live student in batches of a step.",
        "What a half or a quarter of a store costs was measured on such stores; supports are taken to cost as many times a plain score there.",
        "",
        *_starts(found),
    ]


def _edges(found: Found) -> str:
    """Name the arms whose rate is at an end of the tried ones, so a lower or higher one might have been better."""
    rates = [float(rate) for rate in found.plan["rates"]]
    chosen = {name: found.rate(name) for name in found.names() if "(" not in name}
    lists = [", ".join(name for name, rate in chosen.items() if rate == edge) or "not one arm" for edge in (min(rates), max(rates))]
    tried = ", ".join(f"{rate:g}" for rate in rates)
    return f"Rates: {tried}.  At the lowest of them: {lists[0]}; at the highest: {lists[1]}; their best rates may lie outside."


def _starts(found: Found) -> list[str]:
    """Return a table of both students before OPD."""
    rows = []
    for student in (NEAR.name, FAR.name):
        stores, starts = found.stores(student).values(), found.starts(student).values()
        if stores:
            means = [Interval.of([row["start"]["overlap"][k] for row in stores]).show() for k in ("16", "64")]
            tail = Interval.of([row["start"]["tail"] for row in stores]).show(".4f")
            said = ", ".join(sorted({row["start"]["verdict"] for row in stores}))
            rows.append([student, Interval.of([mean_kl(row) for row in starts]).show(), *means, tail, said])
    head = ["student", "reverse KL", "overlap@16", "overlap@64", "advantages beyond 5 nats", "verdict of `measure_start`"]
    return table(head, iter(rows))


def _frontier(found: Found, picture: str) -> list[str]:
    """Return the picture, and its points."""

    def rows() -> Iterator[list[str]]:
        for name in found.pictured():
            cell = found.cell(name)
            for step in steps(cell):
                spent = found.mean(cell, lambda row, at=step: cost(row, at)).show(".0f")
                left = found.mean(cell, lambda row, at=step: kl(row, at)).show()
                yield [name, str(step), spent, left]

    return [
        "### Reverse KL against cost",
        "",
        f"![Held-out reverse KL over CPU seconds, for stored and live runs]({picture})",
        "",
        *table(["arm", "steps", "CPU s", "held-out reverse KL"], rows()),
    ]


def steps(cell: dict[int, Row]) -> list[int]:
    """Return the steps at which the runs of a cell were measured."""
    return [point["step"] for point in next(iter(cell.values()))["curve"]]


def _arms(found: Found, student: str) -> list[str]:
    """Return a table of every arm at its end."""
    online, starts = found.cell(ONLINE.name, student) if found.of("run", student) else {}, found.starts(student)
    if not online:
        return []

    def rows() -> Iterator[list[str]]:
        for name in found.names(student):
            cell = found.cell(name, student)
            moved = found.paired(cell, starts, lambda ours, start: kl(ours) - mean_kl(start)).show("+.3f")
            beside = "" if name == ONLINE.name else found.paired(cell, online, lambda ours, theirs: kl(ours) - kl(theirs)).show("+.3f")
            spread = found.over_prompts(cell, online)
            prompts = "" if name == ONLINE.name else f"{spread.mean:+.3f} ± {spread.ci95:.3f}"
            others = [found.mean(cell, value).show(form) for value, form in ((forward, ".3f"), (length, ".1f"))]
            seconds = [
                f"{found.mean(cell, lambda row, p=part: cost(row, None, p)).mean:.0f}"
                for part in ("sampling", "scoring", "training", "all")
            ]
            yield [name, f"{found.rate(name, student):g}", moved, beside, prompts, *others, *seconds]

    head = [
        "arm",
        "rate",
        "reverse KL minus SFT's",
        "minus online OPD's",
        "the same over prompts",
        "forward KL",
        "tokens",
        "sampling",
        "scoring",
    ]
    return [f"### The {student} student, at the end of every run", "", *table([*head, "training", "CPU s"], rows())]


def _limits(found: Found) -> list[str]:
    copies = [row["near_copies"] for row in found.starts().values()]
    most = f"{min(copies)} to {max(copies)}" if len(set(copies)) > 1 else str(copies[0])
    lines = [
        *_LIMITS,
        f"- Of the {found.plan['held_out']} held-out questions of a seed, {most} share {ALIKE:.0%} of their words or more with one of its training.",
    ]
    if found.plan["choice"] is not None:
        lines.append(
            "- The seed of choice splits the same questions in another way: some that other seeds hold out were trained on, or chosen on, there."
        )
    return lines


_LIMITS = [
    "### What the real weights do not show",
    "",
    "- One teacher of 135 million parameters, students that are cut from it, short answers, and runs of few steps.",
    "- Layers before the cut, which compute what the teacher's do, are not trained, nor are embeddings: that makes a step a third cheaper for all.",
    f"- In lopd a live student compares its most likely {WHOLE.support.candidates} tokens, with the residual; in TRL, the whole vocabulary.",
    "- The far student takes over the rates that were chosen for the near one.",
    "- SFT, Lightning and LSPD weight every response alike, as the paper does; all others of lopd weight every token alike, as TRL does.",
    f"- {SFT.name} has a quarter more steps, as nothing is scored for it.",
]


def draw(path: Path, found: Found) -> None:
    """Draw reverse KL over cost, means and bands over seeds: every run that was measured on its way, and the forms of the best stored arm."""
    figure, (axes,) = panels(1, 1, 5.0)
    rule(axes, y=float(np.mean([mean_kl(row) for row in found.starts().values()])))
    for name in found.pictured():
        cell = found.cell(name)
        spent = [found.mean(cell, lambda row, at=step: cost(row, at)).mean for step in steps(cell)]
        left = [[kl(row, step) for step in steps(cell)] for row in cell.values()]
        form = name.split(" (")[0] == found.best
        band(
            axes,
            spent,
            left,
            name.removeprefix(f"{found.best} ").strip("()"),
            color=SUPPORT if form else color_of(name),
            line="--" if "(" in name else "-",
        )
    axes.set_xlabel("CPU seconds of one thread, sampling and scoring included")
    axes.set_ylabel("held-out reverse KL, nats a token")
    axes.set_title("the dashed line is the student after SFT")
    label_ends(axes)
    save(figure, path)
