"""Families whose caches differ, sampled in batches and alone, against the whole model on each rollout alone."""

import copy
import warnings

import numpy as np
import pytest
import torch
import transformers
from hf_parts import source_of

from lopd import MemoryStore, collect_rollouts
from lopd.engines.hf.probing import check_sampling
from lopd.engines.hf.texts import Way, select_rows
from lopd.errors import ContextOverflowError, ModelError, ModelWarning, RefusedPromptsWarning
from lopd.records import Prompt

VOCAB, BORDER = 96, 16
_SHAPE = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.4},
    **{"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None},
}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
_MAMBA = {"mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False}
_BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "init_std": 0.4, "dropout": 0.0}
_HALVES = ["linear_attention", "full_attention"]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": BORDER,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0, 5.0, 8.0, 12.0],
    "factor": 4.0,
}
#: name -> class of the configuration, of the model, what is special about it, and the way that is right for it
FAMILIES = {
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {**_LINEAR, "layer_types": _HALVES}, Way.PADDED),
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", {**_LINEAR, **_EXPERTS, "layer_types": _HALVES}, Way.PADDED),
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48}, Way.PADDED),
    "jamba": ("JambaConfig", "JambaForCausalLM", {**_MAMBA, "attn_layer_period": 2, "attn_layer_offset": 1}, Way.PADDED),
    "mamba": ("MambaConfig", "MambaForCausalLM", {"state_size": 8, "time_step_rank": 4}, Way.EQUAL),
    "bart": ("BartConfig", "BartForCausalLM", _BART, Way.EQUAL),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        "RecurrentGemmaForCausalLM",
        {"lru_width": 32, "attention_window_size": 4, "block_types": ["recurrent", "attention"], "logits_soft_cap": 1e4},
        Way.WHOLE,
    ),
    "rwkv": ("RwkvConfig", "RwkvForCausalLM", {"attention_hidden_size": 32, "context_length": 64}, Way.WHOLE),
    "minimax": ("MiniMaxConfig", "MiniMaxForCausalLM", {"layer_types": _HALVES, "block_size": 8}, Way.WHOLE),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}, Way.PADDED),
}


def build(config_class, model_class, special):
    """A random model of two layers in eval mode, far from flat."""
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**_SHAPE, **special}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def family():
    made = {}

    def get(name):
        if name not in made:
            made[name] = build(*FAMILIES[name][:3])
        return made[name]

    return get


@pytest.fixture
def phi3():
    return build("Phi3Config", "Phi3ForCausalLM", {"rope_parameters": LONGROPE, "original_max_position_embeddings": BORDER, "sliding_window": None})


def check_rollouts(model, rollouts, full_logprobs):
    for rollout in rollouts:
        np.testing.assert_allclose(rollout.behavior_logprobs, full_logprobs(model, rollout), atol=1e-4)


def same_tokens(first, second):
    return [r.response_ids.tolist() for r in first] == [r.response_ids.tolist() for r in second]


@pytest.mark.filterwarnings("ignore::lopd.errors.ModelWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_reports_the_logprobs_of_the_whole_model_in_batches_and_alone(name, family, tokenizer, prompts, full_logprobs):
    source = source_of(family(name), tokenizer, stop_ids=tuple(range(20)))
    together, alone = source.sample(prompts), [r for prompt in prompts for r in source.sample([prompt])]
    assert len({r.response_ids.size for r in together}) > 2, "rows should leave the batch at different times"
    check_rollouts(family(name), together, full_logprobs)
    check_rollouts(family(name), alone, full_logprobs)
    assert same_tokens(together, alone)


@pytest.mark.filterwarnings("ignore::lopd.errors.ModelWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_is_decoded_in_the_fastest_way_that_is_right(name, family):
    assert check_sampling(family(name), VOCAB) is FAMILIES[name][3]
