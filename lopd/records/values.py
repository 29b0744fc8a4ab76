"""A few values of each tensor of a model, by which one that was changed is told from one that was not."""

from collections.abc import Iterable

from torch import Tensor, nn


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor holds floating-point numbers that can be read as they are: sharded, quantised and absent ones do not."""
    return type(tensor) in (nn.Parameter, Tensor) and tensor.is_floating_point() and not tensor.is_meta


def few_values(named: Iterable[tuple[str, Tensor]], most: int) -> dict[str, Tensor]:
    """Return up to `most` values of each plain tensor in float32, evenly spaced, by name; where the tensor is."""
    plain = ((name, tensor.detach().reshape(-1)) for name, tensor in named if is_plain(tensor))
    return {name: values[:: max(len(values) // most, 1)][:most].float() for name, values in plain}
