"""The weights that a model applies now, under the names that they have in the model without any wrapper.

Adapters of peft count through what they make of the weights: switched off they are the base model, merged they are what they were before.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal

import torch
from attrs import frozen
from torch import Tensor, nn

from lopd.engines.causal_lm import unwrap
from lopd.errors import ModelError

# torch.compile, FSDP and activation checkpointing put a module around a module
_TRANSPARENT = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_MERGEABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Kind = Literal["parameter", "buffer", "derived"]
#: Returns the tensors that an adapted layer applies, by name.
_Merge = Callable[[Any], Mapping[str, Tensor]]


@frozen(eq=False)
class Weight:
    """A tensor that a model applies.

    Args:
        names: all its names, the first one first; several if it is tied.
        kind: a parameter, a buffer that is saved with the parameters, or one that the model derives from its configuration.
        held: the tensor in the model; adapters change its values but not its shape.
        adapted: the adapted layer that applies it and its name in there, or None.
    """

    names: list[str]
    kind: Kind
    held: Tensor
    adapted: tuple[_Merge, Any, str] | None = None

    def read(self) -> Tensor:
        """Return the values that are applied."""
        if self.adapted is None:
            return self.held
        merge, layer, name = self.adapted
        return merge(layer)[name]


def effective_weights(model: Any) -> list[Weight]:
    """Return the parameters and buffers that a model applies now, sorted by name.

    The values of adapted layers are computed when they are read, a layer at a time.

    Raises:
        ModelError: a method of peft is at work whose effect is not in the weights of layers, or a layer cannot be merged.
    """
    _check_methods(model)
    kept: dict[int, list[Weight]] = {}
    for weight in _walk(unwrap(model), "", lru_cache(1)(_merged)):  # the tensors of a layer are read one after the other
        same = kept.setdefault(id(weight.held), [])
        twin = next((other for other in same if _applied_alike(weight, other)), None)
        if twin:
            twin.names.extend(weight.names)
        else:
            same.append(weight)
    return sorted((weight for same in kept.values() for weight in same), key=lambda weight: weight.names[0])


def _check_methods(model: Any) -> None:
    for module in model.modules():
        config = getattr(module, "active_peft_config", None)
        if config is not None and (config.is_prompt_learning or config.peft_type == "XLORA"):
            raise ModelError(
                f"Model {type(unwrap(model)).__name__}: its adapter is of the kind {config.peft_type}, which does more than change weights; "
                "merge another kind, or pass `identity=`."
            )


def is_adapted(module: Any) -> bool:
    """Return whether a module is a layer of peft around another layer."""
    return hasattr(module, "base_layer") and hasattr(module, "active_adapters") and hasattr(module, "merge")


def applied_adapter(model: Any) -> str | None:
    """Return the name of the adapter that a model applies, the one that an export holds; None where it applies none.

    Raises:
        ModelError: it applies several.
    """
    wrapped, inside = hasattr(model, "get_base_model"), getattr(model, "_hf_peft_config_loaded", False)
    active = [*model.active_adapters] if wrapped else model.active_adapters() if inside else []
    if len(active) > 1:
        raise ModelError(
            f"Model {type(unwrap(model)).__name__}: it applies {len(active)} adapters ({', '.join(active)}), expected 1, as an export holds one; "
            "merge the others (`merge_and_unload()`), export that, and train one on what `load_model` makes of it."
        )
    return active[0] if active else None


def saved_adapter(model: Any) -> str | None:
    """Return the name of the adapter that a model of peft is asked to save; None for any other, of which transformers saves the one that it applies.

    Raises:
        ModelError: it applies several.
    """
    applied = applied_adapter(model)
    return applied if hasattr(model, "get_base_model") else None


def _applied_alike(weight: Weight, other: Weight) -> bool:
    # tied weights are one, unless an adapter changes one of them
    return (weight.adapted is None and other.adapted is None) or torch.equal(weight.read().double().cpu(), other.read().double().cpu())


def _walk(module: Any, prefix: str, merge: _Merge) -> Iterator[Weight]:
    if isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict):
        active = [] if module.disable_adapters else [name for name in module.active_adapters if name in module.modules_to_save]
        yield from _walk(module.modules_to_save[active[0]] if active else module.original_module, prefix, merge)
    elif hasattr(module, "token_adapter"):
        yield from _walk(module.token_adapter, prefix, merge)
    elif is_adapted(module):
        yield from _walk_adapted(module, prefix, merge)
    else:
        for name, tensor, kind in _own_tensors(module):
            yield Weight([prefix + name], kind, tensor)
        for name, child in module.named_children():
            yield from _walk(child, prefix if name in _TRANSPARENT else f"{prefix}{name}.", merge)


def _walk_adapted(layer: Any, prefix: str, merge: _Merge) -> Iterator[Weight]:
    weights = list(_walk(_innermost(layer), "", merge))
    changed, mergeable = _differs_from_base(layer), all(_is_mergeable(weight.held) for weight in weights)
    for weight in weights:
        adapted = (merge, layer, weight.names[0]) if changed and mergeable else None
        yield Weight([prefix + weight.names[0]], weight.kind, weight.held, adapted)
    if changed and not mergeable:
        yield from _beside_the_base(layer, prefix)


def _beside_the_base(layer: Any, prefix: str) -> Iterator[Weight]:
    """Yield the active adapters of quantised weights, as they are: merging would round."""
    for adapter in layer.active_adapters:
        for name, tensor in layer.named_parameters():
            if adapter in name.split(".") and not name.startswith("base_layer."):
                yield Weight([f"{prefix}{name.replace(f'.{adapter}', '')}"], "parameter", tensor)
        scaling = getattr(layer, "scaling", {}).get(adapter)
        if scaling is not None:
            yield Weight([f"{prefix}scaling"], "parameter", torch.tensor(float(scaling), device="cpu"))


def _innermost(layer: Any) -> Any:
    return _innermost(layer.base_layer) if is_adapted(layer) else layer


def _differs_from_base(layer: Any) -> bool:
    """Return whether the layer applies other weights than its base holds now; adapters that were merged are held in the base."""
    return is_adapted(layer) and (bool(layer.merged_adapters) == layer.disable_adapters or _differs_from_base(layer.base_layer))


def _is_mergeable(held: Tensor) -> bool:
    return type(held) in (nn.Parameter, Tensor) and held.dtype in _MERGEABLE


@torch.no_grad()
def _merged(layer: Any) -> dict[str, Tensor]:
    """Return the tensors of the layer that is adapted, by name, with what its adapters do now in them: in float32 unless they are wider.

    They are on the CPU: each kind of device rounds products in its own way, and the sum is hashed.
    """
    copied = copy.deepcopy(layer)._apply(lambda tensor: tensor.cpu().float() if tensor.dtype in _MERGEABLE[:2] else tensor.cpu())
    try:
        with torch.autocast("cpu", enabled=False):  # the caller's would round the product of two adapters
            while is_adapted(copied):
                if _differs_from_base(copied):
                    copied.unmerge() if copied.disable_adapters else copied.merge()
                copied = copied.base_layer
    except Exception as error:  # whatever a method of peft raises
        raise ModelError(
            f"Model: its layer {type(layer).__name__} cannot be merged ({error}), expected adapters with an effect on weights alone; merge them, or "
            "pass `identity=`."
        ) from error
    return {weight.names[0]: weight.held for weight in _walk(copied, "", _merged)}


def _own_tensors(module: Any) -> Iterator[tuple[str, Tensor, Kind]]:
    """Yield the tensors of the module itself, by name; of quantised weights, also the scales that it saves beside them."""
    saved: dict[str, Any] = {}
    module._save_to_state_dict(saved, "", True)
    for name, tensor in {**saved, **module._buffers, **module._parameters}.items():
        if isinstance(tensor, Tensor):
            yield name, tensor, "parameter" if name in module._parameters else "buffer" if name in saved else "derived"
