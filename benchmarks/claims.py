"""Does Lightning OPD do what its paper claims?  Every claim on small models with a verifier, over several seeds.

    python benchmarks/claims.py            # benchmarks/results/claims.json, benchmarks/RESULTS.md and its plots; about 35 minutes on two cores
    python benchmarks/claims.py --report   # RESULTS.md and the plots again, from the result files
    python benchmarks/claims.py --quick    # two seeds, the main claims; writes to runs/claims-quick, in a few minutes

Paper: Lightning OPD, arXiv 2604.13010v2.  Teachers and students are made from seeds and kept in runs/testbed.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attrs import asdict, evolve, frozen
from claims_report import claims_part
from claims_summary import find_goals
from publish import publish
from record import ROOT, describe_machine, result_file
from results_page import make_page
from testbed.arms import ABLATIONS, MAIN, PLAIN, RATIO, TOP_K, Arm, run_arm
from testbed.gap import run_gap
from testbed.models import FAILING, HEALTHY, STYLES, Setting, prepare
from testbed.runs import Training
from testbed.seeds import CLAIMS
from testbed.task import Writer
from testbed.trl_peer import run_trl
from transformers.utils.logging import disable_progress_bar

Rows = list[dict[str, Any]]
Job = Callable[[], Rows]

QUICK_HOME = ROOT / "runs" / "claims-quick"
#: At this rate the runs take tens of steps; at that of `bench_drift.py`, chosen to show falls, ten.
RATE = 3e-5
#: A teacher with doubts, and a student after long SFT.
CLAIM = evolve(HEALTHY, name="doubt, SFT 700", opd_lr=RATE)
#: A teacher that is all but certain, and a student half-way through SFT.
FALL = evolve(CLAIM, name="certain, SFT 300", writer=FAILING.writer, sft_steps=FAILING.sft_steps)
WRITERS = {"certain": FAILING.writer, "some doubt": Writer(synonyms=2, slips=0.03), "doubt": HEALTHY.writer}
#: SFT steps: a student that has the skill by half, and one that has it.
STRENGTHS = (300, 700)
LENGTHS = (150, 300, 700, 1200)
CURVE = (1, 2, 5, 10, 20, 30, 50, 75, 100)
GAP_AT = (0, 5, 25, 100)
#: Of the ablations those that may repair a fall.
REPAIRS = ("refresh", "learning rate", "clip", "top-k")


@frozen
class Plan:
    """What is run.

    Args:
        seeds: seeds of every table.
        settings: settings of the map, `CLAIM` and `FALL` among them.
        ablations: names of those that are run on `CLAIM`; of them the repairs also on `FALL`.
        mismatch: whether teachers are crossed.
        gap_at: steps at which the gradient gap is measured.
    """

    seeds: Sequence[int]
    settings: Sequence[Setting]
    ablations: Sequence[str]
    mismatch: bool
    gap_at: Sequence[int]


def _map() -> list[Setting]:
    cells = [(name, steps) for name in WRITERS for steps in (LENGTHS if name == "doubt" else STRENGTHS)]
    return [evolve(CLAIM, name=f"{name}, SFT {steps}", writer=WRITERS[name], sft_steps=steps) for name, steps in cells]


FULL = Plan(CLAIMS, _map(), tuple(ABLATIONS), mismatch=True, gap_at=GAP_AT)
QUICK = Plan(CLAIMS[:2], [CLAIM, FALL], ("top-k",), mismatch=False, gap_at=(0, 25))


def builds(plan: Plan, folder: Path) -> list[Job]:
    """Return jobs that build teachers and students; one process builds all students of a teacher."""
    by_writer = {setting.writer: [s for s in plan.settings if s.writer == setting.writer] for setting in plan.settings}
    crossed = [[CLAIM]] if plan.mismatch else []
    groups = [(group, STYLES[:1]) for group in by_writer.values()] + [(group, STYLES[1:]) for group in crossed]
    return [partial(build, group, seed, folder, styles) for seed in plan.seeds for group, styles in groups]


def build(settings: Sequence[Setting], seed: int, folder: Path, styles: Sequence[str]) -> Rows:
    """Make the models of these settings."""
    for setting in settings:
        prepare(setting, seed, folder, styles)
    return []


def runs(plan: Plan, folder: Path) -> list[Job]:
    """Return a job for every run of the plan."""
    return turned([_runs_of(plan, seed, folder) for seed in plan.seeds])


def _runs_of(plan: Plan, seed: int, folder: Path) -> list[Job]:
    jobs: list[Job] = []
    for setting in plan.settings:
        followed = CURVE if setting.name in {CLAIM.name, FALL.name} else ()
        jobs += [partial(taught, setting, seed, folder)]
        jobs += [partial(one, setting, seed, folder, arm, curve=followed) for arm in MAIN]
    jobs += [partial(against_trl, seed, folder)]
    ablations = [arm for name in plan.ablations for arm in ABLATIONS[name]]
    jobs += [partial(one, CLAIM, seed, folder, arm, curve=CURVE if arm is TOP_K else ()) for arm in ablations]
    jobs += [partial(one, FALL, seed, folder, arm) for name in plan.ablations if name in REPAIRS for arm in ABLATIONS[name]]
    crossed = [("A", "B"), ("B", "A"), ("B", "B")] if plan.mismatch else []
    jobs += [partial(one, CLAIM, seed, folder, arm, teachers=teachers) for teachers in crossed for arm in MAIN]
    return jobs + [
        partial(gap, setting, seed, folder, arm, plan.gap_at) for setting, arm in ((CLAIM, PLAIN), (CLAIM, RATIO), (FALL, PLAIN))
    ]


def turned(by_seed: Sequence[Sequence[Job]]) -> list[Job]:
    """Return the jobs of all seeds, those of each begun at another place: so no arm always runs first, or beside the same other."""
    return [job for at, jobs in enumerate(by_seed) for begin in [len(jobs) * at // len(by_seed)] for job in (*jobs[begin:], *jobs[:begin])]


def one(setting: Setting, seed: int, folder: Path, arm: Arm, **options: Any) -> Rows:
    """Train one run."""
    return [{"kind": "run", **run_arm(setting, seed, folder, arm, **options)}]


def against_trl(seed: int, folder: Path, **options: Any) -> Rows:
    """Train the same in TRL."""
    return [{"kind": "run", **run_trl(CLAIM, seed, folder, CURVE, **options)}]


def taught(setting: Setting, seed: int, folder: Path) -> Rows:
    """Measure how often the teacher is right, greedily and sampled as the students are."""
    bed = prepare(setting, seed, folder, STYLES[:1])
    teacher = Training.of(bed.teachers["A"], setting.opd_lr)
    return [{"kind": "teacher", "setting": setting.name, "seed": seed, "arm": "teacher", **teacher.measure(bed)}]


def gap(setting: Setting, seed: int, folder: Path, arm: Arm, at: Sequence[int]) -> Rows:
    """Measure the gradient gap along one run."""
    return [{"kind": "gap", **row} for row in run_gap(setting, seed, folder, arm, at)]


def work(job: Job) -> Rows:
    """Run one job in this process, on one thread."""
    torch.set_num_threads(1)
    disable_progress_bar()
    return job()


def run_all(first: Sequence[Job], then: Sequence[Job], workers: int) -> Rows:
    """Run the first jobs, then the others, in so many processes, and return the rows of the others."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    rows: Rows = []
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(work, first))
        for found in pool.map(work, then):
            rows += found
            for row in found:
                print(*(row.get(name) for name in ("setting", "seed", "arm", "step", "start", "accuracy", "gap", "bound")), flush=True)
    return rows


def main() -> None:
    """Build the models, run all jobs, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true", help="only write the report again, from the result files: publish.py")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "testbed")
    options = parser.parse_args()
    if options.report:
        publish()
        return
    plan = QUICK if options.quick else FULL
    rows: Rows = [{"kind": "setting", **asdict(setting)} for setting in plan.settings]
    rows += run_all(builds(plan, options.folder), runs(plan, options.folder), options.workers)
    home = QUICK_HOME if options.quick else ROOT / "benchmarks"
    written = result_file("claims", describe_machine(), rows, find_goals(rows, CLAIM.name, FALL.name), home / "results")
    if options.quick:
        part = claims_part(json.loads(written.read_text()), ".", claim=CLAIM.name, fall=FALL.name)
        (home / "RESULTS.md").write_text(make_page("What holds, in short", [part]))
        part.draw(home)
    else:
        publish()


if __name__ == "__main__":
    main()
