"""Offline beside online OPD on real weights: SmolLM2-135M-Instruct and two students cut from it, five seeds, TRL beside them.

    python benchmarks/evidence.py            # benchmarks/results/evidence.json, benchmarks/RESULTS.md; six hours on two cores
    python benchmarks/evidence.py --quick    # one seed, few arms and steps, into runs/evidence-quick; a quarter of an hour
    python benchmarks/evidence.py --plan     # how many runs are done, how many are left, and how many seconds of one core they take
    python benchmarks/evidence.py --report   # the file and the page, of the seeds that are finished
    python benchmarks/evidence.py --go-on    # from evidence.json or evidence_choice.json, if made on this machine with these versions

Every finished unit (a teacher's text, a student, a store, one run of an arm) is a file in runs/evidence.  A killed run that is called again goes
on from there, and loses the units that were in work.  Rates, the arm that is run in several forms, and the form that the goals are set for, are
chosen on another seed than those of the report.

On the seed of choice there are more held-out questions, and for that fewer arms have rates of their own.
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
from attrs import asdict
from evidence_bed import BETAS, NEAR, ROWS, Bed, Row, mean_kl, once
from evidence_make import COLUMNS, KEPT, make_store, make_student, make_teacher, make_text
from evidence_plan import (
    FULL,
    QUICK,
    Chosen,
    Plan,
    choose_rates,
    edge_trials,
    expected_build_s,
    expected_run_s,
    made,
    other_trials,
    parts,
    plan_units,
    rate_trials,
)
from evidence_report import evidence_part
from evidence_summary import find_goals
from publish import publish
from record import describe_machine, result_file
from results_page import make_page
from transformers.utils.logging import disable_progress_bar

Job = Callable[[], Any]
#: What a run can go on from: finished seeds with all trials, or, before there are such, the trials alone.
FINISHED, CHOSEN = "evidence", "evidence_choice"


def work(job: Job) -> Any:
    """Run one job in this process, on one thread."""
    torch.set_num_threads(1)
    disable_progress_bar()
    return job()


def build(plan: Plan, bed: Bed) -> Row:
    """Build a student, and its store, with what its arms train on."""
    make_student(bed)
    return make_store(bed, *parts(plan, bed))


def settings_of(plan: Plan) -> Row:
    """Return sizes, students and arms, as a file keeps them."""
    ours: Row = {
        **asdict(plan.size),
        "choice_held_out": plan.choice_held_out,
        "kept": KEPT,
        "columns": COLUMNS,
        "rows at once": ROWS,
        "betas": BETAS,
    }
    for kind, arms in plan.arms:
        ours |= {f"layers left out of {kind.name}": kind.dropped}
        ours |= {f"{arm.name}, {kind.name}": re.sub(" at 0x[0-9a-f]+", "", repr(arm)) for arm in arms}
    plain: Row = json.loads(json.dumps(ours))
    return plain


def check_settings(plan: Plan) -> None:
    """Refuse a folder whose units were made with other sizes, students or arms: their figures would stand beside those of these."""
    ours, path = settings_of(plan), plan.folder / "settings.json"
    if not path.exists() and next(plan.folder.glob("**/*.json"), None):
        raise SystemExit(f"Evidence {plan.folder}: it has units and no settings.json, which describes them; move that folder away.")
    theirs = once(path, lambda: ours)
    for name in {**ours, **theirs}:
        value = ours.get(name)
        if name != "unit_s" and theirs.get(name) != value:
            raise SystemExit(f"Evidence {plan.folder}: {name} is {theirs.get(name)!r} there, expected {value!r}; move that folder away.")


def execute(plan: Plan, workers: int) -> Chosen:
    """Run everything that is not done yet: what is chosen first, then seed by seed.

    So a run that is stopped has whole seeds to report.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    with ProcessPoolExecutor(workers) as pool:

        def wave(jobs: Sequence[Job]) -> None:
            for number, row in enumerate(pool.map(work, jobs), 1):
                end = (row["arm"], row["rate"], mean_kl(row["curve"][-1]), row["curve"][-1]["cpu_s"]) if row["kind"] == "run" else ()
                print(f"{number} of {len(jobs)}:", row["kind"], row.get("seed"), row.get("student"), *end, flush=True)

        def seed_of(beds: Sequence[Bed]) -> None:
            if any(unit.bed in beds and not unit.path.exists() for unit in plan_units(plan)):
                wave([partial(make_text, beds[0])])
                wave([partial(build, plan, bed) for bed in beds])

        check_settings(plan)
        wave([partial(make_teacher, plan.folder)])
        if plan.choice is not None:
            seed_of([plan.bed(plan.choice, NEAR)])
            wave(rate_trials(plan))
            wave(edge_trials(plan))
            wave(other_trials(plan, choose_rates(plan)))
            wave(Chosen.of(plan).form_trials(plan))
        chosen = Chosen.of(plan)
        if plan.choice is not None and not (plan.home / f"{FINISHED}.json").exists():
            result_file(CHOSEN, describe_machine(), choice_rows(plan, chosen), [], plan.home)
        for seed in plan.seeds:
            seed_of([plan.bed(seed, kind) for kind, _ in plan.arms])
            wave([unit for unit in chosen.runs(plan) if unit.bed.seed == seed])
    return chosen


def take_over(plan: Plan) -> None:
    """Write the units that the result file holds to the folder, but those that it has: a run goes on where it has nothing but that file.

    Seconds are compared, so it must have been made on the same machine with the same versions.
    """
    path = next((path for name in (FINISHED, CHOSEN) if (path := plan.home / f"{name}.json").exists()), None)
    if path is None:
        raise SystemExit(f"Evidence {plan.home}: it has neither {FINISHED}.json nor {CHOSEN}.json to go on from; run without --go-on.")
    here = describe_machine()
    theirs = json.loads(path.read_text())
    for name, ours in {**here["versions"], **here["machine"]}.items():
        if (found := {**theirs["versions"], **theirs["machine"]}.get(name)) != ours:
            raise SystemExit(f"Evidence {path}: {name} is {found!r} there, expected {ours!r}; run without --go-on, from nothing.")
    described, *rows = theirs["rows"]
    once(plan.folder / "settings.json", lambda: described["settings"])
    check_settings(plan)
    once(plan.folder / "taken_over.json", lambda: {"commits": [*described["taken_over"], theirs["commit"]]})
    for row in rows:
        bed = plan.bed(row["seed"], next(kind for kind, _ in plan.arms if kind.name == row["student"]))
        unit = {**row, "kind": "run"} if "arm" in row else row
        once(bed.run_file(row["arm"], row["rate"]) if "arm" in row else bed.of_student / f"{row['kind']}.json", partial(dict, unit))


def choice_rows(plan: Plan, chosen: Chosen) -> list[Row]:
    """Return the row of the plan, with the commits of result files whose units were taken over, and those of all trials."""
    path = plan.folder / "taken_over.json"
    said: Row = {"choice": plan.choice, "choice_held_out": plan.choice_held_out, "rates": plan.rates, "beyond": plan.beyond}
    said |= {"best": chosen.best.name, "rival": chosen.rival.name, "settings": settings_of(plan)}
    said["taken_over"] = json.loads(path.read_text())["commits"] if path.exists() else []
    trials = [*rate_trials(plan), *edge_trials(plan), *other_trials(plan, chosen.rates), *chosen.form_trials(plan)]
    return [{"kind": "plan", **said, **asdict(plan.size)}, *({**unit(), "kind": "trial"} for unit in trials)]


def report(plan: Plan) -> list[Row]:
    """Return the rows of all finished units, without running any."""
    trials = rate_trials(plan)
    if made(trials):
        trials += edge_trials(plan)
    if made(trials):
        trials += other_trials(plan, choose_rates(plan))
    if missing := sum(not unit.path.exists() for unit in trials):
        raise SystemExit(
            f"Evidence {plan.folder}: {missing} trials of arms are not made, expected 0 for a report; `--plan` lists what is left."
        )
    return gather(plan, Chosen.of(plan))


def gather(plan: Plan, chosen: Chosen) -> list[Row]:
    """Return the rows of all finished units of the seeds that are finished."""
    reported = chosen.runs(plan)
    finished = [seed for seed in plan.seeds if all(unit.path.exists() for unit in reported if unit.bed.seed == seed)]
    if not finished:
        raise SystemExit(f"Evidence {plan.folder}: 0 seeds are finished, expected at least 1 for a report; `--plan` lists what is left.")
    described, *trials = choice_rows(plan, chosen)
    rows = [described]
    rows += [json.loads(path.read_text()) for bed in plan.beds() if bed.seed in finished for path in sorted(bed.of_student.glob("*.json"))]
    return rows + trials + [unit() for unit in reported if unit.bed.seed in finished]


def write(rows: list[Row], home: Path) -> None:
    """Write the result file and its part of the page of results, or, in another folder, a page of its own."""
    written = result_file(FINISHED, describe_machine(), rows, find_goals(rows), home)
    (home / f"{CHOSEN}.json").unlink(missing_ok=True)
    if home == FULL.home:
        publish()
    else:
        part = evidence_part(json.loads(written.read_text()), ".")
        (home / "RESULTS.md").write_text(make_page("A trial", [part]))
        part.draw(home)


def say_plan(plan: Plan) -> None:
    """Print what is done, what is left, and how the trials ended.

    Seconds are those of finished runs of the same arm, or else expected ones.
    """
    units, beds = plan_units(plan), plan.beds()
    left = [unit for unit in units if not unit.path.exists()]
    took: dict[tuple[str, int, int], list[float]] = {}
    for unit in units:
        if unit.path.exists():
            took.setdefault(unit.effort, []).append(unit()["unit_s"])
    seconds = sum(float(np.mean(took[unit.effort])) if unit.effort in took else expected_run_s(unit) for unit in left)
    seconds += sum(expected_build_s(plan, bed) for bed in beds if any(unit.bed == bed for unit in left))
    students = sum((bed.of_student / "store.json").exists() for bed in beds)
    print(f"students: {students} of {len(beds)}; runs: {len(units) - len(left)} of {len(units)}")
    print(f"seconds of one core for what is left: {seconds:,.0f}")
    for unit in units:
        if unit.path.exists() and unit.bed.seed == plan.choice:
            end, kl = unit()["curve"][-1], [mean_kl(unit()["curve"][-1], kind) for kind in ("reverse_kl", "forward_kl")]
            print(
                f"seed {plan.choice}, {unit.arm.name}, rate {unit.rate:g}: {kl[0]:.4f} and {kl[1]:.4f} nats a token, {end['cpu_s']['all']:.0f} s"
            )


def main() -> None:
    """Run all jobs, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--plan", action="store_true", help="only say what is done and what is left")
    parser.add_argument("--report", action="store_true", help="only write what is found")
    parser.add_argument("--go-on", action="store_true", help="first take over what the result file holds")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    if options.go_on:
        take_over(plan)
    if options.plan:
        say_plan(plan)
    elif options.report:
        write(report(plan), plan.home)
    else:
        write(gather(plan, execute(plan, options.workers)), plan.home)


if __name__ == "__main__":
    main()
