"""The planner: arithmetic that can be done by hand, the paper's table 2, and the command line."""

import itertools
import json
import re

import numpy as np
import pytest
from attrs import evolve

from lopd import MemoryStore, SamplingParams, ZarrStore, collect_rollouts, label_rollouts, score_rollouts
from lopd.engines.hf import HFScorer, HFSource
from lopd.errors import InvalidRecordError
from lopd.records import Commit, Scores
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores, tiny_top_k
from lopd.tools import command
from lopd.tools.plan import (
    PAPER_LOCKSTEP,
    TABLE_2,
    GpuRates,
    Work,
    lightning,
    lockstep_of,
    measured_rates,
    online,
    rates_like,
    work_like,
)

HOUR = 3600
WORK = Work(prompts=1000, samples=2, prompt_tokens=100, response_tokens=900, steps=50, rollouts_per_step=64, tokens_per_batch=8000)
RATES = GpuRates(sampling=100, scoring=1000, training=500)


def main(arguments):
    return command.main(["plan", *arguments])


def hours(bill):
    return {phase.name: phase.gpu_hours for phase in bill.phases}


def test_lightning_samples_and_scores_once_and_trains_on_every_step():
    bill = lightning(WORK, RATES, gpus=4)
    expected = {"rollouts": 2000 * 900 / 100, "scores": 2000 * 1000 / 1000, "training": 50 * 64 * 1000 / 500}
    assert hours(bill) == pytest.approx({name: seconds / HOUR for name, seconds in expected.items()})
    assert bill.wall_hours == pytest.approx(bill.gpu_hours / 4)
    assert bill.bottleneck.name == "rollouts"
    assert hours(lightning(evolve(WORK, columns=(0, 0, 0)), RATES, gpus=4))["scores"] == pytest.approx(3 * expected["scores"] / HOUR)


def test_online_opd_samples_and_scores_what_every_step_trains_on():
    bill = online(WORK, RATES, gpus=4)
    expected = {"rollouts": 3200 * 900 / 100, "scores": 3200 * 1000 / 1000, "training": 3200 * 1000 / 500}
    assert hours(bill) == pytest.approx({name: seconds / HOUR for name, seconds in expected.items()})
    slow = hours(online(WORK, RATES, gpus=4, lockstep=3.0))
    assert slow == pytest.approx({name: h * (1 if name == "training" else 3) for name, h in hours(bill).items()})


def test_training_spreads_over_as_many_gpus_as_a_step_has_micro_batches_and_others_are_held_only_online():
    few, many = lightning(WORK, RATES, gpus=8), lightning(WORK, RATES, gpus=100)
    assert (few.phases[2].gpus, many.phases[2].gpus) == (8, 8)
    assert many.phases[2].wall_hours == few.phases[2].wall_hours
    assert many.phases[2].limit.startswith("50 steps one after the other, each with work for 8 GPUs")
    assert many.bottleneck.name == "training"
    assert many.gpu_hours == pytest.approx(few.gpu_hours)
    assert hours(online(WORK, RATES, gpus=100))["training"] == pytest.approx(100 / 8 * hours(few)["training"])
    long = evolve(WORK, response_tokens=32_868, tokens_per_batch=8192)
    assert lightning(long, RATES, gpus=1000).phases[2].gpus == 64, "a rollout is not split"


def test_one_process_that_commits_is_a_limit_of_its_own():
    bill = lightning(WORK, RATES, gpus=100_000)
    assert bill.phases[0].wall_hours == pytest.approx(2000 * 900 / 2e6 / HOUR)
    assert bill.phases[0].limit.startswith("the process that commits")


def test_by_default_steps_pass_over_the_rollouts_as_often_as_those_of_the_paper():
    assert Work(prompts=17_400).all_steps == 150
    assert Work(prompts=174_000).all_steps == 1500
    assert Work(prompts=1).all_steps == 1


def test_memory_is_that_of_the_largest_model_offline_and_of_all_of_them_online():
    work = Work(prompts=10, student_billions=1, teacher_billions=10)
    assert (lightning(work, RATES, 1).memory_gb, online(work, RATES, 1).memory_gb) == (20, 16 + 2 + 20)
    mixture = evolve(work, student_active=0.5, teacher_active=2.0)
    assert lightning(mixture, RATES, 1).memory_gb == 20, "experts that are not met are in memory all the same"
    assert rates_like(mixture).training == pytest.approx(2 * rates_like(work).training)
    assert rates_like(mixture).scoring == pytest.approx(5 * rates_like(work).scoring)


@pytest.mark.parametrize("name", TABLE_2)
def test_with_a_rows_own_rates_table_2_comes_out_as_it_is(name):
    row = TABLE_2[name]
    stored, texts = row.work.rollouts * row.work.response_tokens, row.work.rollouts * (row.work.response_tokens + 200)
    trained = row.work.trained * (row.work.response_tokens + 200)
    rates = GpuRates(sampling=stored / row.rollouts / HOUR, scoring=texts / row.scores / HOUR, training=trained / row.training / HOUR)
    assert lightning(row.work, rates, 8).gpu_hours == pytest.approx(row.total)
    assert online(row.work, rates, 8, lockstep_of(row)).gpu_hours == pytest.approx(row.online)
    assert online(row.work, rates, 8).gpu_hours < 0.6 * row.online, "at bulk rates online OPD would have taken far less"


@pytest.mark.parametrize("name", TABLE_2)
def test_with_rates_from_the_sizes_of_models_table_2_comes_out_nearly(name):
    row = TABLE_2[name]
    rates = rates_like(row.work)
    assert lightning(row.work, rates, 8).gpu_hours == pytest.approx(row.total, rel=0.1)
    assert online(row.work, rates, 8, PAPER_LOCKSTEP).gpu_hours == pytest.approx(row.online, rel=0.25)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Work(prompts=0), "Work: prompts is 0, expected at least 1"),
        (lambda: evolve(WORK, steps=0), "Work: steps is 0"),
        (lambda: evolve(WORK, student_billions=0), "Work: student_billions is 0, expected finite and more than 0"),
        (lambda: evolve(WORK, teacher_active=-1), "Work: teacher_active is -1"),
        (lambda: evolve(WORK, prompt_tokens=0.5), "prompt_tokens is 0.5, expected finite and at least 1"),
        (lambda: evolve(WORK, response_tokens=float("nan")), "response_tokens is nan"),
        (lambda: evolve(WORK, columns=()), "number of columns is 0"),
        (lambda: evolve(WORK, columns=(0, -1)), "top-k is -1"),
        (lambda: evolve(WORK, labels=-1), "Work: labels is -1, expected at least 0"),
        (lambda: evolve(WORK, logprob_dtype="bfloat16"), "logprob_dtype is 'bfloat16'"),
        (lambda: evolve(RATES, scoring=0), "GpuRates: scoring is 0, expected finite and more than 0 tokens a second"),
        (lambda: evolve(RATES, sampling="1"), "GpuRates: sampling is '1', expected a number"),
        (lambda: rates_like(WORK, flops="989"), "Rates: flops is '989', expected a number"),
        (lambda: evolve(WORK, id_bytes=float("nan")), "Work: id_bytes is nan"),
        (lambda: evolve(WORK, scored=2), "Work: scored is 2, expected 0 to 1, the number of columns"),
        (lambda: lightning(WORK, RATES, 0), "Bill: gpus is 0"),
        (lambda: online(WORK, RATES, 1, 0.5), "Bill: lockstep is 0.5, expected finite and at least 1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make, message):
    with pytest.raises(InvalidRecordError, match=message):
        make()


# what is stored


def fill(store, count=40):
    """Fill a store with rollouts in two appends, a teacher with a top-k support, and another column."""
    lengths = [3 + i % 5 for i in range(count)]
    items = [tiny_rollout(f"p{i}/s0/g0", range(n), behavior_logprobs=[-1.0] * n) for i, n in enumerate(lengths)]
    items[1] = tiny_rollout("p1/s0/g0", range(4), loss_mask=[True, False, True, False], behavior_logprobs=[-1.0] * 4)
    store.append(items[: count // 2])
    store.append(items[count // 2 :])
    for column, k in (("teacher", 2), ("ref", 0)):
        scores = [Scores.of(r, np.full(r.response_ids.size, -2.0), top_k=tiny_top_k(r.response_ids.size) if k else None) for r in items]
        store.append_scores(column, tiny_provenance(column, k), scores)
    return store


@pytest.mark.parametrize(("vocab_size", "width"), [(256, 1), (257, 2), (65_536, 2), (65_537, 4)])
def test_a_token_costs_its_id_and_its_log_probs_exactly(vocab_size, width):
    work = Work(prompts=10, prompt_tokens=20, response_tokens=100, vocab_size=vocab_size, columns=(0, 0), behavior=False)
    assert (work.stored.token_ids, work.stored.logprobs) == (10 * 120 * width, 10 * 100 * 2 * 4)
    size = evolve(work, logprob_dtype="float16", behavior=True, columns=(16, 0), masked=True).stored
    assert (size.logprobs, size.top_k, size.masks) == (10 * 100 * 3 * 2, 10 * 100 * (16 * (width + 2) + 4), 10 * 100)
    assert size.total == size.token_ids + size.logprobs + size.top_k + size.masks + size.overhead


def test_twelve_bytes_a_token_for_ids_teacher_and_ref_in_long_rollouts():
    assert 11.99 < Work(prompts=1000, prompt_tokens=1, response_tokens=8191).stored.bytes_per_token < 12.1


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("compacted", [False, True])
def test_the_plan_of_a_store_that_is_there_has_its_size(tmp_path, dtype, compacted):
    for count in (8, 200):
        store = fill(ZarrStore.create(tmp_path / f"{count}", tiny_manifest(), logprob_dtype=dtype), count)
        if compacted:
            store.compact()
        assert work_like(store, dtype).stored.total == pytest.approx(store.stored_bytes(), rel=0.03)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_plan_of_a_store_counts_what_sampling_that_is_not_neutral_leaves_in_it(tmp_path, dtype):
    store = ZarrStore.create(tmp_path / "store", tiny_manifest(), logprob_dtype=dtype)
    values = {"behavior_logprobs": [-1.0] * 200, "sampler_logprobs": [-0.5] * 200}
    rollouts = [tiny_rollout(f"p{i}/s0/g0", range(200), **values) for i in range(40)]
    store.append(rollouts)
    store.append_scores("teacher", tiny_provenance(), [tiny_scores(rollout) for rollout in rollouts])
    assert work_like(store, dtype).stored.total == pytest.approx(store.stored_bytes(), rel=0.03)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_labels_are_planned_in_float32_as_a_store_of_any_dtype_keeps_them(tmp_path, dtype):
    store = ZarrStore.create(tmp_path / "store", tiny_manifest(), logprob_dtype=dtype)
    rollouts = [tiny_rollout(f"p{i}/s0/g0", range(200)) for i in range(40)]
    store.append(rollouts)
    store.append_scores("teacher", tiny_provenance(), [tiny_scores(rollout) for rollout in rollouts])
    label_rollouts(store, lambda *_: 1.0, None, name="right")
    work = work_like(store, dtype)
    assert work.stored.labels == 40 * 200 * 4
    assert work.stored.total == pytest.approx(store.stored_bytes(), rel=0.03)
    assert lightning(work, RATES, 1).gpu_hours == lightning(evolve(work, labels=0), RATES, 1).gpu_hours, "a verifier takes no GPU"


def test_rates_are_the_median_over_commits_so_that_a_night_does_not_count():
    class Remembering:
        def __getattr__(self, name):
            return getattr(store, name)

        def history(self):
            return commits

    store = fill(MemoryStore(tiny_manifest()), 5)
    prompts, responses = store.lengths().sum(axis=0).tolist()
    share, moments = responses / (prompts + responses), [0, 10, 20, 86_420, 86_430]
    commits = [Commit(i, "rollouts", 5, 1000, None, when) for i, when in enumerate(moments)]
    commits += [Commit(5 + i, "scores", 5, 600, "teacher", 90_000 + 3 * i) for i in range(4)]
    assert measured_rates(Remembering()) == pytest.approx({"sampling": 100 * share, "scoring": 200 / share})
    commits = commits[:1]
    assert measured_rates(Remembering()) == {}


def test_an_empty_store_cannot_be_measured_and_one_without_scores_is_planned_with_a_column(tmp_path):
    store = ZarrStore.create(tmp_path / "empty", tiny_manifest())
    with pytest.raises(InvalidRecordError, match="0 rollouts"):
        work_like(store)
    store.append([tiny_rollout("p/s0/g0")])
    assert work_like(store).columns == (0,)


# the command line


def printed(capsys, *arguments):
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_line_plans_several_sizes(capsys):
    plans = printed(capsys, "--gpus", "64", "--top-k", "8")
    assert [plan["rollouts"] * 3072 for plan in plans] == pytest.approx([1e6, 1e9, 1e12], rel=1e-2)
    for small, large in itertools.pairwise(plans):
        for name in ("lightning", "online_at_least", "online_in_lockstep"):
            assert large[name]["gpu_hours"] == pytest.approx(1000 * small[name]["gpu_hours"], rel=0.2)
        assert large["lightning"]["store_bytes"] == pytest.approx(1000 * small["lightning"]["store_bytes"], rel=0.01)
    assert main(["--prompts", "17400", "--gpu-price", "2", "--storage-price", "0.02"]) == 0
    shown = capsys.readouterr().out
    assert "17,400 rollouts" in shown
    assert "price" in shown
    assert "Longest: training" in shown


def test_given_rates_go_before_measured_ones_and_measured_ones_before_guesses(capsys, tmp_path, llama, tokenizer, prompts):
    source = HFSource(llama, tokenizer, SamplingParams(max_new_tokens=6))
    store = ZarrStore.create(str(tmp_path / "store"), source.manifest)
    collect_rollouts(source, prompts, store, prompts_per_batch=2)
    score_rollouts(store, HFScorer(llama, tokenizer), rollouts_per_batch=2)
    (guess,) = printed(capsys, "--prompts", "100")
    (plan,) = printed(capsys, "--prompts", "100", "--like", str(tmp_path / "store"), "--scoring-rate", "123")
    (half,) = printed(capsys, "--prompts", "100", "--like", str(tmp_path / "store"), "--like-gpus", "2")
    assert plan["work"]["vocab_size"] == 96
    assert plan["work"]["prompt_tokens"] == pytest.approx(store.lengths()[:, 0].mean())
    assert (plan["rates"]["scoring"], plan["rates"]["training"]) == (123, guess["rates"]["training"])
    assert plan["rates"]["sampling"] == pytest.approx(2 * half["rates"]["sampling"])
    assert plan["rates"]["sampling"] != guess["rates"]["sampling"]


def test_the_bytes_are_those_of_what_is_asked(capsys):
    lengths = ("--prompt-tokens", "100", "--response-tokens", "3000")
    (plan,) = printed(capsys, "--prompts", "1000", "--samples", "4", *lengths, "--columns", "2", "--top-k", "8", "--no-behavior")
    assert plan["store"]["token_ids"] == 4000 * 3100 * 4
    assert plan["store"]["logprobs"] == 4000 * 3000 * 2 * 4
    assert plan["store"]["top_k"] == 4000 * 3000 * (8 * 8 + 4)
    assert plan["store"]["total"] == plan["lightning"]["store_bytes"]


def test_like_a_store_of_as_many_prompts_is_its_size(capsys, tmp_path):
    store = fill(ZarrStore.create(tmp_path / "store", tiny_manifest(), logprob_dtype="float16"))
    like = ("--prompts", "40", "--like", str(tmp_path / "store"), "--logprob-dtype", "float16")
    (plan,) = printed(capsys, *like, "--storage-option", "any=thing")
    assert plan["store"]["total"] == pytest.approx(store.stored_bytes(), rel=0.03)
    assert plan["work"]["columns"] == [2, 0]
    (plan,) = printed(capsys, *like, "--columns", "3", "--top-k", "0", "--samples", "2")
    assert (plan["work"]["columns"], plan["rollouts"]) == ([0, 0, 0], 80)
    assert main(like) == 0
    shown = capsys.readouterr().out
    assert "float16; 2 score columns, behavior" in shown
    guess = "Training is guessed for 8.2 billion parameters on an H100; pass --student-billions, or --training-rate."
    assert guess in " ".join(shown.split())
    assert main([*like, "--training-rate", "2"]) == 0
    assert "Training is guessed" not in capsys.readouterr().out


def test_a_rate_that_is_guessed_is_marked_where_others_are_measured_also_with_the_sizes_of_the_models(capsys, tmp_path):
    """Measured rates of one GPU and a guessed one of another make the ratio of both bills a guess."""
    fill(ZarrStore.create(tmp_path / "store", tiny_manifest()))
    like = ("--prompts", "9", "--like", str(tmp_path / "store"))

    def shown(*given: str) -> str:
        assert main([*like, *given]) == 0
        return " ".join(capsys.readouterr().out.split())

    for given in ("--student-billions", "--student-active"):
        said = shown(given, "2", "--teacher-billions", "4", "--tflops", "312")
        assert "Training is guessed for 2 billion parameters on a GPU of 312 TFLOPS; pass --training-rate." in said
        assert "Scoring is guessed for 4 billion parameters on a GPU of 312 TFLOPS; pass --scoring-rate." in said
        assert re.search(r"response tokens sampled, [\d,]+ read tokens scored \(guessed\), [\d,]+ trained \(guessed\)\.", said)
    assert "guessed" not in shown("--scoring-rate", "2", "--training-rate", "2")
    assert main(["--prompts", "9"]) == 0
    assert capsys.readouterr().out.count("(guessed)") == 3  # a plan like no store


def test_scoring_that_a_store_does_not_show_the_pace_of_is_said_to_be_guessed(capsys, tmp_path):
    fill(ZarrStore.create(tmp_path / "store", tiny_manifest()))  # scored in one commit a column
    like = ("--prompts", "9", "--like", str(tmp_path / "store"), "--student-billions", "2")
    assert main(like) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Scoring is guessed for 32.8 billion parameters on an H100; pass --teacher-billions, or --scoring-rate." in shown
    assert main([*like, "--scoring-rate", "2"]) == 0
    assert "Scoring is guessed" not in capsys.readouterr().out


def test_json_marks_each_figure_that_stands_on_a_guess(capsys, tmp_path):
    fill(ZarrStore.create(tmp_path / "store", tiny_manifest()))  # scored in one commit a column
    like = ("--prompts", "9", "--like", str(tmp_path / "store"))
    (plan,) = printed(capsys, *like)
    assert plan["guessed_rates"] == ["scoring", "training"]
    for bill in (plan[name] for name in ("lightning", "online_at_least", "online_in_lockstep")):
        assert {phase["name"]: phase["guessed"] for phase in bill["phases"]} == {"rollouts": False, "scores": True, "training": True}
        assert bill["guessed"]
    (plan,) = printed(capsys, *like, "--scoring-rate", "2", "--training-rate", "2")
    assert (plan["guessed_rates"], plan["lightning"]["guessed"]) == ([], False)


def test_rates_that_were_guessed_for_shorter_responses_are_said_to_be(capsys):
    rates = ["--sampling-rate", "9", "--scoring-rate", "9", "--training-rate", "9"]
    for tokens, given, length in (("6144", [], None), ("131072", [], 3072), ("131072", rates[:4], 3072), ("131072", rates, None)):
        arguments = ["--prompts", "9", "--response-tokens", tokens, *given]
        (plan,) = printed(capsys, *arguments)
        assert plan["guessed_for_response_tokens"] == length
        assert main(arguments) == 0
        assert ("guessed for responses of 3,072 tokens" in capsys.readouterr().out) == (length is not None)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prompts", "many"],
        ["--prompts", "5", "--prompt-tokens", "0"],
        ["--prompts", "5", "--prompt-tokens", "nan"],
        ["--prompts", "5", "--columns", "0"],
        ["--prompts", "5", "--vocab-size", "0"],
        ["--prompts", "5", "--sampling-rate", "-1"],
        ["--prompts", "5", "--logprob-dtype", "float8"],
        ["--prompts", "5", "--storage-options", "secret=hunter2"],
    ],
)
def test_a_plan_of_nonsense_is_bad_usage(arguments, capsys):
    try:
        code = main(arguments)
    except SystemExit as leaving:
        code = leaving.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") >= 1
    assert "hunter2" not in error


@pytest.mark.parametrize(
    "given",
    [
        "--student X",
        "--teacher X",
        "--rows 1",
        "--lora-rank 8",
        "--dtype bfloat16",
        "--autocast bfloat16",
        "--gradient-checkpointing",
        "--packed",
    ],
)
def test_what_the_bill_does_not_depend_on_is_refused_without_a_card(given, capsys):
    assert main(given.split()) == 2
    assert f"Plan: {given.split()[0]} is given without --card, expected both; pass --card GB" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "given", ["--prompts 5", "--tokens 5", "--steps 1", "--gpu-price 2", "--like X", "--tflops 5", "--behavior", "--logprob-dtype float16"]
)
def test_what_a_card_does_not_depend_on_is_refused_beside_one(given, capsys):
    assert main(["--card", "24", "--student", "X", *given.split()]) == 2
    assert f"Plan: {given.split()[0]} is given beside --card, expected one of them" in " ".join(capsys.readouterr().err.split())


def test_what_the_command_line_cannot_do_is_one_sentence_and_exit_code_2(capsys, tmp_path):
    assert main(["--prompts", "0"]) == 2
    assert [main([f"--{name}", value]) for name, value in (("tokens", "nan"), ("gpus", "0"), ("like-gpus", "0"))] == [2, 2, 2]
    assert "Work: prompts is 0, expected at least 1" in capsys.readouterr().err
    assert main(["--like", str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err
