"""Following a model without numbers: its code is run on tensors that have sizes alone, and the bytes that are alive are counted.

Shape suffixes: T operations, P parts.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from lopd.engines.causal_lm import decoder_of, unwrap
from lopd.errors import ArgumentError, LopdError, ModelError
from lopd.records.checks import a_kind
from lopd.records.optional import need
from lopd.tools.plan.live import LiveBytes, Need, Stretch

#: Attention that keeps no scores, whatever the layout.
ATTENTION = "lopd_plan"
#: Runs a phase with so many rows.
Phase = Callable[[int], list[Stretch]]


def lora_config(rank: int) -> Any:
    """Return adapters of this rank on all linear layers but the head, which the loss reads as it is."""
    return need("peft", "Adapters").LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def layers_of(model: Any) -> list[Any]:
    """Return the layers below the head; an empty list where there are several lists of modules, or none."""
    lists = [child for child in decoder_of(unwrap(model)).children() if isinstance(child, torch.nn.ModuleList)]
    return list(lists[0]) if len(lists) == 1 else []


def empty(config: Any, dtype: torch.dtype, lora_rank: int, attention: str | None) -> Any:
    """Make the model that `load_model` makes of this configuration, whose weights are nowhere.

    Args:
        config: a transformers configuration.
        dtype: type of the weights.
        lora_rank: rank of the adapters; 0 for none.
        attention: as transformers calls it; None for the one that it takes itself.

    Raises:
        ArgumentError: it is not a configuration.
        ModelError: it is not the configuration of a causal LM, or one of quantised weights.
    """
    make = _maker(config)
    need("transformers", "Plan").AttentionInterface.register(ATTENTION, _attention)
    with torch.device("meta"):
        model = make(copy.deepcopy(config), dtype=dtype, attn_implementation=attention)
        return need("peft", "Adapters").get_peft_model(model, lora_config(lora_rank)) if lora_rank else model


def _maker(config: Any) -> Callable[..., Any]:
    """Return what makes a causal LM of this configuration; what is made of it has plain weights."""
    transformers = need("transformers", "Plan")
    if not isinstance(config, transformers.PretrainedConfig):
        given = f"the class {config.__name__}" if isinstance(config, type) else a_kind(config)
        raise ArgumentError(f"Plan: a model is {given}, expected a transformers configuration; pass AutoConfig.from_pretrained(folder).")
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"Plan: the weights of this {type(config).__name__} are quantised, and would be counted as if they were not; measure it on the "
            "card, or plan the model that was quantised."
        )
    from lopd.engines.stored import class_of

    auto, kind = transformers.AutoModelForCausalLM, class_of(config)
    make: Callable[..., Any] | None = auto.from_config if kind is auto else getattr(kind, "_from_config", None)
    if type(config) not in auto._model_mapping and (kind is auto or getattr(config, "is_encoder_decoder", False)):
        make = None
    if make is None:
        raise ModelError(f"Plan: a {type(config).__name__} is not the configuration of a causal LM; pass one that `load_model` can load.")
    return make


def _attention(_module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float | None = None, **__: Any) -> Any:
    """Return causal attention that keeps no scores, whatever the layout."""
    of_heads = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return of_heads.transpose(1, 2), None


def count(config: Any, make: Callable[[Any], Any], rows: int, prepare: Callable[[Any, LiveBytes], Phase]) -> Need:
    """Run a phase with so many rows and with one more; layers that are alike are run two at a time and three at a time, and the rest follows.

    Args:
        config: the model's configuration.
        make: a model of a configuration, whose weights are nowhere (`empty`).
        rows: how many.
        prepare: put what the phase keeps beside the model, and return what runs it.

    Raises:
        ArgumentError: it is not a configuration.
        ModelError: the model has quantised weights or cannot be run, or its code depends on numbers, so that its sizes alone do not show what
            it does.
    """
    _maker(config)
    try:
        depth = _layers_alike(config, make)
        models = [make(config)] if depth is None else [make(_cut(config, layers)) for layers in (2, 3)]
        runs = [_run(model, rows, prepare) for model in models]
        if depth is None:
            alive = [[stretch.after for stretch in stretches] for stretches in runs[0]]
        else:
            alive = [[a.with_layers(b, depth - 2) for a, b in zip(*pair, strict=True)] for pair in zip(*runs, strict=True)]
        return Need.of(rows, *alive)
    except LopdError:
        raise
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ModelError(
            f"Plan: a {type(config).__name__} cannot be followed without numbers ({error.func}), expected operations that depend on sizes "
            "alone; measure it on the card."
        ) from error
    except Exception as error:  # what a family raises that has no such attention, cache or arguments, can be anything
        reason = " ".join(str(error).split())
        raise ModelError(
            f"Plan: a {type(config).__name__} cannot be made and run on token ids alone ({type(error).__name__}: {reason:.200}); measure it "
            "on the card."
        ) from error


def _run(model: Any, rows: int, prepare: Callable[[Any, LiveBytes], Phase]) -> list[list[Stretch]]:
    live = LiveBytes()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"), live:
        live.make("weights")
        _fill(model)
        if len(layers_of(model)) > 1:
            layers_of(model)[1].register_forward_pre_hook(lambda _, args, kwargs: _watch(live, *args, *kwargs.values()), with_kwargs=True)
        step = prepare(model, live)
        return [step(some) for some in (rows, rows + 1)]


def _watch(live: LiveBytes, hidden: Tensor, *_: Any) -> None:
    """Note where the second layer begins, and where its backward pass ends."""
    live.enter()
    if hidden.requires_grad:
        hidden.register_hook(lambda _: live.leave())


def _fill(model: Any) -> None:
    """Put tensors of the present mode in the place of all parameters and buffers, once where one is used twice."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None and id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[id(old)] = torch.nn.Parameter(new, old.requires_grad) if isinstance(old, torch.nn.Parameter) else new
                tensors[name] = None if old is None else made[id(old)]


def _layers_alike(config: Any, make: Callable[[Any], Any]) -> int | None:
    """Return how many layers there are, if more than three and all alike, also where there are three."""
    text = config.get_text_config()
    depth, kinds = getattr(text, "num_hidden_layers", 0), getattr(text, "layer_types", None) or [""]
    if depth <= 3 or len(set(kinds)) > 1 or _place(config) is None:
        return None
    try:
        few, whole = (layers_of(make(some)) for some in (_cut(config, 3), config))
    except Exception:  # a configuration with one more list of its layers is followed whole, and one that cannot be made is refused there
        return None
    shapes = {tuple(p.shape for p in layer.parameters()) for layer in (*few, *whole)}
    return depth if (len(few), len(whole), len(shapes)) == (3, depth, 1) else None


def _place(config: Any) -> str | None:
    """Return which of its parts is about text: the name of a field, "" for the whole, or None."""
    text = config.get_text_config()
    return "" if text is config else next((name for name in config.sub_configs if getattr(config, name, None) is text), None)


def _cut(config: Any, layers: int) -> Any:
    """Return the same configuration with so many layers of text."""
    if place := _place(config):
        whole = copy.deepcopy(config)
        setattr(whole, place, _cut(getattr(config, place), layers))
        return whole
    depth = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    kinds = {name: of_layers[:layers] for name in ("layer_types", "mlp_layer_types") if (of_layers := getattr(config, name, None))}
    return type(config).from_dict({**config.to_dict(), depth: layers, **kinds})
