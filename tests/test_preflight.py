"""The self-test of a scorer, before a column is paid for."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attrs import evolve
from small_runs import Interrupted, Refusing, Stopping, behavior, column, make_store, names, reopened, source, teacher_model  # noqa: F401

from lopd import collect_rollouts, score_rollouts
from lopd.backends.memory_store import MemoryStore
from lopd.engines.hf import HFScorer
from lopd.errors import EndTokenWarning, EngineChangeWarning, InvalidRecordError, ScorerError
from lopd.records import Rollout, Scores, measure_parity
from lopd.records.manifest import LABEL, RESIDUAL
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout
from lopd.verbs import Preflight


class Moody:
    """A scorer whose answers shift: by `company` nats in a call of several, or by a constant."""

    def __init__(self, inner, company=0.0, always=0.0, provenance=None):
        self.inner, self.company, self.always = inner, company, always
        self.provenance = provenance or inner.provenance

    def score(self, rollouts):
        shift = self.always + (self.company if len(rollouts) > 1 else 0.0)
        scores = self.inner.score(rollouts)
        return [Scores.of(r, np.minimum(s.logprobs - shift, 0)) for r, s in zip(rollouts, scores, strict=True)]


@pytest.fixture
def collected(source, prompts, make_store):
    store = make_store(source.manifest)
    collect_rollouts(source, prompts, store)
    return store


def test_pain_16_a_scorer_whose_answers_depend_on_the_batch_is_refused_before_it_is_paid_for(collected, teacher_model, tokenizer):
    scorer = HFScorer(teacher_model, tokenizer)
    with pytest.raises(
        ScorerError, match=r"of 8 rollouts differ by 0\.1 nats on average when they are scored alone and in company.*at most 0\.05"
    ):
        score_rollouts(collected, Moody(scorer, company=0.1))
    assert (dict(collected.columns), collected.scored("teacher").any()) == ({}, False)
    score_rollouts(collected, Moody(scorer, company=0.1), preflight=Preflight(repeat_bound=0.2))
    assert collected.scored("teacher").all()


def test_a_column_is_not_continued_by_a_scorer_that_says_something_else_than_what_is_stored(collected, teacher_model, tokenizer):
    scorer = HFScorer(teacher_model, tokenizer)
    with pytest.raises(Interrupted):
        score_rollouts(collected, Stopping(scorer, 1), rollouts_per_batch=4, preflight=None)
    before = int(collected.scored("teacher").sum())
    with pytest.raises(ScorerError, match=r"differ by 0\.3 nats on average from those that column 'teacher' holds"):
        score_rollouts(collected, Moody(scorer, always=0.3))
    assert int(collected.scored("teacher").sum()) == before == 4


@pytest.mark.parametrize("mode", [LABEL, RESIDUAL])
def test_a_column_of_values_above_0_is_gone_on_with(mode):
    store, items = MemoryStore(tiny_manifest()), [tiny_rollout(f"p{i}/s0/g0") for i in range(6)]

    def score(rollouts):
        return [Scores.of(rollout, [0.7] * 3, signed=True) for rollout in rollouts]

    judge = SimpleNamespace(provenance=evolve(tiny_provenance(), logprobs_mode=mode), score=score)
    for part in (items[:3], items[3:]):
        store.append(part)
        score_rollouts(store, judge, column="judge")
    assert store.scored("judge").all()


def test_rows_of_which_none_is_scored_are_compared_with_others_of_the_column(collected, teacher_model, tokenizer):
    """With the five of the first seven that are no longer than the longest of these."""
    scorer, others = HFScorer(teacher_model, tokenizer), np.arange(7, 14)
    newer = evolve(scorer.provenance, engine="transformers 99.0")
    collected.quarantine("ref", scorer.provenance, {names(collected, [0])[0]: "too long"})
    with pytest.warns(EngineChangeWarning, match=r"goes on with 'transformers 99.0'$"):
        score_rollouts(collected, Moody(scorer, provenance=newer), column="ref", rows=others)
    score_rollouts(collected, scorer, rows=np.arange(7))
    with pytest.raises(ScorerError, match=r"of 5 rollouts differ by 0\.3 nats on average from those that column 'teacher' holds"):
        score_rollouts(collected, Moody(scorer, always=0.3), rows=others)
    with pytest.warns(EngineChangeWarning, match=r"on 5 rollouts.* 0\.01 nats"):
        score_rollouts(collected, Moody(scorer, always=0.01, provenance=newer), rows=others)
    assert collected.scored("teacher").all()


def test_rows_of_others_that_a_scorer_cannot_take_are_no_reason_to_refuse_it(collected, teacher_model, tokenizer):
    *others, longest = np.argsort(collected.lengths().sum(axis=1), kind="stable").tolist()
    inner, known = HFScorer(teacher_model, tokenizer), names(collected, [longest])

    class OfItsOwn:
        provenance = inner.provenance

        def score(self, rollouts):
            if {rollout.rollout_id for rollout in rollouts} - set(known):
                raise InvalidRecordError("Rollout: it is of another prompt; drop it.")
            return inner.score(rollouts)

    score_rollouts(collected, inner, rows=np.array(others))
    score_rollouts(collected, OfItsOwn(), rows=np.array([longest]))
    assert collected.scored("teacher").all()


def test_another_engine_goes_on_with_a_column_that_it_agrees_with_and_both_are_named(collected, teacher_model, tokenizer):
    scorer = HFScorer(teacher_model, tokenizer)
    with pytest.raises(Interrupted):
        score_rollouts(collected, Stopping(scorer, 1), rollouts_per_batch=4, preflight=None)
    newer = evolve(scorer.provenance, engine="transformers 99.0")
    with pytest.warns(
        EngineChangeWarning,
        match=rf"begun with '{scorer.provenance.engine}' and goes on with 'transformers 99.0'; on 4 rollouts.* 0\.01 nats",
    ):
        score_rollouts(collected, Moody(scorer, always=0.01, provenance=newer))
    assert collected.scored("teacher").all()
    assert collected.columns["teacher"].engine == scorer.provenance.engine


def test_pain_09_the_difference_to_the_trainers_own_log_probs_is_measured_stored_and_bounded(collected, teacher_model, tokenizer, tmp_path):
    truth = HFScorer(teacher_model, tokenizer)
    engine = evolve(truth.provenance, engine="shifted 1.0")
    with pytest.raises(ScorerError, match=r"shifted 1\.0 against transformers.*mean 0\.2.*expected a mean of at most 0\.1"):
        score_rollouts(collected, Moody(truth, always=0.2, provenance=engine), preflight=Preflight(truth=truth))
    report = score_rollouts(collected, Moody(truth, always=0.02, provenance=engine), preflight=Preflight(truth=truth))
    parity = reopened(collected, tmp_path).columns["teacher"].parity
    assert parity == report.parity
    assert (parity.engine, parity.rollouts, parity.tokens) == ("shifted 1.0", 14, int(collected.lengths()[:, 1].sum()))
    np.testing.assert_allclose([parity.mean, parity.p99, parity.max, -parity.bias], 0.02, atol=1e-5)
    gaps = np.concatenate(column(collected)).astype(np.float64) + 0.02 - behavior(collected)
    np.testing.assert_allclose(parity.advantage, np.abs(gaps).mean(), rtol=1e-4)
    np.testing.assert_allclose(parity.sign_flips, ((gaps > 0) & (gaps < 0.02)).mean(), atol=1e-9)
    assert dict(collected.columns) == {"teacher": engine}, "a comparison does not change who computed a column"


def test_the_self_test_asks_for_all_its_rollouts_at_once_then_for_those_that_are_new_alone_and_the_truth_once(
    collected, teacher_model, tokenizer
):
    scorer, truth = (Refusing(HFScorer(teacher_model, tokenizer), []) for _ in range(2))
    score_rollouts(collected, scorer, rows=np.arange(4), preflight=Preflight(rollouts=3, truth=truth))
    assert (scorer.asked, truth.asked) == ([4, 1, 1, 1, 4], [4])
    scorer.asked.clear()
    score_rollouts(collected, scorer, preflight=Preflight(rollouts=3))
    assert scorer.asked == [6, 1, 1, 1, 10], "three that the column holds and three that are new; then the column"


def test_the_truth_must_be_the_same_model(collected, teacher_model, llama, tokenizer):
    with pytest.raises(ScorerError, match="expected the same weights"):
        score_rollouts(collected, HFScorer(teacher_model, tokenizer), preflight=Preflight(truth=HFScorer(llama, tokenizer)))


def test_pain_08_a_teacher_that_never_ends_as_the_policy_does_is_noticed(source, make_model, tokenizer):
    store, model = MemoryStore(source.manifest), make_model("phi_bias")
    store.append([Rollout(f"r{i}", [9, 10], [20 + i, 30, 40, 5], [True] * 4, "stop") for i in range(4)])
    score_rollouts(store, HFScorer(model, tokenizer), column="healthy")
    with torch.no_grad():
        model.lm_head.bias[5] = -20.0
    with pytest.warns(EndTokenWarning, match=r"tokens that ended 4 responses have a mean log-prob of -2\d.*those before them -6"):
        score_rollouts(store, HFScorer(model, tokenizer))


def test_the_tokens_of_tools_are_not_compared_with_the_ends_of_responses():
    """A tool wrote two tokens, or the last one, or all before it; the policy's own have -1 nats, its ends -20."""
    store, given = MemoryStore(tiny_manifest()), np.array([-1.0, -30.0, -30.0, -20.0])
    masks = [[True, False, False, True]] * 3 + [[True, True, True, False], [False, False, False, True]]
    store.append([tiny_rollout(f"r{i}", [5, 6, 7, 1], loss_mask=mask) for i, mask in enumerate(masks)])
    scorer = SimpleNamespace(provenance=tiny_provenance(), score=lambda rollouts: [Scores.of(r, given) for r in rollouts])
    with pytest.warns(EndTokenWarning, match="tokens that ended 3 responses have a mean log-prob of -20 nats, and those before them -1, "):
        score_rollouts(store, scorer)


def test_pain_08_a_teacher_whose_tokenizer_ends_texts_with_another_token_is_noticed(source, prompts, teacher_model, tokenizer):
    scorer = HFScorer(teacher_model, tokenizer)
    assert scorer.provenance.eos_id == source.manifest.tokenizer.eos_id == tokenizer.eos_token_id
    store = MemoryStore(evolve(source.manifest, tokenizer=evolve(source.manifest.tokenizer, eos_id=3)))
    store.append([Rollout("r", [9, 10], [20, 30], [True] * 2, "length")])
    with pytest.warns(EndTokenWarning, match=f"end with token {tokenizer.eos_token_id}, expected the policy's 3"):
        score_rollouts(store, scorer)


def test_parity_is_over_the_tokens_that_count_and_says_what_becomes_of_the_advantage():
    items = [
        Rollout("a", [9], [1, 2, 3], [True, False, True], "stop", [-1.0, -1.0, -1.0]),
        Rollout("b", [9], [4, 5], [True, True], "length", [-2.0, -2.0]),
    ]
    truth = [Scores.of(items[0], [-1.5, -9.0, -0.5]), Scores.of(items[1], [-2.25, -1.0])]
    engine = [Scores.of(items[0], [-0.5, -0.0, -0.5]), Scores.of(items[1], [-2.75, -1.25])]
    parity = measure_parity(items, engine, truth, engine="E", truth="T")
    differences = np.array([1.0, 0.0, -0.5, -0.25])
    assert (parity.rollouts, parity.tokens) == (2, 4)
    assert (parity.mean, parity.max, parity.bias) == (np.abs(differences).mean(), 1.0, differences.mean())
    assert parity.p99 == pytest.approx(np.quantile(np.abs(differences), 0.99))
    assert (parity.advantage, parity.sign_flips) == (np.abs([-0.5, 0.5, -0.25, 1.0]).mean(), 0.25)
    assert measure_parity([evolve(items[0], behavior_logprobs=None)], engine[:1], truth[:1], engine="E", truth="T").advantage is None


class Tilted:
    """A scorer that is far off on some tokens, or on all by as much up as down."""

    def __init__(self, inner, provenance, offsets):
        self.inner, self.provenance, self.offsets = inner, provenance, offsets

    def score(self, rollouts):
        scores = self.inner.score(rollouts)
        return [Scores.of(r, np.minimum(s.logprobs + self.offsets(s.logprobs.size), 0)) for r, s in zip(rollouts, scores, strict=True)]


@pytest.mark.parametrize(
    ("name", "offsets"),
    [
        ("mean", lambda n: np.resize([0.2, -0.2], n)),
        ("p99", lambda n: np.eye(1, n, 2)[0] * -1.5),
        ("bias", lambda n: np.full(n, -0.07)),
    ],
)
def test_a_bound_for_each_way_in_which_an_engine_may_be_off(name, offsets, collected, teacher_model, tokenizer):
    truth = HFScorer(teacher_model, tokenizer)
    off = Tilted(truth, evolve(truth.provenance, engine="off 1.0"), offsets)
    loose = {"parity_bound": 1.0, "parity_p99_bound": 9.0, "parity_bias_bound": 1.0}
    score_rollouts(collected, off, column="loose", preflight=Preflight(truth=truth, **loose))
    field = "parity_bound" if name == "mean" else f"parity_{name}_bound"
    with pytest.raises(ScorerError, match=f"expected a {name} of at most.*raise `{field}`"):
        score_rollouts(collected, off, preflight=Preflight(truth=truth, **(loose | {field: getattr(Preflight(), field)})))


def test_what_the_truth_refuses_is_not_compared_and_the_rest_stays_in_line(collected, teacher_model, tokenizer):
    truth = HFScorer(teacher_model, tokenizer)
    bad = names(collected, [2, 9])
    report = score_rollouts(collected, truth, preflight=Preflight(truth=Refusing(truth, bad)))
    assert (report.parity.rollouts, report.parity.max) == (12, pytest.approx(0, abs=1e-5))
    everything = Refusing(truth, names(collected, range(14)))
    with pytest.raises(ScorerError, match="0 rollouts could be compared"):
        score_rollouts(collected, truth, column="again", preflight=Preflight(truth=everything))


class Alone:
    """A scorer that refuses what is alone in a call."""

    def __init__(self, inner):
        self.inner, self.provenance = inner, inner.provenance

    def score(self, rollouts):
        if len(rollouts) == 1:
            raise InvalidRecordError("Rollout: it is lonely.")
        return self.inner.score(rollouts)


def test_a_scorer_that_refuses_alone_what_it_takes_in_company_is_refused(collected, teacher_model, tokenizer):
    with pytest.raises(ScorerError, match=r"refused alone and not in company.*lonely"):
        score_rollouts(collected, Alone(HFScorer(teacher_model, tokenizer)))


@pytest.mark.parametrize(("field", "value"), [("rollouts", 0), ("parity_rollouts", -1), ("repeat_bound", -0.1), ("parity_bound", np.nan)])
def test_bounds_that_make_no_sense_are_refused(field, value):
    with pytest.raises(InvalidRecordError, match=f"{field} is {value}"):
        Preflight(**{field: value})
