"""Nested values as plain JSON and named tensors, and back: each comes back as what it was, numbers of numpy and tuples included."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lopd.errors import InvalidRecordError
from lopd.records.checks import a_kind

_PLAIN = (type(None), bool, int, float, str)


def pack(owner: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return JSON of a value; its tensors are added to `tensors`, and named in the JSON.

    >>> pack("Optimizer", {"betas": (0.9, np.float32(0.5))}, {})
    {'dict': [['betas', {'tuple': [0.9, {'numpy': 'float32', 'value': 0.5}]}]]}

    Raises:
        InvalidRecordError: it holds something that is neither a number, text, tensor, array, dtype, None, nor a list, tuple or dict of such.
    """
    if isinstance(value, _PLAIN) and not isinstance(value, np.number):
        return value
    if (leaf := _pack_leaf(owner, value, tensors)) is not None:
        return leaf
    if isinstance(value, list | tuple):
        packed = [pack(owner, item, tensors) for item in value]
        return packed if isinstance(value, list) else {"tuple": packed}
    if isinstance(value, Mapping):
        return {"dict": [[pack(owner, part, tensors) for part in pair] for pair in value.items()]}
    raise InvalidRecordError(
        f"{owner}: it holds {a_kind(value)}, expected numbers, text, tensors, and lists or dicts of them; take it out."
    )


def _pack_leaf(owner: str, value: Any, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    """Return what JSON has no word for; None for anything else."""
    if isinstance(value, Tensor):
        name = f"nested.{len(tensors)}"
        tensors[name] = value.detach().clone()
        return {"tensor": name}
    # JSON has no more digits than 64 bits
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "biufc" and value.dtype.char not in "gG":
        shape = {"shape": value.shape} if isinstance(value, np.ndarray) else {}
        return {"numpy": value.dtype.name, "value": pack(owner, value.tolist(), tensors), **shape}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    return {"complex": [value.real, value.imag]} if isinstance(value, complex) else None


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the inverse of `pack`; JSON that it did not write stays as it is.

    Raises:
        KeyError: a tensor is missing.
        ValueError, TypeError: JSON that `pack` did not write, which looks like what it writes.
    """
    match packed:
        case [*items]:
            made: Any = [unpack(item, tensors) for item in items]
        case {"tensor": name}:
            made = tensors[name]
        case {"numpy": dtype, "value": value, "shape": shape}:
            made = np.array(unpack(value, tensors), dtype).reshape(shape)
        case {"numpy": dtype, "value": value}:  # a scalar; older checkpoints have arrays so, too
            made = np.array(unpack(value, tensors), dtype)[()]
        case {"dtype": name}:
            made = getattr(torch, str(name), None)
            if not isinstance(made, torch.dtype):
                raise TypeError(f"dtype {name!r:.80} is not one of torch")
        case {"complex": [real, imaginary]}:
            made = complex(real, imaginary)
        case {"tuple": [*items]}:
            made = tuple(unpack(items, tensors))
        case {"dict": [*pairs]}:
            made = dict(unpack(pairs, tensors))
        case _:
            made = packed
    return made


def unpack_all(packed: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return each of these unpacked, by its name."""
    return {name: unpack(value, tensors) for name, value in packed.items()}


def moved(value: Any, device: torch.device) -> Any:
    """Return the same with its tensors on this device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list | tuple):
        return type(value)(moved(item, device) for item in value)
    return {key: moved(item, device) for key, item in value.items()} if isinstance(value, dict) else value
