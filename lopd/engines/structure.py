"""What a model is made of, apart from its weights: models of one structure compute alike, so one of them is probed for all."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

from lopd.engines.causal_lm import unwrap

T = TypeVar("T")
# their modules do what their class and settings state; one of somebody's own may do something else in each object
_LIBRARIES = ("transformers", "peft", "torch")
# each probe sets the mode; where a model came from, and that it was made, change nothing
_OF_ONE = ("training", "name_or_path", "_is_hf_initialized")
_Plain = int | float | str | bool | None
_of_all: dict[Hashable, Any] = {}
_of_one: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()


def once(what: Hashable, model: Any, probe: Callable[[], T]) -> T:
    """Return what `probe` finds; it is asked once for all models of one structure, and again where it raised.

    Args:
        what: which probe, and its settings.
        model: that is probed.
        probe: what the probe of the model found.
    """
    structure, shared = _structure(model)
    known = _of_all if shared else _of_one.setdefault(unwrap(model), {})
    if (what, structure) not in known:
        known[what, structure] = probe()
    found: T = known[what, structure]
    return found


def _structure(model: Any) -> tuple[Hashable, bool]:
    """Return modules with their code and settings, shapes and dtypes of weights, and the configuration; and whether other models may be like it."""
    config, shared = unwrap(model).config, True
    parts: list[Hashable] = [str(config), getattr(config, "_attn_implementation", None), uses_tf32()]
    for path, module in model.named_modules():
        own, kind = vars(module), type(module)
        attached = tuple(map(id, (*module._forward_hooks.values(), *module._forward_pre_hooks.values(), own.get("forward"))))
        shared = shared and len(attached) == 1 and "forward" not in own and kind.__module__.partition(".")[0] in _LIBRARIES
        # those of a configuration are in its text
        settings = tuple((name, value) for name, value in own.items() if name not in _OF_ONE and isinstance(value, _Plain))
        parts.append((path, kind, kind.forward, attached, settings))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # a number that is kept as a weight may be a scale
        value = float(tensor) if tensor.numel() == 1 else None
        parts.append((name, tuple(tensor.shape), tensor.dtype, str(tensor.device), tensor.requires_grad, value))
    return tuple(parts), shared


def is_exact(model: Any) -> bool:
    """Return whether products of all weights are: a k-bit model that was prepared for training has float32 ones beside those that it unpacks."""
    base = unwrap(model)
    packed = getattr(base, "is_quantized", False) or getattr(base.config, "quantization_config", None)
    weights = list(base.parameters())
    wide = all(weight.dtype in (torch.float32, torch.float64) for weight in weights)
    return wide and not packed and not (uses_tf32() and any(weight.is_cuda for weight in weights))


def uses_tf32() -> bool:
    """Return whether products of float32 are rounded to TF32 on CUDA; torch refuses to read the older setting once the newer one was set."""
    settings: Any = torch.backends.cuda.matmul
    return bool(settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32)
