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


@pytest.mark.slow
def test_a_tiny_run_measures_both_stores(tmp_path: Path) -> None:
    command = [sys.executable, bench_commits.__file__, "--quick", "--out", str(tmp_path)]
    subprocess.run(command, check=True, timeout=280, stdout=subprocess.DEVNULL)
    result = json.loads((tmp_path / "commits.json").read_text())
    sizes = [(found["store"], found["commits"]) for found in result["rows"] if found["kind"] == "commits"]
    assert sizes == [(store, size) for store in ("zarr", "lance") for size in bench_commits.QUICK.sizes]
    assert len(result["goals"]) == 2 * len(bench_commits.COSTS)
    assert all(math.isfinite(goal["measured"]) for goal in result["goals"])
    assert all(found[cost] > 0 for found in result["rows"] if found["kind"] == "commits" for cost in bench_commits.COSTS)
