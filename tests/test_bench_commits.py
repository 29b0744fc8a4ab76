"""The benchmark of many small commits: a tiny run, and what is made of its figures."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_commits


def row(commits: int, append_s: list[float], read_s: float) -> dict[str, object]:
    costs = dict.fromkeys(bench_commits.COSTS, 1.0) | {"append_s": sum(append_s) / len(append_s), "read_s": read_s}
    figures = {"kind": "commits", "store": "zarr", "commits": commits, "rollouts": 100 * commits}
    return {**figures, **costs, "timed": {"append_s": append_s}}


def test_exponents_are_those_of_a_power_law_and_have_intervals() -> None:
    rows = [row(10**i, [scale * 10 ** (0.3 * i) for scale in (0.9, 1.0, 1.1)], 1e-3 * (i + 1)) for i in range(1, 5)]
    found = bench_commits.exponents(rows, "append_s")
    assert (found["all"], found["last"]) == pytest.approx((0.3, 0.3))
    assert found["low"] < 0.3 < found["high"]
    slopes = {cost: bench_commits.exponents(rows, cost) for cost in bench_commits.COSTS}
    goals = bench_commits.find_goals([*rows, {"kind": "exponents", "store": "zarr", **slopes}])
    missed = [goal["name"] for goal in goals if not goal["met"]]
    assert missed == ["append grows with commits to this power (zarr)"]
    assert goals[-1]["name"].startswith("64 random rows of 1,000,000 rollouts")
    assert goals[-1]["measured"] == pytest.approx(5.0)


def test_memory_is_judged_beyond_imports_and_by_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{**row(10_000, [1.0], 1e-3), "writer_mb": 63.0, "reader_mb": 65.0}]
    judged = {goal["name"].split(",")[0]: goal for goal in bench_commits.find_goals(rows)}
    assert (judged["memory of a writer"]["measured"], judged["memory of a writer"]["met"]) == (63, True)
    assert not judged["memory of a reader"]["met"]
    monkeypatch.setattr(bench_commits, "memory", lambda _: 300.0)
    assert bench_commits.taken_since(280.0) == 20
    assert bench_commits.taken_since(301.0) == 0.1


def test_the_slowest_append_is_of_all_and_memory_is_what_came_after_a_tiny_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, plan = iter([300.0, 320.0]), bench_commits.Plan(per_commit=2, timed=1)
    monkeypatch.setattr(bench_commits, "memory", lambda _: next(told))
    seconds = iter([9.0, 1.0, 2.0, 1.0, 2.0, 1.0])
    monkeypatch.setattr(bench_commits.Clock, "read", lambda _: next(seconds))
    found = bench_commits.write("zarr", tmp_path / "store", 0, 3, plan)()
    assert (found["writer_mb"], found["slowest_append_s"], found["append_s"]) == (20, 9, [2])


@pytest.mark.slow
def test_a_tiny_run_measures_both_stores(tmp_path: Path) -> None:
    command = [sys.executable, bench_commits.__file__, "--quick", "--out", str(tmp_path)]
    subprocess.run(command, check=True, timeout=280, stdout=subprocess.DEVNULL)
    result = json.loads((tmp_path / "commits.json").read_text())
    sizes = [(found["store"], found["commits"]) for found in result["rows"] if found["kind"] == "commits"]
    assert sizes == [(store, size) for store in ("zarr", "lance") for size in bench_commits.QUICK.sizes]
    assert all(found["slowest_append_s"] >= found["append_s"] for found in result["rows"] if found["kind"] == "commits")
    assert len(result["goals"]) == 2 * len(bench_commits.COSTS)
    assert all(math.isfinite(goal["measured"]) for goal in result["goals"])
    assert all(found[cost] > 0 for found in result["rows"] if found["kind"] == "commits" for cost in bench_commits.COSTS)
