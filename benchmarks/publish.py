"""Write benchmarks/RESULTS.md, its pictures, its first sentences on the first page, and those on the quickstart, out of the result files.

Nothing is measured here; goals are judged again, out of the rows of their files.

python benchmarks/publish.py     # half a minute
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import claims_estimators_report
import claims_long_report
import claims_summary
import evidence_summary
import quickstart_seeds
import record_quickstart
from claims_estimators_report import estimators_part
from claims_long_report import long_part
from claims_report import claims_part
from docs_tables import DOCS, FAILS, RESULTS, WORKS, read
from evidence_report import evidence_part
from record import ROOT, fill, judge_again
from results_page import Maker, Part, make_page

PAGE, TITLE = ROOT / "benchmarks" / "RESULTS.md", "What holds, and what does not"


def _estimators_part(result: Mapping[str, Any], folder: str) -> Part:
    return estimators_part(result, folder, claim=WORKS, fall=FAILS, claims=read("claims")["rows"])


#: The parts of the page, in its order, by result file; one that was not measured yet is left out.
PARTS: dict[str, Maker] = {
    "claims": partial(claims_part, claim=WORKS, fall=FAILS),
    "claims_estimators": _estimators_part,
    "claims_long": long_part,
    "evidence": evidence_part,
}
#: What judges the goals of each, out of its rows.
JUDGES: dict[str, Callable[[Sequence[dict[str, Any]]], list[dict[str, Any]]]] = {
    "claims": partial(claims_summary.find_goals, claim=WORKS, fall=FAILS),
    "claims_estimators": partial(claims_estimators_report.find_goals, claim=WORKS, fall=FAILS),
    "claims_long": claims_long_report.find_goals,
    "evidence": evidence_summary.find_goals,
    "quickstart": lambda rows: record_quickstart.goals(record_quickstart.recorded(rows)),
    "quickstart_seeds": quickstart_seeds.find_goals,
}


def measured() -> list[str]:
    """Return the names of those that were measured."""
    return [name for name in PARTS if (RESULTS / f"{name}.json").exists()]


def parts() -> list[Part]:
    """Return the parts that were measured."""
    return [PARTS[name](read(name), "../docs") for name in measured()]


def publish() -> None:
    """Judge, write and draw all of it."""
    for name, judge in JUDGES.items():
        if (path := RESULTS / f"{name}.json").exists():
            rows = read(name)["rows"]
            judge_again(path, rows, judge(rows))
    found = parts()
    PAGE.write_text(make_page(TITLE, found))
    for part in found:
        part.draw(DOCS)
    record_quickstart.publish()
    fill(DOCS / "index.md", "claims sentences", [line.replace("](../docs/", "](") for line in found[0].sentences()])


if __name__ == "__main__":
    publish()
