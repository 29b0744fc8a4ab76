"""Float32 products of torch through its other matrix library on a CPU, for a block of code."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_ROWS, _INNER, _COLUMNS = 64, 896, 2048


def _setting() -> Any:
    """Return torch's setting of the precision that oneDNN may use for float32 products.

    It is None in a torch without oneDNN or without the setting.
    """
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    return settings if torch.backends.mkldnn.is_available() and hasattr(settings, "fp32_precision") else None


def _is_float32(left: Tensor, right: Tensor) -> bool:
    """Return whether the product of two matrices has the error of float32; that of bfloat16 is a thousand times larger."""
    truth = left.double() @ right.double()
    return bool((left @ right - truth).abs().max() <= 1e-5 * truth.abs().max())


def products_are_float32() -> bool:
    """Return whether the three kinds of product of a language-model head are computed in float32 under the current settings of torch."""
    random = torch.Generator().manual_seed(0)
    hidden_CD, weight_VD = (torch.randn(rows, _INNER, generator=random) for rows in (_ROWS, _COLUMNS))
    logits_CV = torch.randn(_ROWS, _COLUMNS, generator=random)
    return all(_is_float32(*pair) for pair in ((hidden_CD, weight_VD.T), (logits_CV, weight_VD), (logits_CV.T, hidden_CD)))


@contextmanager
def fast_matmul() -> Iterator[bool]:
    """Compute float32 products through oneDNN, if they are still float32 there; yield whether the switch is on.

    torch multiplies float32 matrices on a CPU with MKL, which takes a slow path on processors of another maker.  oneDNN does not, and torch
    uses it for float32 where bfloat16 would be allowed.  Whether oneDNN then really rounds to bfloat16 depends on the processor (with AMX it
    does), so three products are compared with float64 first: where they are not float32, nothing is switched.  The setting belongs to the
    process, other threads included, and is what it was after the block.
    """
    setting = _setting()
    if setting is None:
        yield False
        return
    before = setting.fp32_precision
    try:
        setting.fp32_precision = "bf16"
        on = products_are_float32()
        if not on:
            setting.fp32_precision = before
        yield on
    finally:
        setting.fp32_precision = before
