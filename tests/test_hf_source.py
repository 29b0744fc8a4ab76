"""HFSource against the plain thing: one rollout alone through the whole model, float32 log-softmax."""

import copy
import json

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import TOKENIZER_ID, build_tokenizer
from engine_models import drawn_logprobs
from hf_parts import FLAT, VOCAB, every_kind, source_of, spoiled

from lopd import collate
from lopd.engines.hf import HFScorer, HFSource
from lopd.engines.hf.decoding import draw
from lopd.engines.student import CausalLMStudent
from lopd.errors import ContextOverflowError, InvalidRecordError, LopdError
from lopd.losses.reference import SFTLoss
from lopd.records import Lineage, LMHead, ModelId, Prompt, SamplingParams, ScoredRollout, by_rollout, by_token

EOS_ID = 0


def as_lists(rollouts):
    return {r.rollout_id: r.response_ids.tolist() for r in rollouts}


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
        source = HFSource(llama, tokenizer, params, rows_per_batch=4)
        widths.clear()  # those of its probes
        few = source.sample(prompts)
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


class OnDevice(torch.Tensor):
    """As on a GPU, whose tensors numpy does not read."""

    def __array__(self, *_):
        raise TypeError


def test_stop_ids_are_those_asked_for_or_those_of_model_and_tokenizer(llama, tokenizer):
    model = copy.deepcopy(llama)
    model.generation_config.eos_token_id = [7, 8]
    assert source_of(model, tokenizer).stop_ids == {7, 8, EOS_ID}
    assert source_of(model, tokenizer, stop_ids=(11,)).stop_ids == {11}
    for seven in (7, np.int64(7), torch.tensor(7), [7], np.array([7]), [7, None], {7}, torch.tensor([7]).as_subclass(OnDevice)):
        model.generation_config.eos_token_id = seven
        assert source_of(model, tokenizer).stop_ids == {7, EOS_ID}
    model.generation_config.eos_token_id = None
    assert source_of(model, tokenizer).stop_ids == {EOS_ID}


def test_an_export_ends_responses_in_transformers_where_it_ends_them_here(make_model, tmp_path):
    b, lineage = build_tokenizer(), Lineage(ModelId("writer", "1", "float32"))
    b.eos_token = "b"  # noqa: S105 (a token, which the generation configuration does not name)
    make_model("llama_tied").save_pretrained(tmp_path / "base")
    for name in ("full", "adapters"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        student = CausalLMStudent(model if name == "full" else peft.get_peft_model(model, peft.LoraConfig()), b)
        student.export(tmp_path / name, b, lineage)
        assert json.loads((tmp_path / name / "generation_config.json").read_text())["eos_token_id"] == [EOS_ID, b.eos_token_id]
        assert model.generation_config.eos_token_id == EOS_ID
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    ids = torch.tensor([[5, 6, 7]] * 100)
    rows = loaded.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=20, pad_token_id=EOS_ID)
    responses = [row[3:].tolist() for row in rows]
    after = [row[row.index(b.eos_token_id) + 1 :] for row in responses if b.eos_token_id in row]
    assert any(after)
    assert not any(token for rest in after for token in rest)


@pytest.mark.parametrize("ends", [EOS_ID, [EOS_ID, 9], [9], None])
def test_the_ends_that_an_export_names_are_those_of_the_model_and_of_its_tokenizer(ends, make_model, tokenizer, tmp_path):
    model = make_model("llama_tied")
    model.generation_config.eos_token_id = ends
    model.save_pretrained(tmp_path / "plain")
    student = CausalLMStudent(model, tokenizer)
    student.export(tmp_path / "out", tokenizer, Lineage(ModelId("writer", "1", "float32")))
    out, plain = ((tmp_path / name / "generation_config.json").read_text() for name in ("out", "plain"))
    named = json.loads(out)["eos_token_id"]
    assert {*np.ravel(named).tolist()} == student.stop_ids
    if ends in (EOS_ID, [EOS_ID, 9]):
        assert out == plain


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


def test_the_log_probs_of_the_sampler_are_at_its_temperature_and_renormalised_over_its_cut(llama, tokenizer, prompts):
    for sampling in ({"temperature": 0.5}, {"top_p": 0.6}, {"temperature": 1.7, "top_p": 0.8}):
        source = source_of(llama, tokenizer, **sampling)
        for rollout in source.sample(prompts):
            np.testing.assert_allclose(rollout.sampler_logprobs, drawn_logprobs(llama, rollout, **sampling), atol=2e-5)
    (greedy, *_) = source_of(llama, tokenizer, temperature=0.0, top_p=0.9).sample(prompts)
    assert greedy.sampler_logprobs.tolist() == [0.0] * greedy.response_ids.size
    assert all(rollout.sampler_logprobs is None for rollout in source_of(llama, tokenizer).sample(prompts))


def drawn_on_a_grid(probabilities, expected, n=1000, **sampling):
    """Return how often each token is drawn when the uniform numbers are the midpoints of n equal intervals: its probability, exactly."""
    logits_BV = torch.tensor(probabilities, dtype=torch.float32).log().expand(n, -1)
    ids_B, logprobs_BV, drawn_B = draw(logits_BV, (torch.arange(n, dtype=torch.float64) + 0.5) / n, SamplingParams(**sampling))
    np.testing.assert_allclose(logprobs_BV, torch.tensor(probabilities).log().expand(n, -1), atol=1e-6)
    np.testing.assert_allclose(drawn_B, torch.tensor(expected).log()[ids_B], atol=1e-6)
    return np.bincount(ids_B.numpy(), minlength=len(probabilities)) / n


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, [0.15, 0.5, 0.05, 0.3]),
        ({"temperature": 0.5}, [p**2 / 0.365 for p in (0.15, 0.5, 0.05, 0.3)]),
        ({"temperature": 0.0}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_p": 0.99}, [0.15, 0.5, 0.05, 0.3]),
        ({"top_p": 0.9}, [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
        ({"top_p": 0.7}, [0, 0.625, 0, 0.375]),
        ({"top_p": 0.45}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_p": 1e-6}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_p": 1e-300}, [0.0, 1.0, 0.0, 0.0]),
        ({"temperature": 1e-45}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_p": 0.7, "temperature": 0.5}, [0, 0.25 / 0.34, 0, 0.09 / 0.34]),
    ],
)
def test_draw_gives_each_token_its_share_of_the_uniform_numbers(sampling, expected):
    np.testing.assert_allclose(drawn_on_a_grid([0.15, 0.5, 0.05, 0.3], expected, **sampling), expected, atol=1.01e-3)


def test_draw_stays_inside_the_vocabulary_and_off_impossible_tokens_at_both_ends_of_the_interval():
    logits_BV = 4 * torch.randn(500, 97)
    logits_BV[:, [0, 1, 95, 96]] = float("-inf")
    for u in (0.0, float(np.nextafter(1.0, 0.0))):
        for top_p in (1.0, 0.8):
            ids_B, logprobs_BV, drawn_B = draw(logits_BV, torch.full((500,), u, dtype=torch.float64), SamplingParams(top_p=top_p))
            assert int(ids_B.min()) >= 2
            assert int(ids_B.max()) <= 94
            assert bool((logprobs_BV[range(500), ids_B].isfinite() & drawn_B.isfinite()).all())
