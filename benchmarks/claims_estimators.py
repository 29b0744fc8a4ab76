"""Can a store do what a live teacher does?  Estimators of the reverse KL on the testbed of the claims, beside online OPD and TRL.

    python benchmarks/claims_estimators.py           # benchmarks/results/claims_estimators.json, and its part of benchmarks/RESULTS.md
    python benchmarks/claims_estimators.py --report  # that part again, from the file
    python benchmarks/claims_estimators.py --quick   # two seeds and few arms; writes to runs/claims-quick
    python benchmarks/claims_estimators.py --seeds 100 101   # others: for choosing; likewise

Seeds, models, prompts, batch, rate and steps are those of `claims.py`.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import claims
from attrs import asdict
from claims_estimators_report import estimators_part, find_goals
from publish import publish
from record import ROOT, describe_machine, result_file
from results_page import make_page
from testbed.estimator_arms import BEST, FALLEN, FAST, FASTER, LIVE, STORED, faster
from testbed.models import STYLES
from testbed.seeds import CLAIMS
from testbed.trl_peer import ARM as TRL

RESULT = ROOT / "benchmarks" / "results" / "claims_estimators.json"
SETTINGS = (claims.CLAIM, claims.FALL)


def runs(seed: int, folder: Path, *, quick: bool) -> list[claims.Job]:
    """Return a job for every run of a seed."""
    arms = (*LIVE, BEST) if quick else (*LIVE, *STORED, *FAST)
    jobs: list[claims.Job] = [partial(claims.one, claims.CLAIM, seed, folder, arm, curve=claims.CURVE) for arm in arms]
    jobs += [partial(claims.against_trl, seed, folder)]
    if quick:
        return jobs
    jobs += [partial(claims.against_trl, seed, folder, rate=FASTER, name=faster(TRL))]
    return jobs + [partial(claims.one, claims.FALL, seed, folder, arm) for arm in FALLEN]


def measure(seeds: Sequence[int], folder: Path, workers: int, home: Path, *, quick: bool) -> Path:
    """Build the models, run all jobs, and write the result file into a folder."""
    builds = [partial(claims.build, [setting], seed, folder, STYLES[:1]) for seed in seeds for setting in SETTINGS[: 1 if quick else None]]
    rows: claims.Rows = [{"kind": "setting", **asdict(setting)} for setting in SETTINGS]
    rows += claims.run_all(builds, claims.turned([runs(seed, folder, quick=quick) for seed in seeds]), workers)
    return result_file(RESULT.stem, describe_machine(), rows, find_goals(rows, claims.CLAIM.name, claims.FALL.name), home)


def main() -> None:
    """Run all jobs, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true", help=f"only write the part of the report again, from {RESULT.name}")
    parser.add_argument("--seeds", type=int, nargs="+", help="others than those of the claims")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "testbed")
    options = parser.parse_args()
    trial = options.quick or options.seeds
    home = claims.QUICK_HOME if trial else RESULT.parent
    seeds = options.seeds or (CLAIMS[:2] if options.quick else CLAIMS)
    written = RESULT if options.report else measure(seeds, options.folder, options.workers, home, quick=options.quick)
    if trial:
        part = estimators_part(json.loads(written.read_text()), ".", claim=claims.CLAIM.name, fall=claims.FALL.name)
        print(make_page("Estimators, in short", [part]))
        part.draw(home)
    else:
        publish()


if __name__ == "__main__":
    main()
