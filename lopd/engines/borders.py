"""Borders in a text behind which a model computes something else, as its configuration states them, and which of them a probe goes beyond."""

from typing import Any

from lopd.engines.causal_lm import context_length, rope_borders, text_config

_BORDERS = ("window", "chunk", "block_size", "compress", "floor_scale")
_LONGEST, _CPU_FLOPS, _FLOPS = 2048, 4e10, 2e14


def stated_borders(model: Any) -> list[int]:
    """Return windows, chunks and rope borders that the configuration states, as far as a forward beyond them is cheap, in ascending order."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    budget = _CPU_FLOPS if next(model.parameters()).device.type == "cpu" else _FLOPS
    longest = min(_LONGEST, context_length(model), int(budget / (2 * weights))) - 2
    windows = [value for name, value in vars(text_config(model)).items() if any(part in name for part in _BORDERS)]
    return sorted({size for value in [*windows, rope_borders(text_config(model))] for size in _numbers(value) if 0 < size <= longest})


def goes_by_place(model: Any, *, packed: bool) -> bool:
    """Return whether places in a packed row, or else in one padded on the left, decide behind a border that no probe reaches (Llama 4)."""
    config, seen = text_config(model), stated_borders(model)
    scale = getattr(config, "floor_scale", None) if getattr(config, "attn_temperature_tuning", False) else None
    # chunks begin behind the padding; and a packed row may be longer than a context
    borders = [scale, getattr(config, "attention_chunk_size", None)] if packed else [scale]
    return any(size and size not in seen and (packed or size <= context_length(model)) for size in borders)


def _numbers(value: Any) -> list[int]:
    """Return a number of the configuration, those of a list, or those of a table."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
    return [part for part in parts if isinstance(part, int) and not isinstance(part, bool)]
