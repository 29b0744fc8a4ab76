"""The part of a model's configuration that decides what it computes, in one form however it is written."""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import transformers
from torch import nn

from lopd.engines.causal_lm import unwrap

# Fields that change what is stored, trained, returned or printed, and not a logit.
_IRRELEVANT = frozenset(transformers.GenerationConfig().to_dict()) | {
    *("architectures", "auto_map", "tokenizer_class", "model_max_length", "torchscript", "tie_word_embeddings", "dtype", "torch_dtype"),
    *("sep_token_id", "cls_token_id", "unk_token_id", "mask_token_id", "eod_token_id", "return_dict", "output_router_logits"),
    *("id2label", "label2id", "problem_type", "task_specific_params", "chunk_size_feed_forward", "chunk_size_lm_head", "pretraining_tp"),
    *("gradient_checkpointing", "use_mamba_kernels", "use_mambapy", "use_mem_eff_path", "slow_but_exact", "init_std", "init_device"),
    # these round otherwise, as another dtype does
    *("reorder_and_upcast_attn", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "residual_in_fp32"),
    *("norm_reduction_force_float32", "enable_moe_fp32_combine"),
}
_IRRELEVANT_PARTS = ("dropout", "pdrop", "layerdrop", "jitter_noise", "initializer_", "loss", "summary_", "version")
# What counts nevertheless, by kind of model: by this one, Phi-MoE masks experts in eval too, where it is noise of training in others.
_RELEVANT: Mapping[str, tuple[str, ...]] = {"phimoe": ("router_jitter_noise",)}
# Which of their settings the kinds of rotary embeddings read, and what transformers takes for one that is left out.
_ROPE_KINDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        "original_max_position_embeddings",
    ),
}
_ROPE_SETTINGS = {name for names in _ROPE_KINDS.values() for name in names}
_ROPE_DEFAULTS = {"partial_rotary_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
_MOVING = ("dynamic", "longrope")
_ROPE_SPELLINGS = ("rope_theta", "rope_scaling", "partial_rotary_factor")
_ATTENTION_CAP = "attn_logit_softcapping"


def function_settings(model: Any, *, capped: bool = False) -> str:
    """Return the settings that decide what a model computes from its weights: as text, and the same text for the same function.

    Fields at the default of their class are left out, so that a version of transformers with more fields agrees.

    Args:
        model: loaded, or built without memory for its weights.
        capped: as if attention applied its caps, as `load_model` has it; False looks at the attention that the model uses now.
    """
    base = unwrap(model)
    # some models count positions from their padding id; an embedding, and the model as a whole, have it for themselves
    aside = nn.Embedding | transformers.PreTrainedModel
    paddings = {vars(module).get("padding_idx") for module in base.modules() if not isinstance(module, aside)}
    without_sinks = not capped and _is_capless(base.config) and any(name.endswith("sinks") for name, _ in base.named_parameters())
    return json.dumps([_settings(base.config, capped), sorted(paddings - {None}), without_sinks], sort_keys=True)


def rope_moves(config: Any) -> bool:
    """Return whether rotary embeddings depend on the longest sequence so far."""
    rope = _plain(config.to_dict().get("rope_parameters") or {})
    return any(_rope_kind(part) in _MOVING for part in _rope_parts(rope))


def _is_capless(config: Any) -> bool:
    # sdpa has no argument for a cap on its scores, nor for learned sinks
    return "sdpa" in str(getattr(config, "_attn_implementation", None))


def _settings(config: Any, capped: bool) -> dict[str, Any]:
    defaults, fields = _defaults(config.__class__), _fields(config)
    found: dict[str, Any] = {}
    for name, value in fields.items():
        inner = vars(config).get(name)
        if isinstance(inner, transformers.PreTrainedConfig):
            found[name] = _settings(inner, capped)
            continue
        effective = None if name == _ATTENTION_CAP and not capped and _is_capless(config) else value
        if effective != defaults.get(name):
            found[name] = effective
    if rope := fields.get("rope_parameters"):
        for name in _ROPE_SPELLINGS:
            if name in found and found[name] == rope.get(name):
                del found[name]
        if not any(map(_reads_length, _rope_parts(rope))):
            found.pop("max_position_embeddings", None)
        found["rope_parameters"] = _rope(rope)
    return found


@cache
def _defaults(kind: Any) -> Mapping[str, Any]:
    try:
        return _fields(kind())
    except Exception:  # a configuration of parts that are never left out
        return {}


def _fields(config: Any) -> dict[str, Any]:
    kept = _RELEVANT.get(config.model_type, ())
    return {name: _plain(value) for name, value in config.to_dict().items() if name in kept or not _is_irrelevant(name)}


def _is_irrelevant(name: str) -> bool:
    return name.startswith("_") or name in _IRRELEVANT or any(part in name for part in _IRRELEVANT_PARTS)


def _plain(value: Any) -> Any:
    """Return numbers as floats, tuples as lists, and None in a mapping as absence: as JSON and Python may differ in."""
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items() if part is not None and not _is_irrelevant(str(name))}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return value if isinstance(value, str | bool | None) else str(value)


def _rope_parts(rope: Mapping[str, Any]) -> list[Any]:
    """Return one for each type of layer, or the only one."""
    return [part for part in rope.values() if isinstance(part, dict)] or [rope]


def _rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    if any(isinstance(part, dict) for part in rope.values()):
        return {name: _rope(part) if isinstance(part, dict) else part for name, part in rope.items()}
    kind = _rope_kind(rope)
    # a model that has settings of its own may read the others in its own way
    usual = rope.keys() <= _ROPE_SETTINGS | {"rope_theta", "partial_rotary_factor", "rope_type", "type"}
    read = _ROPE_KINDS.get(kind, _ROPE_SETTINGS) if usual else _ROPE_SETTINGS
    found = {name: value for name, value in rope.items() if name not in _ROPE_SETTINGS or name in read}
    found = {name: value for name, value in found.items() if name not in ("type", "rope_type") and _ROPE_DEFAULTS.get(name) != value}
    return found | {"rope_type": kind}


def _rope_kind(rope: Mapping[str, Any]) -> str:
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    return "default" if kind == "linear" and rope.get("factor") == 1.0 else kind


def _reads_length(rope: Mapping[str, Any]) -> bool:
    """Return whether the configured number of positions changes the embeddings of the first ones."""
    return _rope_kind(rope) in _MOVING or (_rope_kind(rope) == "yarn" and "factor" not in rope)
