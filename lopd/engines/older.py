"""The configuration of an export for readers with transformers 4, which take defaults of their own for what they do not find, and say nothing.

And for readers of a part of the model, in any version, which take the dtype that stands there.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lopd.engines.causal_lm import unwrap
from lopd.errors import ModelWarning
from lopd.records.values import is_plain
from lopd.records.warn import warn_user

#: What stands outside the scaling, and what some classes call that.
_APART = ("rope_theta", "partial_rotary_factor")
_CALLED: Mapping[str, tuple[str, str]] = dict.fromkeys(("gpt_neox", "gpt_neox_japanese"), ("rotary_emb_base", "rotary_pct"))
#: Classes whose layers with a window have a base of their own and no scaling.
_LOCAL = ("gemma3_text", "gemma3n_text")
#: Classes that refuse any more of LongRoPE than the type, by its first name, and the factors.
_BRIEF, _FACTORS = ("phi3", "phi4_multimodal"), ("short_factor", "long_factor")


def spell_out(path: Path, *, untied: bool, dtype: torch.dtype) -> None:
    """Add rope and dtype by the names of transformers 4 to a config.json, of which transformers 5 makes the same model as before.

    The whole and its parts get one dtype: a model that was loaded in one and is in another now has the first there, and transformers would round
    to it.

    Rope that differs by layer has no such names, but in Gemma 3.

    Args:
        path: the file.
        untied: let it state that no weights are tied: only transformers 5 looks whether both are there.
        dtype: what `widest` gave.
    """
    stated = json.loads(path.read_text())
    if isinstance(stated.get("dtype"), str):
        _give_dtype(stated, str(dtype).removeprefix("torch."))
    for part in (stated, stated.get("text_config")):
        if isinstance(part, dict):
            part.update(_older(part) | ({"tie_word_embeddings": False} if untied else {}))
    path.write_text(json.dumps(stated, indent=2, sort_keys=True) + "\n")


def _give_dtype(whole: dict[str, Any], dtype: str) -> None:
    whole.update({"dtype": dtype} if "dtype" in whole else {})
    for part in whole.values():
        if isinstance(part, dict) and "model_type" in part:
            _give_dtype(part, dtype)


def widest(model: Any, state: Mapping[str, Tensor] | None) -> torch.dtype:
    """Return the dtype in which no weight is rounded: that of the first one, which transformers states, or a wider one that others need.

    Args:
        model: a transformers model.
        state: the weights, where the model's own are sharded.

    Warns:
        ModelWarning: most of the weights have a narrower dtype than that.
    """
    base = unwrap(model)
    dtype: torch.dtype = base.dtype
    alone = getattr(base, "_keep_in_fp32_modules_strict", None) or ()  # these are float32 to transformers whatever is stated
    sizes, wide = Counter[torch.dtype](), list[tuple[str, torch.dtype]]()
    for name, parameter in base.named_parameters():
        weight = parameter.detach() if state is None else state.get(name, parameter)
        if is_plain(weight) and not any(part in name for part in alone):
            sizes.update({weight.dtype: weight.numel()} if weight.dtype.itemsize > 1 else {})  # codes of FP8 are not a dtype to load in
            if not _equal(weight.to(dtype).to(weight.dtype), weight):
                dtype = torch.promote_types(dtype, weight.dtype) if dtype.itemsize > 1 else weight.dtype
                wide.append((name, weight.dtype))
    most = max(sizes, key=sizes.__getitem__, default=dtype)
    if torch.promote_types(most, dtype) != most:
        if most != base.dtype:
            wide = [(name, base.dtype) for name, parameter in base.named_parameters() if parameter.dtype == base.dtype]
        (name, own), stated, of_most = wide[0], *(str(one).removeprefix("torch.") for one in (dtype, most))
        warn_user(
            f"Model {type(base).__name__}: most of its weights are in {of_most}, and {name!r} is in {str(own).removeprefix('torch.')}, so its export "
            f"states {stated}, in which programs load all of it; cast such weights to {of_most} before the export, unless this is meant.",
            ModelWarning,
        )
    return dtype


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def is_untied(model: Any, state: Mapping[str, Tensor] | None) -> bool:
    """Return whether all weights that the configuration ties have values of their own, as a head that was trained as a saved module of adapters.

    Args:
        model: a transformers model.
        state: the weights, where the model's own are sharded.
    """
    base = unwrap(model)
    weights = base.state_dict() if state is None else state
    pairs = [
        (weights[one], weights[other]) for one, other in base.get_expanded_tied_weights_keys().items() if {one, other} <= weights.keys()
    ]
    # weights of shards are put together one by one, so that tied ones are equal and in two places
    return bool(pairs) and not any(_same(*pair) for pair in pairs)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() or (one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu()))


def _older(part: Mapping[str, Any]) -> dict[str, Any]:
    rope, kind = part.get("rope_parameters") or {}, str(part.get("model_type"))
    found: dict[str, Any] = {"torch_dtype": part["dtype"]} if isinstance(part.get("dtype"), str) else {}
    local = rope.get("sliding_attention") if kind in _LOCAL else None
    if local and local.get("rope_type") == "default":
        found["rope_local_base_freq"], rope = local["rope_theta"], rope["full_attention"]
    if rope.get("rope_theta") is None or any(isinstance(value, dict) for value in rope.values()):
        return found
    found |= {older: rope[name] for name, older in zip(_APART, _CALLED.get(kind, _APART), strict=True) if name in rope}
    scaling = {name: value for name, value in rope.items() if name not in _APART}
    if kind in _BRIEF and scaling.keys() - {"type", "rope_type", "original_max_position_embeddings"} == {*_FACTORS}:
        scaling = {"type": "longrope", **{name: scaling[name] for name in _FACTORS}}
    # not by its type alone: sections of positions stand beside the default one
    return found if scaling == {"rope_type": "default"} else {**found, "rope_scaling": scaling}
