"""Long responses: what does a store save where decoding is most of the bill?  Products with their working, over several seeds.

    python benchmarks/claims_long.py            # benchmarks/results/claims_long.json, its part of benchmarks/RESULTS.md; half an hour on one core
    python benchmarks/claims_long.py --report   # that part again, from the file
    python benchmarks/claims_long.py --quick    # two seeds and few arms; writes to runs/claims-quick, in ten minutes
    python benchmarks/claims_long.py --seeds 100    # others: for choosing; likewise

Every run is kept in a file when it ends, so after a kill the same command of the same commit goes on.
"""

import argparse
import hashlib
import json
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import claims
from attrs import asdict, evolve
from claims_long_report import find_goals, long_part
from publish import publish
from record import ROOT, commit, describe_machine, result_file
from results_page import make_page
from testbed.arms import ONLINE, Arm
from testbed.long_arms import BEST, BEST_LIVE, LIVE, PROMPTS, STORED
from testbed.models import Setting, prepare, untrained_teacher
from testbed.runs import Clock, Training, online
from testbed.seeds import LONG
from testbed.task import Writer
from testbed.trl_peer import ARM as TRL
from testbed.trl_peer import run_trl

from lopd.errors import TeacherConsistencyWarning

RESULT = ROOT / "benchmarks" / "results" / "claims_long.json"
#: Small steps, for a model that is decoded token by token has few responses at a time beside what the machine could compute at once.
SETTING = Setting(
    "products",
    task="products",
    digits=3,
    writer=Writer(slips=0.001),
    teacher_size=(96, 3),
    student_size=(48, 2),
    taught_problems=8000,
    teacher_steps=1200,
    teacher_lr=4e-3,
    sft_prompts=2000,
    sft_steps=1000,
    opd_prompts=PROMPTS,
    held_out_prompts=500,
    max_new_tokens=92,
    batch=8,
    opd_steps=150,
)
CURVE = (10, 20, 35, 50, 75, 100, 125, 150)
#: What may move the limit, each changed alone.
CHANGES: dict[str, dict[str, Any]] = {
    "as in the runs": {},
    "2 rollouts a step": {"batch": 2},
    "32 rollouts a step": {"batch": 32},
    "first 46 tokens": {"max_new_tokens": 46},
    "teacher of 384, 12 layers": {"teacher_size": (384, 12)},
}
#: Steps that are timed, after one that is not.
TIMED = 3


def split(setting: Setting, seed: int, folder: Path, name: str, changes: dict[str, Any]) -> claims.Rows:
    """Measure where the time of a step of online OPD goes, with these changes to the setting; a teacher of another size is not trained."""
    bed, changed = prepare(setting, seed, folder, ("A",)), evolve(setting, opd_steps=TIMED + 1, **changes)
    teacher = untrained_teacher(changed, seed, folder) if "teacher_size" in changes else bed.teachers["A"]
    bed, arm, clock = evolve(bed, setting=changed, teachers={"A": teacher}), BEST_LIVE, Clock()
    steps = online(bed, Training.of(bed.students["A"], setting.opd_lr), arm.loss, "A", support=arm.support, clock=clock)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TeacherConsistencyWarning)
        next(steps)
        before = clock.split()
        for _ in steps:
            pass
    spent = {part: (seconds - before[part]) / TIMED for part, seconds in clock.split().items()}
    return [{"kind": "split", "setting": setting.name, "seed": seed, "arm": name, "cpu_s": spent}]


def kept(path: Path, job: claims.Job) -> claims.Rows:
    """Return the rows of a job: from the file if it exists, otherwise measured and written to it."""
    if not path.exists():
        unfinished = path.with_suffix(".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(job()))
        unfinished.rename(path)
    return json.loads(path.read_text())


def runs(setting: Setting, seed: int, folder: Path, *, quick: bool) -> list[claims.Job]:
    """Return a job for every run of a seed."""
    arms: Sequence[Arm] = (ONLINE, BEST_LIVE, BEST) if quick else (*LIVE, *STORED)
    jobs: dict[str, claims.Job] = {arm.name: partial(claims.one, setting, seed, folder, arm, curve=CURVE) for arm in arms}
    jobs |= {TRL: partial(against_trl, setting, seed, folder), "teacher": partial(claims.taught, setting, seed, folder)}
    jobs |= {name: partial(split, setting, seed, folder, name, changes) for name, changes in CHANGES.items()}
    made = commit()
    named = {name: hashlib.sha256(json.dumps([made, asdict(setting), seed, name]).encode()).hexdigest()[:12] for name in jobs}
    return [partial(kept, folder / "runs" / f"{seed}-{named[name]}.json", job) for name, job in jobs.items()]


def against_trl(setting: Setting, seed: int, folder: Path) -> claims.Rows:
    """Train the same in TRL."""
    return [{"kind": "run", **run_trl(setting, seed, folder, CURVE)}]


def measure(setting: Setting, seeds: Sequence[int], folder: Path, workers: int, home: Path, *, quick: bool) -> Path:
    """Build the models, run all jobs, and write the result file into a folder."""
    builds = [partial(claims.build, [setting], seed, folder, ("A",)) for seed in seeds]
    rows: claims.Rows = [{"kind": "setting", **asdict(setting)}]
    rows += claims.run_all(builds, claims.turned([runs(setting, seed, folder, quick=quick) for seed in seeds]), workers)
    return result_file(RESULT.stem, describe_machine(), rows, find_goals(rows), home)


def main() -> None:
    """Run all jobs, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true", help=f"only write the part of the report again, from {RESULT.name}")
    parser.add_argument("--seeds", type=int, nargs="+", help="others than those of the claims")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "testbed-long")
    options = parser.parse_args()
    trial = options.quick or options.seeds
    home = claims.QUICK_HOME if trial else RESULT.parent
    seeds = options.seeds or (LONG[:2] if options.quick else LONG)
    written = RESULT if options.report else measure(SETTING, seeds, options.folder, options.workers, home, quick=options.quick)
    if trial:
        part = long_part(json.loads(written.read_text()), ".")
        print(make_page("Long responses, in short", [part]))
        part.draw(home)
    else:
        publish()


if __name__ == "__main__":
    main()
