"""An autocast that the caller is in changes no number: engines and students compute in the dtype of the weights, or in their own autocast."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import TOKENIZER_ID
from hf_parts import every_kind, source_of
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lopd import collate, opd_steps
from lopd.engines.causal_lm import hidden_states, lm_head
from lopd.engines.hf import HFScorer
from lopd.engines.hf.scorer import exact_reverse_kl
from lopd.engines.student import CausalLMStudent
from lopd.losses.fused import FusedOPDLoss
from lopd.losses.reference import ReferenceOPDLoss
from lopd.records import ScoredRollout, Step


def outer():
    return torch.autocast("cpu", torch.bfloat16)


@every_kind
def test_scores_and_samples_are_those_of_the_weights(kind, models, tokenizer, rollouts, prompts):
    with outer():
        scorer, source = HFScorer(models(kind), tokenizer, top_k=2), source_of(models(kind), tokenizer)
        scores, sampled = scorer.score(rollouts), source.sample(prompts)
    for inside, outside in zip(scores, scorer.score(rollouts), strict=True):
        np.testing.assert_array_equal(inside.logprobs, outside.logprobs)
        assert inside.top_k is not None
        assert outside.top_k is not None
        np.testing.assert_array_equal(inside.top_k.logprobs, outside.top_k.logprobs)
    for inside, outside in zip(sampled, source.sample(prompts), strict=True):
        np.testing.assert_array_equal(inside.response_ids, outside.response_ids)
        np.testing.assert_array_equal(inside.behavior_logprobs, outside.behavior_logprobs)


def test_the_exact_reverse_kl_is_that_of_the_weights(llama, near_teacher, tokenizer, rollouts):
    source, scorer = source_of(llama, tokenizer), HFScorer(near_teacher, tokenizer)
    with outer():
        inside = exact_reverse_kl(source, scorer, rollouts).sums
    np.testing.assert_array_equal(inside, exact_reverse_kl(source, scorer, rollouts).sums)


def test_logits_are_float32(llama):
    with torch.no_grad():
        hidden_SD = hidden_states(llama, torch.arange(4, 20)[None])[0]
        expected = lm_head(llama, 96).logits(hidden_SD)
        with outer():
            assert torch.equal(lm_head(llama, 96).logits(hidden_SD), expected)


@pytest.mark.filterwarnings("ignore:.*nats a token from its teacher:lopd.errors.AdvantageWarning")  # the scores are made up
@pytest.mark.parametrize("own", [None, torch.bfloat16], ids=["float32", "its own bfloat16"])
@pytest.mark.parametrize("loss", [ReferenceOPDLoss(), FusedOPDLoss()], ids=["reference", "fused"])
def test_a_training_loop_gives_the_steps_of_the_student_alone(loss, own, llama, rollouts):
    records = [ScoredRollout(r, {"teacher": np.full(r.response_ids.size, -2, np.float32)}) for r in rollouts]
    step, found = Step(0, (collate(records, teacher="teacher"),)), []
    for where in (nullcontext(), outer()):
        student = CausalLMStudent(copy.deepcopy(llama), TOKENIZER_ID, autocast=own)
        with where:
            losses = [metrics.loss for metrics in opd_steps(student, 3 * [step], loss, torch.optim.SGD(student.parameters(), lr=0.05))]
        found.append((losses, [p.detach() for p in student.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


class _Copies(TorchDispatchMode):
    """Notes what is cast to bfloat16."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.made = shapes, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and made.dtype == torch.bfloat16 and made.shape in self.shapes:
            self.made.append(StorageWeakRef(made.untyped_storage()))
        return made


def test_no_copy_of_a_weight_outlives_its_layer_where_layers_are_computed_again(llama, rollouts):
    """As many as there are weights would be on every rank, whatever is sharded."""
    student = CausalLMStudent(copy.deepcopy(llama), TOKENIZER_ID, autocast=torch.bfloat16, gradient_checkpointing=True)
    records = [ScoredRollout(r, {"teacher": np.full(r.response_ids.size, -2, np.float32)}) for r in rollouts]
    batch, loss = collate(records, teacher="teacher"), FusedOPDLoss()
    weights = {module.weight.shape for module in student.modules() if isinstance(module, torch.nn.Linear)}
    student(batch, loss)  # what is probed once
    with torch.autocast("cpu", enabled=False), _Copies(weights) as copies:
        output = student(batch, loss)
        assert copies.made
        assert sum(not ref.expired() for ref in copies.made) == 0, "one that is still there"
        output.loss_sum.backward()
