"""The part of RESULTS.md on long responses: goals, tables, words and a plot, out of what `claims_long.py` measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from claims_summary import (
    ENDS,
    MARGIN,
    NO_WORSE,
    TIMES,
    Interval,
    Ratio,
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
    started,
    taught,
)
from docs_tables import table
from pictures import band, label_ends, panels, rule, save
from results_page import Part, Reading
from testbed.arms import ONLINE, PLAIN, RATIO
from testbed.long_arms import BEST, BEST_LIVE, LIVE, STORED
from testbed.trl_peer import ARM as TRL

TITLE = "What a store saves where responses are long"
#: Share of the limit that is to be reached.
OF_LIMIT = 0.85
_PARTS = ("sampling", "scoring", "training", "all")


@frozen(eq=False, slots=False)
class Found:
    """What was measured.

    Args:
        rows: all of them.
        setting: whose runs are read.
    """

    rows: Sequence[Row]
    setting: str

    @cached_property
    def runs(self) -> Runs:
        """Every run."""
        return Runs.of(self.rows)

    @property
    def names(self) -> list[str]:
        """Arms that were run, the live ones first."""
        known = [*(arm.name for arm in LIVE), TRL, *(arm.name for arm in STORED)]
        return [name for name in known if self.cell(name)]

    def cell(self, name: str) -> dict[int, Row]:
        """Return the runs of an arm by seed."""
        return self.runs.where(self.setting, name)

    def beside(self, name: str, other: str, value: Callable[[Row], float] = accuracy) -> Interval:
        """Return how much more accurate one ends than another, or how much more it has of another value."""
        return self.runs.difference(self.cell(name), self.cell(other), value)

    def times(self, online: str, name: str, at: str) -> Ratio:
        """Return how many times as much as an arm online OPD costs."""
        return ratios(self.runs, self.setting, online, name)[at]

    def of_limit(self, online: str, name: str, at: str) -> Ratio:
        """Return what an arm saves as a share of what it would with a store that costs nothing, seed by seed.

        Training of online OPD counts as dear as the arm's: what rounds cost it does not come of a store.  At equal steps this is the share
        of training in what the arm costs, so never above 1; at equal accuracy it may be, where the arm needs fewer steps.
        """
        mine = {seed: row["cpu_s"]["training"] / spent(self.cell(online)[seed]) for seed, row in self.cell(name).items()}
        one = [ratios(Runs([r for r in self.runs.rows if r["seed"] == seed]), self.setting, online, name)[at].mean for seed in mine]
        return Ratio.of([times * share for times, share in zip(one, mine.values(), strict=True)])


def over_training(row: Row) -> float:
    """Return how many times as much a run costs as its training alone."""
    return float(row["cpu_s"]["all"] / row["cpu_s"]["training"])


def find_goals(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Judge every goal: against live teachers, and against the limit of online OPD with the same loss and support."""
    found, goals = Found(rows, _setting(rows)["name"]), []
    for other in (BEST_LIVE.name, ONLINE.name, TRL):
        gain, more = found.runs.mean(found.cell(other), change), found.beside(BEST.name, other)
        goals.append(as_goal(f"{other} gains over SFT, accuracy", "> 0", gain, gain.positive))
        goals.append(as_goal(f"{BEST.name}, minus {other}: accuracy", NO_WORSE, more, more.at_least(-MARGIN)))
    for other in (BEST_LIVE.name, TRL):
        times = found.times(other, BEST.name, "equal accuracy")
        goals.append(as_goal(f"{other} over {BEST.name}, cost at equal accuracy", f">= {TIMES:g}", times, times.at_least(TIMES)))
    for at in ("equal accuracy", "equal steps"):
        share = found.of_limit(BEST_LIVE.name, BEST.name, at)
        goals.append(
            as_goal(f"cost at {at} as a share of the limit, training counted alike", f">= {OF_LIMIT}", share, share.at_least(OF_LIMIT))
        )
    return goals + [no_fall(arm.name, found.runs, cell) for arm in STORED if (cell := found.cell(arm.name))]


def _setting(rows: Sequence[Row]) -> Row:
    """Return the setting that was run."""
    return next(row for row in rows if row["kind"] == "setting")


def long_part(result: Mapping[str, Any], folder: str) -> Part:
    """Make the part of the page that reports `claims_long.json`, with its picture in a folder."""
    setting = _setting(result["rows"])
    found = Found(result["rows"], setting["name"])
    pictures = {"claims_long": partial(_draw, found=found)}
    lines = [
        *_task(found, setting),
        "",
        *table(("", *ENDS, f"minus {BEST_LIVE.name}", "its KL, likewise"), _ends(found)),
        "",
        "The KL is the reverse one to the teacher over the whole vocabulary, in nats a token, on fresh responses to the held-out prompts.",
        "",
        "Costs are CPU seconds of one thread for the whole OPD stage.  The last columns say how many times as much as each arm",
        f"*{BEST_LIVE.name}* costs: at equal steps, and until both have the accuracy with which the worse of them ends.",
        "They are geometric means.",
        "A curve has few points and rises by less than a tenth, so figures at equal accuracy have wide intervals; those at equal steps have not.",
        'Where an arm ended no higher than SFT with one of the seeds, there was nothing to reach: "below SFT".',
        "",
        *table(("", *_PARTS, "equal steps", "equal accuracy"), _costs(found)),
        "",
        f"![Gain in accuracy against CPU seconds]({folder}/claims_long.png)",
    ]
    sections = [lines, ["### What the limit is, and what moves it", "", *_limits(found)]]
    return Part(TITLE, result, _readings(found), _meaning(found), sections, pictures, "claims_long.py")


def _readings(found: Found) -> list[Reading]:
    tail = float(np.mean([row["tail"] for row in found.cell(PLAIN.name).values()] or [0.0]))
    return [
        Reading(
            "Live teachers improve on SFT",
            r"^(?P<arm>.+) gains over SFT",
            "*{arm}* gains {measured} in accuracy over SFT",
            "*{arm}* falls below SFT ({measured})",
            "One sampled token shows little of where mass should go, and steps are few and small here; a support shows more at each token.",
            told=".",
            open="*{arm}* gains nothing over SFT that could be told from chance ({measured})",
        ),
        Reading(
            f"The stored arm (*{BEST.name}*) ends at most {MARGIN:g} below live teachers",
            r"^.+, minus (?P<peer>.+): accuracy$",
            f"the stored arm ends at most {MARGIN:g} below *{{peer}}* ({{measured}})",
            f"the stored arm ends more than {MARGIN:g} below *{{peer}}* ({{measured}})",
            "Stored states are those of the SFT student, and the arm goes through few of them several times.",
            told=".",
            open=f"the stored arm was not shown to end at most {MARGIN:g} below *{{peer}}* ({{measured}})",
        ),
        Reading(
            "The stored arm costs a fraction of them",
            r"^(?P<peer>.+) over .+, cost at equal accuracy$",
            "*{peer}* costs {measured} times as much at equal accuracy",
            "*{peer}* costs only {measured} times as much at equal accuracy",
            told=".",
            open="*{peer}* was not shown to cost {bound} times as much at equal accuracy ({measured})",
        ),
        Reading(
            f"What it saves beside *{BEST_LIVE.name}* is most of what a store can save",
            r"^cost at (?P<what>.+) as a share of the limit, training counted alike$",
            "with training counted alike it saves {measured} of what a store can save at {what}",
            "with training counted alike it saves only {measured} of what a store can save at {what}",
            told=".",
            open="with training counted alike it was not shown to save {bound} of what a store can save at {what} ({measured})",
        ),
        Reading(
            f"No stored arm falls more than {MARGIN:g} below SFT",
            r"^(?P<arm>.+) does not fall more than .+ below SFT$",
            f"*{{arm}}* ends at most {MARGIN:g} below SFT ({{measured}})",
            f"*{{arm}}* falls more than {MARGIN:g} below SFT ({{measured}})",
            f"That is not for the tail of its advantages: {tail:.1%} of them are below -5 nats before training.",
            told=f"^({PLAIN.name}|{RATIO.name}) does",
            open=f"*{{arm}}* was not shown to end at most {MARGIN:g} below SFT ({{measured}})",
        ),
    ]


def _meaning(found: Found) -> str:
    """Return the third sentence."""
    sampling = found.runs.mean(found.cell(BEST_LIVE.name), lambda row: row["cpu_s"]["sampling"] / row["cpu_s"]["all"])
    times, more = found.times(BEST_LIVE.name, BEST.name, "equal steps"), found.beside(BEST.name, BEST_LIVE.name)
    return (
        f"the larger the share of decoding, the more a store saves: it was {sampling.show('.2f')} of the bill of *{BEST_LIVE.name}*, which cost "
        f"{times.show('.2f')} times as much at equal steps as *{BEST.name}*, which ended {more.show('+.3f')} beside it."
    )


def _task(found: Found, setting: Row) -> list[str]:
    online = found.cell(ONLINE.name)
    sft = found.runs.mean(online, lambda row: row["start"]).show()
    teacher = Interval.of([row["accuracy"] for row in found.rows if row["kind"] == "teacher"]).show()
    sizes = [f"{layers} layers of {hidden}" for hidden, layers in (setting["teacher_size"], setting["student_size"])]
    return [
        f"Products of a number of {setting['digits']} digits and one of {setting['digits'] - 1}, with their working",
        f"(`benchmarks/testbed/products.py`): responses have {setting['max_new_tokens']} tokens, and a slip in any of them can spoil the result.",
        f"{len(online)} seeds, each with its own problems, teacher and student.",
        f"The teacher ({sizes[0]}) is right in {teacher} of what it samples, the SFT student ({sizes[1]}) in {sft}.",
        f"{setting['opd_steps']} steps of {setting['batch']} rollouts, so few that decoding is most of online OPD's bill, as it is with",
        "large models.  Sizes, lengths, one rate for all arms and the arm of the goals come from trials on other seeds.",
    ]


def _ends(found: Found) -> Iterator[list[str]]:
    yield ["SFT", *started(found.cell(ONLINE.name)), "", ""]
    for name in found.names:
        beside = [found.beside(name, BEST_LIVE.name, value).show("+.3f") for value in (accuracy, reverse_kl)]
        yield [name, *ended(found.cell(name)), *(["", ""] if name == BEST_LIVE.name else beside)]
    yield ["the teacher", *taught(found.rows, found.setting), "", ""]


def _costs(found: Found) -> Iterator[list[str]]:
    for name in found.names:
        split = [found.runs.mean(found.cell(name), lambda row, part=part: row["cpu_s"][part]).show(".1f") for part in _PARTS]
        times = [found.times(BEST_LIVE.name, name, at).show(".2f") for at in ("equal steps", "equal accuracy")]
        yield [name, *split, *(["1", "1"] if name == BEST_LIVE.name else times)]


def _limits(found: Found) -> list[str]:
    """Return lines on what the limit is, and what moves it."""
    splits = [row for row in found.rows if row["kind"] == "split"]
    names = dict.fromkeys(row["arm"] for row in splits)

    def lines() -> Iterator[list[str]]:
        for name in names:
            cell = {row["seed"]: row for row in splits if row["arm"] == name}
            shares = [
                found.runs.mean(cell, lambda row, part=part: row["cpu_s"][part] / row["cpu_s"]["all"]).show(".2f") for part in _PARTS[:3]
            ]
            yield [
                name,
                *shares,
                found.runs.mean(cell, lambda row: row["cpu_s"]["all"]).show(".2f"),
                found.runs.mean(cell, over_training).show(".2f"),
            ]

    pairs = [(row, found.cell(BEST_LIVE.name)[seed]) for seed, row in found.cell(BEST.name).items()]
    own = Ratio.of([stored["cpu_s"]["training"] / online["cpu_s"]["training"] for stored, online in pairs])
    alike = [(spent(online) - online["cpu_s"]["training"] + stored["cpu_s"]["training"], stored) for stored, online in pairs]
    bare = Ratio.of([online / spent(stored) for online, stored in alike])
    most = Ratio.of([online / stored["cpu_s"]["training"] for online, stored in alike])
    near = [
        f"{next(iter(found.cell(arm.name).values()))['stored_rollouts']} rollouts "
        f"{found.of_limit(BEST_LIVE.name, arm.name, 'equal steps').show('.2f')}"
        for arm in STORED
        if arm.support == BEST.support and found.cell(arm.name)
    ]
    return [
        "A store saves sampling and scoring, never training.  Training is all that is neither sampling nor scoring; online it has in it what a round",
        "costs: at every step a store and a plan are made.  A stored run makes them once, and its training is",
        f"{own.show('.2f')} of that of *{BEST_LIVE.name}*.",
        "That does not come of a store, so the limit counts training alike: if online's cost what the stored arm's does, it would cost",
        f"{bare.show('.2f')} times as much as the stored arm",
        f"at equal steps, and {most.show('.2f')} times as much as one whose store cost nothing, which is the limit.",
        "How near to the limit a store gets depends on how often it goes through its rollouts; shares at equal steps, with",
        f"{'; '.join(near)}.",
        f"What moves the limit, each changed alone: shares of a step of *{BEST_LIVE.name}*, its CPU seconds, and all of it over its training.",
        "",
        *table(("", "sampling", "scoring", "training", "CPU s a step", "all over training"), lines()),
    ]


def _draw(path: Path, found: Found) -> None:
    """Draw the gain over seconds, of stores and of live teachers."""
    figure, (axes,) = panels(1, 1, height=4.5)
    for name in [name for name in (ONLINE.name, BEST_LIVE.name, TRL, RATIO.name, BEST.name) if found.cell(name)]:
        curves = np.array([row["curve"] for row in found.cell(name).values()])
        band(axes, curves[:, :, 2].mean(0), curves[:, :, 1] - curves[:, :1, 1], name, line="--" if name == BEST_LIVE.name else "-")
    rule(axes, y=0)
    axes.set(title="Gain in accuracy over SFT, sampled", xlabel="CPU seconds of the OPD stage")
    label_ends(axes)
    save(figure, path)
