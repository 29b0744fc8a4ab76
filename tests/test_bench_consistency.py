"""The benchmark of teacher consistency: intervals and goals are those of its runs, and the page says what these say."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_consistency
import docs_tables


def test_the_cells_that_the_page_shows_are_those_of_the_runs():
    cells = bench_consistency.summarise(bench_consistency.measured())
    file = docs_tables.read("consistency")
    assert [row for row in file["rows"] if row.get("cell")] == [{"cell": True, **cell} for cell in cells], (
        "run bench_consistency.py --report"
    )
    assert file["goals"] == bench_consistency.goals(bench_consistency.measured()), "run bench_consistency.py --report"
    shown = "\n".join(docs_tables.teachers())
    for cell in cells:
        assert "ratio" in cell["method"] or f"{cell['change']:+.3f} ± {cell['change_ci95']:.3f}" in shown


def test_intervals_of_two_seeds_are_those_of_students_t():
    known = {"sft_teacher": "A", "opd_teacher": "A", "method": "offline", "accuracy_at_start": 0.5}
    (cell,) = bench_consistency.summarise([{**known, "accuracy": accuracy} for accuracy in (0.6, 0.7)])
    assert (cell["change"], cell["change_ci95"]) == (pytest.approx(0.15), pytest.approx(12.706 * 0.05, rel=1e-4))


def fake_runs(moved):
    """Make two seeds in which a residual moves each consistent cell by so much."""
    for seed in (0, 1):
        for sft, opd in ("AA", "AB", "BA", "BB"):
            for method in bench_consistency.METHODS:
                by = moved[sft][seed] if sft == opd and "residual" in method else 0.0
                row = {"seed": seed, "sft_teacher": sft, "opd_teacher": opd, "method": method, "accuracy_at_start": 0.5}
                yield {**row, "accuracy": 0.6 + 0.2 * (sft == opd) + by}


def kept(moved):
    found = bench_consistency.goals([*fake_runs(moved)])
    assert [goal["met"] for goal in found if "gains more than" in goal["name"]] == [True] * 2
    return [(goal["measured"], goal["met"]) for goal in found if "leaves the consistent cells alone" in goal["name"]]


def test_changes_of_opposite_signs_do_not_leave_the_consistent_cells_alone():
    assert kept({"A": (0.04, 0.04), "B": (-0.05, -0.05)}) == [(pytest.approx(-0.05), False)] * 2
    assert kept({"A": (0.001, 0.002), "B": (0.0, 0.0)}) == [(pytest.approx(0.0015), True)] * 2
    assert kept({"A": (0.02, -0.02), "B": (0.0, 0.0)})[0][1] is False, "the mean is 0, each seed is not"


def test_a_mean_of_two_seeds_that_differ_is_not_enough():
    def luckier(run):
        return {**run, "accuracy": run["accuracy"] + 0.3 * run["seed"] * (run["sft_teacher"] == run["opd_teacher"])}

    runs = [luckier(run) for run in fake_runs({"A": (0, 0), "B": (0, 0)})]
    gaps = [goal for goal in bench_consistency.goals(runs) if "gains more than" in goal["name"]]
    assert [(goal["measured"], goal["met"]) for goal in gaps] == [(pytest.approx(0.35), False)] * 2


def test_the_page_says_what_a_residual_did_with_every_seed():
    runs = {(row["sft_teacher"] + row["opd_teacher"], row["method"], row["seed"]): row["accuracy"] for row in bench_consistency.measured()}
    seeds = {seed for _, _, seed in runs}
    by = {pair: [runs[pair, "offline, residual", s] - runs[pair, "offline", s] for s in seeds] for pair in ("AA", "AB", "BA", "BB")}
    assert min(*by["AB"], *by["BA"]) > 0, "it repairs a part"
    assert max(by["AA"]) < 0, "it takes something from the first pair"
    assert max(by["BB"]) > 0, "and not from the other with every seed"
    repaired = [goal["met"] for goal in bench_consistency.goals(bench_consistency.measured()) if "repairs" in goal["name"]]
    assert repaired == [True, True]
