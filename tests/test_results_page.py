"""The page of results: it is what its script makes of the result files, and states each goal once, in words that fit."""

import re
import sys
from pathlib import Path
from statistics import mean

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_train
import publish
from claims_summary import MARGIN, Ratio, Runs, accuracy, change, farthest, passed, ratios, spent
from docs_tables import IN_WORDS
from evidence_summary import Found, cost, moved
from results_page import Part, Reading, make_page, undecided
from testbed.arms import ONLINE, PLAIN, RATIO, TOP_K
from testbed.estimator_arms import BEST, CANDIDATES, FAST, STORED, faster
from testbed.trl_peer import ARM as TRL

READINGS = [
    Reading(
        "Cheap", r"^cost of (?P<arm>.+)$", "*{arm}* costs {measured}", "*{arm}* costs {measured}, too much", "Wages.", told="^cost of b"
    ),
    Reading("Good", r"^gain$", "it gains {measured}", "it gains nothing ({measured})", told="."),
]


def goal(name, measured, met, wanted="<= 1"):
    return {"name": name, "goal": wanted, "measured": measured, "ci95": 0.5, "seeds": 2, "met": met}


def part(*goals, readings=READINGS):
    result = {"commit": "0123456789abcdef", "machine": {"cores": 2}, "versions": {"lopd": "1"}, "goals": goals}
    return Part("A small part", result, readings, "be careful.", [["### More", "", "words"]], {}, "some.py")


def words(page):
    """Return a page in one line."""
    return " ".join(page.read_text().split())


def test_the_page_in_the_repository_is_what_its_script_makes_of_the_result_files():
    parts = publish.parts()
    assert make_page(publish.TITLE, parts) == publish.PAGE.read_text(), "run benchmarks/publish.py"
    assert parts[0].sentences()[0] in (publish.DOCS / "index.md").read_text().splitlines(), "run benchmarks/publish.py"


def test_goals_of_the_result_files_are_what_their_rows_give():
    assert {*publish.measured(), "quickstart", "quickstart_seeds"} == publish.JUDGES.keys()
    for name, judge in publish.JUDGES.items():
        found = publish.read(name)
        assert found["goals"] == judge(found["rows"]), f"{name}: run benchmarks/publish.py"


def test_the_step_of_trl_is_said_to_hold_a_part_of_its_teacher():
    found = publish.read("bench_train")
    rows = bench_train.measured()
    whole = {row["path"] for row in rows} >= bench_train.PEERS.keys()
    if whole:
        assert found["goals"] == bench_train.goals(bench_train.summarise(rows)), "run bench_train.py --report"
    (goal,) = (goal for goal in found["goals"] if "TRL" in goal["name"])
    assert goal["name"].endswith("its teacher's layers not counted")
    said = words(publish.DOCS / "comparison.md")
    assert "with its teacher's layers not counted (`benchmarks/results/bench_train.json`)" in said
    assert (f"took {goal['measured']:.3g} times as many tokens a second as TRL's" in said) == whole
    assert ("in accumulated parts it was not measured" in said) != whole


def test_no_goal_is_met_whose_interval_holds_its_bound():
    named = [
        (name, goal)
        for name in publish.JUDGES
        for goal in publish.read(name)["goals"]
        if goal["goal"][:1] in "<>" and (goal.get("ci95") or "low" in goal)
    ]
    assert len(named) > 20
    assert [goal["name"] for _, goal in named if goal["met"] and undecided(goal)] == []


def test_pages_state_what_both_files_of_costs_have():
    files = [Runs.of(publish.read(name)["rows"]) for name in ("claims", "claims_estimators")]

    def times(base, arm, at="equal steps"):
        return [ratios(runs, publish.WORKS, base, arm)[at].mean for runs in files]

    assert [1.95 < cost < 3 for cost in times(ONLINE.name, PLAIN.name)] == [True, True]
    at_equal_accuracy = times(ONLINE.name, PLAIN.name, "equal accuracy")
    assert all(less < cost for less, cost in zip(at_equal_accuracy, times(ONLINE.name, PLAIN.name), strict=True))
    stored, trained = passed(publish.read("claims")["rows"], publish.WORKS, PLAIN.name)
    assert round(trained / stored) == 4
    assert f"A store has {stored:,} rollouts" in words(publish.PAGE), "the results: less is sampled and scored for a store"
    real = Found(publish.read("evidence")["rows"])
    live, top = real.cell(ONLINE.name), real.cell(real.best)
    assert real.plan["batch"] * live[0]["steps"] == real.plan["opd_prompts"], "one pass"
    once = Ratio.of([cost(live[seed]) / cost(top[seed]) for seed in live]).mean
    kept = zip(times(ONLINE.name, TOP_K.name), times(ONLINE.name, TOP_K.name, "equal accuracy"), strict=True)
    assert all(cost < more for cost, more in kept), "the first page: at equal accuracy a support saves more"
    for page in (publish.ROOT / "README.md", publish.DOCS / "index.md", publish.DOCS / "decisions" / "0008-recommended-loss.md"):
        assert "two to three times as much" in page.read_text(), page
        assert ("with about four passes over each" in words(page), f"{once:.1f} times as much" in words(page)) == (True, True), page
    assert [2.1 < cost < 2.5 for cost in times(TRL, PLAIN.name)] == [True, True], (
        "the comparison: a little more than twice as much as Lightning"
    )
    assert [0.9 < cost < 1.1 for cost in times(TRL, PLAIN.name, "equal accuracy")] == [True, True], "about the same"
    beside = [ratios(runs, publish.WORKS, ONLINE.name, TRL) for runs in files]
    alike = all(times["equal steps"].low <= 1 <= times["equal steps"].high for times in beside)
    chosen = words(publish.DOCS / "choose.md")
    assert ("Its cost at equal steps was not told from that of online OPD, here or beside" in chosen) == alike
    twice = all(1.7 < times["equal accuracy"].mean < 2.3 and times["equal accuracy"].low > 1.4 for times in beside)
    assert ("until both are as accurate, online OPD with the sampled token costs about twice as much" in chosen) == twice


def test_pages_say_beside_which_losses_trl_ends_highest():
    claims, again = (Runs.of(publish.read(name)["rows"]) for name in ("claims", "claims_estimators"))

    def above(runs, arm, trl=TRL):
        return runs.difference(runs.where(publish.WORKS, trl), runs.where(publish.WORKS, arm), accuracy)

    sampled = {row["arm"] for row in claims.rows if row["setting"] == publish.WORKS} - {TRL, "ratio, three times the rate"}
    assert all(above(claims, arm).positive for arm in sampled if not arm.startswith("stored top-8"))
    top_8 = above(claims, TOP_K.name)
    assert ("was not told from stored top-8 with reverse KL" in words(publish.DOCS / "choose.md")) == (top_8.low <= 0 <= top_8.high)
    supports = {arm.name: above(again, arm.name) for arm in STORED if arm.support.width}
    assert {name for name, more in supports.items() if not more.low <= 0 <= more.high} == {"8 drawn"}
    assert supports["8 drawn"].positive
    at_three_times = {arm.name: above(again, arm.name, faster(TRL)) for arm in FAST if arm.support.width}
    assert {name for name, more in at_three_times.items() if more.positive} == {faster(TOP_K.name), faster(BEST.name)}
    ahead = {name: more.mean for name, more in at_three_times.items()}
    assert 0.005 < ahead[faster(BEST.name)] < 0.01 < ahead[faster(TOP_K.name)] < 0.015
    assert at_three_times[faster(TOP_K.name)].high > MARGIN, "the README: that it is at most so much lower was not shown"
    assert ahead.keys() - {faster(TOP_K.name), faster(BEST.name)} == {faster(CANDIDATES.name)}
    said = words(publish.DOCS / "comparison.md")
    assert "From stored supports it was not told apart there at the rate of the claims, draws aside, of which it is ahead" in said
    assert "At three times the rate it is ahead of the teacher's top-8 and of the arm of the goals by about a hundredth" in said
    top = next(line for line in publish.PAGE.read_text().splitlines() if line.startswith(f"| {faster(TOP_K.name)} | 0"))
    assert f" {ahead[faster(TOP_K.name)] * -1:+.3f} ± " in top, "minus TRL at its own rate"


def test_the_sentence_on_real_weights_has_the_measure_with_less_noise():
    found = Found(publish.read("evidence")["rows"])
    stored, live = found.cell(found.form()), found.cell(ONLINE.name)
    gains = [found.mean(cell, moved).show("+.3f") for cell in (stored, live)]
    beside = found.paired(stored, live, lambda ours, theirs: moved(ours) - moved(theirs)).show("+.3f")
    (said,) = (
        line
        for line in publish.PAGE.read_text().splitlines()
        if "at the tokens of its own answers" in line and line.startswith("- **For you")
    )
    assert all(figure in said for figure in (*gains, f"{beside} beside online OPD"))
    assert f"| minus that of {found.rival} |" in publish.PAGE.read_text()


def test_where_stored_tokens_are_overfitted_is_said_beside_where_they_are_not():
    runs = Runs.of(publish.read("claims")["rows"])
    worst = max(farthest(row) for row in runs.where(publish.FAILS, PLAIN.name).values())
    (said,) = (
        line for line in publish.PAGE.read_text().splitlines() if "of the step at which it is farthest from 1" in line and "held" in line
    )
    assert worst > 1
    assert f"to {worst:.2f} on *{publish.FAILS}*" in said
    assert f"**Stored tokens are not overfitted on {publish.WORKS}: " in publish.PAGE.read_text()


def test_seconds_of_two_files_are_not_told_to_be_of_one_clock():
    page = publish.PAGE.read_text()
    claimed, again = (Runs.of(publish.read(name)["rows"]).where(publish.WORKS, ONLINE.name) for name in ("claims", "claims_estimators"))
    took = [mean(spent(row) for row in cell.values()) for cell in (claimed, again)]
    assert re.search(rf"The same run of online OPD took {took[0]:.2f} ± \S+ of them in the claims and {took[1]:.2f} ", page)
    assert "so seconds are compared within a file" in (publish.DOCS / "decisions" / "0008-recommended-loss.md").read_text()


def test_the_decision_says_of_supports_what_the_file_has():
    runs = Runs.of(publish.read("claims_estimators")["rows"])
    ends = {
        arm.name: runs.difference(runs.where(publish.WORKS, arm.name), runs.where(publish.WORKS, TRL), accuracy)
        for arm in STORED
        if arm.support.width
    }
    assert [name for name, end in ends.items() if not end.at_least(-MARGIN)] == ["8 drawn"]
    assert min(ends, key=lambda name: ends[name].mean) == "8 drawn"
    long = {(row["arm"], row["seed"]): row["accuracy"] for row in publish.read("claims_long")["rows"] if row["kind"] == "run"}
    drawn, top = (f"{name}, residual, 300 rollouts" for name in ("16 drawn", "stored top-8"))
    assert all(long[drawn, seed] < long[top, seed] for arm, seed in long if arm == drawn), "on the longer one with every seed"
    real = {row["variant"]: row["held_out_reverse_kl"] for row in publish.read("quickstart_losses")["rows"]}
    assert real["the quickstart's"] < real["16 draws of the policy"] < real["teacher's top 64 with the residual"]
    assert publish.read("evidence")["rows"][0]["best"] == "teacher's top 64"
    assert f"all but the draws at most {MARGIN:g} below TRL" in (publish.DOCS / "decisions" / "0008-recommended-loss.md").read_text()


def test_the_decision_says_how_lightning_ends_where_it_works():
    runs = Runs.of(publish.read("claims")["rows"])
    plain, ratio, online = (runs.where(publish.WORKS, arm.name) for arm in (PLAIN, RATIO, ONLINE))
    below, more = runs.difference(plain, online, accuracy), runs.difference(ratio, plain, accuracy)
    said = words(publish.DOCS / "decisions" / "0008-recommended-loss.md")
    assert ("it ends below online OPD, by more than chance" in said) == below.negative
    assert ("its end was not told from that of online OPD, nor shown to be at most 0.02" in said) == (
        not (below.negative or below.positive or below.at_least(-MARGIN))
    )
    assert ("the ratio ends at most that much below" in said) == runs.difference(ratio, online, accuracy).at_least(-MARGIN)
    assert ("the two were not told apart there" in said) == (not (more.negative or more.positive))


def test_pages_say_how_far_the_ratio_goes_where_the_plain_loss_falls():
    rows = [row for row in publish.read("drift")["rows"] if row.get("setting") == "failing" and "curve" in row]
    ends = {
        run: mean(row["accuracy_at_end"] - row["accuracy_at_start"] for row in rows if row["run"] == run)
        for run in {row["run"] for row in rows}
    }
    assert ends["plain"] < -0.2
    assert -0.05 < ends["ratio to ref"] < 0, "it keeps nearly all of its accuracy"
    assert 0.01 < ends["online"] - ends["ratio to ref"] < 0.05, "a little below"
    runs = Runs.of(publish.read("claims")["rows"])
    moved = {
        arm: runs.mean(runs.where(publish.FAILS, arm), change) for arm in ("Lightning", "refresh every 20 steps", "refresh every 50 steps")
    }
    assert moved["Lightning"].mean < moved["refresh every 20 steps"].mean
    assert moved["refresh every 50 steps"].mean < moved["Lightning"].mean, "new rollouts every 50 steps do not slow the fall"
    supports = runs.mean(runs.where(publish.FAILS, "stored top-8, reverse KL"), change)
    assert (supports.at_least(-MARGIN), 0 < supports.mean < 0.05) == (True, True), "the README: supports gain little"


def test_goals_that_pages_leave_to_this_one_are_in_it():
    assert {name for name in IN_WORDS if (publish.RESULTS / f"{name}.json").exists()} <= {*publish.PARTS}


def test_three_sentences_tell_what_held_and_what_did_not():
    found = part(goal("cost of a", 2.0, met=False), goal("cost of b", 0.5, met=True), goal("gain", 3.0, met=True))
    assert found.sentences() == [
        "- **What held** (2 of 3 goals): *b* costs 0.50 ± 0.50; it gains 3.00 ± 0.50.",
        "- **What did not:** *a* costs 2.00 ± 0.50, too much.",
        "- **For you:** be careful.",
    ]


def test_a_goal_whose_interval_holds_its_bound_is_not_said_to_be_excluded():
    reading = Reading(
        "Cheap", "^cost", "it costs {measured}", "it costs as much as {measured}", open="not shown to be at most {bound} ({measured})"
    )
    assert reading.say(goal("cost", 1.2, met=False)) == "not shown to be at most 1 (1.20 ± 0.50)"
    assert reading.say(goal("cost", 1.6, met=False)) == "it costs as much as 1.60 ± 0.50"
    assert reading.say(goal("cost", 0.4, met=True)) == "it costs 0.40 ± 0.50"
    page = "".join(part(goal("cost", 1.2, met=False), goal("cost", 1.6, met=False), readings=[reading]).goals())
    assert page.count("| ? open | not shown") == page.count("| ✗ missed | it costs as much") == 1


def test_of_missed_goals_an_excluded_one_is_told_before_one_that_was_left_open():
    reading = Reading(
        "Cheap", "^cost of (?P<arm>.+)", "held", "*{arm}* is dear", open="*{arm}* was not shown to be cheap", told="^cost of d"
    )
    missed = [goal("cost of a", 1.2, met=False), goal("cost of b", 1.6, met=False), goal("cost of c", 1.7, met=False)]
    assert reading.tell(missed, met=False) == ["*b* is dear"]
    assert reading.tell(missed[:1], met=False) == ["*a* was not shown to be cheap"]
    assert reading.tell([*missed, goal("cost of d", 1.2, met=False)], met=False) == ["*d* was not shown to be cheap"]


def test_the_first_sentences_tell_where_trl_costs_less_than_a_stored_support():
    goals = [goal for goal in publish.read("claims")["goals"] if goal["name"].startswith("TRL over ")]
    less = {goal["name"] for goal in goals if goal["measured"] < 1 and not undecided(goal)}
    assert less == {f"TRL over {arm.name}, cost at half of the gain" for arm in (PLAIN, TOP_K)}
    missed = publish.parts()[0].sentences()[1]
    assert all(f"TRL costs less than *{arm.name}* at half of the gain" in missed for arm in (PLAIN, TOP_K))


def test_no_goal_is_easier_to_meet_the_wider_its_interval_is():
    wanted = [goal["goal"] for name in (*publish.JUDGES, "consistency") for goal in publish.read(name)["goals"]]
    assert [words for words in wanted if "interval" in words] == []


def test_no_reason_is_given_for_what_was_only_not_shown():
    assert "Why:" not in "".join(part(goal("cost of a", 1.2, met=False)).goals())


def test_a_part_in_which_nothing_was_missed_says_so():
    assert part(goal("gain", 3.0, met=True)).sentences()[1] == "- **What did not:** nothing."


def test_every_goal_is_in_the_page_by_claim_with_the_reason_of_a_miss_and_what_it_is_from_stands_last():
    page = make_page("Results", [part(goal("cost of a", 2.0, met=False), goal("cost of b", 0.5, met=True), goal("gain", 3.0, met=True))])
    assert page.startswith("# Results\n\n[A small part](#a-small-part):\n\n- **What held**")
    assert "**Cheap**: 1 of 2 goals met.\n" in page
    assert "| ✗ missed | *a* costs 2.00 ± 0.50, too much | <= 1 |\n| ✓ held | *b* costs 0.50 ± 0.50 | <= 1 |\n\nWhy: Wages.\n" in page
    assert page.count("Why:") == 1
    assert page.endswith("| A small part | `benchmarks/some.py` | 0123456789ab | cores 2 | lopd 1 |\n")


def test_a_goal_that_no_reading_says_is_refused():
    with pytest.raises(ValueError, match=r"A small part: goal 'size' has 0 readings, expected 1\."):
        part(goal("size", 1.0, met=True))
