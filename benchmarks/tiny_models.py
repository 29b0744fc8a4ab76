"""Tiny random models of the causal LMs in transformers: two layers, hidden size 32, 96 tokens, and what makes each family what it is.

`build_model("qwen3_next")` takes milliseconds.  A field of `SIZES` is set where the configuration of the family has it; `SPECIAL` holds what a
family needs beyond that: layers of each kind that it mixes, caps and scales other than 1, windows and chunks shorter than a rollout.
Dropout is off, and the weights are large enough for distributions that are far from flat.
"""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

VOCAB, CONTEXT = 96, 64


def _each(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


#: Value of a field, in every configuration that has the field.
SIZES: Mapping[str, Any] = (
    _each(VOCAB, "vocab_size vocab_size_per_layer_input num_embeddings")
    | _each(CONTEXT, "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length context_length max_target_positions")
    | _each(32, "hidden_size n_embd d_model dim embed_dim embedding_size embedding_dim input_embedding_size output_embedding_size emb_dim")
    | _each(32, "word_embed_proj_dim attention_hidden_size lru_width dim_model")
    | _each(48, "intermediate_size n_inner ffn_dim d_ff ffn_hidden_size encoder_ffn_dim decoder_ffn_dim dff feed_forward_size block_ff_dim")
    | _each(48, "dim_ff d_inner intermediate_size_mlp dense_intermediate_size")
    | _each(2, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers")
    | _each(2, "num_blocks depth")
    | _each(4, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads")
    | _each(4, "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads")
    | _each(2, "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads")
    | _each(4, "linear_num_value_heads mamba_n_heads mamba_num_heads")
    | _each(8, "head_dim swa_head_dim swa_v_head_dim global_head_dim d_kv d_head dim_head attention_head_size")
    | _each(8, "linear_key_head_dim linear_value_head_dim")
    # experts
    | _each(4, "num_experts num_local_experts n_routed_experts moe_num_experts num_attn_experts")
    | _each(2, "num_experts_per_tok moe_k moe_topk experts_per_token moe_top_k top_k_experts")
    | _each(1, "n_shared_experts n_group topk_group first_k_dense_replace decoder_sparse_step")
    | _each(16, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size")
    # latent attention
    | _each(16, "kv_lora_rank q_lora_rank qk_head_dim")
    | _each(8, "qk_rope_head_dim qk_nope_head_dim v_head_dim")
    # sparse attention
    | _each(4, "index_topk index_topk_blocks index_block_size")
    | _each(16, "index_n_heads")  # with few heads many scores are 0, and which of equal ones are kept is not defined
    | _each(8, "index_head_dim")
    # recurrent layers, windows and chunks
    | _each(8, "state_size mamba_d_state mamba_chunk_size chunk_size ssm_state_size")
    | _each(4, "mamba_d_conv mamba_dt_rank time_step_rank sliding_window attention_window_size window_size sliding_window_size")
    | _each(2, "mamba_expand")
    | _each(16, "mamba_d_head mamba_head_dim")
    | _each(1, "mamba_n_groups mamba_ngroups n_groups")
    # pictures and sound
    | _each(32, "image_size input_size out_hidden_size projection_dim text_hidden_size hidden_size_global")
    | _each(8, "patch_size")
    # weights, ids, dropout
    | _each(0.4, "initializer_range init_std")
    | _each(0, "eos_token_id")
    | _each(1, "bos_token_id")
    | _each(None, "pad_token_id")
    | _each(0.0, "attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop dropout hidden_dropout_prob embed_dropout")
    | _each(0.0, "attention_probs_dropout_prob resid_dropout activation_dropout layerdrop decoder_layerdrop encoder_layerdrop")
    | _each(0.0, "classifier_dropout ff_dropout summary_first_dropout residual_dropout embedding_dropout attn_dropout dropout_p")
    | _each(0.0, "router_jitter_noise input_jitter_noise relu_dropout")
)

_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
_CAPS = {"query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0, "attn_implementation": "eager"}
_DECODER = {"is_decoder": True}
_PADDED = {"is_decoder": True, "pad_token_id": 2}
_LATENT = {"num_key_value_heads": 4}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}

#: Fields that one family needs beside those of `SIZES`.
SPECIAL: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu"), _LATENT
    ),
    **dict.fromkeys(("bert", "bert-generation", "ernie", "megatron-bert"), _DECODER),
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"), _PADDED),
    **dict.fromkeys(
        ("afmoe", "cohere2_moe", "exaone4", "exaone_moe", "gpt_oss", "granite_swa", "granitemoe_swa", "laguna", "mellum", "olmo3"),
        _SLIDING,
    ),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _LINEAR),
    **dict.fromkeys(("gemma2", "vaultgemma"), _CAPS),
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {**_DECODER, "attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 32},
    "codegen": {"rotary_dim": 4},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {**_SLIDING, "logit_scale": 0.5},
    "cohere_compass_text": {**_SLIDING, "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0, "attn_pdrop": 0.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {**_LATENT, "num_experts_per_tok": 2},
    "deepseek_v4": {
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "num_key_value_heads": 1,
        "o_groups": 2,
        "o_lora_rank": 8,
        "partial_rotary_factor": 0.5,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "max_window_layers": 1},
    "electra": _DECODER,
    "emu3": {"pad_token_id": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "lm_head_multiplier": 0.3, "embedding_multiplier": 2.0},
    "gemma3_text": {**_SLIDING, "query_pre_attn_scalar": 8},  # with a cap on logits transformers computes "gemma3" without it
    "gemma3n_text": {
        **_SLIDING,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "hidden_size_per_layer_input": 8,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0, 0.0],
        "final_logit_softcapping": 3.0,
    },
    "gemma4_text": {
        **_SLIDING,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "final_logit_softcapping": 3.0,
        "pad_token_id": 0,
    },
    "gemma4_unified_text": {**_SLIDING, "pad_token_id": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granite": {"logits_scaling": 2.5, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "granitemoe": {"logits_scaling": 2.5},
    "granitemoehybrid": {"logits_scaling": 2.5, "layer_types": ["mamba", "attention"]},
    "granitemoeshared": {"logits_scaling": 2.5},
    "hrm_text": {"initializer_range": 0.1},  # it repeats its layers, and larger weights make rounding grow
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "inkling_text": {"layer_types": ["hybrid_sliding", "hybrid"], "rel_extent": 8},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {**_LINEAR, **_LATENT, "linear_head_dim": 8, "linear_num_heads": 4, "num_experts_per_token": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {
        "attention_chunk_size": 8,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 0],
        "moe_layers": [1],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
    "longcat_flash": {**_LATENT, "zero_expert_num": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2},
    "minimax": {**_LINEAR, "block_size": 8},
    "ministral": {**_SLIDING, "head_dim": 8},
    "modernbert-decoder": {"pad_token_id": 0},
    "mpt": {"expansion_ratio": 2, "attn_config": {"attn_pdrop": 0}},
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"], "mamba_head_dim": 16},
    "prophetnet": {"is_decoder": True, "add_cross_attention": False, "pad_token_id": 0},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "hc_lowrank": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "logits_soft_cap": 3.0},
    "reformer": {
        **_DECODER,
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (16, 16),
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 64,
        "lsh_attn_chunk_length": 64,
    },
    "rembert": _DECODER,
    "roc_bert": {**_DECODER, "enable_shape": False, "enable_pronunciation": False, "shape_vocab_size": 16, "pronunciation_vocab_size": 16},
    "roformer": _DECODER,
    "rwkv": {"rescale_every": 0},
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": {"use_sliding_window": True},
    "xlstm": {"num_heads": 2, "chunk_size": 16},
    "xlm": {"causal": True, "pad_token_id": 2},
    "xmod": {**_PADDED, "default_language": "en_XX", "languages": ("en_XX",)},
    "zamba": {
        "num_hidden_layers": 6,
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "use_mamba_kernels": False,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_mem_blocks": 1,
        "adapter_rank": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 4,
        "num_key_value_heads": 4,
        "use_mamba_kernels": False,
    },
    "zaya": {"layer_types": ["hybrid_sliding", "hybrid"], "sliding_window": 4, "num_experts_per_tok": 1, "router_hidden_size": 16},
}

_BORDER = {"rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 8}
_LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 5.0, 8.0], **_BORDER}

#: Configurations of a family that compute something else than the family's own: a name, the family, and the fields.
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama, linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}}),
    "llama, dynamic rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}}),
    "llama, yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", **_BORDER}}),
    "llama, llama3 rope": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_BORDER}},
    ),
    "llama, longrope": ("llama", {"rope_parameters": _LONG}),
    "phi3, longrope": ("phi3", {"rope_parameters": _LONG, "original_max_position_embeddings": 8}),
    "gemma2, sdpa": ("gemma2", {"attn_implementation": "sdpa"}),
    "falcon_h1, head multiplier 0.97": ("falcon_h1", {"lm_head_multiplier": 0.97}),
    "hyperclovax, logits scaling 1.02": ("hyperclovax", {"logits_scaling": 1.02}),
    "rwkv, rescaled": ("rwkv", {"num_hidden_layers": 4, "rescale_every": 2}),
}


def families() -> dict[str, str]:
    """Return name and class of every family of `AutoModelForCausalLM`: of several names of one class, that of its own configuration."""
    names: dict[str, list[str]] = {}
    for name, model_class in CLASSES.items():
        names.setdefault(model_class, []).append(name)
    return {_own(several, model_class): model_class for model_class, several in sorted(names.items(), key=lambda item: min(item[1]))}


def _own(names: list[str], model_class: str) -> str:
    own = names[0] if len(names) == 1 else getattr(transformers, model_class).config_class.model_type
    return own if own in names else names[0]


def tiny_config(config_class: type[PretrainedConfig], **special: Any) -> PretrainedConfig:
    """Make a configuration with the fields of `SIZES` that the class has and uses, and those of its parts; `special` is set last."""
    default = config_class()
    has = default.to_dict()
    aliases = config_class.attribute_map
    fields = {
        name: value
        for name, value in SIZES.items()
        if name in {*has, *aliases} and (has.get(name, 1) is not None or name in {"pad_token_id", "n_inner"})
    }
    for part, part_class in config_class.sub_configs.items():
        own = getattr(default, part, None)
        if own is not None and part not in special:
            chosen = type(own) if part_class is AutoConfig else part_class
            fields[part] = tiny_config(chosen, **SPECIAL.get(chosen.model_type, {})).to_dict()
    fields |= special
    for alias, name in aliases.items():
        if alias in fields and name in fields:
            del fields[alias]
    return config_class(**fields)


def build_model(family: str, *, seed: int = 0, **special: Any) -> Any:
    """Make a random model in eval mode, float32.

    Args:
        family: a name of `families()`, or another model type of transformers.
        seed: decides the weights.
        special: fields of the configuration, beside those of `SIZES` and `SPECIAL`.
    """
    model_class = getattr(transformers, CLASSES[family])
    config_class = model_class.config_class
    config = tiny_config(config_class, **{**SPECIAL.get(family, {}), **special})
    torch.manual_seed(seed)
    model = model_class._from_config(config)
    _spread(model.eval())
    return model


@torch.no_grad()
def _spread(model: Any) -> None:
    """Move norms and biases away from 1 and 0, and logits away from equal."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name.lower() or "ln_" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
    weight = getattr(model.get_output_embeddings(), "weight", None)
    spread = float(model(input_ids=torch.arange(4, 12)[None], use_cache=False).logits.std())
    if weight is not None and spread < 1:
        weight.mul_(1 / max(spread, 0.1))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with as many tokens as the models have, the first of them both EOS and padding."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w1"))  # noqa: S106
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w0", pad_token="w0")  # noqa: S106
