"""The part of RESULTS.md on real weights: words, tables and a picture, out of what `evidence.py` measured."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from claims_summary import Interval
from docs_tables import table
from evidence_arms import ONLINE, SFT, TRL, WHOLE
from evidence_bed import ALIKE, FAR, NEAR, Row, mean_kl
from evidence_summary import MARGIN, Found, cost, final, kl, length, moved
from pictures import SUPPORT, band, color_of, label_ends, panels, rule, save
from results_page import Part, Reading


def evidence_part(result: Mapping[str, Any], folder: str) -> Part:
    """Make the part of the page that reports `evidence.json`, with its picture in a folder."""
    found = Found(result["rows"])
    sections = [_plan(found), _frontier(found, f"{folder}/evidence.png"), _arms(found, NEAR.name), _arms(found, FAR.name), _limits(found)]
    pictures = {"evidence": partial(draw, found=found)}
    training = found.mean(found.cell(ONLINE.name), lambda row: cost(row, None, "training") / cost(row)).mean
    return Part(
        "Offline beside online on real weights", result, _readings(f"{training:.0%}"), _meaning(found), sections, pictures, "evidence.py"
    )


_REGIME = "The near student is in the paper's regime"
_CHEAP = f"A stored run ends at most {MARGIN:g} nats a token above a live one, at a quarter of its cost"
_ALL = f"With all of its steps a stored run ends at most {MARGIN:g} nats a token above a live one"


def _ends(claim: str, pattern: str, form: str, reason: str = "") -> list[Reading]:
    """Return the readings of goals on either KL."""
    return [
        Reading(
            claim,
            rf"^{pattern}, minus (?P<rival>.+): {measure}",
            f"{form} ends at most {{bound}} above *{{rival}}* in {kl} KL ({{measured}})",
            f"{form} ends more than {{bound}} above *{{rival}}* in {kl} KL ({{measured}})",
            reason,
            told=".",
            open=f"{form} was not shown to end at most {{bound}} above *{{rival}}* in {kl} KL ({{measured}})",
        )
        for kl, measure in (("reverse", "held-out"), ("forward", "forward"))
    ]


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
        *_ends(
            _CHEAP,
            r"(?P<form>(?!.*, all of its steps).+)",
            "*{form}*",
            f"A quarter of the cost pays for few steps: training, which a store does not save, is {training} of what online OPD spends here.",
        ),
        Reading(
            _CHEAP,
            r"^(?P<form>.+), as a share of (?P<rival>.+): cost",
            "it costs {measured} of *{rival}*",
            "it costs as much as {measured} of *{rival}*",
            told=".",
            open="it was not shown to cost at most {bound} of *{rival}* ({measured})",
        ),
        *_ends(_ALL, r"(?P<form>.+), all of its steps", "with all of its steps *{form}*"),
    ]


def _meaning(found: Found) -> str:
    form = found.form()
    stored, live, imitated = (found.cell(name) for name in (form, ONLINE.name, SFT.name))

    def share(cell: dict[int, Row]) -> str:
        return f"{found.paired(cell, live, lambda ours, theirs: cost(ours) / cost(theirs)).mean:.0%}"

    more = f", and {_beside(found, stored, found.rival)} beside *{found.rival}*" if found.rival != ONLINE.name else ""
    gains = [found.mean(cell, moved).show("+.3f") for cell in (stored, imitated, live)]
    return (
        f"for {share(stored)} of what online OPD costs, a store changes the reverse KL of such a student at the tokens of its own answers by "
        f"{gains[0]} nats a token, SFT that is continued by {gains[1]} for {share(imitated)}, and online OPD by {gains[2]}; the store ends "
        f"{_beside(found, stored, ONLINE.name)} beside online OPD there{more}."
    )


def _beside(found: Found, cell: dict[int, Row], rival: str, student: str = NEAR.name) -> str:
    """Return how much more reverse KL runs added at the tokens of their own answers than those of a live arm; nothing where that was not run."""
    other = found.cell(rival, student) if rival in found.names(student) else {}
    return "" if cell == other or not other else found.paired(cell, other, lambda ours, theirs: moved(ours) - moved(theirs)).show("+.3f")


def _plan(found: Found) -> list[str]:
    size = found.plan
    chosen = "on them, so they are told too good" if size["choice"] is None else f"on seed {size['choice']}, which is not among them"
    return [
        "### What was run",
        "",
        "The teacher is SmolLM2-135M-Instruct, with the weights that a file of 4 bits a weight gives.",
        f"Students are cut from it and fine-tuned on {size['sft_prompts']} of its answers.",
        f"Prompts are questions of TruthfulQA: {size['opd_prompts']} for OPD, {size['held_out']} held out.",
        f"Answers have at most {size['new_tokens']} tokens, and a step {size['batch']} of them.",
        f"Seeds: {len(found.starts())}, each with its own split, students and rollouts.",
        f"Rates, the arm that is run in several forms, the form of the goals and lopd's best live run were chosen {chosen}, by the sum of both KLs.",
        *filter(None, [found.beside_trl()]),
        _edges(found),
        "Intervals are those of Student's t over seeds, paired where two arms are compared.",
        "Seconds are CPU seconds of one thread; a store is sampled and scored in large batches, a live student in batches of a step.",
        "What a part of a store costs was measured on such stores; supports are taken to cost as many times a plain score there.",
        "",
        *_starts(found),
    ]


def _edges(found: Found) -> str:
    """Name the arms whose rate is at an end of the tried ones, so a lower or higher one might have been better."""
    chosen = {name: found.rate(name) for name in found.names() if "(" not in name}
    rates = sorted({row["rate"] for row in found.of("trial")} | {*chosen.values()})
    lists = [", ".join(name for name, rate in chosen.items() if rate == edge) or "not one arm" for edge in (rates[0], rates[-1])]
    tried, last = ", ".join(f"{rate:g}" for rate in rates), " (the last only where the one before it was best)"
    return (
        f"Rates: {tried}{last if found.plan['beyond'] in rates else ''}.  "
        f"At the lowest of them: {lists[0]}; at the highest: {lists[1]}; their best rates may lie outside."
    )


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
    rivals = [name for name in dict.fromkeys((ONLINE.name, found.rival, TRL.name)) if name in found.names(student)]

    def rows() -> Iterator[list[str]]:
        for name in found.names(student):
            cell = found.cell(name, student)
            changed = found.paired(cell, starts, lambda ours, start: kl(ours) - mean_kl(start)).show("+.3f")
            beside = [
                found.paired(cell, online, lambda ours, theirs, k=kind: final(ours, k) - final(theirs, k)).show("+.3f")
                for kind in ("reverse_kl", "forward_kl")
            ]
            own, tokens = found.mean(cell, moved).show("+.3f"), found.mean(cell, length).show(".1f")
            left, ended = (
                found.mean(cell, lambda row: final(row, "forward_kl")).show(),
                found.mean(cell, lambda row: row["curve"][-1]["ended"]),
            )
            compared = ["", ""] if name == ONLINE.name else beside
            seconds = [
                f"{found.mean(cell, lambda row, p=part: cost(row, None, p)).mean:.0f}"
                for part in ("sampling", "scoring", "training", "all")
            ]
            rate = f"{found.rate(name, student):g}"
            paired = [_beside(found, cell, rival, student) for rival in rivals]
            yield [name, rate, changed, compared[0], own, *paired, left, compared[1], tokens, f"{ended.mean:.0%}", *seconds]

    head = [
        "arm",
        "rate",
        "reverse KL minus SFT's",
        "minus online OPD's",
        "at the same tokens",
        *(f"minus that of {rival}" for rival in rivals),
        "forward KL",
        "minus online OPD's",
        "tokens",
        "ended",
        "sampling",
        "scoring",
    ]
    return [
        f"### The {student} student, at the end of every run",
        "",
        "*At the same tokens*: at those of the run's own answers, beside the student after SFT; which answers those are adds no noise there.",
        "So differences there, seed by seed, have less of it than those of the reverse KL; the goals were set on the latter.",
        "",
        *table([*head, "training", "CPU s"], rows()),
    ]


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
