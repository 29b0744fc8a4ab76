"""Dropout: one warning where it makes a ratio noise, and modules come back in the mode that they were in."""

import copy
import warnings

import numpy as np
import peft
import pytest
import torch
from conftest import TOKENIZER_ID
from odd_models import tampered

from lopd import collate
from lopd.engines.causal_lm import hidden_states
from lopd.engines.hf import HFScorer, HFSource
from lopd.engines.probes import check_training
from lopd.engines.student import CausalLMStudent
from lopd.errors import ModelWarning
from lopd.losses.reference import ReferenceOPDLoss, SFTLoss
from lopd.records import SamplingParams, ScoredRollout


@pytest.fixture(scope="module")
def batch(rollouts):
    scores = [
        {"teacher": np.full(r.response_ids.size, -2, np.float32), "ref": np.full(r.response_ids.size, -3, np.float32)} for r in rollouts
    ]
    return collate([ScoredRollout(r, s) for r, s in zip(rollouts, scores, strict=True)], teacher="teacher", ref="ref")


def adapted(model, **options):
    return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules=["q_proj"], **options))


def warned(student, batch, loss):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            student(batch, loss)
    return [str(w.message) for w in seen if issubclass(w.category, ModelWarning)]


def of_jitter(module, hidden):
    return hidden * torch.empty_like(hidden).uniform_(0.99, 1.01) if module.training else hidden


def of_functional(module, hidden):
    return torch.nn.functional.dropout(hidden, 0.2, module.training)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda make_model, llama: make_model("gpt2_dropout"), r"7 modules drop values at random \(transformer.drop with p = 0.3\)"),
        (lambda make_model, llama: adapted(llama, lora_dropout=0.1), r"2 modules drop .*lora_dropout.default with p = 0.1"),
        (lambda make_model, llama: tampered(llama, of_functional), "its layers draw at random"),
        (lambda make_model, llama: tampered(llama, of_jitter), "its layers draw at random"),
    ],
    ids=["gpt2", "lora that begins at 0", "not a module", "jitter"],
)
def test_dropout_beside_a_ref_column_draws_one_warning(make, said, make_model, llama, batch):
    with pytest.warns(ModelWarning, match=said) as caught:
        CausalLMStudent(make(make_model, llama), TOKENIZER_ID)(batch, ReferenceOPDLoss(ratio_to_ref=True))
    assert __file__ in [one.filename for one in caught], "torch calls modules, and is not the user"
    (message,) = warned(CausalLMStudent(make(make_model, llama), TOKENIZER_ID), batch, ReferenceOPDLoss(ratio_to_ref=True))
    assert "set dropout to 0" in message
    assert "eval()" not in message, "in eval mode layers recompute nothing"


def test_dropout_that_no_ratio_meets_draws_no_warning(make_model, llama, batch, rollouts):
    without = collate([ScoredRollout(r, {}) for r in rollouts])
    assert warned(CausalLMStudent(make_model("gpt2_dropout"), TOKENIZER_ID), without, SFTLoss()) == []
    evaluated = CausalLMStudent(make_model("gpt2_dropout"), TOKENIZER_ID)
    evaluated.model.eval()
    assert warned(evaluated, batch, ReferenceOPDLoss()) == []
    assert warned(CausalLMStudent(adapted(llama), TOKENIZER_ID), batch, ReferenceOPDLoss()) == []


def test_a_student_whose_dropout_was_set_to_0_draws_no_warning_and_recomputes(make_model, batch):
    student, calls = CausalLMStudent(make_model("gpt2_dropout"), TOKENIZER_ID, gradient_checkpointing=True), []
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert warned(student, batch, ReferenceOPDLoss()) == []
    student.model.transformer.h[0].attn.register_forward_hook(lambda *_: calls.append(1))
    student(batch, ReferenceOPDLoss()).loss_sum.backward()
    assert len(calls) == 2


def test_a_student_leaves_modules_in_eval_that_its_owner_put_there(make_model, tokenizer, prompts, rollouts, batch):
    model = make_model("gpt2_dropout").train()
    # attention reads p of its dropout module, and its own mode
    kept = [module for name, module in model.named_modules() if "drop" in name or name.endswith("attn")]
    for module in kept:
        module.training = False
    student = CausalLMStudent(model, TOKENIZER_ID)
    HFSource(model, tokenizer, SamplingParams(max_new_tokens=2)).sample(prompts)
    HFScorer(model, tokenizer).score(rollouts)
    check_training(model, 96)
    assert model.training
    assert not any(module.training for module in kept)
    assert warned(student, batch, ReferenceOPDLoss()) == []
    first, second = (float(student(batch, ReferenceOPDLoss()).loss_sum.detach()) for _ in range(2))
    assert first == second


def test_a_model_in_eval_mode_is_put_in_training_mode_as_a_whole(make_model):
    student = CausalLMStudent(make_model("gpt2_dropout").eval(), TOKENIZER_ID)
    assert all(module.training for module in student.modules())


def test_adapters_around_a_model_in_eval_mode_do_not_keep_it_there(llama):
    model = adapted(llama.eval())
    assert model.training, "peft's own module is new, so it is in training mode"
    student = CausalLMStudent(model, TOKENIZER_ID, gradient_checkpointing=True)
    assert all(module.training for module in student.modules()), "layers in eval mode recompute nothing"


def test_looking_for_dropout_draws_nothing_from_the_callers_random_stream(make_model, batch):
    student = CausalLMStudent(make_model("gpt2_dropout"), TOKENIZER_ID)
    state = torch.get_rng_state()
    with pytest.warns(ModelWarning):
        first = float(student(batch, ReferenceOPDLoss()).loss_sum.detach())
    torch.set_rng_state(state)
    assert first == float(student(batch, ReferenceOPDLoss()).loss_sum.detach())


def test_no_weight_that_the_look_for_dropout_cast_is_trained_on(llama, batch, monkeypatch):
    """The look has no gradients, and older torch keeps what is cast without them; here it is other weights that are cast."""

    def look(model):
        hidden_states(model, torch.arange(8)[None])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)

    monkeypatch.setattr("lopd.engines.student.warn_of_dropout", look)
    student = CausalLMStudent(copy.deepcopy(llama), TOKENIZER_ID, autocast=torch.bfloat16)
    first, second = (float(student(batch, ReferenceOPDLoss()).loss_sum.detach()) for _ in range(2))
    assert first == second
