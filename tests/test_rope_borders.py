"""LongRoPE: a rollout's log-probs and gradients are those of the rollout alone, whatever is longer in its batch."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import TOKENIZER_ID
from odd_models import LONGROPE, odd_model

from lopd import collate
from lopd.engines.causal_lm import packed_hidden_states, rope_borders, text_config
from lopd.engines.hf import HFScorer, HFSource
from lopd.engines.hf.scorer import exact_reverse_kl
from lopd.engines.student import CausalLMStudent
from lopd.losses.reference import ReferenceOPDLoss
from lopd.records import Rollout, SamplingParams, ScoredRollout

BORDER = 16
# one below the border, one on it, two beyond it
LENGTHS = [(5, 6), (4, 12), (10, 20), (4, 30)]


def model_of(name):
    if name == "Phi3":
        return odd_model("Phi3", rope_parameters=LONGROPE, original_max_position_embeddings=BORDER, sliding_window=None)
    return odd_model(name, rope_parameters=LONGROPE)


@pytest.fixture(scope="module")
def long_and_short():
    rng = np.random.default_rng(3)
    return [Rollout(f"r{p}-{t}", rng.integers(4, 96, p), rng.integers(4, 96, t), np.ones(t, bool), "length") for p, t in LENGTHS]


every_model = pytest.mark.parametrize("name", ["Phi3", "Llama"])


@every_model
def test_scores_do_not_depend_on_a_longer_rollout_of_the_batch(name, tokenizer, long_and_short, full_logprobs):
    model = model_of(name)
    assert rope_borders(text_config(model)) == [BORDER]
    for batch in (long_and_short, long_and_short[::-1], long_and_short[:3]):
        for rollout, score in zip(batch, HFScorer(model, tokenizer).score(batch), strict=True):
            np.testing.assert_allclose(score.logprobs, full_logprobs(model, rollout), atol=1e-5)


@every_model
def test_gradients_do_not_depend_on_a_longer_rollout_of_the_batch(name, long_and_short):
    rng = np.random.default_rng(4)
    records = [ScoredRollout(r, {"teacher": -rng.exponential(4, r.response_ids.size).astype(np.float32)}) for r in long_and_short]
    together, alone = (CausalLMStudent(model_of(name), TOKENIZER_ID) for _ in range(2))
    together(collate(records, teacher="teacher"), ReferenceOPDLoss()).loss_sum.backward()
    for record in records:
        alone(collate([record], teacher="teacher"), ReferenceOPDLoss()).loss_sum.backward()
    for got, expected in zip(together.parameters(), alone.parameters(), strict=True):
        assert float((got.grad - expected.grad).norm()) <= 1e-5 * float(expected.grad.norm())


def test_exact_reverse_kl_reads_each_rollout_as_if_alone(tokenizer, long_and_short):
    student, teacher = model_of("Llama"), model_of("Llama")
    with torch.no_grad():
        teacher.model.norm.weight.mul_(1.1)
    source, scorer = HFSource(student, tokenizer, SamplingParams(max_new_tokens=4)), HFScorer(teacher, tokenizer)
    together = exact_reverse_kl(source, scorer, long_and_short).sums
    np.testing.assert_allclose(together, [exact_reverse_kl(source, scorer, [r]).sums[0] for r in long_and_short], rtol=1e-4)


def test_a_pack_that_stays_one_row_is_one_for_each_side_of_the_border():
    seen = []

    class Decoder:
        config = transformers.LlamaConfig(
            rope_parameters={**LONGROPE, "original_max_position_embeddings": 3}, hidden_size=32, num_attention_heads=4
        )

        def get_decoder(self):
            return self

        def __call__(self, input_ids, position_ids, **_):
            seen.append(position_ids.tolist())
            return SimpleNamespace(last_hidden_state=input_ids[..., None].float())

    Decoder.config._attn_implementation = "flash_attention_2"
    ids_N, positions_N = torch.arange(11), torch.tensor([0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3])
    assert packed_hidden_states(Decoder(), ids_N, positions_N, [4, 3, 4])[:, 0].tolist() == ids_N.tolist()
    assert seen == [[[0, 1, 2]], [[0, 1, 2, 3, 0, 1, 2, 3]]]


def test_a_probe_reaches_beyond_the_border(tokenizer):
    model, lengths = model_of("Llama"), []
    handle = model.model.register_forward_hook(lambda *_: lengths.append(_[2].last_hidden_state.shape[1]))
    HFScorer(model, tokenizer)
    handle.remove()
    assert max(lengths) > BORDER
    assert any(length < BORDER for length in lengths)


def test_a_dynamic_scale_is_that_of_the_context_up_to_its_end(tokenizer, long_and_short, full_logprobs):
    model = odd_model("Llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0})
    truth = [full_logprobs(copy.deepcopy(model), rollout) for rollout in long_and_short]
    for expected, score in zip(truth, HFScorer(model, tokenizer).score(long_and_short), strict=True):
        np.testing.assert_allclose(score.logprobs, expected, atol=1e-5)
