"""A transformers model and its tokenizer, from a folder or a hub name."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from lopd.engines.adapters import take_generation_config
from lopd.engines.borders import stated_borders
from lopd.engines.causal_lm import attention_of, context_length, evaluating, hidden_states
from lopd.engines.conditions import drops_cap
from lopd.engines.finding import check_described, find_model, load_tokenizer, looking_for
from lopd.engines.whole import load_whole
from lopd.errors import EngineError
from lopd.records.devices import check_device, has_flash_3

_LOG = logging.getLogger(__name__)
#: The faster first; that they are installed is asked without importing them.
_FLASH = {"flash_attention_3": is_flash_attn_3_available, "flash_attention_2": is_flash_attn_2_available}
#: Root mean square difference of hidden states, as a share of their own: rounding of 16 bits, added up over layers, is below it.
_ROUNDING = 6e-2
_SHORT = 16  # tokens
_16_BITS = (torch.bfloat16, torch.float16)


def load_model(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    *,
    attention: str | None = None,
    autocast: torch.dtype | None = None,
) -> tuple[Any, Any]:
    """Return (model, tokenizer) from a folder or hub name; `dtype=None` keeps the dtype of the stored weights.

    A model that also reads images is loaded whole, as the class that its configuration names, and lopd uses its text part.  Freeze the rest before
    DistributedDataParallel wraps its student, as the page "Several GPUs and machines" shows.  Adapters are loaded frozen, to sample and to score; to
    go on training them, load their base, and them by `PeftModel.from_pretrained(..., is_trainable=True)`.

    Train in float32: at the learning rates of OPD, bfloat16 weights round most updates away (`CausalLMStudent(autocast=...)` computes in less).

    Args:
        folder: the model's folder, or its hub name.
        dtype: the dtype of the weights.
        device: where it goes.
        attention: how transformers computes it, by its name for that ("sdpa", "flash_attention_2", "flex_attention").  None takes FlashAttention
            where it is installed, the model computes in 16 bits, and its hidden states are the same with it; elsewhere what transformers takes.
            `model.config._attn_implementation` names it, and the log gives the reason.
        autocast: the dtype in which a student will compute (`CausalLMStudent(autocast=...)`), where it is not that of the weights.  FlashAttention
            takes 16 bits alone: where float32 weights are given it, such a student can use the model, and a source or a scorer refuses it.

    Raises:
        EngineError: there is no such model, device or dtype, its weights need what is not here, the attention cannot be used, or autocast is another
            dtype than bfloat16.
        ModelError: its files lack weights, which transformers would make up, or the device has no float64.
    """
    _check_device(folder, device)
    if not isinstance(getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype, torch.dtype | None):
        raise EngineError(f"Model {str(folder)!r}: dtype is {dtype!r:.40}, expected a torch.dtype; pass torch.float32, for example.")
    if autocast not in (None, torch.bfloat16):
        raise EngineError(f"Model {str(folder)!r}: autocast is {autocast!r:.40}, expected torch.bfloat16; pass that, or leave it out.")
    # what may be wrong with a folder is reported before its weights are read
    check_described(find_model(folder))
    tokenizer = load_tokenizer(folder)
    with looking_for(folder) as found:
        model = load_whole(str(found), dtype or "auto")
        take_generation_config(model, found)
    if getattr(model, "_hf_peft_config_loaded", False):
        # of adapters, transformers leaves saved modules and biases to be trained by themselves
        model.requires_grad_(False)
    model = model.to(device).eval()
    _set_attention(model, folder, attention, autocast)
    return model, tokenizer


def _set_attention(model: Any, folder: str | Path, asked: str | None, autocast: torch.dtype | None) -> None:
    """Set the one that is asked for, or FlashAttention if it is right, and "eager" where neither keeps a cap on attention scores."""
    why = "it is the one that was asked for"
    if asked is not None:
        try:
            taken = _attention_set(model, asked)
        except (ValueError, ImportError) as error:
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise EngineError(f"Model {str(folder)!r}: attention {asked!r} cannot be used ({reason}); leave it out.") from error
        if taken != asked:
            raise EngineError(f"Model {str(folder)!r}: its attention is {taken!r} and cannot be set to {asked!r}; leave it out.")
    if drops_cap(model):
        # before FlashAttention, which is compared with what keeps the cap
        model.set_attn_implementation("eager")
        why = "sdpa drops the cap on attention scores"
    if asked is None:
        why = _try_flash(model, autocast)
    _LOG.info("Model %r: attention %s (%s)", str(folder), attention_of(model), why)


def _attention_set(model: Any, name: str) -> str:
    """Set it, and return which one the model has then: old families keep theirs, with a line in a log.

    Raises:
        ValueError: it would end the process on this card.
    """
    if name == "flash_attention_3" and _on_cuda(model) and not has_flash_3(model.device):
        raise ValueError("it has no kernel for this card, and would end the process")
    model.set_attn_implementation(name)
    return str(model.config._attn_implementation)


def _on_cuda(model: Any) -> bool:
    return bool(model.device.type == "cuda")


def _try_flash(model: Any, autocast: torch.dtype | None) -> str:
    """Set FlashAttention where it can be used and is right; log why it was taken, or why not."""
    if not _on_cuda(model):
        return "FlashAttention is for CUDA"
    if (autocast or model.dtype) not in _16_BITS:
        return f"FlashAttention is for 16 bits, and weights are {model.dtype}; pass the `autocast` of a student"
    names = [name for name, installed in _FLASH.items() if installed()]
    before = attention_of(model)
    if any(_same_states(model, name, autocast) for name in names):
        return f"hidden states are those of {before}"
    return "FlashAttention cannot be used, or gives other hidden states" if names else "FlashAttention is not installed"


@torch.no_grad()
def _same_states(model: Any, name: str, autocast: torch.dtype | None) -> bool:
    """Set this attention if hidden states stay the same up to rounding; a kernel may lack a size of heads, a cap, a window or this GPU.

    The ids go on beyond each window that is cheap to reach, and both ends are judged by themselves: a window shows at the end alone.
    """
    before, vocabulary = attention_of(model), model.get_input_embeddings().num_embeddings
    length = min(max(_SHORT, 2 * max(stated_borders(model), default=0)), context_length(model))
    ids_1S = torch.arange(1, length + 1, device=model.device)[None] % vocabulary

    def ends() -> tuple[torch.Tensor, torch.Tensor]:
        with evaluating(model), torch.autocast(model.device.type, dtype=autocast, enabled=autocast is not None):
            states_SD = hidden_states(model, ids_1S)[0].float()
        return states_SD[:_SHORT], states_SD[-_SHORT:]

    try:
        expected = ends()
        same = _attention_set(model, name) == name
        pairs = zip(ends(), expected, strict=True)
        same = same and all(bool((found_RD - own_RD).norm() <= _ROUNDING * own_RD.norm()) for found_RD, own_RD in pairs)
    except Exception as error:
        _LOG.info("Model %s: %s cannot be used (%s)", type(model).__name__, name, error)
        same = False
    if not same:
        model.set_attn_implementation(before)
    return same


def _check_device(folder: str | Path, device: str) -> None:
    """Refuse a device that this process cannot use, before the weights are read."""
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise EngineError(
            f"Model {str(folder)!r}: device {device!r} cannot be used ({reason}); pass device='cpu', or install the build of torch for it."
        ) from error
    check_device(f"Model {str(folder)!r}", found)
