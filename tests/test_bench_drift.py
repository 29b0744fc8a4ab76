"""The benchmark of the guards: when the watch spoke, and whether that was in time."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_drift


def run(spoke, curve):
    known = {"setting": "failing", "seed": 0, "run": "plain", "accuracy_at_start": 0.5}
    return {**known, "curve": curve, "step_at_which_the_watch_spoke": spoke}


def test_a_watch_that_speaks_when_accuracy_has_fallen_is_not_in_time():
    row = run(3, [(0, 0.5), (2, 0.48), (4, 0.44)])
    assert bench_drift.spoke_after(row) == 4, "step 3 is the fourth"
    assert bench_drift.change_when_it_spoke(row) == pytest.approx(-0.06), "not the -0.02 of two updates before"
    assert bench_drift.change_when_it_spoke({**row, "step_at_which_the_watch_spoke": 2}) == pytest.approx(-0.04)
    assert bench_drift.change_when_it_spoke({**row, "step_at_which_the_watch_spoke": None}) is None
    rows = [{**row, "step_at_which_the_watch_spoke": spoke} for spoke in (2, 3, None)]
    found = bench_drift.goals([*rows, {"run": "cost", "cpu_s": 0.1}])
    assert next(goal["measured"] for goal in found if "full rate" in goal["name"]) == "1 of 3"


def test_goals_of_the_result_file_are_what_its_rows_give():
    found = json.loads(bench_drift.RESULT.read_text())
    assert found["goals"] == bench_drift.goals(found["rows"]), "run bench_drift.py --report"


def test_the_page_says_how_often_the_guards_were_right():
    text = " ".join((bench_drift.ROOT / "docs" / "decisions" / "0007-guards.md").read_text().split())
    goals = {
        goal["name"].split(":")[0]: goal["measured"]
        for goal in json.loads(bench_drift.RESULT.read_text())["goals"]
        if goal["goal"] == "all"
    }
    rows = json.loads(bench_drift.RESULT.read_text())["rows"]
    warned = [row["warned"] for row in rows if row["run"] == "before the first step" and row.get("setting") == "failing"]
    of_healthy = [row for row in rows if row.get("setting") == "healthy" and row.get("step_at_which_the_watch_spoke") is not None]
    assert f"in time in {goals['failing, a third of the rate']} failing runs" in text
    assert f"in time in {goals['failing, full rate (falls within two to twelve steps)']} runs" in text
    assert f"It warned of {sum(warned)} of {len(warned)} failing starts and of 0 of 5 healthy ones" in text
    assert f"It was silent in {20 - len(of_healthy)} of 20 healthy runs" in text
    assert all(row["accuracy_at_end"] > row["accuracy_at_start"] for row in of_healthy), "these gained all the same"
