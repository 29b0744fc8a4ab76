"""The page and the picture of `evidence.py`, out of the rows that it measured."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from claims_summary import Interval, goal_lines
from docs_tables import table
from evidence_arms import ONLINE, SFT, WHOLE
from evidence_bed import FAR, NEAR, Row, mean_kl
from evidence_summary import Found, cost, find_goals, forward, kl, length, shown
from matplotlib.figure import Figure
from record import ROOT, describe_machine, result_file


def publish(rows: list[Row], home: Path) -> None:
    """The result file; the page and its picture, in the docs unless the results are elsewhere."""
    written = result_file("evidence", describe_machine(), rows, find_goals(rows), home)
    pages = ROOT / "docs" if home == ROOT / "benchmarks" / "results" else home
    write_page(written, pages)


def write_page(result: Path, pages: Path) -> Path:
    """`evidence.md` and `evidence.png` in a folder."""
    said = json.loads(result.read_text())
    found = Found(said["rows"])
    draw(pages / "evidence.png", found)
    page = pages / "evidence.md"
    sections = [_head(said, found), _frontier(found), _arms(found, NEAR.name), _arms(found, FAR.name), _LIMITS]
    page.write_text("\n".join(line for section in sections if section for line in (*section, "")).rstrip() + "\n")
    return page


def _head(said: Row, found: Found) -> list[str]:
    goals, machine = said["goals"], ", ".join(f"{name} {value}" for part in ("machine", "versions") for name, value in said[part].items())
    size, seeds = found.plan, sorted(found.starts())
    chosen = f"on seed {size['choice']}, which is not among them" if size["choice"] else "on them, so they are told too good"
    return [
        "# Offline beside online on real weights",
        "",
        *_sentences(found, goals),
        "",
        "| goal | | measured | met |",
        "|---|---|--:|---|",
        *("| " + " | ".join(line) + " |" for line in goal_lines(goals)),
        "",
        f"The teacher is SmolLM2-135M-Instruct; the students are cut from it and fine-tuned on {size['sft_prompts']} of its answers.",
        f"Prompts are questions of TruthfulQA: {size['opd_prompts']} for OPD, {size['held_out']} held out.",
        f"Answers have at most {size['new_tokens']} tokens, and a step {size['batch']} of them.",
        f"Seeds: {len(seeds)}, each with its own split, students and rollouts.",
        f"Rates, the arm that is run in several forms, and the form of the goals were chosen {chosen}.",
        "Intervals are those of Student's t over seeds, paired where two arms are compared.",
        "Seconds are CPU seconds of one thread; a store is sampled and scored in large batches, a live student in batches of a step.",
        "",
        *_starts(found),
        "",
        f"Written by `benchmarks/evidence.py`: commit {said['commit'][:12]}; {machine}.",
    ]


def _sentences(found: Found, goals: list[dict[str, Any]]) -> list[str]:
    """What held, what did not, and what it means."""
    form = found.form()
    held, missed = ([goal["name"] for goal in goals if goal["met"] is met] for met in (True, False))
    stored, live = found.cell(form.arm), found.cell(ONLINE.name)
    share = found.paired(stored, live, lambda ours, theirs: cost(ours, form.step) / cost(theirs))
    gained = found.paired(stored, found.starts(), lambda ours, start: kl(ours, form.step) - mean_kl(start))
    more = found.paired(stored, live, lambda ours, theirs: kl(ours, form.step) - kl(theirs))
    than = "above" if more.positive else "below" if more.negative else "not told apart from"
    moved = f"{shown(form)} of a stored run move a student like this by {gained.show('+.3f')} nats a token, at {share.mean:.0%} of the cost"
    return [
        f"What held: {'; '.join(held) or 'nothing'}.",
        f"What did not: {'; '.join(missed) or 'nothing'}.",
        f"What it means for you: {moved} of online OPD, and it ends {than} that ({more.show('+.3f')}).",
    ]


def _starts(found: Found) -> list[str]:
    """Both students before OPD."""
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


def _frontier(found: Found) -> list[str]:
    """The picture, and its points."""

    def rows() -> Iterator[list[str]]:
        for name in found.pictured():
            cell = found.cell(name)
            for step in steps(cell):
                spent = found.mean(cell, lambda row, at=step: cost(row, at)).show(".0f")
                left = found.mean(cell, lambda row, at=step: kl(row, at)).show()
                yield [name, str(step), spent, left]

    return [
        "## Reverse KL against cost",
        "",
        "![Held-out reverse KL over CPU seconds, for stored and live runs](evidence.png)",
        "",
        *table(["arm", "steps", "CPU s", "held-out reverse KL"], rows()),
    ]


def steps(cell: dict[int, Row]) -> list[int]:
    """At which the runs of a cell were measured."""
    return [point["step"] for point in next(iter(cell.values()))["curve"]]


def _arms(found: Found, student: str) -> list[str]:
    """Every arm at its end."""
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
    return [f"## The {student} student, at the end of every run", "", *table([*head, "training", "CPU s"], rows())]


_LIMITS = [
    "## What this does not show",
    "",
    "- One teacher of 135 million parameters, students that are cut from it, short answers, and runs of few steps.",
    "- Layers before the cut, which compute what the teacher's do, are not trained, nor are embeddings: that makes a step a third cheaper for all.",
    f"- In lopd a live student compares its most likely {WHOLE.support.candidates} tokens, with the residual; in TRL, the whole vocabulary.",
    "- The far student takes over the rates that were chosen for the near one.",
    f"- {SFT.name} has a quarter more steps, as nothing is scored for it.",
]


def draw(path: Path, found: Found) -> None:
    """Reverse KL over cost, means and bands over seeds: every run that was measured on its way, and the forms of the best stored arm."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(float(np.mean([mean_kl(row) for row in found.starts().values()])), color="gray", linestyle="--", linewidth=0.8)
    for name in found.pictured():
        cell = found.cell(name)
        spent = [found.mean(cell, lambda row, at=step: cost(row, at)).mean for step in steps(cell)]
        axes.plot(spent, [found.mean(cell, lambda row, at=step: kl(row, at)).mean for step in steps(cell)], marker="o", label=name)
    axes.set_xlabel("CPU seconds of one thread, sampling and scoring included")
    axes.set_ylabel("held-out reverse KL, nats a token")
    figure.legend(loc="outside right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, transparent=True)
