"""Write benchmarks/RESULTS.md, its pictures, and its first sentences on the first page, out of benchmarks/results/*.json.

Nothing is measured here.

python benchmarks/publish.py     # half a minute
"""

from functools import partial

from claims_estimators_report import estimators_part
from claims_long_report import long_part
from claims_report import claims_part
from docs_tables import DOCS, FAILS, RESULTS, WORKS, read
from evidence_report import evidence_part
from record import ROOT, fill
from results_page import Maker, Part, make_page

PAGE, TITLE = ROOT / "benchmarks" / "RESULTS.md", "What holds, and what does not"
#: The parts of the page, in its order, by result file; one that was not measured yet is left out.
PARTS: dict[str, Maker] = {
    "claims": partial(claims_part, claim=WORKS, fall=FAILS),
    "claims_estimators": partial(estimators_part, claim=WORKS, fall=FAILS),
    "claims_long": long_part,
    "evidence": evidence_part,
}


def parts() -> list[Part]:
    """Return the parts that were measured."""
    return [make(read(name), "../docs") for name, make in PARTS.items() if (RESULTS / f"{name}.json").exists()]


def publish() -> None:
    """Write and draw all of it."""
    found = parts()
    PAGE.write_text(make_page(TITLE, found))
    for part in found:
        part.draw(DOCS)
    fill(DOCS / "index.md", "claims sentences", [line.replace("](../docs/", "](") for line in found[0].sentences()])


if __name__ == "__main__":
    publish()
