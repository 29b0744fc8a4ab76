"""Write benchmarks/RESULTS.md, its pictures, and the README's words on it, out of benchmarks/results/*.json: nothing is measured here.

python benchmarks/publish.py     # half a minute
"""

from functools import partial

from claims_estimators_report import estimators_part
from claims_report import claims_part, readme_table
from docs_tables import FAILS, RESULTS, WORKS, read
from record import ROOT, fill
from results_page import Maker, Part, make_page

PAGE, TITLE = ROOT / "benchmarks" / "RESULTS.md", "What holds, and what does not"
#: The parts of the page, in its order, by result file; one that was not measured yet is left out.
PARTS: dict[str, Maker] = {
    "claims": partial(claims_part, claim=WORKS, fall=FAILS),
    "claims_estimators": partial(estimators_part, claim=WORKS, fall=FAILS),
}


def parts() -> list[Part]:
    """Those that were measured."""
    return [make(read(name), "../docs") for name, make in PARTS.items() if (RESULTS / f"{name}.json").exists()]


def publish() -> None:
    """Write and draw all of it."""
    found = parts()
    PAGE.write_text(make_page(TITLE, found))
    for part in found:
        part.draw(ROOT / "docs")
    fill(ROOT / "README.md", "claims sentences", found[0].sentences())
    fill(ROOT / "README.md", "claims", readme_table(read("claims")["rows"], WORKS, FAILS))


if __name__ == "__main__":
    publish()
