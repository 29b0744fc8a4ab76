"""What the probes of models cost in the quickstart: `make bench-probes` runs it with a clock around each, and writes benchmarks/results/probes.json.

A model is probed when a source, a scorer or a student is made around it; a run that is there already, and is only resumed, makes too few of them.
"""

import runpy
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from time import perf_counter
from typing import Any

from record import ROOT, describe_machine, result_file

from lopd.engines import student
from lopd.engines.hf import scorer, source

#: Share of the whole run that the probes may take.
LIMIT = 0.02
#: Where the names are that are called.
PROBES = {
    "scoring": [(source, "check_scoring"), (scorer, "check_scoring")],
    "sampling": [(source, "check_sampling")],
    "training": [(student, "check_training")],
    "export": [(student, "check_exportable")],
}


def clocked(probe: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """Wrap a probe so that each call appends its seconds."""

    def call(*arguments: Any, **named: Any) -> Any:
        started = perf_counter()
        found = probe(*arguments, **named)
        seconds.append(perf_counter() - started)
        return found

    return call


def main() -> None:
    """Run the quickstart from its beginning in a folder of its own, and write what was seen."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for ability, places in PROBES.items():
        for module, name in places:
            setattr(module, name, clocked(getattr(module, name), seconds[ability]))
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["quickstart.py", "--out", folder]
        started = perf_counter()
        sys.path.insert(0, str(ROOT / "examples"))
        runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")
        total = perf_counter() - started
    rows = [{"ability": ability, "calls": len(times), "seconds": sum(times), "longest_s": max(times)} for ability, times in seconds.items()]
    share = sum(row["seconds"] for row in rows) / total
    goal = f"the probes take at most {LIMIT:.0%} of the quickstart"
    goals = [{"name": "probes", "goal": goal, "measured": share, "met": share <= LIMIT}]
    for row in [*rows, {"total_s": total, "share": share}]:
        print(row)
    print("written:", result_file("probes", describe_machine(), rows, goals))


if __name__ == "__main__":
    main()
