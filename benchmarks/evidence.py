"""Offline beside online OPD on real weights: SmolLM2-135M-Instruct and two students cut from it, five seeds, TRL beside them.

    python benchmarks/evidence.py            # benchmarks/results/evidence.json, benchmarks/RESULTS.md; four hours on two cores
    python benchmarks/evidence.py --quick    # one seed, few arms and steps, into runs/evidence-quick; a quarter of an hour
    python benchmarks/evidence.py --plan     # how many runs are done, how many are left, and how many seconds of one core they take
    python benchmarks/evidence.py --report   # the file and the page, of the seeds that are finished

Every finished unit (a teacher's text, a student, a store, one run of an arm) is a file in runs/evidence.  A killed run that is called again goes
on from there, and loses the units that were in work.  Rates, the arm that is run in several forms, and the form that the goals are set for, are
chosen on another seed than those of the report.

By what units took on a quiet AMD EPYC, one core is busy for about 7,300 seconds with the seed of choice, and for 4,400 with each of the others.
"""

import argparse
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import asdict, field, frozen
from evidence_arms import ARMS, MAIN, ONLINE, RATIO, SFT, TOP_64, TRL, Arm, run_arm, variants
from evidence_bed import (
    BETAS,
    COLUMNS,
    FAR,
    KEPT,
    NEAR,
    ROWS,
    Bed,
    Kind,
    Row,
    Size,
    make_store,
    make_student,
    make_teacher,
    make_text,
    mean_kl,
    once,
)
from evidence_report import evidence_part
from evidence_summary import find_goals
from publish import publish
from record import ROOT, describe_machine, result_file
from results_page import make_page
from transformers.utils.logging import disable_progress_bar

Job = Callable[[], Any]
#: Shares of the steps after which a run is measured; one that no frontier shows, at its end alone; and a trial of a stored arm, which has paid for
#: most of its cost before the first step.
POINTS, END, HALF = (0.25, 0.5, 1.0), (1.0,), (0.5, 1.0)


@frozen
class Plan:
    """What is run.

    Args:
        folder: where units are kept.
        home: of the results.
        seeds: of the report.
        choice: seed on which everything is chosen; None takes the first rate, and the arm `TOP_64`.
        rates: that each arm chooses from.
        size: of everything.
        arms: of each student.
    """

    folder: Path = ROOT / "runs" / "evidence"
    home: Path = ROOT / "benchmarks" / "results"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    choice: int | None = 100
    rates: tuple[float, ...] = (1.5e-5, 5e-5, 1.5e-4)
    size: Size = field(factory=Size)
    arms: tuple[tuple[Kind, tuple[Arm, ...]], ...] = ((NEAR, ARMS), (FAR, MAIN))

    def bed(self, seed: int, kind: Kind) -> Bed:
        """Of a seed and a student."""
        return Bed(self.folder, self.size, seed, kind)

    def beds(self) -> list[Bed]:
        """All of them."""
        trial = [] if self.choice is None else [self.bed(self.choice, NEAR)]
        return [*trial, *(self.bed(seed, kind) for seed in self.seeds for kind, _ in self.arms)]


FULL = Plan()
QUICK = Plan(
    ROOT / "runs" / "evidence-quick",
    ROOT / "runs" / "evidence-quick",
    (0,),
    None,
    (1e-4,),
    Size(sft_prompts=64, opd_prompts=32, held_out=16, new_tokens=32, sft_batch=8),
    ((NEAR, (SFT, RATIO, TOP_64, ONLINE, TRL)),),
)


@frozen
class Unit:
    """A run that is to be made: once."""

    bed: Bed
    arm: Arm
    rate: float
    points: tuple[float, ...] = END

    @property
    def path(self) -> Path:
        """Where it is kept."""
        return self.bed.of_student / "runs" / f"{re.sub('[^a-z0-9]+', '-', self.arm.name.lower())}-{self.rate:g}.json"

    def __call__(self) -> Row:
        """Make it, or find it made."""
        row = once(self.path, partial(run_arm, self.bed, self.arm, self.rate, self.points))
        if (found := [point["step"] for point in row["curve"]]) != (expected := self.arm.looks(self.bed, self.points)):
            raise SystemExit(f"Evidence {self.path}: it was measured after steps {found}, expected {expected}; move it away.")
        return row


def rate_trials(plan: Plan) -> list[Unit]:
    """Every arm of the near student at every rate, on the seed of choice; the far student takes over what is chosen there.

    Any stored arm may be the one whose steps on the way are looked at; of the others the end is enough.
    """
    if plan.choice is None:
        return []
    bed, arms = plan.bed(plan.choice, NEAR), dict(plan.arms)[NEAR]
    return [Unit(bed, arm, rate, HALF if arm.way == "stored" else END) for arm in arms for rate in plan.rates]


@frozen
class Chosen:
    """What the seed of choice says.

    Args:
        rates: name of an arm -> its rate.
        best: the stored arm of least reverse KL at its end.
    """

    rates: dict[str, float]
    best: Arm

    @classmethod
    def of(cls, plan: Plan) -> "Chosen":
        """Read the trials of rates, which are made by now."""
        arms = dict(plan.arms)[NEAR]
        if plan.choice is None:
            return cls({arm.name: plan.rates[0] for arm in arms}, TOP_64)
        ends = {(unit.arm.name, unit.rate): mean_kl(unit()["curve"][-1]) for unit in rate_trials(plan)}
        rates = {arm.name: min(plan.rates, key=lambda rate: ends[arm.name, rate]) for arm in arms}
        return cls(rates, min((arm for arm in arms if arm.way == "stored"), key=lambda arm: ends[arm.name, rates[arm.name]]))

    def forms(self, bed: Bed) -> list[Unit]:
        """The best arm in other forms."""
        rate = self.rates[self.best.name]
        return [Unit(bed, arm, rate, POINTS if arm.passes > 1 else END) for arm in variants(self.best)]

    def form_trials(self, plan: Plan) -> list[Unit]:
        """Those on the seed of choice."""
        return [] if plan.choice is None else self.forms(plan.bed(plan.choice, NEAR))

    def runs(self, plan: Plan) -> list[Unit]:
        """All of the report, the longest of a seed first, so that two workers end a seed at about the same time."""
        units, curved = [], {RATIO, self.best, ONLINE, TRL}
        for seed in plan.seeds:
            for kind, arms in plan.arms:
                bed = plan.bed(seed, kind)
                points = {arm: POINTS if kind == NEAR and arm in curved else END for arm in arms}
                units += [Unit(bed, arm, self.rates[arm.name], points[arm]) for arm in reversed(arms)]
                units += self.forms(bed) if kind == NEAR else []
        return units


def work(job: Job) -> Any:
    """What one process does, on one thread."""
    torch.set_num_threads(1)
    disable_progress_bar()
    return job()


def build(plan: Plan, bed: Bed) -> Row:
    """A student, and its store, with what its arms train on; the best arm of the near student, whichever it is, trains on shares of it, too."""
    make_student(bed)
    columns = dict.fromkeys(["teacher", "top64", *(arm.column for arm in dict(plan.arms)[bed.kind] if arm.way == "stored")])
    shares = {arm.share: None for arm in variants(TOP_64) if arm.share < 1}
    return make_store(bed, columns, shares if bed.kind == NEAR else ())


def check_settings(plan: Plan) -> None:
    """Refuse a folder whose units were made with other sizes, students or arms: their figures would stand beside those of these."""
    ours: Row = {**asdict(plan.size), "kept": KEPT, "columns": COLUMNS, "rows at once": ROWS, "betas": BETAS}
    for kind, arms in plan.arms:
        ours |= {f"layers left out of {kind.name}": kind.dropped}
        ours |= {f"{arm.name}, {kind.name}": re.sub(" at 0x[0-9a-f]+", "", repr(arm)) for arm in arms}
    ours, path = json.loads(json.dumps(ours)), plan.folder / "settings.json"
    if not path.exists() and next(plan.folder.glob("**/*.json"), None):
        raise SystemExit(f"Evidence {plan.folder}: it has units and no settings.json, which says what they are; move that folder away.")
    theirs = once(path, lambda: ours)
    for name in {**ours, **theirs}:
        value = ours.get(name)
        if name != "unit_s" and theirs.get(name) != value:
            raise SystemExit(f"Evidence {plan.folder}: {name} is {theirs.get(name)!r} there, expected {value!r}; move that folder away.")


def execute(plan: Plan, workers: int) -> Chosen:
    """Everything that is not done yet: what is chosen first, then seed by seed, so that a run that is stopped has whole seeds to report."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    with ProcessPoolExecutor(workers) as pool:

        def wave(jobs: Sequence[Job]) -> None:
            for number, row in enumerate(pool.map(work, jobs), 1):
                end = (row["arm"], row["rate"], mean_kl(row["curve"][-1]), row["curve"][-1]["cpu_s"]) if row["kind"] == "run" else ()
                print(f"{number} of {len(jobs)}:", row["kind"], row.get("seed"), row.get("student"), *end, flush=True)

        def seed_of(beds: Sequence[Bed]) -> None:
            wave([partial(make_text, beds[0])])
            wave([partial(build, plan, bed) for bed in beds])

        check_settings(plan)
        wave([partial(make_teacher, plan.folder)])
        if plan.choice is not None:
            seed_of([plan.bed(plan.choice, NEAR)])
            wave(rate_trials(plan))
            wave(Chosen.of(plan).form_trials(plan))
        chosen = Chosen.of(plan)
        for seed in plan.seeds:
            seed_of([plan.bed(seed, kind) for kind, _ in plan.arms])
            wave([unit for unit in chosen.runs(plan) if unit.bed.seed == seed])
    return chosen


def report(plan: Plan) -> list[Row]:
    """Rows of what is there; nothing is run."""
    if missing := sum(not unit.path.exists() for unit in rate_trials(plan)):
        raise SystemExit(
            f"Evidence {plan.folder}: {missing} trials of rates are not made, expected 0 for a report; `--plan` says what is left."
        )
    return gather(plan, Chosen.of(plan))


def gather(plan: Plan, chosen: Chosen) -> list[Row]:
    """Rows of all finished units of the seeds that are finished."""
    trials = [*rate_trials(plan), *chosen.form_trials(plan)]
    reported = chosen.runs(plan)
    finished = [seed for seed in plan.seeds if all(unit.path.exists() for unit in reported if unit.bed.seed == seed)]
    if not finished:
        raise SystemExit(f"Evidence {plan.folder}: 0 seeds are finished, expected at least 1 for a report; `--plan` says what is left.")
    rows: list[Row] = [{"kind": "plan", "choice": plan.choice, "rates": plan.rates, "best": chosen.best.name, **asdict(plan.size)}]
    rows += [json.loads(path.read_text()) for bed in plan.beds() if bed.seed in finished for path in sorted(bed.of_student.glob("*.json"))]
    rows += [{**unit(), "kind": "trial"} for unit in trials]
    return rows + [unit() for unit in reported if unit.bed.seed in finished]


def write(rows: list[Row], home: Path) -> None:
    """The result file, and its part: of the page of results, or of a page of its own beside a file that is not among the results."""
    written = result_file("evidence", describe_machine(), rows, find_goals(rows), home)
    if home == FULL.home:
        publish()
    else:
        part = evidence_part(json.loads(written.read_text()), ".")
        (home / "RESULTS.md").write_text(make_page("A trial", [part]))
        part.draw(home)


def say_plan(plan: Plan) -> None:
    """What is done, what is left, and how the trials ended; which arm is run in other forms is known when all of them have."""
    trials = rate_trials(plan)
    tried = all(unit.path.exists() for unit in trials)
    chosen = Chosen.of(plan) if tried else Chosen(dict.fromkeys((arm.name for arm in ARMS), 0.0), TOP_64)
    units = [*trials, *chosen.form_trials(plan), *chosen.runs(plan)]
    left = [unit for unit in units if not unit.path.exists()]
    took: dict[str, list[float]] = {}
    for path in plan.folder.glob("seed-*/*/runs/*.json"):
        row = json.loads(path.read_text())
        took.setdefault(row["arm"], []).append(row["unit_s"])
    every = [seconds for each in took.values() for seconds in each] or [0.0]
    seconds = sum(float(np.mean(took.get(unit.arm.name, every))) for unit in left)
    students = sum((bed.of_student / "store.json").exists() for bed in plan.beds())
    print(f"students: {students} of {len(plan.beds())}; runs: {len(units) - len(left)} of {len(units)}")
    print(f"seconds of one core for the other runs, by those that are done: {seconds:,.0f}")
    for unit in trials:
        if unit.path.exists():
            end = unit()["curve"][-1]
            print(f"seed {plan.choice}, {unit.arm.name}, rate {unit.rate:g}: {mean_kl(end):.4f} nats a token, {end['cpu_s']['all']:.0f} s")


def main() -> None:
    """Run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--plan", action="store_true", help="only say what is done and what is left")
    parser.add_argument("--report", action="store_true", help="only write what is found")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    if options.plan:
        say_plan(plan)
    elif options.report:
        write(report(plan), plan.home)
    else:
        write(gather(plan, execute(plan, options.workers)), plan.home)


if __name__ == "__main__":
    main()
