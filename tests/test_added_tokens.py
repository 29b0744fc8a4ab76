"""A tokenizer with an added token more than the head has rows: the model is used as with the plain tokenizer, and the token is refused by name."""

import copy

import numpy as np
import pytest
import torch
from attrs import evolve
from conftest import build_tokenizer
from engine_models import VOCAB, save_model
from helpers import flat_gradient
from test_vllm_life import fake  # noqa: F401
from transformers import PreTrainedTokenizerFast

from lopd import CausalLMStudent, MemoryStore, Prompt, Rollout, SamplingParams, collate, collect_rollouts, score_rollouts
from lopd.engines.hf import HFScorer, HFSource
from lopd.engines.hf.scorer import exact_reverse_kl
from lopd.engines.vllm import VLLMScorer, VLLMSource
from lopd.errors import InvalidRecordError, ModelError, TokenizerMismatchError
from lopd.losses.reference import ReferenceOPDLoss
from lopd.records import ScoredRollout, fingerprint_tokenizer

PICTURE = "<picture>"
SAMPLING = SamplingParams(max_new_tokens=6, candidates=VOCAB)
PROMPTS = [Prompt("a", [5, 6, 7]), Prompt("b", [8, 9])]
OUTSIDE = Prompt("with a picture", [5, VOCAB])


@pytest.fixture(scope="module")
def larger() -> PreTrainedTokenizerFast:
    made = build_tokenizer()
    made.add_special_tokens({"additional_special_tokens": [PICTURE]})
    assert made.get_vocab()[PICTURE] == VOCAB
    return made


def with_more_rows(model):
    """Return the same model with rows for a few ids more."""
    made = copy.deepcopy(model)
    made.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
    return made


def test_it_is_scored_as_with_the_plain_tokenizer_and_the_token_is_refused_by_name(llama, tokenizer, larger, rollouts):
    ours, plain = (HFScorer(llama, with_ids, top_k=VOCAB) for with_ids in (larger, tokenizer))
    assert ours.tokenizer_id == fingerprint_tokenizer(larger)
    for found, expected in zip(ours.score(rollouts), plain.score(rollouts), strict=True):
        np.testing.assert_array_equal(found.logprobs, expected.logprobs)
        np.testing.assert_array_equal(found.top_k.ids, expected.top_k.ids)
    for ids in ([5, VOCAB], [6]), ([5], [6, VOCAB]):
        with pytest.raises(
            InvalidRecordError, match=rf"Rollout 'r': token 1 is id {VOCAB}, .*leave out added tokens that it has no row for"
        ):
            ours.score([Rollout("r", *ids, [True] * len(ids[1]), "length")])
    with pytest.raises(InvalidRecordError, match=rf"top_k is {VOCAB + 1}, expected 0 to {VOCAB}"):
        HFScorer(llama, larger, top_k=VOCAB + 1)


def test_it_is_sampled_as_with_the_plain_tokenizer_and_the_prompt_is_refused_by_name(llama, tokenizer, larger):
    source = HFSource(llama, larger, SAMPLING)
    for found, expected in zip(source.sample(PROMPTS), HFSource(llama, tokenizer, SAMPLING).sample(PROMPTS), strict=True):
        assert found.response_ids.tolist() == expected.response_ids.tolist()
        np.testing.assert_array_equal(found.behavior_logprobs, expected.behavior_logprobs)
    with pytest.raises(InvalidRecordError, match=rf"Prompt 'with a picture': token 1 is id {VOCAB}"):
        source.sample([OUTSIDE])


def test_it_is_trained_as_with_the_plain_tokenizer_and_the_token_is_refused(llama, tokenizer, larger, rollouts):
    records = [ScoredRollout(r, {"teacher": np.full(r.response_ids.size, -1.0, np.float32)}) for r in rollouts]
    batch, gradients = collate(records, teacher="teacher"), []
    for with_ids in larger, tokenizer:
        student = CausalLMStudent(copy.deepcopy(llama), with_ids)
        gradients.append(flat_gradient(student, student(batch, ReferenceOPDLoss()).loss_sum))
        assert student.tokenizer == fingerprint_tokenizer(with_ids)
    assert torch.equal(*gradients)
    student = CausalLMStudent(copy.deepcopy(llama), larger)
    ids_NK = torch.arange(VOCAB - 1, VOCAB + 1).expand(batch.inputs.numel(), 2)
    for name, ids in ("inputs", torch.full_like(batch.inputs, VOCAB)), ("top_k_ids", ids_NK):
        with pytest.raises(InvalidRecordError, match=rf"Batch: its {name} hold id {VOCAB}, expected ids below {VOCAB}, .*no row"):
            student(evolve(batch, **{name: ids}), ReferenceOPDLoss())


def test_a_teacher_without_the_token_is_told_to_take_the_larger_tokenizer_and_can(llama, tokenizer, larger):
    source = HFSource(llama, larger, SAMPLING)
    store = MemoryStore(source.manifest)
    collect_rollouts(source, PROMPTS, store)
    says = rf"the same ids may mean .* if only the ids from {VOCAB} on are tokens that it lacks .* larger tokenizer \(`HFScorer\(model, tokenizer"
    with pytest.raises(TokenizerMismatchError, match=says):
        score_rollouts(store, HFScorer(llama, tokenizer))
    assert score_rollouts(store, HFScorer(llama, larger)).rollouts == len(PROMPTS)


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_kl_to_a_model_with_a_row_for_the_token_is_over_the_vocabulary_of_both(who, llama, larger, rollouts):
    more = with_more_rows(llama)
    student, teacher = (llama, more) if who == "teacher" else (more, llama)
    sums = exact_reverse_kl(HFSource(student, larger, SAMPLING), HFScorer(teacher, larger), rollouts).sums
    if who == "student":  # it may draw what the teacher never would
        assert np.isposinf(sums).all()
        return
    read = HFScorer(more, larger, top_k=VOCAB + 1).score(rollouts)
    # the teacher is the student, and gives some probability to one token more
    shares = [np.log1p(-np.exp(s.top_k.logprobs[s.top_k.ids == VOCAB].astype(np.float64))) for s in read]
    left = [share[rollout.loss_mask].sum() for share, rollout in zip(shares, rollouts, strict=True)]
    np.testing.assert_allclose(sums, [-gap for gap in left], rtol=1e-3)


def test_a_token_of_the_base_vocabulary_or_an_end_without_a_row_is_refused(llama, larger, tokenizer):
    assert larger.eos_token_id == 0
    ended = copy.deepcopy(larger)
    ended.eos_token = PICTURE
    small = copy.deepcopy(llama)
    small.resize_token_embeddings(VOCAB - 1)
    for model, with_ids, ids in ((llama, ended, VOCAB + 1), (small, tokenizer, VOCAB), (small, larger, VOCAB + 1)):
        for make in HFScorer, HFSource, CausalLMStudent:
            with pytest.raises(
                ModelError, match=rf"rows, expected at least the tokenizer's {ids} ids; load the tokenizer that belongs to it"
            ):
                make(model, with_ids)
    with pytest.raises(ModelError, match=r"itself and not its fingerprint, which does not state what was added"):
        CausalLMStudent(llama, fingerprint_tokenizer(larger))


def test_vllm_is_given_the_ids_that_have_a_row(fake, larger, rollouts, tmp_path):
    folder = save_model(tmp_path / "model", "llama_tied")
    larger.save_pretrained(folder)
    source, scorer = VLLMSource.from_folder(folder, SamplingParams()), VLLMScorer.from_folder(folder)
    assert (len(source.sample(PROMPTS)), len(scorer.score(rollouts))) == (len(PROMPTS), len(rollouts))
    assert source.manifest.tokenizer == fingerprint_tokenizer(larger)
    with pytest.raises(InvalidRecordError, match=rf"Prompt 'with a picture': token 1 is id {VOCAB}"):
        source.sample([OUTSIDE])
    with pytest.raises(InvalidRecordError, match=rf"Rollout 'r': token 0 is id {VOCAB}"):
        scorer.score([Rollout("r", [VOCAB], [5], [True], "length")])


@pytest.mark.parametrize("make", [HFScorer, lambda *given: HFSource(*given, SAMPLING), CausalLMStudent])
def test_a_class_in_place_of_a_model_is_refused_as_ever(make, llama, larger):
    with pytest.raises(ModelError):
        make(type(llama), larger)
