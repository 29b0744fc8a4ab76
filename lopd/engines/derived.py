"""Buffers that are not saved: a model makes them from its configuration, and they count only where they were changed."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from lopd.engines.causal_lm import unwrap
from lopd.engines.configs import rope_moves
from lopd.engines.effective import Weight, effective_weights


def changed_buffers(model: Any, weights: Sequence[Weight]) -> list[Weight]:
    """Return those of the derived buffers among these weights that hold other values than a new model of the same configuration."""
    derived = [weight for weight in weights if weight.kind == "derived" and weight.held.device.type != "meta"]
    if rope_moves(unwrap(model).config):
        derived = [weight for weight in derived if "inv_freq" not in weight.names[0]]
    made = _made_again(model) if derived else {}
    return [weight for weight in derived if not _agree(weight.held, made.get(weight.names[0]))]


def _agree(held: Tensor, made: Tensor | None) -> bool:
    if made is None or made.shape != held.shape:
        return made is None  # what cannot be made again is not known to be changed
    if not held.is_floating_point():
        return torch.equal(held.cpu(), made.to(held.dtype))
    # devices round in their own way, and a cast of the model rounds its buffers too
    tolerance, value = 8 * torch.finfo(held.dtype).eps, held.cpu().double()
    casts = (made.to(dtype).double() for dtype in (held.dtype, torch.bfloat16, torch.float16))
    return any(torch.allclose(value, cast, rtol=tolerance, atol=0.0, equal_nan=True) for cast in casts)


@torch.no_grad()
def _made_again(model: Any) -> dict[str, Tensor]:
    """Return the derived buffers of a new model, by name, without memory for its weights: as transformers makes them when it loads one."""
    base = unwrap(model)
    try:
        with torch.random.fork_rng(devices=[]):
            with torch.device("meta"):
                new = type(base)(copy.deepcopy(base.config))
            for module in new.modules():
                for name in module._non_persistent_buffers_set:
                    held = module._buffers[name]
                    module._buffers[name] = None if held is None else torch.empty_like(held, device="cpu")
            for module, owner in _with_owners(new, new):
                owner._init_weights(module)
    except Exception:  # a class that cannot be built from its configuration alone
        return {}
    return {weight.names[0]: weight.held for weight in effective_weights(new) if weight.kind == "derived"}


def _with_owners(module: Any, owner: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each module, with the part of the model that knows how to initialise it."""
    owner = module if isinstance(module, transformers.PreTrainedModel) else owner
    yield module, owner
    for child in module.children():
        yield from _with_owners(child, owner)
