"""FlashAttention as transformers calls it, computed on the CPU: packed rollouts by their borders, rows as they are, and no question to the GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def flash(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **known: Any
) -> tuple[Tensor, None]:
    """Return (B, S, H, D) of (B, H, S, D) queries, keys and values."""
    assert attention_mask is None, "the real one takes a mask of padding alone"
    groups = query.shape[1] // key.shape[1]
    parts = [query, *(tensor.repeat_interleave(groups, 1, output_size=query.shape[1]) for tensor in (key, value))]
    borders = known.get("cu_seq_lens_q")
    scale = known.get("scaling")
    if borders is None:
        return scaled_dot_product_attention(*parts, is_causal=True, scale=scale).transpose(1, 2), None
    assert borders.dtype == torch.int32
    assert isinstance(known["max_length_q"], int)
    assert query.shape[0] == 1
    places = torch.arange(query.shape[2], device=query.device)
    rollout = torch.searchsorted(borders, places, right=True)
    mask = (rollout[:, None] == rollout) & (places[:, None] >= places)
    return scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale).transpose(1, 2), None


@contextmanager
def take_flash(model: Any, name: str = "flash_attention_2", attention: Any = flash) -> Iterator[None]:
    """Make the model compute its attention with this function; on the CPU transformers would refuse to set it."""
    configs = [model.config, *(part.config for part in model.modules() if hasattr(part, "config"))]
    before = [config._attn_implementation for config in configs]
    installed = ALL_ATTENTION_FUNCTIONS._global_mapping[name]
    ALL_ATTENTION_FUNCTIONS._global_mapping[name] = attention
    for config in configs:
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping[name] = installed
        for config, old in zip(configs, before, strict=True):
            config._attn_implementation_internal = old


@contextmanager
def take_flex(model: Any) -> Iterator[None]:
    """Make the model take FlexAttention, whose mask is a whole one here, and which is compiled nowhere."""
    masks = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    installed, masks["flex_attention"] = masks["flex_attention"], masks["sdpa"]
    try:
        with take_flash(model, "flex_attention", ALL_ATTENTION_FUNCTIONS._global_mapping["sdpa"]):
            yield
    finally:
        masks["flex_attention"] = installed
