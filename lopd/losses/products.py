r"""The matrix products between hidden states, a head and a buffer of logits, in a dtype of choice, summed in float32 or better.

Shape suffixes: C rows of a chunk, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

_TILE_ROWS = 2048  # stays in a cache while it is converted and used


def sum_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What statistics and sums are kept in: float64 if one of the tensors is, float32 otherwise."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


@final
class Products:
    """`hidden @ weight.T` and the two products of its backward pass.

    A weight of another dtype is converted tile by tile, so no copy of it ever exists.

    Args:
        weight_VD: of any float dtype and strides.
        dtype: what the products are computed in.
    """

    def __init__(self, weight_VD: Tensor, dtype: torch.dtype) -> None:
        self._weight_VD, tile = weight_VD, weight_VD[:_TILE_ROWS]
        self._tile = None if weight_VD.dtype == dtype else torch.empty_like(tile, dtype=dtype)

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        if self._tile is None:
            yield slice(None), self._weight_VD
            return
        for first in range(0, self._weight_VD.shape[0], _TILE_ROWS):
            part = self._weight_VD[first : first + _TILE_ROWS]
            yield slice(first, first + len(part)), self._tile[: len(part)].copy_(part)

    def logits(self, hidden_CD: Tensor, bias_V: Tensor | None, out_CV: Tensor) -> None:
        """`hidden @ weight.T + bias` into `out`."""
        for tile, weight_RD in self._tiles():
            if bias_V is None:
                torch.mm(hidden_CD, weight_RD.T, out=out_CV[:, tile])
            else:
                torch.addmm(bias_V[tile], hidden_CD, weight_RD.T, out=out_CV[:, tile])

    def hidden_gradient(self, gradient_CV: Tensor, out_CD: Tensor) -> None:
        """`gradient @ weight` into `out`, which is summed in its own dtype over tiles."""
        for tile, weight_RD in self._tiles():
            _add_product(out_CD, gradient_CV[:, tile], weight_RD, first=tile.start in (None, 0))

    def weight_gradient(self, gradient_CV: Tensor, hidden_CD: Tensor, out_VD: Tensor, first: bool) -> None:
        """Add `gradient.T @ hidden` to `out`; the `first` chunk overwrites it, so nothing has to fill it with zeros."""
        for begin in range(0, len(out_VD), _TILE_ROWS):
            tile = slice(begin, begin + _TILE_ROWS)
            _add_product(out_VD[tile], gradient_CV[:, tile].T, hidden_CD, first=first)


def _add_product(out: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """Products in another dtype than the sum's are rounded once each, and never added up in it."""
    if left.dtype == out.dtype:
        out.addmm_(left, right, beta=0 if first else 1)
    elif first:
        out.copy_(left @ right)
    else:
        out.add_(left @ right)
