"""A page of results: parts that begin with three sentences, say each goal in plain words, and end with where their figures are from.

A part is made by the script that knows its result file; `publish.py` has the list of them and writes benchmarks/RESULTS.md.
Words depend on what was measured: nothing here knows a figure.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from attrs import frozen
from claims_summary import show_measured
from docs_tables import table

Goal = Mapping[str, Any]


@frozen
class Reading:
    """What goals with like names say in words.

    Args:
        claim: what they judge; goals of one claim stand together.
        pattern: a regular expression that finds them, by name; its named groups may be used in the words.
        held: what was seen where one is met, a clause that may name `{measured}`.
        missed: likewise, where it is not.
        reason: why it is missed, as far as that is known: whole sentences, said once for the claim; not where it was left open.
        told: which of them the three sentences tell; of the others only the first that was missed, if none of these was: an excluded one before
            one that was left open.
        open: what was seen where one is missed because its interval holds the `{bound}` that it names; as `missed` where it is empty.
    """

    claim: str
    pattern: str
    held: str
    missed: str
    reason: str = ""
    told: str = ""
    open: str = ""

    def find(self, goals: Sequence[Goal]) -> list[Goal]:
        """Return the goals that this reading covers."""
        return [goal for goal in goals if re.search(self.pattern, goal["name"])]

    def say(self, goal: Goal) -> str:
        """Return the clause on one of these goals."""
        named = re.search(self.pattern, goal["name"])
        words = {**(named.groupdict() if named else {}), "measured": show_measured(goal), "bound": goal["goal"].split()[-1]}
        missed = self.open if self.leaves_open(goal) else self.missed
        return (self.held if goal["met"] else missed).format(**words)

    def leaves_open(self, goal: Goal) -> bool:
        """Return whether a goal is neither met nor excluded, and there are words for that."""
        return bool(self.open and not goal["met"] and undecided(goal))

    def tell(self, goals: Sequence[Goal], *, met: bool) -> list[str]:
        """Return the clauses of the three sentences on the goals that were met, or missed."""
        found = [goal for goal in self.find(goals) if goal["met"] == met]
        told = [goal for goal in found if self.told and re.search(self.told, goal["name"])]
        return [self.say(goal) for goal in (told if told or met else sorted(found, key=self.leaves_open)[:1])]


def undecided(goal: Goal) -> bool:
    """Return whether the interval of a goal holds the bound that it names, so that it is neither met nor excluded; one seed has no interval."""
    bound = re.fullmatch(r"[<>]=? (\S+)", goal["goal"])
    if not bound or goal.get("seeds") == 1:
        return bool(bound)
    if "low" in goal:
        return bool(goal["low"] <= float(bound[1]) <= goal["high"])
    return goal["ci95"] is not None and bool(abs(goal["measured"] - float(bound[1])) <= goal["ci95"])


@frozen(eq=False)
class Part:
    """What one benchmark found.

    Args:
        title: its heading; links are made of it, so words and spaces only.
        result: the result file.
        readings: readings of all of its goals, in the order of the page.
        meaning: the third sentence: what it means for the reader.
        sections: lines of Markdown after the goals; headings have three `#` or more.
        pictures: by the name of the file without its ending, what draws them to a path.
        script: the file in benchmarks/ that measured it.
    """

    title: str
    result: Mapping[str, Any]
    readings: Sequence[Reading]
    meaning: str
    sections: Sequence[Sequence[str]]
    pictures: Mapping[str, Callable[[Path], None]]
    script: str

    def __attrs_post_init__(self) -> None:
        for goal in self.result["goals"]:
            if (times := sum(bool(reading.find([goal])) for reading in self.readings)) != 1:
                raise ValueError(f"{self.title}: goal {goal['name']!r} has {times} readings, expected 1.")

    def sentences(self) -> list[str]:
        """Return what held, what did not, what it means."""
        goals = self.result["goals"]
        lists = {met: [clause for reading in self.readings for clause in reading.tell(goals, met=met)] for met in (True, False)}
        counts = f"{sum(goal['met'] for goal in goals)} of {len(goals)} goals"
        said = {met: "; ".join(clauses) or "nothing" for met, clauses in lists.items()}
        return [f"- **What held** ({counts}): {said[True]}.", f"- **What did not:** {said[False]}.", f"- **For you:** {self.meaning}"]

    def goals(self) -> Iterator[str]:
        """Yield every goal in plain words, by claim; and why the missed ones were missed."""
        for claim, readings in groupby(self.readings, lambda reading: reading.claim):
            found = [(reading, goal) for reading in readings for goal in reading.find(self.result["goals"])]
            if not found:
                continue
            met = sum(goal["met"] for _, goal in found)
            signs = ("✓ held" if goal["met"] else "? open" if reading.leaves_open(goal) else "✗ missed" for reading, goal in found)
            rows = ([sign, reading.say(goal), goal["goal"]] for sign, (reading, goal) in zip(signs, found, strict=True))
            yield from (f"**{claim}**: {met} of {len(found)} goals met.", "")
            yield from (*table(("", "what was found", "wanted"), rows, 3), "")
            reasons = dict.fromkeys(reading.reason for reading, goal in found if reading.reason and not goal["met"] and not undecided(goal))
            yield from ("Why: " + " ".join(reasons), "") if reasons else ()

    def draw(self, folder: Path) -> None:
        """Write its pictures."""
        for name, draw in self.pictures.items():
            draw(folder / f"{name}.png")


def make_page(title: str, parts: Sequence[Part]) -> str:
    """Return the page: the sentences of all parts, then the parts one below the other, and at the end the sources."""
    lines = [f"# {title}", ""]
    for part in parts:
        lines += [f"[{part.title}](#{anchor(part.title)}):", "", *part.sentences(), ""]
    for part in parts:
        lines += [f"## {part.title}", "", *part.goals()]
        lines += [line for section in part.sections if section for line in (*section, "")]
    lines += ["## Where the figures are from", "", *table(_SOURCES, map(_source, parts), len(_SOURCES))]
    return "\n".join(lines) + "\n"


def anchor(title: str) -> str:
    """Return the anchor of a heading of words and spaces."""
    return title.lower().replace(" ", "-")


_SOURCES = ("part", "measured by", "commit", "machine", "versions")


def _source(part: Part) -> list[str]:
    found = part.result
    machine, versions = (", ".join(f"{name} {value}" for name, value in found[key].items()) for key in ("machine", "versions"))
    return [part.title, f"`benchmarks/{part.script}`", found["commit"][:12], machine, versions]


#: Makes a part of a result file, with links to pictures in a folder.
Maker = Callable[[Mapping[str, Any], str], Part]
