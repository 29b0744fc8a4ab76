"""Should a run go offline?  Pairs of teacher and student: what is known of each before its first step, beside what came out.

    python benchmarks/pairs.py               # benchmarks/results/pairs.json and its plot; about an hour on one core
    python benchmarks/pairs.py --minutes 5   # only what begins in the next five minutes; call again to go on
    python benchmarks/pairs.py --quick       # two pairs, one seed, into runs/pairs-quick; two minutes
    python benchmarks/pairs.py --report      # goals and plot again, from the file

Every piece that is done is a file in the folder, so a killed run goes on where it was.
"""

import argparse
import json
import re
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pairs_made import REAL, SUMS, Spec
from pairs_report import draw, find_goals
from pairs_runs import DRAWN, ONLINE_DRAWN, Pair, Row, run_arm, run_start
from phases import write_json
from record import ROOT, describe_machine, result_file
from transformers.utils.logging import disable_progress_bar

from lopd.records import RolloutSums

RESULT, PLOT = ROOT / "benchmarks" / "results" / "pairs.json", ROOT / "docs" / "bench_pairs.png"
#: Seeds on which nothing was chosen.
SUMS_SEEDS, REAL_SEEDS = range(200, 203), range(200, 201)
QUICK = SUMS[3:5]

Unit = tuple[Spec, int]


def plan(*, quick: bool) -> list[Unit]:
    """Pairs and their seeds, in the order in which they are run."""
    if quick:
        return [(spec, SUMS_SEEDS[0]) for spec in QUICK]
    first, *others = SUMS_SEEDS
    sums = [(spec, seed) for seed in others for spec in SUMS]
    return [*((spec, first) for spec in SUMS), *((spec, seed) for seed in REAL_SEEDS for spec in REAL), *sums]


def pieces(units: Sequence[Unit], folder: Path) -> Iterator[Path]:
    """Do what is not done, piece by piece; the file of each is given when it is there."""
    for spec, seed in units:
        home = folder / "found" / _slug(f"{spec.name} {seed}")
        made: list[Pair] = []
        work = {"SFT": run_start, **{arm.name: partial(_with_arm, arm) for arm in spec.arms}}
        for name, run in work.items():
            path = home / f"{_slug(name)}.json"
            if not path.exists():
                made = made or [spec.build(seed, folder)]
                write_json(path, run(made[0], home))
            yield path


def _with_arm(arm: Any, pair: Pair, home: Path) -> Row:
    return run_arm(pair, arm, home)


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def row_of(spec: Spec, seed: int, found: dict[str, Row]) -> Row:
    """A row of the results: every diagnostic, and what each arm came to."""
    start = found.pop("SFT")
    known, before = start["known"], _sums(start)
    diagnostics = {
        "reverse_kl": known["reverse_kl"]["mean"],
        **{f"overlap{k}": known["overlap"][k]["mean"] for k in sorted(known["overlap"], key=int)},
        "outside": known["outside"][1]["mean"],
        "tail": known["advantages"]["tail"],
        **dict(zip(("size50", "size90", "size99"), known["sizes"], strict=False)),
        "heaviest": known["heaviest"],
    }
    arms = {name: _against(_sums(row), before) | _accuracy(row) | {"cpu_s": row["cpu_s"]} for name, row in found.items()}
    once, live = (_sums(found[arm.name]) for arm in (DRAWN, ONLINE_DRAWN))
    gap = once.minus(live)
    identity = {"kind": spec.kind, "pair": spec.name, "seed": seed, "sft_steps": spec.sft_steps}
    return {
        **identity,
        "verdict": known["verdict"],
        **diagnostics,
        "held_out_kl": before.per_token().mean,
        **_accuracy(start),
        **{f"teacher_{name}": value for name, value in _accuracy(start.get("teacher", {})).items()},
        "above_live": gap.mean,
        "above_live_ci95": gap.ci95,
        "arms": arms,
    }


def _sums(row: Row) -> RolloutSums:
    return RolloutSums(np.array(row["sums"]), np.array(row["counts"]))


def _accuracy(row: Row) -> Row:
    return {"accuracy": float(np.mean(row["right"]))} if "right" in row else {}


def _against(after: RolloutSums, before: RolloutSums) -> Row:
    kl, change = after.per_token(), after.minus(before)
    return {"held_out_kl": kl.mean, "ci95": kl.ci95, "change": change.mean, "change_ci95": change.ci95}


def main() -> None:
    """Run what is missing; when nothing is, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true", help="only goals and plot again, from results/pairs.json")
    parser.add_argument("--kind", choices=("sums", "real"), help="only run pairs of this kind, and write nothing")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after so many")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "pairs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    result, plot = (ROOT / "runs" / "pairs-quick" / path.name if options.quick else path for path in (RESULT, PLOT))
    if options.report:
        kept = json.loads(result.read_text())
        kept["goals"] = find_goals(kept["rows"])
        result.write_text(json.dumps(kept, indent=1) + "\n")
    else:
        units, begun = plan(quick=options.quick), time.monotonic()
        units = [unit for unit in units if options.kind in {None, unit[0].kind}]
        total = sum(1 + len(spec.arms) for spec, _ in units)
        for done, path in enumerate(pieces(units, options.folder), 1):
            print(f"{done} of {total}: {path.parent.name}, {path.stem}", flush=True)
            if time.monotonic() - begun > 60 * options.minutes and done < total:
                print("Call again to go on.")
                raise SystemExit(3)
        if options.kind:
            return
        rows = [row_of(*unit, collect(unit, options.folder)) for unit in units]
        result_file(result.stem, describe_machine(), rows, find_goals(rows), result.parent)
    draw(json.loads(result.read_text())["rows"], plot)


def collect(unit: Unit, folder: Path) -> dict[str, Row]:
    """Everything that was found of a pair and a seed."""
    found = [json.loads(path.read_text()) for path in pieces([unit], folder)]
    return {row["arm"]: row for row in found}


if __name__ == "__main__":
    main()
