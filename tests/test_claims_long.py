"""The comparison on long responses at tiny size: its runs, its files, its goals and its part of the report."""

import json
import sys
from pathlib import Path

import pytest
from attrs import asdict, evolve

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import claims
import claims_long
from claims_long_report import Found, find_goals, long_part
from record import result_file
from results_page import make_page
from testbed.arms import ONLINE
from testbed.long_arms import BEST, BEST_LIVE, LIVE, STORED
from testbed.trl_peer import ARM as TRL

TINY = evolve(
    claims_long.SETTING,
    name="tiny",
    digits=2,
    max_new_tokens=40,
    teacher_size=(16, 1),
    student_size=(16, 1),
    taught_problems=16,
    teacher_steps=2,
    sft_prompts=8,
    sft_steps=2,
    opd_prompts=32,
    held_out_prompts=4,
    batch=2,
    opd_steps=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("testbed")


def test_a_share_of_the_prompts_is_stored_and_online_opd_takes_small_steps(folder):
    (stored,) = claims.one(TINY, 0, folder, BEST, curve=(1, 2))
    assert (stored["stored_rollouts"], [point[0] for point in stored["curve"]]) == (round(32 * BEST.prompts), [0, 1, 2])
    (live,) = claims.one(TINY, 0, folder, BEST_LIVE, curve=(1, 2))
    assert min(live["cpu_s"][part] for part in ("sampling", "scoring", "training")) > 0


def test_a_teacher_of_another_size_is_timed_untrained(folder):
    (row,) = claims_long.split(TINY, 0, folder, "larger", {"teacher_size": (24, 1)})
    assert (row["kind"], row["arm"]) == ("split", "larger")
    assert row["cpu_s"]["all"] == pytest.approx(sum(row["cpu_s"][part] for part in ("sampling", "scoring", "training")))
    (made,) = folder.glob("untrained-*")
    assert json.loads((made / "config.json").read_text())["hidden_size"] == 24


def test_what_has_run_is_read_and_not_run_again(tmp_path):
    path, calls = tmp_path / "runs" / "a.json", []

    def job():
        calls.append(1)
        return [{"accuracy": 0.5}]

    assert [claims_long.kept(path, job) for _ in range(2)] == [[{"accuracy": 0.5}]] * 2
    assert len(calls) == 1
    with pytest.raises(ZeroDivisionError):
        claims_long.kept(tmp_path / "b.json", lambda: 1 / 0)
    assert not (tmp_path / "b.json").exists(), "what failed is run again"


def test_a_plan_has_every_arm_once_a_seed_and_files_of_their_own(monkeypatch):
    jobs = [job for seed in (200, 201) for job in claims_long.runs(claims_long.SETTING, seed, Path("testbed"), quick=False)]
    assert len({job.args[0] for job in jobs}) == len(jobs)
    named = [job.args[1].args[3].name for job in jobs if job.args[1].func is claims.one]
    assert named == [arm.name for arm in (*LIVE, *STORED)] * 2
    assert {ONLINE.name, BEST.name, BEST_LIVE.name} < set(named)
    other = claims_long.runs(evolve(claims_long.SETTING, opd_lr=1.0), 200, Path("testbed"), quick=False)
    monkeypatch.setattr(claims_long, "commit", lambda: "another")
    other += claims_long.runs(claims_long.SETTING, 200, Path("testbed"), quick=False)
    assert not {job.args[0] for job in other} & {job.args[0] for job in jobs}


def fake(seed, arm, accuracy, seconds):
    """Make a run whose accuracy rises in a straight line; training is a fifth of the cost, of the stored arm nine tenths."""
    row = {"kind": "run", "setting": TINY.name, "arm": arm, "sft_teacher": "A", "opd_teacher": "A", "seed": seed, "start": 0.2}
    before, training = (0.05, 0.9) if arm == BEST.name else (0.4, 0.2)
    spent = {"sampling": before * seconds, "scoring": before * seconds, "training": training * seconds, "all": seconds}
    ended = {"start_greedy": 0.2, "start_kl": 0.8, "accuracy": accuracy, "greedy": accuracy, "kl": 1 - accuracy}
    return {**row, **ended, "stored_rollouts": 4, "cpu_s": spent, "curve": [(0, 0.2, 0.0), (100, accuracy, seconds)]}


@pytest.fixture
def rows():
    """Return two seeds: the stored arm ends as the same loss with a live teacher, at a quarter and a bit of its cost."""
    ends = {BEST.name: (0.6, 10.0), TRL: (0.7, 30.0), ONLINE.name: (0.2, 44.0), BEST_LIVE.name: (0.6, 44.0)}
    found = [fake(seed, arm, end + seed / 100, cost) for seed in (0, 1) for arm, (end, cost) in ends.items()]
    found += [{"kind": "teacher", "setting": TINY.name, "seed": seed, "arm": "teacher", "accuracy": 0.9, "greedy": 0.9} for seed in (0, 1)]
    split = {"sampling": 0.6, "scoring": 0.2, "training": 0.2, "all": 1.0}
    found += [{"kind": "split", "setting": TINY.name, "seed": seed, "arm": "as in the runs", "cpu_s": split} for seed in (0, 1)]
    return [{"kind": "setting", **asdict(TINY)}, *found]


def test_the_cost_is_compared_with_the_limit_that_the_split_allows(rows):
    goals = {goal["name"]: goal for goal in find_goals(rows)}
    beside = goals[f"{BEST_LIVE.name} over {BEST.name}, cost at equal accuracy"]
    assert (beside["measured"], beside["met"]) == (pytest.approx(4.4), True)
    for at in ("equal accuracy", "equal steps"):
        share = goals[f"cost at {at} as a share of the limit, training counted alike"]
        assert (share["measured"], share["met"]) == (pytest.approx(0.9), True)
    assert not goals[f"{TRL} over {BEST.name}, cost at equal accuracy"]["met"]
    assert not goals[f"{BEST.name}, minus {TRL}: accuracy"]["met"]
    assert not goals[f"{ONLINE.name} gains over SFT, accuracy"]["met"]
    assert Found(rows, TINY.name).names == [ONLINE.name, BEST_LIVE.name, TRL, BEST.name]


def test_a_mean_beyond_its_goal_is_not_enough(rows, tmp_path):
    rows = [fake(row["seed"], row["arm"], row["accuracy"], 44.0 * (1 + row["seed"])) if spread(row) else row for row in rows]
    goals = {goal["name"]: goal for goal in find_goals(rows)}
    beside = goals[f"{BEST_LIVE.name} over {BEST.name}, cost at equal accuracy"]
    assert (beside["measured"] > 4, beside["met"]) == (True, False)
    part = long_part({"rows": rows, "goals": [*goals.values()]}, "plots")
    assert f"*{BEST_LIVE.name}* was not shown to cost 4 times as much at equal accuracy (6.22 [0.0" in part.sentences()[1]


def spread(row):
    return row["kind"] == "run" and row["arm"] == BEST_LIVE.name


def test_the_share_of_the_limit_of_an_arm_that_ended_below_sft_is_no_number(rows):
    fallen = [{**row, "accuracy": 0.1} if row["kind"] == "run" and row["arm"] == BEST.name else row for row in rows]
    found = Found(fallen, TINY.name)
    assert found.of_limit(BEST_LIVE.name, BEST.name, "equal accuracy").show() == "below SFT"
    assert found.of_limit(BEST_LIVE.name, BEST.name, "equal steps").mean == pytest.approx(0.9)


def test_what_rounds_cost_online_opd_is_no_saving_of_a_store(rows):
    dearer = [
        {**row, "cpu_s": {**row["cpu_s"], "training": row["cpu_s"]["training"] + 100, "all": row["cpu_s"]["all"] + 100}}
        if spread(row)
        else row
        for row in rows
    ]
    for each in (rows, dearer):
        share = Found(each, TINY.name).of_limit(BEST_LIVE.name, BEST.name, "equal steps")
        assert (share.mean, share.high <= 1) == (pytest.approx(0.9), True)


def test_the_part_says_what_the_rows_say(rows, tmp_path):
    result = result_file("claims_long", {"machine": {"cores": 2}, "versions": {"lopd": "0"}}, rows, find_goals(rows), tmp_path)
    part = long_part(json.loads(result.read_text()), "plots")
    text = make_page("Long", [part])
    assert f"*{BEST_LIVE.name}* costs 4.40 [4.40 to 4.40] times as much at equal accuracy" in text
    assert "is right in 0.900 ± 0.000 of what it samples" in text
    assert "| SFT | 0.200 ± 0.000 | 0.200 ± 0.000 | 0.800 ± 0.000 |  |  |" in text
    assert "| the teacher | 0.900 ± 0.000 | 0.900 ± 0.000 |  |  |  |" in text
    assert "if online's cost what the stored arm's does, it would cost\n4.42 [4.42 to 4.42] times as much as the stored arm" in text
    assert "| as in the runs | 0.60 ± 0.00 | 0.20 ± 0.00 | 0.20 ± 0.00 | 1.00 ± 0.00 | 5.00 ± 0.00 |" in text
    assert "nan" not in text
    part.draw(tmp_path)
    assert (tmp_path / "claims_long.png").stat().st_size > 10_000
