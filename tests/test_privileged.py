"""Scorers that read more than the policy did: the same response tokens after another prompt, in a column that records it."""

import warnings

import numpy as np
import pytest
from attrs import evolve
from conftest import CONTEXT, TOKENIZER_ID, build_tokenizer
from helpers import OTHER_TEACHER, POLICY, SFT_TEACHER, make_manifest, make_provenance, make_store
from named_batches import numbered_records
from suite_cases import filler, prompts_of, some_rollouts, told_for

from lopd import (
    ConsistencyPolicy,
    MemoryStore,
    PrivilegedScorer,
    Prompt,
    SamplingParams,
    ZarrStore,
    batches,
    collect_rollouts,
    make_prompts,
    residualise,
    rows_of,
    score_rollouts,
)
from lopd.engines.hf import HFScorer, HFSource
from lopd.errors import (
    ArgumentError,
    ConflictError,
    ContextOverflowError,
    InvalidRecordError,
    QuarantineWarning,
    ScorerError,
    TeacherConsistencyError,
    TeacherConsistencyWarning,
)
from lopd.guards.consistency import judge_scorer, verdict
from lopd.records import Provenance, Scores
from lopd.tools.doctor.contents import inspect_store
from lopd.tools.facts import judged_columns
from lopd.verbs import Preflight

TOKENIZER = build_tokenizer()
QUESTIONS = ["a", "bc", "defg"]


@pytest.fixture
def sampled(make_model):
    """Return (student, prompts, store): rollouts of a student without privileged prompts."""
    model = make_model("llama_tied", seed=2)
    source = HFSource(model, TOKENIZER, SamplingParams(max_new_tokens=5))
    prompts = make_prompts(QUESTIONS, TOKENIZER, answers=["1", "2", "3"])
    store = MemoryStore(source.manifest)
    collect_rollouts(source, prompts, store)
    return model, prompts, store


def hints(prompts):
    return make_prompts([f"{prompt.text} the answer is {prompt.answer}." for prompt in prompts], TOKENIZER)


def test_the_scores_are_those_of_the_same_response_after_the_other_prompt(sampled):
    model, prompts, store = sampled
    plain, told = HFScorer(model, TOKENIZER), hints(prompts)
    score_rollouts(store, PrivilegedScorer(plain, prompts, told), column="told")
    for record, prompt in zip(store.read(range(3), columns=("told",)), told, strict=True):
        (expected,) = plain.score([evolve(record.rollout, prompt_ids=prompt.token_ids)])
        np.testing.assert_allclose(record.scores["told"], expected.logprobs, atol=1e-5)


def test_a_column_is_continued_by_the_same_prompts_in_any_order_and_by_no_others(sampled):
    model, prompts, store = sampled
    plain, told = HFScorer(model, TOKENIZER), hints(prompts)
    score_rollouts(store, PrivilegedScorer(plain, prompts, told), column="told", rows=np.array([0]))
    again = PrivilegedScorer(plain, prompts[::-1], told[::-1])
    assert score_rollouts(store, again, column="told").rollouts == 2
    for other in (plain, PrivilegedScorer(plain, prompts, hints(prompts[::-1]))):
        with pytest.raises(ConflictError, match="was scored with logprobs_mode 'privileged "):
            score_rollouts(store, other, column="told")
    assert Provenance.from_json(store.columns["told"].to_json()) == again.provenance


def test_self_distillation_draws_one_warning_until_it_is_meant(sampled):
    model, prompts, store = sampled
    score_rollouts(store, PrivilegedScorer(HFScorer(model, TOKENIZER), prompts, hints(prompts)))
    with pytest.warns(
        TeacherConsistencyWarning, match="the scoring teacher is the policy itself after other prompts than the policy's"
    ) as caught:
        batches(store, ref="behavior")
    assert [warning.filename for warning in caught] == [__file__]
    steps = batches(store, ref="behavior", consistency=ConsistencyPolicy.PRIVILEGED)
    assert steps.lineage.opd_teacher == store.manifest.policy
    assert steps.lineage.opd_teacher.name.endswith(" (privileged)")
    with pytest.raises(InvalidRecordError, match=r"'teacher' was scored by .* after other prompts, expected the policy that sampled"):
        batches(store, ref="teacher", consistency=ConsistencyPolicy.PRIVILEGED)
    with pytest.raises(InvalidRecordError, match="of other prompts than the policy's, expected a teacher's log-probs"):
        residualise(store, column="teacher", ref="behavior", into="residual")


@pytest.mark.parametrize(
    ("sft_teacher", "model", "word"),
    [
        (SFT_TEACHER, POLICY, "privileged: it is the policy itself, and read other prompts than the policy"),
        (None, POLICY, "privileged: it is the policy itself, and read other prompts than the policy"),
        (SFT_TEACHER, SFT_TEACHER, "privileged: it is the SFT teacher, and read other prompts than the policy"),
        (SFT_TEACHER, OTHER_TEACHER, f"not consistent: the SFT teacher is {SFT_TEACHER}, and it read other prompts than the policy"),
        (None, OTHER_TEACHER, "not known: its SFT teacher is not recorded, and it read other prompts than the policy"),
    ],
)
def test_consistency_has_a_word_for_each_privileged_teacher(sft_teacher, model, word):
    manifest, made = make_manifest(sft_teacher), evolve(make_provenance(model), logprobs_mode="privileged 00")
    assert verdict(manifest, made) == word
    store = make_store(numbered_records(2), columns=("teacher",), manifest=manifest, provenance=lambda _: made)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if word.startswith("privileged"):
            batches(store, consistency=ConsistencyPolicy.PRIVILEGED)
        else:
            with pytest.raises(TeacherConsistencyError, match="its SFT teacher is"):
                batches(store, consistency=ConsistencyPolicy.PRIVILEGED)
            # `residualise` refuses such scores
            with pytest.raises(
                TeacherConsistencyError, match=r"expected a residual: score with the policy that sampled, .* SFT teacher\.$"
            ):
                batches(store, consistency=ConsistencyPolicy.RESIDUALISE)


def test_self_distillation_in_a_later_round_is_with_the_policy_of_that_round(tmp_path):
    later, rollouts = evolve(POLICY, revision="weights:later"), [record.rollout for record in numbered_records(4)]
    store = ZarrStore.create(tmp_path / "rounds", make_manifest())
    store.append(rollouts[:2])
    store.begin_generation(1, later)
    store.append([evolve(rollout, generation=1) for rollout in rollouts[2:]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for column, model, rows in (("first", POLICY, [0, 1]), ("later", later, [2, 3])):
            made = evolve(make_provenance(model), logprobs_mode="privileged 00")
            judge_scorer(store, made)
            store.append_scores(column, made, [Scores.of(rollout, -np.ones(rollout.response_ids.size)) for rollout in rollouts])
            batches(store, teacher=column, rows=np.array(rows), consistency=ConsistencyPolicy.PRIVILEGED)
    said = "privileged: it is the policy itself, and read other prompts than the policy"
    assert judged_columns(store)["as teacher"][:2] == [said, said]
    assert [column.objection for column in inspect_store(store).columns] == [None, None]
    for column, rows in (("first", [2, 3]), ("later", [0, 1]), ("later", [1, 2])):
        with pytest.raises(TeacherConsistencyError, match="score with the policy that sampled, or with its SFT teacher") as caught:
            batches(store, teacher=column, rows=np.array(rows), consistency=ConsistencyPolicy.PRIVILEGED)
        assert ("train on the rows of one round" in str(caught.value)) == (rows == [1, 2])


def test_what_is_too_long_with_its_privileged_prompt_is_named(make_model):
    rollout = filler(CONTEXT)
    scorer = PrivilegedScorer(HFScorer(make_model("llama_tied"), TOKENIZER), prompts_of([rollout]), told_for(prompts_of([rollout])))
    with pytest.raises(
        ContextOverflowError,
        match=rf"Rollout 'filler': it has {CONTEXT + 3} tokens.*these are the privileged prompt and the .*column of their own",
    ):
        scorer.score([rollout])


def test_what_was_too_long_is_trained_on_from_a_column_of_its_own(sampled):
    model, prompts, store = sampled
    plain, told = HFScorer(model, TOKENIZER), hints(prompts)
    long = [evolve(told[0], token_ids=[7] * (CONTEXT - 1)), *told[1:]]
    with pytest.warns(QuarantineWarning, match="1 rollout"):
        score_rollouts(store, PrivilegedScorer(plain, prompts, long))
    shorter = PrivilegedScorer(plain, prompts[:1], told[:1])
    with pytest.raises(ConflictError, match="was scored with logprobs_mode 'privileged "):
        score_rollouts(store, shorter, rows=rows_of(store, prompts[:1]))
    score_rollouts(store, shorter, column="short", rows=rows_of(store, prompts[:1]))
    teachers = {"teacher": prompts[1:], "short": prompts[:1]}
    assert len(batches(store, teacher=teachers, ref="behavior", consistency=ConsistencyPolicy.PRIVILEGED).rows) == 3


def test_slips_are_refused_by_name(make_model):
    plain, rollouts = HFScorer(make_model("llama_tied"), TOKENIZER), some_rollouts(TOKENIZER_ID.vocab_size)
    prompts = prompts_of(rollouts)
    with pytest.raises(InvalidRecordError, match="there are 3 for 4 prompts"):
        PrivilegedScorer(plain, prompts, told_for(prompts[:3]))
    with pytest.raises(InvalidRecordError, match="all 4 have the tokens of the prompts themselves"):
        PrivilegedScorer(plain, prompts, prompts)
    with pytest.raises(InvalidRecordError, match="prompt 'r0' has the tokens of one before it, and another privileged prompt"):
        PrivilegedScorer(plain, [prompts[0], prompts[0]], told_for(prompts[:2]))
    with pytest.raises(ArgumentError, match="Scorer"):
        PrivilegedScorer("teacher", prompts, told_for(prompts))
    scorer = PrivilegedScorer(plain, prompts[:1], told_for(prompts[:1]))
    with pytest.raises(InvalidRecordError, match="Rollout 'r1': its prompt of 3 tokens is not among the 1 that have a privileged one"):
        scorer.score(rollouts[:2])
    with pytest.raises(InvalidRecordError, match=r"its log-probs are 'privileged .*', expected 'raw'"):
        _ = PrivilegedScorer(scorer, prompts, told_for(prompts)).provenance


def test_a_prompt_that_goes_on_is_a_later_turn_only_where_that_is_stated(make_model):
    plain, (rollout, *_) = HFScorer(make_model("llama_tied"), TOKENIZER), some_rollouts(TOKENIZER_ID.vocab_size)
    short, long, told = Prompt("short", [5, 6]), Prompt("long", [5, 6, 7]), [Prompt("short", [8, 5, 6]), Prompt("long", [9, 5, 6, 7])]
    later, first = evolve(rollout, rollout_id="later", prompt_ids=[5, 6, 7, 10, 11]), evolve(rollout, prompt_ids=[5, 6, 7])
    scorer = PrivilegedScorer(plain, [short, long], told)
    with pytest.raises(
        InvalidRecordError,
        match=r"^Rollout 'later': its prompt of 5 tokens is not among the 2 that have a privileged one, but begins like prompt 'long' and goes on "
        r"by 2 tokens; make them from .*, or pass `continued=True` for later turns of trajectories\.$",
    ):
        scorer.score([first, later])
    turns = evolve(scorer, continued=True)
    assert turns.provenance == scorer.provenance
    expected = plain.score([evolve(first, prompt_ids=[9, 5, 6, 7]), evolve(later, prompt_ids=[9, 5, 6, 7, 10, 11])])
    for score, other in zip(turns.score([first, later]), expected, strict=True):
        np.testing.assert_allclose(score.logprobs, other.logprobs, atol=1e-5)


@pytest.mark.parametrize(
    ("give", "what"),
    [
        (lambda scores: scores, r"Rollout 'r0': the scorer gave \d+ log-probs of hash .*; make them with `Scores.of"),
        (lambda scores: scores[:3], "Scorer: score 3 of 3 is of None, expected 'r3'; `score` gives one for each rollout, in order"),
        (lambda scores: [*scores, scores[0]], "Scorer: score 4 of 5 is of 'r0', expected None"),
        (lambda scores: iter(scores[1:]), "Scorer: score 0 of 3 is of 'r1', expected 'r0'"),
    ],
)
def test_a_scorer_that_gives_other_scores_than_it_was_asked_for_is_found_out(give, what, make_model):
    rollouts = some_rollouts(TOKENIZER_ID.vocab_size)
    plain, prompts = HFScorer(make_model("llama_tied"), TOKENIZER), prompts_of(rollouts)

    class Careless:
        provenance = plain.provenance

        def score(self, _):
            return give([Scores.of(rollout, np.zeros(rollout.response_ids.size)) for rollout in rollouts])

    with pytest.raises(ScorerError, match=f"^{what}"):
        PrivilegedScorer(Careless(), prompts, told_for(prompts)).score(rollouts)


def test_a_truth_that_reads_less_is_refused(sampled):
    model, prompts, store = sampled
    plain = HFScorer(model, TOKENIZER)
    with pytest.raises(ScorerError, match=r"expected the same weights and privileged .* log-probs"):
        score_rollouts(store, PrivilegedScorer(plain, prompts, hints(prompts)), preflight=Preflight(truth=plain))
