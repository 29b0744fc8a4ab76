"""HFSource and HFScorer against the plain thing: one rollout alone through the whole model, float32 log-softmax."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import TOKENIZER_ID

from lopd import collate, collect_rollouts, score_rollouts
from lopd.backends.memory_store import MemoryStore
from lopd.backends.zarr.store import ZarrStore
from lopd.engines.causal_lm import lm_head
from lopd.engines.hf import HFScorer, HFSource
from lopd.engines.hf.decoding import draw
from lopd.engines.student import CausalLMStudent
from lopd.errors import ContextOverflowError, InvalidRecordError, LopdError
from lopd.losses.reference import SFTLoss
from lopd.records import LMHead, ModelId, Prompt, Rollout, SamplingParams, ScoredRollout, by_rollout, by_token

KINDS = ("llama_tied", "qwen3_padded", "gemma2_softcap", "mistral_window", "gpt2", "phi_bias", "granite_scaled", "cohere_scaled")
VOCAB = 96
EOS_ID = 0
# At this temperature every token is equally likely, so responses wander over the whole vocabulary.
FLAT = 1e9

every_kind = pytest.mark.parametrize("kind", KINDS)


def source_of(model, tokenizer, **sampling):
    return HFSource(model, tokenizer, SamplingParams(**{"max_new_tokens": 10, **sampling}), identity=ModelId("tiny", "1", "float32"))


def as_lists(rollouts):
    return {r.rollout_id: r.response_ids.tolist() for r in rollouts}


def spoiled(model):
    """The model with NaN as the embedding of token 50, which `check_cut` does not look at."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = float("nan")
    return model


# --- sampling -------------------------------------------------------------------------------------------------------------------------


@every_kind
def test_reported_logprobs_are_those_of_the_whole_model_whatever_shared_the_batch(kind, models, tokenizer, prompts, full_logprobs):
    rollouts = source_of(models(kind), tokenizer, samples_per_prompt=2, stop_ids=tuple(range(20))).sample(prompts)
    assert len({r.response_ids.size for r in rollouts}) > 2, "rows should leave the batch at different times"
    for rollout in rollouts:
        np.testing.assert_allclose(rollout.behavior_logprobs, full_logprobs(models(kind), rollout), atol=2e-5)


@every_kind
def test_temperature_zero_takes_the_most_likely_token_of_the_whole_model_each_time(kind, models, tokenizer, prompts):
    for rollout in source_of(models(kind), tokenizer, temperature=0.0, max_new_tokens=6).sample(prompts):
        ids = rollout.prompt_ids.tolist()
        for token in rollout.response_ids.tolist():
            with torch.no_grad():
                assert token == int(models(kind)(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, :VOCAB].argmax())
            ids.append(token)


def test_logprobs_are_at_temperature_one_and_uncut_whatever_the_sampling(llama, tokenizer, prompts, full_logprobs):
    for rollout in source_of(llama, tokenizer, temperature=0.5, top_p=0.6).sample(prompts):
        np.testing.assert_allclose(rollout.behavior_logprobs, full_logprobs(llama, rollout), atol=2e-5)


def test_rollouts_are_named_and_ordered_by_prompt_then_sample(llama, tokenizer, prompts):
    rollouts = source_of(llama, tokenizer, samples_per_prompt=2).sample(prompts)
    assert [r.rollout_id for r in rollouts] == [f"p{i}/s{s}/g0" for i in range(7) for s in range(2)]
    assert all(np.array_equal(r.prompt_ids, prompts[i // 2].token_ids) for i, r in enumerate(rollouts))
    assert all(r.loss_mask.all() for r in rollouts)


def test_a_rollout_does_not_depend_on_what_it_was_batched_with(llama, tokenizer, prompts):
    source = source_of(llama, tokenizer, samples_per_prompt=2, stop_ids=(0, 5, 6, 7, 8))
    together = source.sample(prompts)
    again, backwards = source.sample(prompts), source.sample(prompts[::-1])
    alone = [r for prompt in prompts for r in source.sample([prompt])]
    assert as_lists(together) == as_lists(again) == as_lists(backwards) == as_lists(alone)
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a.behavior_logprobs, b.behavior_logprobs, atol=2e-5)


def test_other_seeds_samples_generations_and_prompts_draw_other_tokens(llama, tokenizer):
    prompts = [Prompt(name, [5, 6, 7]) for name in ("a", "b")]
    params = SamplingParams(max_new_tokens=12, samples_per_prompt=2)
    first = HFSource(llama, tokenizer, params).sample(prompts)
    other_seed = source_of(llama, tokenizer, max_new_tokens=12, samples_per_prompt=2, seed=1).sample(prompts)
    other_generation = HFSource(llama, tokenizer, params, generation=1).sample(prompts)
    responses = [tuple(r.response_ids.tolist()) for r in (*first, *other_seed, *other_generation)]
    assert len(set(responses)) == 12
    assert other_generation[0].rollout_id == "a/s0/g1"


def test_no_more_rows_are_sampled_side_by_side_than_allowed(llama, tokenizer, prompts):
    params = SamplingParams(max_new_tokens=4, samples_per_prompt=3)
    widths = []
    handle = llama.model.register_forward_hook(lambda _m, _a, kwargs, _o: widths.append(kwargs["input_ids"].shape[0]), with_kwargs=True)
    try:
        few = HFSource(llama, tokenizer, params, rows_per_batch=4).sample(prompts)
    finally:
        handle.remove()
    assert max(widths) == 4
    many = HFSource(llama, tokenizer, params, rows_per_batch=1000).sample(prompts)
    assert [r.rollout_id for r in few] == [r.rollout_id for r in many]
    assert as_lists(few) == as_lists(many)


def test_first_tokens_follow_the_distribution_of_the_model(llama, tokenizer):
    count = 4000
    prompt = Prompt("p", [9, 10, 11, 12])
    rollouts = source_of(llama, tokenizer, max_new_tokens=1, samples_per_prompt=count).sample([prompt])
    with torch.no_grad():
        expected = llama(input_ids=torch.tensor([[9, 10, 11, 12]])).logits[0, -1].double().softmax(-1).numpy() * count
    seen = np.bincount([int(r.response_ids[0]) for r in rollouts], minlength=VOCAB)
    chi2 = float(((seen - expected) ** 2 / expected).sum())
    # 95 degrees of freedom: mean 95, standard deviation 13.8
    assert chi2 < 95 + 5 * 13.8


def test_tokens_along_a_response_are_independent_draws(llama, tokenizer):
    rollouts = source_of(llama, tokenizer, temperature=FLAT, samples_per_prompt=100, max_new_tokens=40, stop_ids=(10**6,)).sample(
        [Prompt("p", [9])]
    )
    ids_BT = np.stack([r.response_ids for r in rollouts]).astype(float)
    assert len(np.unique(ids_BT)) == VOCAB
    for lagged in (ids_BT[:, :-1], np.roll(ids_BT, 1, axis=0)[:, 1:]):
        assert abs(np.corrcoef(lagged.ravel(), ids_BT[:, 1:].ravel())[0, 1]) < 0.08


def test_no_prompts_give_no_rollouts(llama, tokenizer):
    assert list(source_of(llama, tokenizer).sample([])) == []


def test_a_prompt_without_room_is_refused_by_name_before_anything_is_sampled(llama, tokenizer):
    calls = []
    source = source_of(llama, tokenizer)
    handle = llama.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(ContextOverflowError, match=r"'long'.*64 tokens.*context of 64"):
            source.sample([Prompt("short", [5]), Prompt("long", [5] * 64)])
    finally:
        handle.remove()
    assert not calls


def test_responses_stop_at_the_end_of_the_context(llama, tokenizer):
    params = {"max_new_tokens": 30, "stop_ids": (10**6,)}
    rollouts = source_of(llama, tokenizer, **params).sample([Prompt("full", [5] * 63), Prompt("nearly", [5] * 60), Prompt("short", [5])])
    assert [r.response_ids.size for r in rollouts] == [1, 4, 30]
    assert {r.finish_reason for r in rollouts} == {"length"}


def test_a_prompt_with_an_id_outside_the_vocabulary_is_refused_by_name(qwen3, tokenizer):
    # 100 is a row of the model, but a padding row: the tokenizer has no such token
    with pytest.raises(InvalidRecordError, match=r"'bad'.*token 1 is id 100"):
        source_of(qwen3, tokenizer).sample([Prompt("good", [5]), Prompt("bad", [5, 100])])


def test_stop_ids_are_those_asked_for_or_those_of_model_and_tokenizer(llama, tokenizer):
    model = copy.deepcopy(llama)
    model.generation_config.eos_token_id = [7, 8]
    assert source_of(model, tokenizer).stop_ids == {7, 8, EOS_ID}
    assert source_of(model, tokenizer, stop_ids=(11,)).stop_ids == {11}
    model.generation_config.eos_token_id = None
    assert source_of(model, tokenizer).stop_ids == {EOS_ID}


def test_pain_08_eos_is_kept_and_trained_even_when_pad_equals_eos(llama, tokenizer, prompts):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS_ID
    rollouts = source_of(llama, tokenizer, temperature=FLAT, max_new_tokens=40, samples_per_prompt=4).sample(prompts)
    stopped = [r for r in rollouts if r.finish_reason == "stop"]
    cut = [r for r in rollouts if r.finish_reason == "length"]
    assert len(stopped) >= 3
    assert len(cut) >= 3
    for rollout in stopped:
        assert rollout.response_ids.tolist().count(EOS_ID) == 1
        assert rollout.response_ids[-1] == EOS_ID
    for rollout in cut:
        assert EOS_ID not in rollout.response_ids
        assert rollout.response_ids.size == 40
    for weighting in (by_rollout, by_token):
        batch = collate([ScoredRollout(r, {}) for r in stopped], weighting)
        eos_weights = batch.weight[batch.targets == EOS_ID]
        assert len(eos_weights) == len(stopped)
        assert bool((eos_weights > 0).all())
    head, hidden_ND = LMHead(torch.randn(VOCAB, 4, requires_grad=True)), torch.randn(len(batch.targets), 4)
    (taught_VD,) = torch.autograd.grad(SFTLoss()(hidden_ND, head, batch).loss_sum, head.weight)
    batch.weight[batch.targets == EOS_ID] = 0
    (untaught_VD,) = torch.autograd.grad(SFTLoss()(hidden_ND, head, batch).loss_sum, head.weight)
    assert not torch.allclose(taught_VD[EOS_ID], untaught_VD[EOS_ID])


def test_pain_11_padding_rows_of_the_head_are_never_sampled_and_carry_no_mass(qwen3, tokenizer, prompts, full_logprobs):
    model = copy.deepcopy(qwen3)
    with torch.no_grad():  # now a padding row wins every argmax of the uncut head
        model.lm_head.weight[VOCAB:] = 30 * torch.randn(8, 32)
        uncut = model(input_ids=torch.arange(10, 30)[None]).logits[0]
    assert float((uncut.argmax(-1) >= VOCAB).float().mean()) > 0.5
    for temperature in (0.0, 1.0):
        rollouts = source_of(model, tokenizer, temperature=temperature).sample(prompts)
        scores = HFScorer(model, tokenizer).score(rollouts)
        for rollout, score in zip(rollouts, scores, strict=True):
            assert rollout.response_ids.max() < VOCAB
            np.testing.assert_allclose(rollout.behavior_logprobs, full_logprobs(model, rollout), atol=2e-5)
            np.testing.assert_allclose(score.logprobs, full_logprobs(model, rollout), atol=2e-5)
    student = CausalLMStudent(model, TOKENIZER_ID)
    output = student(collate([ScoredRollout(r, {}) for r in rollouts], by_token), SFTLoss())
    assert float(output.loss_sum.detach()) == pytest.approx(-sum(float(full_logprobs(qwen3, r).sum()) for r in rollouts), rel=1e-4)
    output.loss_sum.backward()
    assert float(model.lm_head.weight.grad[VOCAB:].abs().max()) == 0
    assert float(model.lm_head.weight.grad[:VOCAB].abs().max()) > 0


def test_a_model_that_gives_nan_is_refused_when_sampling(qwen3, tokenizer):
    with pytest.raises(LopdError):
        source_of(spoiled(qwen3), tokenizer).sample([Prompt("p", [50])])


def test_sampling_from_a_student_in_training_mode_reports_the_logprobs_of_the_model_all_the_same(llama, tokenizer, prompts, full_logprobs):
    student = CausalLMStudent(copy.deepcopy(llama), TOKENIZER_ID, gradient_checkpointing=True)
    sampled = source_of(student.model, tokenizer).sample(prompts)
    scores = HFScorer(student.model, tokenizer).score(sampled)
    assert student.model.training, "training goes on where it was"
    for rollout, score in zip(sampled, scores, strict=True):
        np.testing.assert_allclose(rollout.behavior_logprobs, full_logprobs(llama, rollout), atol=2e-5)
        np.testing.assert_allclose(score.logprobs, full_logprobs(llama, rollout), atol=2e-5)


def test_dropout_is_off_while_sampling_and_scoring_a_model_in_training_mode(make_model, tokenizer, prompts, full_logprobs):
    model = make_model("gpt2_dropout").train()
    sampled = source_of(model, tokenizer).sample(prompts)
    scores = HFScorer(model, tokenizer).score(sampled)
    assert model.training
    model.eval()
    for rollout, score in zip(sampled, scores, strict=True):
        np.testing.assert_allclose(rollout.behavior_logprobs, full_logprobs(model, rollout), atol=2e-5)
        np.testing.assert_allclose(score.logprobs, full_logprobs(model, rollout), atol=2e-5)


# --- drawing one token ----------------------------------------------------------------------------------------------------------------


def drawn_on_a_grid(probabilities, n=1000, **sampling):
    """How often each token is drawn when the uniform numbers are the midpoints of n equal intervals: its probability, exactly."""
    logits_BV = torch.tensor(probabilities, dtype=torch.float32).log().expand(n, -1)
    ids_B, logprobs_B = draw(logits_BV, (torch.arange(n, dtype=torch.float64) + 0.5) / n, SamplingParams(**sampling))
    np.testing.assert_allclose(logprobs_B, torch.tensor(probabilities).log()[ids_B], atol=1e-6)
    return np.bincount(ids_B.numpy(), minlength=len(probabilities)) / n


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, [0.15, 0.5, 0.05, 0.3]),
        ({"temperature": 0.5}, [p**2 / 0.365 for p in (0.15, 0.5, 0.05, 0.3)]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"top_p": 0.99}, [0.15, 0.5, 0.05, 0.3]),
        ({"top_p": 0.9}, [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
        ({"top_p": 0.7}, [0, 0.625, 0, 0.375]),
        ({"top_p": 0.45}, [0, 1, 0, 0]),
        ({"top_p": 1e-6}, [0, 1, 0, 0]),
        ({"top_p": 0.7, "temperature": 0.5}, [0, 0.25 / 0.34, 0, 0.09 / 0.34]),
    ],
)
def test_draw_gives_each_token_its_share_of_the_uniform_numbers(sampling, expected):
    np.testing.assert_allclose(drawn_on_a_grid([0.15, 0.5, 0.05, 0.3], **sampling), expected, atol=1.01e-3)


def test_draw_stays_inside_the_vocabulary_and_off_impossible_tokens_at_both_ends_of_the_interval():
    logits_BV = 4 * torch.randn(500, 97)
    logits_BV[:, [0, 1, 95, 96]] = float("-inf")
    for u in (0.0, float(np.nextafter(1.0, 0.0))):
        for top_p in (1.0, 0.8):
            ids_B, logprobs_B = draw(logits_BV, torch.full((500,), u, dtype=torch.float64), SamplingParams(top_p=top_p))
            assert int(ids_B.min()) >= 2
            assert int(ids_B.max()) <= 94
            assert bool(logprobs_B.isfinite().all())


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
    """(T, V) float32 log-probs at each response token: one rollout alone through the whole model."""
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
