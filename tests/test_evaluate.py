"""`evaluate` and `evaluate_reverse_kl`: values that one gets by hand or exactly."""

import numpy as np
import pytest
from attrs import evolve
from small_runs import Stopping, exact_reverse_kl, source, teacher_model  # noqa: F401

from lopd import MemoryStore, collect_rollouts, evaluate, evaluate_reverse_kl, score_rollouts
from lopd.engines.hf import HFScorer, HFSource
from lopd.errors import InvalidRecordError, ScorerError, SourceError, TokenizerMismatchError
from lopd.records import Manifest, ModelId, Rollout, SamplingParams, fingerprint_tokenizer, rollout_id
from lopd.verbs import Preflight


class Fixed:
    """A source whose i-th rollout of a prompt states how good it is: its only token is the score in percent, plus 10."""

    def __init__(self, scores_BN, tokenizer, sampling=None, reports=True):
        self.scores_BN, self.reports = scores_BN, reports
        sampling = sampling or SamplingParams(samples_per_prompt=len(scores_BN[0]), max_new_tokens=1)
        self.manifest = Manifest(fingerprint_tokenizer(tokenizer), ModelId("fixed", "1", "float32"), sampling)

    def sample(self, prompts):
        n = self.manifest.sampling.samples_per_prompt
        reported = [-0.5] if self.reports else None
        return [
            Rollout(rollout_id(p.prompt_id, s, 0), p.token_ids, [10 + round(100 * self.scores_BN[i][s])], [True], "stop", reported)
            for i, p in enumerate(prompts)
            for s in range(n)
        ]


def verify(prompt, rollout):
    assert rollout.rollout_id.startswith(f"{prompt.prompt_id}/"), "a rollout is judged with its own prompt"
    return (int(rollout.response_ids[0]) - 10) / 100


def test_avg_at_n_and_pass_at_k_are_the_values_one_gets_by_hand(tokenizer, prompts):
    right = [[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1], [0.5, 0.5, 0, 1]]
    found = evaluate(Fixed(right, tokenizer), prompts[:5], verify)
    means = [0, 0.25, 0.5, 1, 0.5]
    assert found.n == 4
    assert found.avg_at_n.mean == pytest.approx(np.mean(means))
    # Wilson's interval for 5 * (m (1 - m) + 1 / 20) / (s^2 + 1 / 20) = 9.30 trials: m is 0.45, s^2 0.11
    assert (found.avg_at_n.low, found.avg_at_n.high) == pytest.approx((0.19521, 0.73402), abs=1e-5)
    assert (found.avg_at_n.clusters, found.avg_at_n.values) == (5, 20)
    assert str(found) == "Evaluation: avg@4 0.4500 (95 %: 0.1952 to 0.7340); prompts 5; pass@1 0.400; pass@4 0.800"
    # 1 - C(n-c, k) / C(n, k) for c = 0, 1, 2, 4, 1 right answers of 4; half a point is not right
    assert found.pass_at_k == pytest.approx(
        {
            1: np.mean([0, 1 / 4, 1 / 2, 1, 1 / 4]),
            2: np.mean([0, 1 / 2, 5 / 6, 1, 1 / 2]),
            3: np.mean([0, 3 / 4, 1, 1, 3 / 4]),
            4: np.mean([0, 1, 1, 1, 1]),
        }
    )


class Wrong:
    """A source, or a scorer, whose answers are changed on the way."""

    def __init__(self, honest, change):
        self.honest, self.change = honest, change

    def __getattr__(self, name):
        return getattr(self.honest, name)

    def sample(self, prompts):
        return self.change(self.honest.sample(prompts))

    def score(self, rollouts):
        return self.change(self.honest.score(rollouts))


@pytest.mark.parametrize("change", [lambda found: found[::-1], lambda found: found[:-1], lambda found: [*found, found[0]]])
def test_what_was_not_asked_for_is_not_judged(source, teacher_model, tokenizer, prompts, change):
    wrong, teacher = Wrong(source, change), HFScorer(teacher_model, tokenizer)
    with pytest.raises(SourceError, match="every sample of every prompt, in order"):
        evaluate(wrong, prompts, lambda *_: 1.0)
    with pytest.raises(SourceError, match="every sample of every prompt, in order"):
        evaluate_reverse_kl(wrong, teacher, prompts)
    with pytest.raises(ScorerError, match="one for each rollout, in order"):
        evaluate_reverse_kl(source, Wrong(teacher, change), prompts)


def with_prompts_swapped(rollouts):
    first, *rest, last = rollouts
    return [evolve(first, prompt_ids=last.prompt_ids), *rest, evolve(last, prompt_ids=first.prompt_ids)]


@pytest.mark.parametrize("change", [with_prompts_swapped, lambda found: [evolve(r, generation=1) for r in found]])
def test_other_prompts_and_another_round_under_right_ids_are_refused(change, source, prompts):
    wrong, store = Wrong(source, change), MemoryStore(source.manifest)
    what = rf"^Rollout '{prompts[0].prompt_id}/s0/g0': .* generation 0 and the {prompts[0].token_ids.size} tokens of prompt"
    with pytest.raises(SourceError, match=what):
        evaluate(wrong, prompts, lambda *_: 1.0)
    with pytest.raises(SourceError, match=what):
        collect_rollouts(wrong, prompts, store)
    assert len(store) == 0


def too_few(scores):
    return [evolve(score, logprobs=score.logprobs[:-1]) for score in scores]


@pytest.mark.parametrize("change", [too_few, lambda found: [evolve(s, content_hash=bytes(16)) for s in found]])
def test_scores_that_are_too_few_or_of_other_tokens_are_refused(change, source, teacher_model, tokenizer, prompts):
    teacher, store = HFScorer(teacher_model, tokenizer), MemoryStore(source.manifest)
    wrong, what = Wrong(teacher, change), r"^Rollout '.*': the scorer gave \d+ log-probs of .*`Scores\.of"
    with pytest.raises(ScorerError, match=what):
        evaluate_reverse_kl(source, wrong, prompts)
    collect_rollouts(source, prompts, store)
    for scorer, preflight in ((wrong, Preflight()), (wrong, None), (teacher, Preflight(truth=wrong))):
        with pytest.raises(ScorerError, match=what):
            score_rollouts(store, scorer, preflight=preflight)
    assert not store.scored("teacher").any()


def test_sources_and_scorers_may_give_generators(source, teacher_model, tokenizer, prompts):
    teacher = HFScorer(teacher_model, tokenizer)
    assert evaluate(Wrong(source, iter), prompts, lambda *_: 1.0).avg_at_n.mean == 1
    assert evaluate_reverse_kl(Wrong(source, iter), Wrong(teacher, iter), prompts) == evaluate_reverse_kl(source, teacher, prompts)


def test_evaluation_asks_for_n_fresh_samples_of_each_prompt_of_a_real_model(source, prompts):
    seen = []
    found = evaluate(source, prompts, lambda prompt, rollout: seen.append((prompt.prompt_id, rollout.rollout_id)) or 1.0)
    assert seen == [(p.prompt_id, rollout_id(p.prompt_id, s, 0)) for p in prompts for s in range(2)]
    assert found.avg_at_n.mean == 1
    assert found.avg_at_n.low < found.avg_at_n.high == 1, "seven prompts that are all right do not prove that every prompt is"
    assert found.pass_at_k == {1: 1.0, 2: 1.0}


def test_evaluating_on_no_prompts_is_refused(source, teacher_model, tokenizer):
    with pytest.raises(InvalidRecordError):
        evaluate(source, [], verify)
    with pytest.raises(InvalidRecordError):
        evaluate_reverse_kl(HFSource(source.model, tokenizer), HFScorer(teacher_model, tokenizer), [])


def test_a_prompt_that_is_given_twice_is_refused_before_anything_is_sampled(source, prompts, teacher_model, tokenizer):
    """Its rollouts are the same ones again: eight times the prompts gave intervals that were too narrow by far."""
    asked, refused = Stopping(source, 99), r"its id occurs twice, .*for more samples of a prompt raise `samples_per_prompt`"
    with pytest.raises(InvalidRecordError, match=refused):
        evaluate(asked, prompts * 8, lambda *_: 1.0)
    with pytest.raises(InvalidRecordError, match=refused):
        evaluate_reverse_kl(asked, HFScorer(teacher_model, tokenizer), prompts * 8)
    assert asked.asked == []


@pytest.mark.parametrize("answer", [None, float("nan"), 100, -1, "right"])
def test_a_verifier_that_gives_no_number_from_0_to_1_is_refused_and_the_prompt_named(answer, source, prompts):
    with pytest.raises(InvalidRecordError, match=rf"Prompt '{prompts[0].prompt_id}': the verifier gave .*, expected a number from 0 to 1"):
        evaluate(source, prompts[:2], lambda prompt, rollout: answer)


def test_a_verifier_may_answer_with_a_bool(source, prompts):
    assert evaluate(source, prompts[:2], lambda prompt, rollout: np.bool_(True)).avg_at_n.mean == 1


def test_the_estimated_reverse_kl_covers_the_exact_one(llama, near_teacher, tokenizer, prompts):
    exact = exact_reverse_kl(llama, near_teacher, prompts)
    source = HFSource(llama, tokenizer, SamplingParams(max_new_tokens=2, samples_per_prompt=150, seed=2))
    estimate = evaluate_reverse_kl(source, HFScorer(near_teacher, tokenizer), prompts)
    assert (estimate.clusters, estimate.values) == (len(prompts), 2 * 150 * len(prompts))
    assert exact > 0.02
    assert estimate.ci95 < 0.5 * exact
    assert abs(estimate.mean - exact) <= estimate.ci95


class Spoken:
    """A source in whose responses somebody else writes the first token, with a log-prob that means nothing."""

    def __init__(self, inner):
        self.inner, self.manifest = inner, inner.manifest

    def sample(self, prompts):
        changed = []
        for r in self.inner.sample(prompts):
            others = np.arange(r.response_ids.size) == 0
            changed.append(evolve(r, loss_mask=~others, behavior_logprobs=np.where(others, -50, r.behavior_logprobs)))
        return changed


def test_the_estimated_reverse_kl_counts_only_tokens_that_the_policy_said(llama, near_teacher, tokenizer, prompts):
    source, teacher = HFSource(llama, tokenizer, SamplingParams(max_new_tokens=3, stop_ids=(1_000_000,))), HFScorer(near_teacher, tokenizer)
    estimate = evaluate_reverse_kl(Spoken(source), teacher, prompts)
    rollouts = source.sample(prompts)
    gaps = np.concatenate([(s.logprobs - r.behavior_logprobs)[1:] for r, s in zip(rollouts, teacher.score(rollouts), strict=True)])
    assert estimate.values == 2 * len(prompts)
    assert estimate.mean == pytest.approx(float(np.mean(np.expm1(gaps) - gaps)), rel=1e-4)


def test_pain_12_reverse_kl_to_a_teacher_of_other_tokens_is_refused_before_anything_is_sampled(
    source, prompts, teacher_model, swapped_tokenizer
):
    asked = Stopping(source, 99)
    with pytest.raises(TokenizerMismatchError, match="expected the policy's"):
        evaluate_reverse_kl(asked, HFScorer(teacher_model, swapped_tokenizer), prompts)
    assert asked.asked == []


@pytest.mark.parametrize("sampling", [{"temperature": 0.7}, {"top_p": 0.9}])
def test_reverse_kl_of_samples_that_are_not_the_policys_own_is_refused(sampling, llama, tokenizer, prompts, teacher_model):
    with pytest.raises(InvalidRecordError, match="temperature"):
        evaluate_reverse_kl(HFSource(llama, tokenizer, SamplingParams(**sampling)), HFScorer(teacher_model, tokenizer), prompts)


def test_reverse_kl_of_rollouts_that_carry_the_log_probs_of_another_distribution_is_refused(llama, tokenizer, prompts, teacher_model):
    class Biased(Spoken):
        times = 0.7

        def sample(self, prompts):
            return [evolve(r, sampler_logprobs=r.behavior_logprobs * self.times) for r in self.inner.sample(prompts)]

    teacher, biased = HFScorer(teacher_model, tokenizer), Biased(HFSource(llama, tokenizer, SamplingParams(max_new_tokens=3)))
    with pytest.raises(InvalidRecordError, match=r"its sampler_logprobs are not its behavior_logprobs, .* leave out what changes the draw"):
        evaluate_reverse_kl(biased, teacher, prompts)
    biased.times = 1.0
    assert evaluate_reverse_kl(biased, teacher, prompts) == evaluate_reverse_kl(biased.inner, teacher, prompts)


def test_reverse_kl_needs_the_log_probs_of_the_sampler(tokenizer, prompts, teacher_model):
    silent = Fixed([[0.1]] * 7, tokenizer, reports=False)
    with pytest.raises(InvalidRecordError, match="behavior_logprobs"):
        evaluate_reverse_kl(silent, HFScorer(teacher_model, tokenizer), prompts)
