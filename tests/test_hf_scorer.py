"""HFScorer against the plain thing: one rollout alone through the whole model, float32 log-softmax."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from hf_parts import FLAT, VOCAB, every_kind, source_of, spoiled

from lopd import collate, collect_rollouts, score_rollouts
from lopd.backends.memory_store import MemoryStore
from lopd.backends.zarr.store import ZarrStore
from lopd.engines.causal_lm import lm_head
from lopd.engines.hf import HFScorer, HFSource
from lopd.errors import ContextOverflowError, InvalidRecordError
from lopd.records import LMHead, Prompt, Rollout, SamplingParams

# --- scoring --------------------------------------------------------------------------------------------------------------------------


@every_kind
def test_scores_are_the_logprobs_of_the_whole_model_on_each_rollout_alone(kind, models, tokenizer, rollouts, full_logprobs):
    scores = HFScorer(models(kind), tokenizer).score(rollouts)
    for rollout, score in zip(rollouts, scores, strict=True):
        np.testing.assert_allclose(score.logprobs, full_logprobs(models(kind), rollout), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 512])
def test_scores_do_not_depend_on_batching_order_or_chunks(rows_per_chunk, qwen3, tokenizer, rollouts):
    scorer = HFScorer(qwen3, tokenizer, tokens_per_batch=40, rows_per_chunk=rows_per_chunk)
    together, backwards = scorer.score(rollouts), scorer.score(rollouts[::-1])[::-1]
    alone = [scorer.score([r])[0] for r in rollouts]
    for a, b, c in zip(together, backwards, alone, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
        np.testing.assert_allclose(a.logprobs, c.logprobs, atol=1e-5)


def test_scores_come_in_the_order_given_and_carry_the_hash_of_their_rollout(llama, tokenizer, rollouts):
    order = [3, 0, 6, 2, 5, 1, 4]
    scores = HFScorer(llama, tokenizer, tokens_per_batch=20).score([rollouts[i] for i in order])
    assert [(s.rollout_id, s.content_hash) for s in scores] == [(rollouts[i].rollout_id, rollouts[i].content_hash) for i in order]
    assert list(HFScorer(llama, tokenizer).score([])) == []


def test_batches_are_sorted_by_length_and_stay_within_the_token_budget(llama, tokenizer, rollouts):
    scorer = HFScorer(llama, tokenizer, tokens_per_batch=24)
    assert scorer.provenance.vocab_hash  # the check of the cut is over before we look
    shapes = []
    handle = llama.model.register_forward_hook(lambda _m, _a, kwargs, _o: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    try:
        scorer.score(rollouts)
        too_long = Rollout("long/s0/g0", [5] * 20, [6] * 10, np.ones(10, bool), "length")
        shapes_of_long = len(shapes)
        scorer.score([too_long])
    finally:
        handle.remove()
    assert sum(rows for rows, _ in shapes[:shapes_of_long]) == len(rollouts)
    assert all(rows * width <= 24 for rows, width in shapes[:shapes_of_long])
    assert any(rows > 1 for rows, _ in shapes)
    assert all(a <= b for (_, a), (_, b) in pairwise(shapes[:shapes_of_long]))
    assert shapes[shapes_of_long:] == [(1, 30)], "a rollout beyond the budget goes alone"


def test_logits_exist_for_a_chunk_of_response_tokens_only(llama, tokenizer, rollouts, monkeypatch):
    scorer = HFScorer(llama, tokenizer, rows_per_chunk=4)
    assert scorer.provenance.vocab_hash
    seen, whole = [], LMHead.logits
    monkeypatch.setattr(LMHead, "logits", lambda self, hidden_ND: seen.append(tuple(hidden_ND.shape[:-1])) or whole(self, hidden_ND))
    heads = []
    handle = llama.lm_head.register_forward_hook(lambda *_: heads.append(1))
    try:
        scorer.score(rollouts)
    finally:
        handle.remove()
    assert not heads, "the model's own head, which makes logits of all positions, was run"
    assert all(len(shape) == 1 and shape[0] <= 4 for shape in seen)
    assert sum(shape[0] for shape in seen) == sum(r.response_ids.size for r in rollouts)


def test_a_rollout_beyond_the_context_is_refused_by_name(llama, tokenizer, rollouts):
    fits = Rollout("fits/s0/g0", [5] * 60, [6] * 4, np.ones(4, bool), "length")
    long = Rollout("long/s0/g0", [5] * 60, [6] * 5, np.ones(5, bool), "length")
    assert HFScorer(llama, tokenizer).score([fits])[0].logprobs.size == 4
    with pytest.raises(ContextOverflowError, match=r"'long/s0/g0'.*65 tokens"):
        HFScorer(llama, tokenizer).score([*rollouts, long])


@pytest.mark.parametrize(("prompt", "response"), [([5, 99], [6]), ([5], [6, 99])])
def test_a_rollout_with_an_id_outside_the_vocabulary_is_refused_by_name(prompt, response, qwen3, tokenizer, rollouts):
    bad = Rollout("bad/s0/g0", prompt, response, np.ones(len(response), bool), "length")
    with pytest.raises(InvalidRecordError, match=r"'bad/s0/g0'.*token 1 is id 99"):
        HFScorer(qwen3, tokenizer).score([*rollouts, bad])


def test_a_model_that_gives_nan_is_refused_with_the_name_of_the_rollout(qwen3, tokenizer):
    good = Rollout("good/s0/g0", [5, 6], [7, 8, 9], np.ones(3, bool), "length")
    bad = Rollout("bad/s0/g0", [5, 6], [50, 8, 9], np.ones(3, bool), "length")
    with pytest.raises(InvalidRecordError, match=r"'bad/s0/g0'.*logprobs.* is nan"):
        HFScorer(spoiled(qwen3), tokenizer).score([good, bad])


def test_a_token_that_the_head_rules_out_gets_the_floor_and_is_counted(models, tokenizer, rollouts, full_logprobs):
    model, ruled_out = copy.deepcopy(models("phi_bias")), int(rollouts[3].response_ids[4])
    with torch.no_grad():
        model.lm_head.bias[ruled_out] = -torch.inf
    for rollout, score in zip(rollouts, HFScorer(model, tokenizer).score(rollouts), strict=True):
        truth = full_logprobs(model, rollout)
        assert np.isneginf(truth).tolist() == (rollout.response_ids == ruled_out).tolist()
        np.testing.assert_allclose(score.logprobs, np.where(np.isneginf(truth), -100, truth), atol=1e-5, rtol=1e-5)
        assert score.floored == np.isneginf(truth).sum()
    assert np.isneginf(full_logprobs(model, rollouts[3])).any()


@pytest.mark.parametrize("what", ["rows_per_batch", "tokens_per_batch", "rows_per_chunk"])
def test_a_source_or_scorer_whose_batches_hold_nothing_is_refused(what, llama, tokenizer):
    kind = HFSource if what == "rows_per_batch" else HFScorer
    with pytest.raises(InvalidRecordError, match=rf"{kind.__name__}: {what} is 0, expected at least 1"):
        kind(llama, tokenizer, **{what: 0})


def test_provenance_names_the_weights_by_content(llama, qwen3, tokenizer, swapped_tokenizer):
    provenance = HFScorer(llama, tokenizer).provenance
    changed = copy.deepcopy(llama)
    with torch.no_grad():
        changed.model.norm.weight[3] += 1e-3
    assert provenance.model.same_weights(HFScorer(copy.deepcopy(llama), tokenizer).provenance.model)
    assert not provenance.model.same_weights(HFScorer(changed, tokenizer).provenance.model)
    assert not provenance.model.same_weights(HFScorer(qwen3, tokenizer).provenance.model)
    assert provenance.vocab_hash != HFScorer(llama, swapped_tokenizer).provenance.vocab_hash
    assert provenance.model == HFSource(llama, tokenizer).manifest.policy
    assert provenance.engine.startswith("transformers ")


@every_kind
def test_pain_09_sampler_and_scorer_agree_on_the_same_model(kind, models, tokenizer, prompts):
    rollouts = source_of(models(kind), tokenizer, temperature=0.7, samples_per_prompt=2).sample(prompts)
    for rollout, score in zip(rollouts, HFScorer(models(kind), tokenizer).score(rollouts), strict=True):
        np.testing.assert_allclose(rollout.behavior_logprobs, score.logprobs, atol=2e-5)


def test_pain_04_token_ids_survive_although_text_would_not(llama, tokenizer, prompts, full_logprobs, tmp_path):
    source = source_of(llama, tokenizer, temperature=FLAT, stop_ids=(10**6,), max_new_tokens=20)
    sampled = source.sample(prompts)
    changed = [r for r in sampled if tokenizer(tokenizer.decode(r.response_ids))["input_ids"] != r.response_ids.tolist()]
    assert changed, "the test needs responses that decoding and encoding would change"
    store = ZarrStore.create(tmp_path / "store", source.manifest)
    collect_rollouts(source, prompts, store)
    score_rollouts(store, HFScorer(llama, tokenizer))
    records = ZarrStore.open(tmp_path / "store").read(range(len(prompts)), columns=["teacher"])
    for before, record in zip(sampled, records, strict=True):
        assert record.rollout.response_ids.tolist() == before.response_ids.tolist()
        np.testing.assert_allclose(record.scores["teacher"], full_logprobs(llama, before), atol=1e-5)
        batch = collate([record], teacher="teacher")
        counted = batch.weight > 0
        assert batch.targets[counted].tolist() == before.response_ids.tolist()
        np.testing.assert_array_equal(batch.teacher_logprobs[counted], record.scores["teacher"])


def test_memory_store_takes_what_the_engines_make(llama, tokenizer, prompts):
    source = source_of(llama, tokenizer)
    store = MemoryStore(source.manifest)
    collect_rollouts(source, prompts, store)
    score_rollouts(store, HFScorer(llama, tokenizer))
    for record in store.read(range(len(store)), columns=["behavior", "teacher"]):
        np.testing.assert_allclose(record.scores["behavior"], record.scores["teacher"], atol=2e-5)


def test_pain_09_a_bfloat16_model_samples_from_logits_in_float32_as_the_scorer_reads_them(llama, tokenizer):
    model, hidden = copy.deepcopy(llama).to(torch.bfloat16), []
    handle = model.model.register_forward_hook(lambda _m, _a, output: hidden.append(output.last_hidden_state[:, -1]))
    try:
        sampled = source_of(model, tokenizer, max_new_tokens=1, samples_per_prompt=8).sample([Prompt("p", [5, 6, 7])])
    finally:
        handle.remove()
    expected_BV = lm_head(model, VOCAB).logits(hidden[-1]).log_softmax(-1)
    for row, rollout in enumerate(sampled):
        np.testing.assert_allclose(rollout.behavior_logprobs[0], float(expected_BV[row, rollout.response_ids[0]].detach()), atol=1e-4)


# --- top-k ----------------------------------------------------------------------------------------------------------------------------


def truth(model, rollout):
    """Return (T, V) float32 log-probs at each response token: one rollout alone through the whole model."""
    ids = torch.tensor([*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()])
    with torch.no_grad():
        logprobs_SV = model(input_ids=ids[None], use_cache=False).logits[0, :, :VOCAB].float().log_softmax(-1)
    return logprobs_SV[rollout.prompt_ids.size - 1 : -1].numpy()


@pytest.mark.parametrize("top_k", [1, 5, VOCAB])
@pytest.mark.parametrize("kind", ["llama_tied", "qwen3_padded"])
def test_a_top_k_support_is_the_k_most_likely_tokens_and_the_mass_of_all_others(top_k, kind, models, tokenizer, rollouts):
    scorer = HFScorer(models(kind), tokenizer, tokens_per_batch=40, rows_per_chunk=3, top_k=top_k)
    assert scorer.provenance.top_k == top_k
    for rollout, score in zip(rollouts, scorer.score(rollouts), strict=True):
        truth_TV = truth(models(kind), rollout)
        np.testing.assert_allclose(score.top_k.logprobs, -np.sort(-truth_TV, -1)[:, :top_k], atol=1e-5)
        np.testing.assert_allclose(score.top_k.logprobs, np.take_along_axis(truth_TV, score.top_k.ids, -1), atol=1e-5)
        others_TV = np.exp(truth_TV.astype(np.float64))
        np.put_along_axis(others_TV, score.top_k.ids, 0.0, -1)
        np.testing.assert_allclose(score.top_k.tail, others_TV.sum(-1), atol=1e-6)
        np.testing.assert_allclose(score.logprobs, np.take_along_axis(truth_TV, rollout.response_ids[:, None], -1)[:, 0], atol=1e-5)


def test_a_top_k_support_changes_no_score_and_goes_through_a_store(llama, tokenizer, rollouts):
    store = MemoryStore(HFSource(llama, tokenizer).manifest)
    store.append(rollouts)
    score_rollouts(store, HFScorer(llama, tokenizer), column="plain")
    score_rollouts(store, HFScorer(llama, tokenizer, top_k=4), column="wide")
    for record in store.read(range(len(rollouts)), columns=["plain", "wide"], top_k=["wide"]):
        np.testing.assert_array_equal(record.scores["plain"], record.scores["wide"])
        assert record.top_k["wide"].ids.shape == (record.rollout.response_ids.size, 4)


@pytest.mark.parametrize("top_k", [-1, VOCAB + 1])
def test_a_top_k_that_no_vocabulary_of_this_size_has_is_refused(top_k, qwen3, tokenizer):
    with pytest.raises(InvalidRecordError, match=rf"HFScorer: top_k is {top_k}, expected 0 to {VOCAB}"):
        HFScorer(qwen3, tokenizer, top_k=top_k)


def test_candidates_that_the_head_rules_out_get_the_floor_and_no_mass(models, tokenizer, rollouts):
    model = copy.deepcopy(models("phi_bias"))
    with torch.no_grad():
        model.lm_head.bias[10:] = -torch.inf
    inside = [Rollout("r", [3, 4], [5, 6, 7], np.ones(3, bool), "length")]
    support = HFScorer(model, tokenizer, top_k=12).score(inside)[0].top_k
    assert (support.logprobs[:, 10:] == -100).all()
    assert (support.ids[:, :10] < 10).all()
    np.testing.assert_allclose(support.tail, 0, atol=1e-6)


def test_a_source_and_a_scorer_say_which_model_they_have(llama, tokenizer):
    assert repr(HFScorer(llama, tokenizer)).startswith("HFScorer(model=LlamaForCausalLM, ")
    assert repr(HFSource(llama, tokenizer, SamplingParams())).startswith("HFSource(model=LlamaForCausalLM, sampling=")
