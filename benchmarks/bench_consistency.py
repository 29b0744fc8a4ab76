"""Teacher consistency on the testbed: SFT teacher x OPD teacher, offline and online, and what residualisation makes of a mismatch.

    python benchmarks/bench_consistency.py           # writes benchmarks/results/consistency.json; about ten minutes on two cores
    python benchmarks/bench_consistency.py --report  # its cells and goals again, from its runs

The two teachers write their working in different orders and get the same sums right.  Held-out accuracy is of sampled responses.  The form is
that of table 4 of Lightning OPD (arXiv 2604.13010v2).
"""

import argparse
import json
import os
import statistics
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch
from claims_summary import MARGIN, Interval, as_goal, show_measured
from record import ROOT, describe_machine, judge_again, result_file
from testbed.models import HEALTHY, STYLES, prepare
from testbed.runs import Training, offline, online, scored_rollouts
from testbed.seeds import GUARDS

from lopd import ConsistencyPolicy, FusedOPDLoss, residualise
from lopd.records.estimates import mean

RESULT = ROOT / "benchmarks" / "results" / "consistency.json"
METHODS = ("offline", "offline, ratio to ref", "online", "offline, residual", "offline, residual, ratio to ref")


def run(job: tuple[int, str, str, str, Path]) -> dict[str, Any]:
    """Run one cell of the table for one seed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seed, sft, opd, method, folder = job
    bed = prepare(HEALTHY, seed, folder)
    training = Training.of(bed.students[sft], HEALTHY.opd_lr)
    start = training.accuracy(bed).mean
    loss = FusedOPDLoss(ratio_to_ref="ratio" in method)
    row: dict[str, Any] = {"seed": seed, "sft_teacher": sft, "opd_teacher": opd, "method": method, "accuracy_at_start": start}
    if method == "online":
        steps = online(bed, training, loss, opd)
    else:
        store, policy, teacher = scored_rollouts(bed, sft, opd), ConsistencyPolicy.WARN, "teacher"
        if "residual" in method:
            report = residualise(store)
            row |= {"offset": report.offset, "beyond_before": report.beyond_before, "beyond_after": report.beyond_after}
            policy, teacher = ConsistencyPolicy.RESIDUALISE, "teacher-residual"
        steps = offline(bed, store, training, loss, teacher=teacher, consistency=policy)
    drift = list(steps)[-1].drift
    return {**row, "accuracy": training.accuracy(bed).mean, "ratio_mean_at_end": None if drift is None else drift.ratio_mean}


def build(job: tuple[int, str, Path]) -> None:
    """Build teacher and student of one style and seed."""
    torch.set_num_threads(1)
    seed, style, folder = job
    prepare(HEALTHY, seed, folder, (style,))


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean and the 95 % interval over seeds of every cell, and of its change against SFT."""
    found = []
    for sft, opd, method in product(STYLES, STYLES, METHODS):
        cell = [row for row in rows if (row["sft_teacher"], row["opd_teacher"], row["method"]) == (sft, opd, method)]
        if cell:
            reached, change = mean([r["accuracy"] for r in cell]), mean([r["accuracy"] - r["accuracy_at_start"] for r in cell])
            summary = {
                "sft_teacher": sft,
                "opd_teacher": opd,
                "method": method,
                "seeds": len(cell),
                "accuracy": reached.mean,
                "ci95": reached.ci95,
            }
            found.append(
                {
                    **summary,
                    "change": change.mean,
                    "change_ci95": change.ci95,
                    "start": statistics.mean(r["accuracy_at_start"] for r in cell),
                }
            )
    return found


def goals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answer each question by the interval over seeds of a mean over cells; what must change no cell by that which it changes most."""
    changes: dict[tuple[str, str, str, int], float] = {
        (row["sft_teacher"], row["opd_teacher"], row["method"], row["seed"]): row["accuracy"] - row["accuracy_at_start"] for row in rows
    }
    seeds = sorted({row["seed"] for row in rows})
    same, other = [[pair for pair in product(STYLES, STYLES) if (pair[0] == pair[1]) == alike] for alike in (True, False)]

    def change(method: str, pairs: Sequence[tuple[str, str]], seed: int) -> float:
        return statistics.mean(changes[*pair, method, seed] for pair in pairs)

    found = []
    for ratio in ("", ", ratio to ref"):
        raw, repaired = f"offline{ratio}", f"offline, residual{ratio}"
        gap = Interval.of([change(raw, same, seed) - change(raw, other, seed) for seed in seeds])
        found.append(as_goal(f"{raw}: a consistent teacher gains more than a mismatched one", "> 0", gap, gap.positive))
        gain = Interval.of([change(repaired, other, seed) - change(raw, other, seed) for seed in seeds])
        name = f"{raw}: residualisation repairs the mismatched cells (gain over raw scores)"
        found.append(as_goal(name, "> 0", gain, gain.positive))
        cells = [Interval.of([change(repaired, [pair], seed) - change(raw, [pair], seed) for seed in seeds]) for pair in same]
        most = max(cells, key=lambda moved: abs(moved.mean))
        name = f"{raw}: residualisation leaves the consistent cells alone (change of the one that it changes most)"
        alone = all(moved.at_least(-MARGIN) and moved.at_most(MARGIN) for moved in cells)
        found.append(as_goal(name, f"within {MARGIN:g} of 0", most, alone))
    return found


def measured() -> list[dict[str, Any]]:
    """Return the runs of the result file."""
    return [row for row in json.loads(RESULT.read_text())["rows"] if not row.get("cell")]


def measure(seeds: Sequence[int], workers: int, folder: Path) -> list[dict[str, Any]]:
    """Build the models, and run all cells."""
    rows = []
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(build, [(seed, style, folder) for seed in seeds for style in STYLES]))
        for row in pool.map(run, [(*cell, folder) for cell in product(seeds, STYLES, STYLES, METHODS)]):
            print(row, flush=True)
            rows.append(row)
    return rows


def main() -> None:
    """Run all cells, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "testbed")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = measured() if options.report else measure(GUARDS, options.workers, options.folder)
    cells = summarise(rows)
    found = goals(rows)
    for goal in found:
        print("met   " if goal["met"] else "MISSED", goal["name"], "goal", goal["goal"], "measured", show_measured(goal))
    every = [*({"cell": True, **cell} for cell in cells), *rows]
    if options.report:
        judge_again(RESULT, every, found)
    else:
        result_file(RESULT.stem, describe_machine(), every, found)


if __name__ == "__main__":
    main()
