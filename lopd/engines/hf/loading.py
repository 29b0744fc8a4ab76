"""A transformers model and its tokenizer, from a folder or a hub name."""

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from lopd.engines.adapters import keep_precision
from lopd.engines.conditions import drops_cap
from lopd.engines.identity import looking_for
from lopd.engines.stored import named_class
from lopd.errors import EngineError, ModelError

_LOG = logging.getLogger(__name__)
#: The faster first; that they are installed is asked without importing them.
_FLASH = {"flash_attention_3": is_flash_attn_3_available, "flash_attention_2": is_flash_attn_2_available}
#: Root mean square difference of logits, as a share of their own: rounding of 16 bits, added up over layers, is below it.
_ROUNDING = 6e-2


def load_model(
    folder: str | Path, dtype: torch.dtype | None = None, device: str = "cpu", *, attention: str | None = None
) -> tuple[Any, Any]:
    """(model, tokenizer) from a folder or hub name; `dtype=None` keeps the dtype of the stored weights.

    A model that also reads images is loaded whole, and lopd uses its text part.

    Train in float32: at the learning rates of OPD, bfloat16 weights round most updates away (`CausalLMStudent(autocast=...)` computes in less).

    Args:
        folder: the model's folder, or its hub name.
        dtype: the dtype of the weights.
        device: where it goes.
        attention: how transformers computes it, by its name for that ("sdpa", "flash_attention_2", "flex_attention").  None takes FlashAttention
            where it is installed, weights have 16 bits, and the model gives the same logits with it; elsewhere what transformers takes.
            `model.config._attn_implementation` says which, and so does the log.

    Raises:
        EngineError: there is no such model, device or dtype, or the attention cannot be used.
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
    model = model.to(device).eval()
    _set_attention(model, folder, attention)
    return model, tokenizer


def _set_attention(model: Any, folder: str | Path, asked: str | None) -> None:
    """Set the one that is asked for, or FlashAttention if it is right, and "eager" where neither keeps a cap on attention scores."""
    if asked is not None:
        try:
            taken = _attention_set(model, asked)
        except (ValueError, ImportError) as error:
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise EngineError(f"Model {str(folder)!r}: attention {asked!r} cannot be used ({reason}); leave it out.") from error
        if taken != asked:
            raise EngineError(f"Model {str(folder)!r}: its attention is {taken!r} and cannot be set to {asked!r}; leave it out.")
    elif _takes_flash(model):
        next((name for name, installed in _FLASH.items() if installed() and _same_logits(model, name)), None)
    if drops_cap(model):
        model.set_attn_implementation("eager")
    _LOG.info("Model %r: attention %s", str(folder), model.config._attn_implementation)


def _attention_set(model: Any, name: str) -> str:
    """Set it, and say which one the model has then: old families keep theirs, with a line in a log."""
    model.set_attn_implementation(name)
    return str(model.config._attn_implementation)


def _takes_flash(model: Any) -> bool:
    """Whether it could be used at all: FlashAttention is for 16 bits on a GPU."""
    return model.device.type == "cuda" and model.dtype in (torch.bfloat16, torch.float16)


@torch.no_grad()
def _same_logits(model: Any, name: str) -> bool:
    """Set this attention if the logits stay the same up to rounding; a kernel may lack a size of heads, a cap or this GPU."""
    before = str(model.config._attn_implementation)
    ids_1S = torch.arange(1, 17, device=model.device)[None] % model.get_input_embeddings().num_embeddings
    expected_SV = model(input_ids=ids_1S, use_cache=False).logits[0].float()
    try:
        same = _attention_set(model, name) == name
        found_SV = model(input_ids=ids_1S, use_cache=False).logits[0].float()
        same = same and bool((found_SV - expected_SV).norm() <= _ROUNDING * expected_SV.norm())
    except Exception as error:
        _LOG.info("Model %s: %s cannot be used (%s)", type(model).__name__, name, error)
        same = False
    if not same:
        model.set_attn_implementation(before)
    return same


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
