"""The testbed of the benchmarks: right answers, disjoint prompts, models made once, and the same run from the same seed."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from attrs import evolve

from lopd.losses.fused import FusedOPDLoss
from lopd.records import Lineage, Rollout

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from testbed import runs, seeds
from testbed.models import HEALTHY, Setting, prepare, source_of
from testbed.products import Product
from testbed.runs import Training, offline, online, scored_rollouts
from testbed.task import Problem, Writer, decode, encode, make_problems, verify

TINY = Setting(
    "tiny",
    teacher_size=(16, 1),
    student_size=(16, 1),
    taught_problems=64,
    teacher_steps=6,
    sft_prompts=16,
    sft_steps=3,
    opd_prompts=24,
    held_out_prompts=8,
    batch=8,
    opd_steps=2,
)


def answered(problem, text):
    prompt = problem.prompt()
    return verify(prompt, Rollout("r", prompt.token_ids, encode(text), [True] * len(text), "stop"))


@pytest.mark.parametrize("style", ["A", "B"])
def test_a_working_in_either_style_is_right_and_the_verifier_sees_what_is_not(style):
    rng = np.random.default_rng(0)
    for problem in make_problems(200, 2, seed=3):
        text = problem.working(style, rng, Writer(synonyms=4))
        assert answered(problem, text) == 1
        last = str((int(text[-2]) + 1) % 10)
        assert answered(problem, f"{text[:-2]}{last}$") == 0
        assert answered(problem, text[:-1]) == 0, "a response that does not end is not right"


def test_the_styles_differ_and_say_the_same():
    problem, rng = Problem(58, 7, 2), np.random.default_rng(0)
    assert decode(problem.prompt().token_ids.tolist()) == "58+07="
    assert problem.working("A", rng, Writer()) == "5x6o=065$"
    assert problem.working("B", rng, Writer()) == "xo56=065$"


@pytest.mark.parametrize("digits", [2, 3])
def test_the_working_of_a_product_is_right_and_what_a_letter_says_stays(digits):
    rng = np.random.default_rng(0)
    for problem in make_problems(200, digits, 3, Product):
        text = problem.working("A", rng, Writer())
        said = {}
        for letter, digit in re.findall("([A-Z])([0-9])", problem.text() + text):
            assert said.setdefault(letter, digit) == digit
        assert int("".join(re.findall("[0-9]", text.split("=")[1]))) == problem.a * problem.b
        assert answered(problem, text) == 1
        assert answered(problem, f"{text[:-2]}{(int(text[-2]) + 1) % 10}$") == 0


def test_products_are_written_as_they_are_said_to_be():
    problem, rng = Product(34, 7, 2), np.random.default_rng(0)
    assert decode(problem.prompt().token_ids.tolist()) == "A4B3xC7="
    assert problem.working("A", rng, Writer()) == "A4C728D2E8B3C721D2F2G3=F2G3E8$"
    with pytest.raises(ValueError, match="style A, not B"):
        problem.working("B", rng, Writer())
    assert len(set(make_problems(1000, 2, 0, Product))) == 1000, "there are so many, all of them distinct"


def test_a_writer_slips_as_often_as_it_is_said_to():
    rng = np.random.default_rng(0)
    problem = Problem(12, 34, 2)
    right = problem.working("A", rng, Writer())
    slipped = [problem.working("A", rng, Writer(slips=0.2)) for _ in range(2000)]
    digits = [i for i, c in enumerate(right) if c.isdigit()]
    share = np.mean([text[i] != right[i] for text in slipped for i in digits])
    assert share == pytest.approx(0.2 * 0.9, abs=0.02)
    assert all(text[i] == c for text in slipped for i, c in enumerate(right) if not c.isdigit())


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    return prepare(TINY, 0, tmp_path_factory.mktemp("testbed"))


def test_models_are_made_once_and_know_their_teachers(bed):
    folder = bed.teachers["A"].parent
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert len(made) == 4
    again = prepare(TINY, 0, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == made
    assert again.students == bed.students
    for style in ("A", "B"):
        teacher = source_of(bed.teachers[style], bed.sampling()).manifest.policy
        assert Lineage.read(bed.students[style]).sft_teacher.same_weights(teacher)


def test_no_prompt_is_used_twice(bed):
    opd, held_out = ({p.prompt_id for p in prompts} for prompts in (bed.opd_prompts, bed.held_out))
    assert (len(opd), len(held_out)) == (24, 8)
    every = make_problems(64 + 16 + 24 + 8, 2, seed=0)
    assert len(set(every)) == len(every)
    assert not opd & held_out


def test_a_round_is_named_by_its_step_and_nothing_is_hashed_for_it(bed, monkeypatch):
    training, kept, sample = Training.of(bed.students["A"], 1e-3), [], runs.sample_round
    monkeypatch.setattr(runs, "sample_round", lambda source, *rest: kept.append(source.manifest.policy) or sample(source, *rest))
    assert len([*online(bed, training, FusedOPDLoss(), "A")]) == 2
    assert [(policy.name, policy.revision) for policy in kept] == [("online", "step-0"), ("online", "step-1")]


def test_the_same_seed_gives_the_same_run_offline_and_online(bed):
    def run(kind):
        training = Training.of(bed.students["A"], 1e-3)
        store = scored_rollouts(bed, "A", "A")
        steps = offline(bed, store, training, FusedOPDLoss()) if kind == "offline" else online(bed, training, FusedOPDLoss(), "A")
        return [evolve(m, seconds=0.0) for m in steps]

    for kind in ("offline", "online"):
        assert run(kind) == run(kind)
        assert [m.step for m in run(kind)] == [0, 1]


def test_a_student_is_measured_by_its_answers_and_beside_its_teacher(bed):
    training, teacher = Training.of(bed.students["A"], 1e-3), Training.of(bed.teachers["A"], 1e-3)
    assert {*teacher.measure(bed)} == {"accuracy", "greedy"}
    assert teacher.measure(bed, bed.teachers["A"])["kl"] == pytest.approx(0, abs=1e-5)
    found = training.measure(bed, bed.teachers["A"])
    assert found["kl"] > 1e-3
    start = training.start(bed, bed.teachers["A"])
    assert start == {"start": found["accuracy"], "start_greedy": found["greedy"], "start_kl": found["kl"]}


def test_no_seed_of_a_report_is_that_of_another():
    every = [seed for name in ("CLAIMS", "LONG", "PAIRS", "GUARDS") for seed in getattr(seeds, name)]
    assert len(set(every)) == len(every)
    assert min(every) >= 300


def test_the_settings_of_the_benchmarks_leave_room_for_every_response():
    longest = max(len(p.working(s, np.random.default_rng(0), HEALTHY.writer)) for p in make_problems(50, HEALTHY.digits, 0) for s in "AB")
    assert longest <= HEALTHY.max_new_tokens
