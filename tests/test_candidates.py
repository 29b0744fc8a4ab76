"""Candidates: what `HFSource` keeps while it samples, and what `HFScorer` makes of them, against the whole model on one rollout alone."""

import copy

import numpy as np
import pytest
import torch
from attrs import evolve
from hf_parts import KINDS, VOCAB, every_kind, source_of

from lopd.engines.hf import HFScorer
from lopd.errors import ArgumentError, InvalidRecordError
from lopd.records import Prompt, Rollout, TopK

C, D = 5, 4


def all_logprobs(model, rollout):
    """Return (T, V) log-probs: one rollout alone through the whole model."""
    ids = torch.tensor([*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()])
    with torch.no_grad():
        logprobs = model(input_ids=ids[None], use_cache=False).logits[0, :, :VOCAB].float().log_softmax(-1)
    return logprobs[rollout.prompt_ids.size - 1 : -1].numpy()


def with_candidates(rollout, candidates=C, drawn=D, vocab=VOCAB):
    """Return made-up candidates: some ids of each token, each equally likely, and some of these with repetitions."""
    rng = np.random.default_rng(len(rollout))
    ids_TC = np.stack([rng.choice(vocab, candidates, replace=False) for _ in rollout.response_ids])
    ids_TK = np.concatenate([ids_TC, ids_TC[:, rng.integers(candidates, size=drawn)]], axis=1)
    return evolve(rollout, candidates=TopK(ids_TK, np.full(ids_TK.shape, -np.log(candidates)), np.zeros(len(ids_TK)), drawn))


# --- sources --------------------------------------------------------------------------------------------------------------------------


@every_kind
def test_a_source_keeps_the_most_likely_tokens_and_drawn_ones_at_temperature_1(kind, models, tokenizer, prompts):
    for rollout in source_of(models(kind), tokenizer, candidates=C, drawn=D, temperature=0.6, top_p=0.7).sample(prompts):
        support, truth_TV = rollout.candidates, all_logprobs(models(kind), rollout)
        assert (support.ids.shape, support.drawn) == ((rollout.response_ids.size, C + D), D)
        assert support.logprobs.dtype == np.float32
        np.testing.assert_allclose(support.logprobs[:, :C], -np.sort(-truth_TV, -1)[:, :C], atol=2e-5)
        np.testing.assert_allclose(support.logprobs, np.take_along_axis(truth_TV, support.ids, -1), atol=2e-5)
        np.testing.assert_allclose(support.tail, 1 - np.exp(support.logprobs[:, :C]).sum(-1), atol=1e-6)


@pytest.mark.parametrize("kept", [{"candidates": C}, {"drawn": D}, {"candidates": C, "drawn": D}])
def test_keeping_candidates_changes_no_token_and_no_log_prob(kept, llama, tokenizer, prompts):
    sampling = {"samples_per_prompt": 2, "temperature": 0.8, "stop_ids": (0, 5, 6, 7, 8)}
    plain, keeping = (source_of(llama, tokenizer, **sampling, **more).sample(prompts) for more in ({}, kept))
    for a, b in zip(plain, keeping, strict=True):
        assert (a.rollout_id, a.content_hash, a.candidates) == (b.rollout_id, b.content_hash, None)
        np.testing.assert_array_equal(a.behavior_logprobs, b.behavior_logprobs)
        np.testing.assert_array_equal(a.sampler_logprobs, b.sampler_logprobs)
        assert b.candidates.ids.shape[1] == sum(kept.values())


def test_candidates_do_not_depend_on_what_a_rollout_was_batched_with(llama, tokenizer, prompts):
    source = source_of(llama, tokenizer, samples_per_prompt=2, stop_ids=(0, 5, 6, 7, 8), candidates=C, drawn=D)
    together, alone = source.sample(prompts), [r for prompt in prompts for r in source.sample([prompt])]
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_array_equal(a.candidates.ids, b.candidates.ids)
        np.testing.assert_allclose(a.candidates.logprobs, b.candidates.logprobs, atol=2e-5)


def test_drawn_candidates_follow_the_distribution_of_the_model_whatever_the_temperature(llama, tokenizer):
    count, prompt = 4000, Prompt("p", [9, 10, 11, 12])
    (rollout,) = source_of(llama, tokenizer, max_new_tokens=1, temperature=0.3, drawn=count).sample([prompt])
    expected = np.exp(all_logprobs(llama, rollout)[0].astype(np.float64)) * count
    seen = np.bincount(rollout.candidates.ids[0], minlength=VOCAB)
    # 95 degrees of freedom: mean 95, standard deviation 13.8
    assert float(((seen - expected) ** 2 / expected).sum()) < 95 + 5 * 13.8
    assert rollout.candidates.tail.tolist() == [1.0], "nothing but drawn tokens leaves all mass outside"


def test_each_token_and_each_rollout_has_draws_of_its_own(llama, tokenizer):
    sampling = {"temperature": 0.0, "max_new_tokens": 6, "samples_per_prompt": 2, "stop_ids": (10**6,), "drawn": 32}
    sampled = [r for seed in (0, 1) for r in source_of(llama, tokenizer, **sampling, seed=seed).sample([Prompt("p", [9])])]
    assert len({tuple(rollout.response_ids.tolist()) for rollout in sampled}) == 1
    draws = {tuple(ids.tolist()) for rollout in sampled for ids in rollout.candidates.ids}
    assert len(draws) == 4 * 6


def test_candidates_of_a_source_that_the_vocabulary_does_not_have_are_refused(llama, tokenizer):
    with pytest.raises(InvalidRecordError, match=rf"HFSource: candidates is {VOCAB + 1}, expected 0 to {VOCAB}"):
        source_of(llama, tokenizer, candidates=VOCAB + 1)


# --- scorers --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("candidates", "top_k", "drawn", "kind"),
    [(C, 0, 0, "gpt2"), (0, 0, D, "gpt2"), (3, 3, 2, "gpt2"), (C, VOCAB - C, 0, "gpt2"), *((C, 3, D, kind) for kind in KINDS)],
)
def test_a_scorer_scores_candidates_then_its_own_most_likely_then_the_drawn(candidates, top_k, drawn, kind, models, tokenizer, rollouts):
    model = models(kind)
    scorer = HFScorer(model, tokenizer, tokens_per_batch=40, rows_per_chunk=3, top_k=top_k, candidates=candidates, drawn=drawn)
    provenance, given = scorer.provenance, [with_candidates(rollout) for rollout in rollouts]
    assert (provenance.top_k, provenance.candidates, provenance.drawn) == (candidates + top_k + drawn, candidates, drawn)
    plain = HFScorer(model, tokenizer, tokens_per_batch=40, rows_per_chunk=3).score(rollouts)
    for rollout, score, bare in zip(given, scorer.score(given), plain, strict=True):
        np.testing.assert_array_equal(score.logprobs, bare.logprobs)
        support, truth_TV = score.top_k, all_logprobs(model, rollout)
        distinct = candidates + top_k
        assert (support.ids.shape[1], support.drawn) == (distinct + drawn, drawn)
        np.testing.assert_array_equal(support.ids[:, :candidates], rollout.candidates.ids[:, :candidates])
        np.testing.assert_array_equal(support.ids[:, distinct:], rollout.candidates.ids[:, C + D - drawn :])
        np.testing.assert_allclose(support.logprobs, np.take_along_axis(truth_TV, support.ids, -1), atol=2e-5)
        np.put_along_axis(truth_TV, support.ids[:, :candidates], -np.inf, -1)
        np.testing.assert_allclose(support.logprobs[:, candidates:distinct], -np.sort(-truth_TV, -1)[:, :top_k], atol=2e-5)
        np.put_along_axis(truth_TV, support.ids[:, candidates:distinct], -np.inf, -1)
        np.testing.assert_allclose(support.tail, np.exp(truth_TV).sum(-1), atol=2e-6)


def test_candidates_that_the_teacher_rules_out_get_the_floor_and_are_not_among_its_own(models, tokenizer):
    model = copy.deepcopy(models("phi_bias"))
    with torch.no_grad():
        model.lm_head.bias[10:] = -torch.inf
    ids = [[20, 3, 30, 20], [4, 5, 95, 95], [60, 61, 62, 7]]
    given = TopK(ids, np.full((3, 4), -np.log(3)), np.zeros(3), drawn=1)
    rollout = Rollout("r", [3, 4], [5, 6, 7], np.ones(3, bool), "length", candidates=given)
    support = HFScorer(model, tokenizer, top_k=12, candidates=3, drawn=1).score([rollout])[0].top_k
    np.testing.assert_array_equal(support.ids[:, [0, 1, 2, 15]], ids)
    assert all(len(set(row)) == 15 for row in support.ids[:, :15].tolist())
    assert (support.logprobs[support.ids >= 10] == -100).all()
    np.testing.assert_allclose(support.tail, 0, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "has"),
    [
        (None, "0 candidates and 0 drawn ones"),
        ((C - 1, D), f"{C - 1} candidates and {D} drawn"),
        ((C + D, 0), f"{C + D} candidates and 0 drawn"),
    ],
)
def test_a_rollout_without_the_candidates_is_refused_before_anything_is_computed(given, has, llama, tokenizer, rollouts):
    scorer = HFScorer(llama, tokenizer, candidates=C, drawn=D)
    lacking = rollouts[2] if given is None else with_candidates(rollouts[2], *given)
    with pytest.raises(
        InvalidRecordError, match=rf"'r2/s0/g0': it has {has}.*expected at least 5 and 4; .*candidates=5, drawn=4.*score_rollouts"
    ):
        scorer.score([with_candidates(rollouts[0]), lacking])


def test_a_candidate_outside_the_scorers_vocabulary_is_refused_by_name(qwen3, tokenizer, rollouts):
    given = with_candidates(rollouts[3])
    ids = given.candidates.ids.copy()
    # the padded head has a row for it
    ids[6, 1] = VOCAB
    strange = evolve(given, candidates=TopK(ids, given.candidates.logprobs, given.candidates.tail, D))
    with pytest.raises(
        InvalidRecordError, match=rf"'r3/s0/g0': a candidate of token 6 is id {VOCAB}, expected an id below the vocabulary's {VOCAB}"
    ):
        HFScorer(qwen3, tokenizer, candidates=2).score([strange])
    assert HFScorer(qwen3, tokenizer, candidates=1).score([strange])[0].top_k.ids.shape == (13, 1), "it was not asked for"


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"candidates": -1}, rf"candidates is -1, expected 0 to {VOCAB}"),
        ({"candidates": 50, "top_k": 50}, rf"candidates \+ top_k is 100, expected 0 to {VOCAB}"),
        ({"drawn": -1}, "drawn is -1, expected at least 0"),
    ],
)
def test_widths_that_no_vocabulary_has_are_refused(widths, message, llama, tokenizer):
    with pytest.raises(InvalidRecordError, match=f"HFScorer: {message}"):
        HFScorer(llama, tokenizer, **widths)
    assert HFScorer(llama, tokenizer, drawn=2 * VOCAB).provenance.top_k == 2 * VOCAB, "draws repeat"


def test_the_chunks_bound_memory_and_never_hold_the_logits_of_all_tokens(llama, tokenizer, rollouts, monkeypatch):
    seen = []
    softmax = torch.Tensor.log_softmax

    def counted(logits, *arguments):
        seen.append(len(logits))
        return softmax(logits, *arguments)

    scorer = HFScorer(llama, tokenizer, rows_per_chunk=7, top_k=2, candidates=C, drawn=D)
    monkeypatch.setattr(torch.Tensor, "log_softmax", counted)
    scorer.score([with_candidates(rollout) for rollout in rollouts])
    assert max(seen) == 7
    assert sum(seen) == sum(rollout.response_ids.size for rollout in rollouts), "one softmax for each token, whatever is asked"


def test_the_policy_finds_its_own_candidates_as_likely_as_it_said(llama, tokenizer, prompts):
    rollouts = source_of(llama, tokenizer, candidates=C, drawn=D, temperature=0.7).sample(prompts)
    for rollout, score in zip(rollouts, HFScorer(llama, tokenizer, candidates=C, drawn=D).score(rollouts), strict=True):
        np.testing.assert_array_equal(score.top_k.ids, rollout.candidates.ids)
        np.testing.assert_allclose(score.top_k.logprobs, rollout.candidates.logprobs, atol=2e-5)
        np.testing.assert_allclose(score.top_k.tail, rollout.candidates.tail, atol=2e-5)


def test_candidates_that_are_not_a_support_are_refused():
    with pytest.raises(ArgumentError, match="candidates: "):
        Rollout("r", [1], [2, 3], [True, True], "stop", candidates=[1, 2])
