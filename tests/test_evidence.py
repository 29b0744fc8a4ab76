"""The benchmark on real weights, without the weights: what is chosen, what is gathered after a kill, the goals and the page."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from attrs import evolve
from chat_tokenizers import byte_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import evidence
import evidence_arms
import evidence_bed
import evidence_make
import evidence_plan
from evidence_arms import LIVE, ONLINE, PLAIN, RATIO, SAME, SFT, TOP_64, TRL
from evidence_bed import FAR, NEAR, once
from evidence_report import evidence_part
from evidence_summary import Found, find_goals
from tiny_models import build_model

#: Reverse KL at the end, and cost of all steps, by arm.
ENDS = {
    "online OPD": (0.3, 400.0),
    SAME.name: (0.26, 420.0),
    "TRL DistillationTrainer": (0.28, 500.0),
    "teacher's top 64": (0.25, 120.0),
    "teacher's top 64 (a quarter of the store)": (0.32, 72.0),
}
QUARTER = f"{TOP_64.name} (a quarter of the store)"


def curve(arm, steps, points, seed, start=0.4):
    """Return straight lines from the start to the end."""
    end, spent = ENDS.get(arm.name) or ENDS.get(arm.name.split(" (")[0], (0.35, 100.0))
    end += 0.001 * seed
    return [
        {
            "step": max(1, round(share * steps)),
            "cpu_s": {"sampling": 0.1 * spent, "scoring": 0.1 * spent, "training": 0.8 * spent * share, "all": spent * (0.2 + 0.8 * share)},
            "reverse_kl": {"sums": [20 * (start + (end - start) * share), 10 * (start + (end - start) * share)], "counts": [20.0, 10.0]},
            "untrained_kl": {"sums": [9.0, 4.5], "counts": [20.0, 10.0]},
            "forward_kl": {"sums": [4.0 + 10 * end, 4.0 + 10 * end], "counts": [20.0, 20.0]},
            "ended": 0.5,
        }
        for share in points
    ]


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Make up all units in a folder: the middle rate is the best."""

    def run(bed, arm, rate, points):
        rate_costs = 0.0 if rate == 5e-5 else 0.1
        made = curve(arm, arm.steps(bed), points, bed.seed)
        for point in made:
            point["reverse_kl"]["sums"] = [value + rate_costs * 20 for value in point["reverse_kl"]["sums"]]
        return {
            "kind": "run",
            "seed": bed.seed,
            "student": bed.kind.name,
            "arm": arm.name,
            "rate": rate,
            "steps": arm.steps(bed),
            "curve": made,
        }

    monkeypatch.setattr(evidence_plan, "run_arm", run)
    plan = evidence.Plan(
        tmp_path, tmp_path / "results", (0, 1, 2), arms=((NEAR, (SFT, PLAIN, RATIO, TOP_64, *LIVE)), (FAR, (RATIO, TOP_64, ONLINE)))
    )
    for bed in plan.beds():
        start = {"reverse_kl": 0.4, "overlap": {"16": 0.9, "64": 0.8}, "outside_top64": [0.0, 0.1], "tail": 0.01, "verdict": "offline"}
        named = {"seed": bed.seed, "student": bed.kind.name}
        once(bed.of_student / "store.json", lambda named=named, start=start: {"kind": "store", **named, "start": start})
        point = curve(PLAIN, 1, [0.0], bed.seed)[0]
        once(bed.of_student / "sft.json", lambda named=named, point=point: {"kind": "sft", "near_copies": 1, **named, **point})
    make_trials(plan)
    return plan


def make_trials(plan):
    for unit in evidence.rate_trials(plan):
        unit()
    for unit in evidence.edge_trials(plan):
        unit()
    for unit in evidence.other_trials(plan, evidence.choose_rates(plan)):
        unit()


def finish(plan, seeds):
    chosen = evidence.Chosen.of(plan)
    for unit in (*chosen.form_trials(plan), *chosen.runs(plan)):
        if unit.bed.seed in (*seeds, plan.choice):
            unit()
    return evidence.gather(plan, chosen) if seeds else []


def test_rates_and_the_best_arm_are_chosen_on_a_seed_that_is_not_reported(plan):
    chosen = evidence.Chosen.of(plan)
    assert set(chosen.rates.values()) == {5e-5}
    assert (chosen.best, chosen.rival) == (TOP_64, SAME)
    assert plan.choice not in plan.seeds
    assert {unit.bed.seed for unit in chosen.runs(plan)} == set(plan.seeds)


def change(unit, kind, more):
    row = json.loads(unit.path.read_text())
    row["curve"][-1][kind]["sums"] = [value + more * count for value, count in zip(*row["curve"][-1][kind].values(), strict=True)]
    unit.path.write_text(json.dumps(row))


def test_an_arm_that_is_best_at_the_highest_rate_is_tried_beyond_it(plan):
    assert evidence.edge_trials(plan) == []
    highest = next(unit for unit in evidence.rate_trials(plan) if unit.arm == TRL and unit.rate == max(plan.rates))
    change(highest, "reverse_kl", -0.2)
    (beyond,) = evidence.edge_trials(plan)
    assert (beyond.arm, beyond.rate) == (TRL, 5e-4)
    beyond()
    assert evidence.choose_rates(plan)[TRL.name] == max(plan.rates)
    change(beyond, "reverse_kl", -0.3)
    assert evidence.choose_rates(plan)[TRL.name] == 5e-4


def test_arms_are_chosen_by_both_kls(plan):
    unit = next(unit for unit in evidence.rate_trials(plan) if unit.arm == RATIO and unit.rate == 5e-5)
    change(unit, "forward_kl", -0.3)
    assert evidence.Chosen.of(plan).best == RATIO


def test_runs_have_different_places(plan):
    chosen = evidence.Chosen.of(plan)
    paths = [unit.path for unit in (*evidence.rate_trials(plan), *chosen.form_trials(plan), *chosen.runs(plan))]
    assert len(set(paths)) == len(paths)


def test_a_finished_unit_is_not_made_again(tmp_path):
    assert once(tmp_path / "unit.json", lambda: {"value": 1})["value"] == 1
    assert once(tmp_path / "unit.json", lambda: pytest.fail("made again"))["value"] == 1


def test_a_seed_is_reported_when_all_of_it_is_finished(plan):
    rows = finish(plan, (0, 1))
    assert {row["seed"] for row in rows if row["kind"] == "run"} == {0, 1}
    chosen = evidence.Chosen.of(plan)
    next(unit for unit in chosen.runs(plan) if unit.bed.seed == 1).path.unlink()
    assert {row["seed"] for row in evidence.gather(plan, chosen) if row["kind"] == "run"} == {0}


def test_a_unit_that_was_measured_elsewhere_is_refused(plan):
    unit = evidence.rate_trials(plan)[0]
    with pytest.raises(SystemExit, match=r"it was measured after steps \[15\], expected \[8, 15\]; move it away"):
        evolve(unit, points=evidence_plan.HALF)()


def test_units_without_settings_are_refused(plan):
    with pytest.raises(SystemExit, match="it has units and no settings"):
        evidence.check_settings(plan)


def test_a_folder_of_other_settings_is_refused(plan):
    plan = evolve(plan, folder=plan.folder / "new")
    evidence.check_settings(plan)
    evidence.check_settings(plan)
    with pytest.raises(SystemExit, match="opd_prompts is 96 there, expected 8; move that folder away"):
        evidence.check_settings(evolve(plan, size=evolve(plan.size, opd_prompts=8)))
    with pytest.raises(SystemExit, match=r"online OPD, near is .Arm.*, expected None; move"):
        evidence.check_settings(evolve(plan, arms=((NEAR, plan.arms[0][1][:4]), plan.arms[1])))
    with pytest.raises(SystemExit, match=r"layers left out of near is \[14, 15\] there, expected \[20\]"):
        evidence.check_settings(evolve(plan, arms=((evolve(NEAR, dropped=(20,)), (RATIO,)),)))


def test_a_report_runs_nothing(plan, monkeypatch):
    monkeypatch.setattr(evidence_plan, "run_arm", lambda *_: pytest.fail("it ran"))
    with pytest.raises(SystemExit, match="0 seeds are finished, expected at least 1"):
        evidence.report(plan)
    evidence.rate_trials(plan)[0].path.unlink()
    with pytest.raises(SystemExit, match="1 trials of arms are not made, expected 0"):
        evidence.report(plan)


def test_a_run_goes_on_from_the_result_file_alone(plan, monkeypatch):
    rows = finish(plan, (0, 1))
    evidence.write(rows, plan.home)
    elsewhere = evolve(plan, folder=plan.folder / "elsewhere")
    evidence.take_over(elsewhere)
    monkeypatch.setattr(evidence_plan, "run_arm", lambda *_: pytest.fail("it ran"))
    again = evidence.report(elsewhere)
    commits = again[0].pop("taken_over")
    assert (rows[0].pop("taken_over"), commits) == ([], [json.loads((plan.home / "evidence.json").read_text())["commit"]])
    assert again == rows, "seconds that units took included"
    left = [unit for unit in evidence_plan.plan_units(elsewhere) if not unit.path.exists()]
    assert {unit.bed.seed for unit in left} == {2}


def test_a_run_goes_on_from_its_choice_alone(plan):
    finish(plan, ())
    rows = evidence.choice_rows(plan, evidence.Chosen.of(plan))
    evidence.result_file("evidence_choice", evidence.describe_machine(), rows, [], plan.home)
    elsewhere = evolve(plan, folder=plan.folder / "elsewhere")
    evidence.take_over(elsewhere)
    left = [unit for unit in evidence_plan.plan_units(elsewhere) if not unit.path.exists()]
    assert {unit.bed.seed for unit in left} == {*plan.seeds}
    assert evidence.Chosen.of(elsewhere) == evidence.Chosen.of(plan)
    evidence.write(finish(plan, (0,)), plan.home)
    assert sorted(path.name for path in plan.home.glob("*.json")) == ["evidence.json"]


def test_a_result_file_of_elsewhere_is_not_taken_over(plan):
    with pytest.raises(SystemExit, match=r"it has neither evidence\.json nor evidence_choice\.json to go on from"):
        evidence.take_over(plan)
    evidence.write(finish(plan, (0,)), plan.home)
    other = evolve(plan, folder=plan.folder / "other", size=evolve(plan.size, opd_prompts=8))
    with pytest.raises(SystemExit, match="opd_prompts is 96 there, expected 8"):
        evidence.take_over(other)
    path = plan.home / "evidence.json"
    path.write_text(path.read_text().replace(f'"cores": {evidence.os.cpu_count()}', '"cores": 1000'))
    with pytest.raises(SystemExit, match="cores is 1000 there, expected"):
        evidence.take_over(evolve(plan, folder=plan.folder / "new"))
    assert not (plan.folder / "new").exists()


def test_the_form_of_the_goals_is_the_best_that_a_quarter_of_a_live_run_pays_for(plan):
    found = Found(finish(plan, (0, 1, 2)))
    assert found.form() == QUARTER, "it costs 72 of 400, all others more than 100"
    goals = {goal["name"]: goal for goal in find_goals(found.rows)}
    more, share = (goals[f"{QUARTER}, {words}"] for words in (f"minus {TRL.name}: held-out reverse KL", f"as a share of {TRL.name}: cost"))
    assert (more["met"], more["measured"]) == (False, pytest.approx(0.32 - 0.28))
    assert (share["met"], share["measured"]) == (True, pytest.approx(72 / 500))
    forward = goals[f"{TOP_64.name}, all of its steps, minus {TRL.name}: forward KL on held-out text"]
    assert (forward["met"], forward["measured"]) == (True, pytest.approx((0.25 - 0.28) / 2))


def test_an_interval_that_holds_the_margin_is_neither_held_nor_missed(plan):
    rows = finish(plan, (0, 1, 2))
    for row in rows:
        if row["kind"] == "run" and row["arm"] == QUARTER:
            row["curve"][-1]["reverse_kl"]["sums"] = [(0.28 + 0.02 * (row["seed"] - 1)) * count for count in (20, 10)]
    part = evidence_part({"rows": rows, "goals": find_goals(rows)}, ".")
    reading = next(reading for reading in part.readings if "held-out" in reading.pattern)
    goal = next(goal for goal in part.result["goals"] if goal["name"] == f"{QUARTER}, minus {TRL.name}: held-out reverse KL")
    assert not goal["met"]
    assert abs(goal["measured"]) < 0.01, "its mean is within the margin"
    assert "was not shown to end at most 0.01 above *TRL DistillationTrainer* in reverse KL (" in reading.say(goal)


def test_the_page_says_what_the_rows_say(plan, tmp_path):
    rows = finish(plan, (0, 1, 2))
    evidence.write(rows, tmp_path)
    written = (tmp_path / "evidence.json").read_text()
    json.loads(written, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    text, found = (tmp_path / "RESULTS.md").read_text(), Found(rows)
    assert all(f"| {name} |" in text for name in found.names())
    assert f"**What did not:** *{found.form()}* ends more than 0.01 above *online OPD* in reverse KL (+0.020" in text
    assert "it costs 0.14 of *TRL DistillationTrainer*" in text
    assert (tmp_path / "evidence.png").stat().st_size > 10_000
    assert "Rates: 1.5e-05, 5e-05, 0.00015.  At the lowest of them: not one arm; at the highest: not one arm" in text
    assert "Of the 32 held-out questions of a seed, 1 share 80%" in text
    assert "nan" not in text


@pytest.mark.parametrize(("more", "words"), [(-0.1, "lower"), (0.0, "not lower")])
def test_no_live_run_is_called_the_best_beside_a_trl_that_is_not_in_the_choice(plan, more, words):
    trial = next(unit for unit in evidence.rate_trials(plan) if unit.arm == TRL and unit.rate == 5e-5)
    change(trial, "reverse_kl", more)
    rows = finish(plan, (0, 1, 2))
    goals = find_goals(rows)
    page = "\n".join([*evidence_part({"rows": rows, "goals": goals}, ".").sections[0], *(goal["name"] for goal in goals)])
    assert f"{SAME.name} (lopd's best live run)" in page
    assert "the best live run" not in page
    assert f"TRL is not in the choice of lopd's best live run by the sum of both KLs: its sum was {words} on seed 100 (" in page


def test_goals_compare_with_usual_runs_and_lopds_best_live_one(plan):
    goals = find_goals(finish(plan, (0, 1, 2)))
    assert {name for goal in goals for name in (SAME.name, ONLINE.name, TRL.name) if f"minus {name}" in goal["name"]} == {
        SAME.name,
        ONLINE.name,
        TRL.name,
    }


def test_the_page_of_one_seed_neither_claims_nor_excludes(plan, tmp_path):
    evidence.write(finish(plan, (0,)), tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "nan" not in text
    assert "it was not shown to cost at most 0.25 of *TRL DistillationTrainer* (0.14)" in text


def test_one_seed_meets_no_goal(plan):
    assert not any(goal["met"] for goal in find_goals(finish(plan, (0,))))


def test_a_mean_beyond_its_goal_is_not_enough(plan):
    rows = finish(plan, (0, 1, 2))
    for row in rows:
        if row["kind"] == "store":
            row["start"]["overlap"]["16"] = 0.8 + 0.05 * row["seed"]
        if row["kind"] == "sft":
            row["reverse_kl"]["sums"] = [20 * (0.35 + 0.1 * row["seed"]), 10 * (0.35 + 0.1 * row["seed"])]
    goals = find_goals(rows)
    assert [(goal["measured"], goal["met"]) for goal in goals[:2]] == [(pytest.approx(0.85), False), (pytest.approx(0.45), False)]
    name = goals[2]["name"].split(", minus")[0]
    for row in rows:
        if row["kind"] == "run" and name.startswith(row["arm"]):
            for point in row["curve"]:
                point["cpu_s"]["all"] *= 1 + 0.25 * row["seed"]
    shares = [goal for goal in find_goals(rows) if "as a share of" in goal["name"] and 0.2 < goal["measured"] <= 0.25]
    assert shares
    assert not any(goal["met"] for goal in shares)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Make a bed of random weights and made-up questions; four layers, of which one is cut."""
    model, tokenizer = build_model("llama", num_hidden_layers=4, vocab_size=261, max_position_embeddings=256), byte_tokenizer()
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id

    def save(folder):
        for part in (model, tokenizer):
            part.save_pretrained(folder)

    monkeypatch.setattr(evidence_bed.smollm2, "save_teacher", save)
    monkeypatch.setattr(evidence_bed.smollm2, "questions", lambda: [f"What is {i}?" for i in range(20)])
    size = evidence_bed.Size(sft_prompts=4, opd_prompts=8, held_out=2, new_tokens=4, sft_batch=2, batch=2)
    plan = evidence.Plan(tmp_path, seeds=(0,), size=size, arms=((evolve(NEAR, dropped=(2,)), evidence_arms.ARMS),))
    bed = plan.bed(0, plan.arms[0][0])
    evidence_make.make_teacher(tmp_path)
    evidence_make.make_text(bed)
    evidence_make.make_student(bed)
    return bed


def test_questions_that_share_most_words_are_near_copies(tiny, monkeypatch):
    assert evidence_bed.near_copies(tiny) == 0
    monkeypatch.setattr(evidence_bed.smollm2, "questions", lambda: [f"What is it that is not here, {i}?" for i in range(20)])
    assert evidence_bed.near_copies(tiny) == 0, "6 of 8 words are the same"
    monkeypatch.setattr(evidence_bed.smollm2, "questions", lambda: ["What is it?"] * 20)
    assert evidence_bed.near_copies(tiny) == tiny.size.held_out


def test_a_store_a_live_run_and_a_peer_for_real(tiny):
    store = evidence_make.make_store(tiny, shares=(0.5, 0.25))
    assert {share: set(part["scoring"]) for share, part in store["cpu_s"].items()} == {
        "1": set(evidence_make.COLUMNS),
        "0.5": {"teacher"},
        "0.25": {"teacher"},
    }
    half = evidence_arms.paid(tiny, evolve(TOP_64, share=0.5))
    assert half["sampling"] == store["cpu_s"]["0.5"]["sampling"]
    assert half["all"] == half["sampling"] + half["scoring"] > half["sampling"] > 0
    arms = [evolve(TOP_64, share=0.5), ONLINE, *([TRL] if find_spec("trl") else [])]
    before = evidence_bed.teacher(tiny.folder / "teacher")[0]
    cached, held = before.config.use_cache, set(vars(before))
    for arm in arms:
        row = evidence_arms.run_arm(tiny, arm, 1e-3, evidence_plan.HALF)
        assert [point["step"] for point in row["curve"]] == [row["steps"] // 2, row["steps"]]
        spent = row["curve"][-1]["cpu_s"]
        assert all(spent[part] > 0 for part in ("sampling", "scoring", "training"))
        assert spent["all"] == pytest.approx(sum(spent[part] for part in ("sampling", "scoring", "training")))
        assert len(row["curve"][-1]["reverse_kl"]["sums"]) == tiny.size.held_out
    assert (before.config.use_cache, set(vars(before))) == (cached, held), "a run changed the teacher of the others"
