"""The benchmark of several processes and of large stores: a tiny run of everything, and what is made of its figures."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_scale
from scale_growth import exponents
from scale_parts import ALONE, APART, DDP, FSDP, SHARES
from scale_summary import find_goals, lost, multiples, training_rows


def found(*wall_s, tokens=100):
    """Return the steps of one process."""
    counted = {"tokens": [tokens] * len(wall_s), "wall_s": list(wall_s), "cpu_s": list(wall_s)}
    return {**counted, "read_s": [0.0, 0.0], "update_s": [0.0, 0.0]}


@pytest.fixture
def run():
    """Return a made-up run.

    One rank takes 2 s a step; two apart take 2.2 s each; on their shares 1.2 s and 1.3 s; and together 1.5 s, or 3 s with FSDP2.
    """
    shares = [found(1.2, 1.2, tokens=50), found(1.3, 1.3, tokens=50)]
    arms = {ALONE: [found(2, 2)], APART: [found(2.2, 2.2)] * 2, SHARES: shares}
    return {**arms, DDP: [found(1.5, 1.5)] * 2, FSDP: [found(3, 3)] * 2}


def test_the_time_of_two_ranks_is_accounted_for(run):
    assert multiples(run) == pytest.approx({"bandwidth": 1.1, "repeated": 1.25, "slowest": 1.3, DDP: 1.5, FSDP: 3.0})
    assert list(lost(run, DDP).values()) == pytest.approx([0.1, 0.15, 0.05, 0.2])
    assert sum(lost(run, FSDP).values()) == pytest.approx(2.0)


def test_efficiency_is_compared_to_what_the_machine_can_do(run):
    rows = {row["arm"].removesuffix(", 16 rollouts a step"): row for row in training_rows([run] * 3, 16)}
    assert rows[APART]["efficiency"]["median"] == pytest.approx(1 / 1.1)
    assert rows[APART]["cpu_s_over_one_rank"]["median"] == pytest.approx(1.1)
    assert rows[DDP]["cpu_s_over_one_rank"]["median"] == pytest.approx(3 / 2)
    assert rows[DDP]["tokens_per_s"]["median"] == pytest.approx(100 / 1.5)
    assert rows[DDP]["efficiency"]["median"] == pytest.approx(2 / 3)
    assert rows[DDP]["over_ceiling"]["median"] == pytest.approx(1.1 / 1.5)
    (goal,) = find_goals(training_rows([run] * 3, 16))
    assert goal["name"].endswith("over the ceiling, 16 rollouts a step")
    assert (goal["measured"], goal["met"]) == (pytest.approx(1.1 / 1.5), False)


def test_an_exponent_is_that_of_a_power_law():
    rows = [{"rollouts": 10**i, "s": 3e-4 * 10 ** (0.7 * i)} for i in (3, 4, 6)]
    assert exponents(rows, "s") == pytest.approx({"all": 0.7, "last": 0.7})
    bent = [*rows, {"rollouts": 10**7, "s": rows[-1]["s"]}]
    assert exponents(bent, "s")["last"] == pytest.approx(0.0, abs=1e-9)
    assert exponents(bent, "s")["all"] > 0.5


def numbers(value):
    """Return all numbers in a row."""
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers(part)]
    return [value] if isinstance(value, int | float) else []


def run_quick(folder, *parts):
    """Start the benchmark at tiny size."""
    command = [sys.executable, bench_scale.__file__, "--quick", "--out", folder, "--parts", *parts]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_tiny_run_measures_everything(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    running = {part: run_quick(tmp_path / part[0], *part) for part in (("scoring",), ("training", "loading", "growth"))}
    assert [process.wait(timeout=280) for process in running.values()] == [0, 0]
    scoring, result = (
        json.loads((tmp_path / part[0] / "scale.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        for part in running
    )
    assert result.keys() == {"machine", "versions", "load", "commit", "rows", "goals"}
    assert "ray" in result["versions"]
    result = {key: scoring[key] + result[key] for key in ("rows", "goals")}
    names = [goal["name"] for goal in result["goals"]]
    for wanted in ("scoring efficiency at 2", "training efficiency at 2", "open at 1e3", "random rows grows slower"):
        assert any(name.startswith(wanted) or wanted in name for name in names), wanted
    assert all(math.isfinite(goal["measured"]) and isinstance(goal["met"], bool) for goal in result["goals"])
    rows = {
        kind: [row for row in result["rows"] if row["kind"] == kind] for kind in ("training", "scoring", "loading", "growth", "exponents")
    }
    assert sum(map(len, rows.values())) == len(result["rows"])
    assert {row["arm"] for row in rows["training"]} == {
        *(f"{arm}, 4 rollouts a step" for arm in (ALONE, APART, DDP, FSDP)),
        "bare collectives",
    }
    assert [(row["store"], row["readers"]) for row in rows["loading"]] == [(kind, size) for kind in ("zarr", "lance") for size in (1, 2)]
    assert [(row["store"], row["rollouts"]) for row in rows["growth"]] == [
        (kind, size) for kind in ("zarr", "lance") for size in (100, 1000)
    ]
    for row in (*rows["scoring"], *rows["loading"]):
        assert min(numbers(row)) > 0, row
    for row in rows["training"][:-1]:
        assert row["tokens_per_s"]["min"] > 0
    for row in rows["growth"]:
        assert all(value > 0 for name, value in row.items() if name.endswith("_s")), row
        assert 100 < row["bytes_per_rollout"] < 10_000
    assert (tmp_path / "training" / "bench_scale.png").stat().st_size > 10_000
