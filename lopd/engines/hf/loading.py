"""A transformers model and its tokenizer, from a folder or a hub name."""

from pathlib import Path
from typing import Any

import torch
import transformers

from lopd.engines.identity import looking_for
from lopd.errors import EngineError


def load_model(folder: str | Path, dtype: torch.dtype | None = None, device: str = "cpu") -> tuple[Any, Any]:
    """(model, tokenizer) from a folder or hub name; `dtype=None` keeps the dtype of the stored weights.

    Train in float32: at the learning rates of OPD, bfloat16 weights round most updates away (`CausalLMStudent(autocast=...)` computes in less).

    Raises:
        EngineError: there is no such model, or no such device.
    """
    _check_device(folder, device)
    with looking_for(folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        # only eager attention applies a cap on attention scores, and the choice is not saved with the weights
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
