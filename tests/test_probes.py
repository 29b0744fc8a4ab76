"""Probes: what a model does to its logits, to the order of tokens and to the rollouts of a batch; each fault is refused by its cause."""

import copy

import accelerate
import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import TOKENIZER_ID
from odd_models import SHAPE, VOCAB, odd_model, tampered, with_logits

from lopd import collate
from lopd.engines.causal_lm import context_length
from lopd.engines.hf import HFScorer, HFSource, load_model
from lopd.engines.hf.probing import check_sampling
from lopd.engines.hf.texts import Way
from lopd.engines.probes import check_scoring, check_training
from lopd.engines.structure import is_exact
from lopd.engines.student import CausalLMStudent
from lopd.errors import ContextOverflowError, ModelError, ModelWarning
from lopd.losses.reference import SFTLoss
from lopd.records import Lineage, Rollout, ScoredRollout

every_check = pytest.mark.parametrize("check", [check_scoring, check_training])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def assert_scores_are_those_of_the_whole_model(model, tokenizer, rollouts, full_logprobs):
    for rollout, score in zip(rollouts, HFScorer(model, tokenizer).score(rollouts), strict=True):
        np.testing.assert_allclose(score.logprobs, full_logprobs(model, rollout), atol=2e-5, rtol=1e-5)


# --- the head -------------------------------------------------------------------------------------------------------------------------


@every_dtype
@every_check
@pytest.mark.parametrize("factor", [0.97, 1.01, 1.3])
def test_a_scale_that_no_field_states_is_refused_in_every_dtype(factor, check, dtype, llama):
    model = with_logits(llama, lambda logits: logits * factor).to(dtype)
    ability = "scoring" if check is check_scoring else "training"
    with pytest.raises(ModelError, match=rf"Model Odd: {ability} is not possible here, because its logits are (\d\.\d+) times") as refused:
        check(model, VOCAB)
    assert float(str(refused.value).split("its logits are ")[1].split()[0]) == pytest.approx(factor, abs=2e-3)


@every_dtype
def test_a_cap_that_no_field_states_is_refused_in_every_dtype(dtype, llama):
    with pytest.raises(ModelError, match=r"its logits (are|differ).*those of its head"):
        check_scoring(with_logits(llama, lambda logits: 30 * torch.tanh(logits / 30)).to(dtype), VOCAB)


@every_dtype
@every_check
def test_the_rounding_of_half_precision_is_no_reason_to_refuse_a_model(check, dtype, models):
    for kind in ("llama_tied", "gemma2_softcap", "granite_scaled", "cohere_scaled", "phi_bias"):
        check(copy.deepcopy(models(kind)).to(dtype), VOCAB)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("FalconH1", {"lm_head_multiplier": 0.97, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16}),
        ("HyperCLOVAX", {"logits_scaling": 1.02}),
        ("Granite", {"logits_scaling": 1.02}),
        (
            "RecurrentGemma",
            {"logits_soft_cap": 3.0, "lru_width": 32, "attention_window_size": 4, "block_types": ["recurrent", "attention"]},
        ),
        ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_scales_and_caps_have_many_names(name, fields, tokenizer, rollouts, full_logprobs):
    assert_scores_are_those_of_the_whole_model(odd_model(name, **fields), tokenizer, rollouts, full_logprobs)


def test_a_prepared_model_is_read_without_the_autocast_around_it(llama, tokenizer, rollouts, monkeypatch):
    # accelerate keeps one state for the process, which another test may have made
    monkeypatch.setattr(accelerate.state.AcceleratorState, "_shared_state", {})
    monkeypatch.setattr(accelerate.state.PartialState, "_shared_state", {})
    plain = HFScorer(llama, tokenizer).score(rollouts)
    prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(copy.deepcopy(llama))
    for before, after in zip(plain, HFScorer(prepared, tokenizer).score(rollouts), strict=True):
        np.testing.assert_array_equal(before.logprobs, after.logprobs)
    CausalLMStudent(prepared, TOKENIZER_ID)


class Packed(torch.nn.Module):
    """A projection as bitsandbytes has it: its weight is bytes, and it multiplies in bfloat16 whatever comes in."""

    def __init__(self, layer):
        super().__init__()
        self.weight = torch.nn.Parameter(layer.weight.detach().bfloat16().view(torch.uint8), requires_grad=False)

    def forward(self, hidden):
        return torch.nn.functional.linear(hidden.bfloat16(), self.weight.view(torch.bfloat16)).to(hidden.dtype)


def test_a_k_bit_model_that_was_prepared_for_training_is_not_taken_for_float32(llama):
    model = copy.deepcopy(llama)
    for part in [part for layer in model.model.layers for part in (layer.self_attn, layer.mlp)]:
        for name, layer in list(part.named_children()):
            if isinstance(layer, torch.nn.Linear):
                setattr(part, name, Packed(layer))
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}
    assert not is_exact(model)
    check_training(model, VOCAB)
    assert check_sampling(model, VOCAB) in Way


def test_packed_weights_may_be_kept_as_float32(llama):
    model = copy.deepcopy(llama)
    assert is_exact(model)
    model.config.quantization_config = {"quant_method": "bitsandbytes", "bnb_4bit_quant_storage": "float32"}
    assert not is_exact(model)


# --- the batch ------------------------------------------------------------------------------------------------------------------------


@every_dtype
@every_check
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (lambda _, h: h + h.roll(-1, 1), "a later token changes the logits of an earlier one"),
        (lambda _, h: h + h.mean(0, keepdim=True), "rollouts of a batch see each other"),
        (lambda _, h: h * (1 + h[..., :1] * h.shape[1] / 10), "than alone"),
        (lambda _, h: h + h.roll(1, 0) * (h.shape[1] > 20), "rollouts of a batch see each other"),
    ],
    ids=["looks ahead", "mixes", "counts", "mixes beyond its window"],
)
def test_what_a_rollout_sees_of_others_or_of_later_tokens_is_refused_by_cause(fault, cause, check, dtype, llama):
    model = tampered(llama, fault).to(dtype)
    model.config = copy.deepcopy(model.config)
    model.config.sliding_window = 20
    with pytest.raises(ModelError, match=cause):
        check(model, VOCAB)


def test_a_model_that_computes_something_else_in_training_mode_cannot_be_trained_but_scored(llama, tokenizer):
    model = tampered(llama, lambda module, h: h * 2 if module.training else h)
    HFScorer(model, tokenizer)
    with pytest.raises(ModelError, match="training is not possible here, because in training mode"):
        CausalLMStudent(model, TOKENIZER_ID)


@pytest.mark.parametrize("error", [TypeError, AttributeError, KeyError, IndexError, NotImplementedError, RuntimeError])
def test_whatever_a_model_raises_is_the_refusal_of_an_ability(error, llama, tokenizer):
    def fail(module, hidden):
        raise error("no such thing")

    for make, ability in ((HFScorer, "scoring"), (CausalLMStudent, "training")):
        with pytest.raises(ModelError, match=rf"Model LlamaForCausalLM: {ability} is not possible here.*{error.__name__} .*no such thing"):
            make(tampered(llama, fail), tokenizer)


def test_a_model_without_a_backward_pass_cannot_be_trained_but_scored(llama, tokenizer):
    class OneWay(torch.autograd.Function):
        forward = staticmethod(lambda ctx, hidden: hidden.clone())

    model = tampered(llama, lambda _, hidden: OneWay.apply(hidden))
    HFScorer(model, tokenizer)
    with pytest.raises(ModelError, match="training is not possible here, because it raises NotImplementedError"):
        CausalLMStudent(model, TOKENIZER_ID)


def test_options_that_a_model_does_not_take_are_refused_with_the_option(llama):
    class Plain(type(llama)):
        def gradient_checkpointing_enable(self, **_):
            raise ValueError("does not support it")

    model = copy.deepcopy(llama)
    model.__class__ = Plain
    with pytest.raises(ModelError, match=r"ValueError \(does not support it\); leave out `gradient_checkpointing`"):
        CausalLMStudent(model, TOKENIZER_ID, gradient_checkpointing=True)

    def strict(_, hidden):
        # a product is of the autocast's dtype, and index_add takes no other than its own
        return hidden + 0 * torch.zeros_like(hidden).index_add(1, torch.tensor([0]), (hidden @ torch.eye(32, dtype=hidden.dtype))[:, :1])

    with pytest.raises(ModelError, match=r"RuntimeError .*; leave out `autocast`"):
        CausalLMStudent(tampered(llama, strict), TOKENIZER_ID, autocast=torch.bfloat16)


# --- what is not a causal LM of its own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "PROMPT_TUNING"),
        (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "PREFIX_TUNING"),
        (peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "P_TUNING"),
        (peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5, 6]), "activated LoRA"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_adapters_that_act_outside_the_layers_are_refused_by_name(config, name, llama, tokenizer):
    model = peft.get_peft_model(copy.deepcopy(llama), config)
    for make in (HFScorer, HFSource, CausalLMStudent):
        with pytest.raises(ModelError, match=rf"its adapter is {name}, and does not act within the layers"):
            make(model, tokenizer)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
        peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, init_lora_weights=False),
        peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 6]),
        peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], init_ia3_weights=False),
    ],
    ids=["lora", "dora", "tokens", "ia3"],
)
def test_adapters_within_the_layers_are_scored_with_them(config, llama, tokenizer, rollouts, full_logprobs):
    config.task_type = "CAUSAL_LM"
    assert_scores_are_those_of_the_whole_model(peft.get_peft_model(copy.deepcopy(llama), config).eval(), tokenizer, rollouts, full_logprobs)


@pytest.mark.parametrize("thing", ["org/student", torch.nn.Linear(2, 2)], ids=["name", "layer"])
def test_what_is_not_a_causal_lm_is_refused(thing, tokenizer):
    for make in (HFScorer, HFSource, CausalLMStudent):
        with pytest.raises(ModelError, match=r"it is (str|Linear), expected a causal LM of transformers"):
            make(thing, tokenizer)


def test_a_configuration_that_is_not_of_one_text_model_is_refused(llama, tokenizer):
    class Two(transformers.LlamaConfig):
        def get_text_config(self, **_):
            raise ValueError("multiple valid text configs")

    model = copy.deepcopy(llama)
    model.config = Two(**{key: value for key, value in llama.config.to_dict().items() if key != "model_type"})
    with pytest.raises(ModelError, match="multiple valid text configs"):
        HFScorer(model, tokenizer)


def test_a_model_without_a_head_is_refused(llama, tokenizer):
    with pytest.raises(ModelError, match="NoneType"):
        HFScorer(llama.model, tokenizer)


# --- caps on attention scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [HFScorer, HFSource, CausalLMStudent])
@pytest.mark.parametrize("name", ["Gemma2", "VaultGemma"])
def test_a_cap_on_attention_scores_is_kept_whoever_loaded_the_model(name, make, tokenizer, rollouts, full_logprobs):
    fields = {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.0, "sliding_window": 4}
    capped = odd_model(name, **fields, attn_implementation="eager")
    loaded = odd_model(name, **fields, attn_implementation="sdpa")
    assert max(abs(full_logprobs(capped, r) - full_logprobs(loaded, r)).max() for r in rollouts) > 0.01
    with pytest.warns(ModelWarning, match=r"dropped the cap on attention scores, and was set to 'eager'"):
        make(loaded, tokenizer)
    for rollout in rollouts:
        np.testing.assert_array_equal(full_logprobs(capped, rollout), full_logprobs(loaded, rollout))


# --- contexts -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields", "context"),
    [
        ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 24, "expansion_ratio": 2}, 24),
        ("Mamba", {"state_size": 4}, 1 << 30),
        ("Llama", {"max_position_embeddings": 24}, 24),
    ],
    ids=["max_seq_len", "none", "max_position_embeddings"],
)
def test_a_context_has_many_names(name, fields, context, tokenizer):
    model = odd_model(name, **fields)
    assert context_length(model) == context
    if context < 100:
        longer = Rollout("longer/s0/g0", [5] * context, [6, 7], np.ones(2, bool), "length")
        with pytest.raises(ContextOverflowError, match="'longer/s0/g0'"):
            HFScorer(model, tokenizer).score([longer])
        with pytest.raises(ContextOverflowError, match=rf"Batch.*{context + 1} positions.*student's context of {context}"):
            CausalLMStudent(model, TOKENIZER_ID)(collate([ScoredRollout(longer, {})]), SFTLoss())


# --- folders --------------------------------------------------------------------------------------------------------------------------


def qwen_vl():
    text = {**SHAPE, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=95, video_token_id=94)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def gemma3():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    text = {**SHAPE, "head_dim": 8, "sliding_window": 4}
    config = transformers.Gemma3Config(text_config=text, vision_config={**vision, "patch_size": 14}, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


def llama4():
    fields = {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "moe_layers": [1], "attention_chunk_size": 8}
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**SHAPE, **fields, no_rope_layers=[1, 0]))


@pytest.mark.parametrize("make", [qwen_vl, gemma3, llama4])
def test_a_folder_whose_class_reads_images_is_used_for_text(make, tokenizer, rollouts, full_logprobs, tmp_path):
    torch.manual_seed(0)
    made = make().eval()
    made.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base/preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    model, _ = load_model(tmp_path / "base")
    assert type(model) is type(made)
    assert_scores_are_those_of_the_whole_model(model, tokenizer, rollouts, full_logprobs)
    if make is not llama4:  # as `load_model` proposes for DistributedDataParallel
        model.requires_grad_(False)
        model.get_decoder().requires_grad_(True)
        model.get_output_embeddings().requires_grad_(True)
    student = CausalLMStudent(model, TOKENIZER_ID)
    student(collate([ScoredRollout(r, {}) for r in rollouts]), SFTLoss()).loss_sum.backward()
    layers = (model.model if make is llama4 else model.get_decoder()).layers
    assert all(p.requires_grad for p in layers.parameters())
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)
    for size in (12, 13):  # the second takes the place of the first
        (tmp_path / "base/preprocessor_config.json").write_text("x" * size)
        student.export(tmp_path / "out", tokenizer, Lineage())
        assert (tmp_path / "out/preprocessor_config.json").read_text() == "x" * size


def test_what_vllm_needs_for_images_is_missed_before_training_and_what_its_owner_put_into_an_export_stays(tokenizer, tmp_path):
    gemma3().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model, _ = load_model(tmp_path / "base")
    with pytest.warns(ModelWarning, match=r"reads images, .*, expected preprocessor_config.json or processor_config.json"):
        student = CausalLMStudent(model, TOKENIZER_ID)
    student.export(tmp_path / "out", tokenizer, Lineage())
    for place in ("out", "base"):
        (tmp_path / place / "processor_config.json").write_text(place)
    student.export(tmp_path / "out", tokenizer, Lineage())
    assert (tmp_path / "out/processor_config.json").read_text() == "out"


def test_a_folder_that_lacks_weights_is_refused_before_they_are_made_up(qwen3, tokenizer, tmp_path):
    for name, part in (("headless", qwen3.model), ("whole", qwen3)):
        part.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    with pytest.raises(ModelError, match=r"headless': its files lack 1 weights \('lm_head.weight'\), expected all of a Qwen3ForCausalLM"):
        load_model(tmp_path / "headless")
    load_model(tmp_path / "whole")
