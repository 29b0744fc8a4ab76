"""Should a run go offline?  Pairs of teacher and student: what is known of each before its first step, beside what came out.

    python benchmarks/pairs.py            # benchmarks/results/pairs.json and docs/bench_pairs.png; about an hour on one core
    python benchmarks/pairs.py --quick    # two pairs, one seed, into runs/pairs-quick; three minutes
    python benchmarks/pairs.py --report   # its goals and the picture again, from its rows

Every piece that is done is a file in runs/pairs, so a killed run that is called again goes on where it was, if the commit is the same.
"""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pairs_claims
import torch
from pairs_made import REAL, SUMS, Spec
from pairs_report import draw, find_goals
from pairs_runs import DRAWN, ONLINE_DRAWN, Pair, Row, run_arm, run_start
from record import ROOT, commit, describe_machine, judge_again, result_file
from testbed.seeds import PAIRS
from transformers.utils.logging import disable_progress_bar

from lopd.records import RolloutSums
from lopd.tools.phases import write_json

RESULT, PLOT = ROOT / "benchmarks" / "results" / "pairs.json", ROOT / "docs" / "bench_pairs.png"
QUICK = SUMS[3:5]

Unit = tuple[Spec, int]


def plan(*, quick: bool) -> list[Unit]:
    """Return pairs and their seeds, in the order in which they are run."""
    if quick:
        return [(spec, PAIRS[0]) for spec in QUICK]
    first, *others = PAIRS
    sums = [(spec, seed) for seed in others for spec in SUMS]
    return [*((spec, first) for spec in (*SUMS, *REAL)), *sums]


def files(unit: Unit, folder: Path) -> dict[str, Path]:
    """Return the files of the results of a pair and a seed, by arm."""
    spec, seed = unit
    home = folder / f"found-{commit()}" / _slug(f"{spec.name} {seed}")
    return {name: home / f"{_slug(name)}.json" for name in ("SFT", *(arm.name for arm in spec.arms))}


def run(unit: Unit, folder: Path) -> Iterator[Path]:
    """Do what is not done; the file of each piece is given when it is there."""
    (spec, seed), made, arms = unit, list[Pair](), {arm.name: arm for arm in unit[0].arms}
    for name, path in files(unit, folder).items():
        if not path.exists():
            made = made or [spec.build(seed, folder)]
            write_json(path, run_arm(made[0], arms[name], path.parent) if name in arms else run_start(made[0], path.parent))
        yield path


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def rows_of(units: Sequence[Unit], folder: Path) -> list[Row]:
    """Return the result rows of the units that are finished."""
    rows = []
    for unit in units:
        found = files(unit, folder)
        if all(path.exists() for path in found.values()):
            rows.append(row_of(*unit, {name: json.loads(path.read_text()) for name, path in found.items()}))
    return rows


def row_of(spec: Spec, seed: int, found: dict[str, Row]) -> Row:
    """Return a row of the results: every diagnostic, and what each arm reached."""
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


def goals_of(rows: Sequence[Row]) -> list[Row]:
    """Judge every goal, those of the starts of the claims included."""
    return [*find_goals(rows), *pairs_claims.find_goals(json.loads(RESULT.with_name("claims.json").read_text())["rows"])]


def main() -> None:
    """Run what is missing, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    result, plot = (ROOT / "runs" / "pairs-quick" / path.name if options.quick else path for path in (RESULT, PLOT))
    if options.report:
        rows = json.loads(result.read_text())["rows"]
        judge_again(result, rows, goals_of(rows))
    else:
        units, folder = plan(quick=options.quick), ROOT / "runs" / "pairs"
        for unit in units:
            for path in run(unit, folder):
                print(path.parent.name, path.stem, flush=True)
        rows = rows_of(units, folder)
        result_file(result.stem, describe_machine(), rows, goals_of(rows), result.parent)
    draw(rows, plot)


if __name__ == "__main__":
    main()
