r"""The three matrix products between hidden states, a head and a buffer of logits: operands in one dtype, sums in float32 or better.

Each product of C rows takes 2 C D V floating-point operations: logits, the gradient by hidden states, the share of the gradient by the weight.
With operands of s bytes and float32 sums (4 bytes) they move, at least:

- logits: s V D of the weight, 4 C V written;
- gradient by hidden states: s V D of the weight, s C V of the gradient by the logits;
- gradient by the weight: s C V again, and 4 V D written; from the second chunk on, 4 V D read too.

`rows` moves 8 C V read and s C V written between the first and the second.

Shape suffixes: C rows of a chunk, D hidden size, V vocabulary.
"""

import logging
from collections.abc import Iterator
from functools import cache
from typing import final

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)
_TILE_ROWS = 2048  # stays in a cache while it is converted and used


@cache
def multiplies(device: torch.device, operands: torch.dtype, sums: torch.dtype) -> bool:
    """Return whether torch adds products of these operands up in the dtype of the sums there: bfloat16 in float32 on CUDA, from torch 2.10 on.

    It is tried, once for each device, and the log records what was found: the answer depends on versions of torch and of the driver's library.

    Raises:
        torch.OutOfMemoryError: nothing was found, and the next call tries again.
    """
    ones = torch.ones(8, 8, dtype=operands, device=device)
    total = torch.ones(8, 64, dtype=sums, device=device)[:, :8]  # as logits are: rows of a buffer that is wider
    try:
        _add_product(total, ones, ones)
        why = None if (total == 9).all() else "the sum is wrong"
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:
        why = " ".join(str(error).split())
    if why is None:
        _LOG.info("Head on %s: products of %s are added up in %s", device, operands, sums)
    else:
        # a CPU is as it is; on a GPU another version of torch would make the head several times as fast
        level = logging.WARNING if device.type == "cuda" else logging.INFO
        text = "Head on %s: products are computed in %s, since torch %s does not add those of %s up in it (%.120s)"
        _LOG.log(level, text, device, sums, torch.__version__, operands, why)
    return why is None


@final
class Products:
    """`scale * hidden @ weight.T` and the two products of its backward pass.

    A weight of another dtype is converted tile by tile, so no copy of it ever exists.  Where the device cannot add products of such operands
    up in the dtype of the sums, the operands are rounded all the same, and multiplied in that dtype: slower, with the same result.

    Args:
        weight_VD: the head's weight, in any float dtype and with any strides.
        operands: to which all operands are rounded.
        sums: the dtype of what comes out.
        scale: the head's scale.
    """

    def __init__(self, weight_VD: Tensor, operands: torch.dtype, sums: torch.dtype, scale: float = 1.0) -> None:
        self._weight_VD, self._operands, self._scale = weight_VD, operands, scale
        self._taken = operands if operands == sums or multiplies(weight_VD.device, operands, sums) else sums
        self._tile = None if weight_VD.dtype == operands == self._taken else torch.empty_like(weight_VD[:_TILE_ROWS], dtype=self._taken)

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        if self._tile is None:
            yield slice(None), self._weight_VD
            return
        for first in range(0, self._weight_VD.shape[0], _TILE_ROWS):
            part = self._weight_VD[first : first + _TILE_ROWS]
            rounded = part if self._taken == self._operands else part.to(self._operands)
            yield slice(first, first + len(part)), self._tile[: len(part)].copy_(rounded)

    def logits(self, hidden_CD: Tensor, bias_V: Tensor | None, out_CV: Tensor) -> None:
        """Write `scale * hidden @ weight.T + bias` into `out`; the bias comes scaled, in the dtype of the sums."""
        hidden_CD = self._operand(hidden_CD)
        if bias_V is not None:
            out_CV.copy_(bias_V)
        for tile, weight_RD in self._tiles():
            _add_product(out_CV[:, tile], hidden_CD, weight_RD.T, first=bias_V is None, scale=self._scale)

    def hidden_gradient(self, gradient_CV: Tensor, out_CD: Tensor) -> None:
        """Write `scale * gradient @ weight` into `out`."""
        for tile, weight_RD in self._tiles():
            _add_product(out_CD, self._operand(gradient_CV[:, tile]), weight_RD, first=tile.start in (None, 0), scale=self._scale)

    def weight_gradient(self, gradient_CV: Tensor, hidden_CD: Tensor, out_VD: Tensor, first: bool) -> None:
        """Add `scale * gradient.T @ hidden` to `out`; the `first` chunk overwrites it, so nothing has to fill it with zeros."""
        hidden_CD = self._operand(hidden_CD)
        # the sums of a tile stay in a CPU's cache, and a GPU needs all of them to be busy
        step = max(len(out_VD), 1) if out_VD.is_cuda and self._taken == self._operands else _TILE_ROWS
        for begin in range(0, len(out_VD), step):
            tile = slice(begin, begin + step)
            _add_product(out_VD[tile], self._operand(gradient_CV[:, tile]).T, hidden_CD, first=first, scale=self._scale)

    def _operand(self, values: Tensor) -> Tensor:
        """Return it rounded to the dtype that is multiplied."""
        return values.to(self._operands).to(self._taken)


def _add_product(out: Tensor, left: Tensor, right: Tensor, *, first: bool = False, scale: float = 1.0) -> None:
    """Add a product to `out`, or overwrite it; products are added up in its dtype, and never rounded to another."""
    beta = 0 if first else 1
    if left.dtype == out.dtype:
        out.addmm_(left, right, beta=beta, alpha=scale)
    else:
        torch.addmm(out, left, right, out_dtype=out.dtype, beta=beta, alpha=scale, out=out)
