"""A transformers model and its tokenizer, from a folder or a hub name."""

from pathlib import Path
from typing import Any

import torch
import transformers

from lopd.engines.adapters import keep_precision
from lopd.engines.conditions import drops_cap
from lopd.engines.identity import looking_for
from lopd.engines.stored import named_class
from lopd.errors import EngineError, ModelError


def load_model(folder: str | Path, dtype: torch.dtype | None = None, device: str = "cpu") -> tuple[Any, Any]:
    """(model, tokenizer) from a folder or hub name; `dtype=None` keeps the dtype of the stored weights.

    A model that also reads images is loaded whole, and lopd uses its text part.

    Train in float32: at the learning rates of OPD, bfloat16 weights round most updates away (`CausalLMStudent(autocast=...)` computes in less).

    Raises:
        EngineError: there is no such model, no such device, or no such dtype.
        ModelError: its files lack weights, which transformers would make up.
    """
    _check_device(folder, device)
    if not isinstance(getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype, torch.dtype | None):
        raise EngineError(f"Model {str(folder)!r}: dtype is {dtype!r:.40}, expected a torch.dtype; pass torch.float32, for example.")
    with looking_for(folder) as found:
        model, read = _from_pretrained(str(found), dtype or "auto")
        keep_precision(model, found)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(found))
    missing = sorted(read["missing_keys"] & dict(model.named_parameters(remove_duplicate=False)).keys())
    if missing:
        raise ModelError(
            f"Model {str(folder)!r}: its files lack {len(missing)} weights ({missing[0]!r}), expected all of a {type(model).__name__}; transformers "
            "draws such weights at random, so load the folder of a whole causal LM."
        )
    if drops_cap(model):
        model.set_attn_implementation("eager")
    return model.to(device).eval(), tokenizer


def _check_device(folder: str | Path, device: str) -> None:
    """Refuse a device that this process cannot use, before the weights are read."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise EngineError(
            f"Model {str(folder)!r}: device {device!r} cannot be used ({reason}); pass device='cpu', or install the build of torch for it."
        ) from error


def _from_pretrained(folder: str, dtype: torch.dtype | str) -> Any:
    """(model, what its files lacked)."""
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        # a model that also reads images or sound: its own class computes text alone too
        named = named_class(transformers.AutoConfig.from_pretrained(folder))
        if named is None:
            raise
        return named.from_pretrained(folder, dtype=dtype, output_loading_info=True)
