r"""The same work on rows as Triton kernels: one read of the logits for log-probs, one read and one write for the gradient.

A program owns one row, whatever the vocabulary; there are as many programs as rows of a chunk.  Places in the buffer are 64-bit integers.
The matrix products stay with the vendor's library: a hand-written one has been a few times slower in every project that measured both.

A vocabulary that is spread over devices: each calls `partial_statistics` on its part with the first id of it, all put theirs together
(`merge`), and each calls `gradients_` with what came out.

Shape suffixes: C rows, K selected ids each, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast, final

import torch
import triton
import triton.language as tl
from torch import Tensor

from lopd.losses.rows import Statistics, entropies_of

BLOCK, WARPS = 4096, 8


@triton.jit
def statistics_kernel(
    logits, ids, largest, sums, selected, vocabulary, first_id, row_stride, softcap, K, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    # minus infinity, and never 0: logits may all be far below
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for begin in range(0, vocabulary, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        z = tl.load(logits + columns, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)
        if CAPPED:
            z = tl.where(columns < vocabulary, softcap * (2.0 / (1.0 + tl.exp(-2.0 * z / softcap)) - 1.0), float("-inf"))
        higher = tl.maximum(top, tl.max(z, 0))
        # where all logits so far are minus infinity there is nothing to rescale
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(z - base), 0)
        top = higher
    tl.store(largest + row, top)
    tl.store(sums + row, total)
    for k in range(K):
        place = tl.load(ids + row * K + k) - first_id
        here = (place >= 0) & (place < vocabulary)
        z = tl.load(logits + place, mask=here, other=0.0).to(tl.float32)
        if CAPPED:
            z = softcap * (2.0 / (1.0 + tl.exp(-2.0 * z / softcap)) - 1.0)
        tl.store(selected + row * K + k, tl.where(here, z, float("-inf")))


@triton.jit
def gradient_kernel(
    logits, ids, largest, sums, coefficients, vocabulary, first_id, row_stride, softcap, K, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    top, sum_of_row = tl.load(largest + row), tl.load(sums + row)
    total = tl.zeros((), tl.float32)
    for k in range(K):
        total += tl.load(coefficients + row * K + k)
    for begin in range(0, vocabulary, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        z = tl.load(logits + columns, mask=inside, other=float("-inf")).to(tl.float32)
        slope = tl.full((BLOCK,), 1.0, tl.float32)
        if CAPPED:
            bent = 2.0 / (1.0 + tl.exp(-2.0 * z / softcap)) - 1.0
            slope = 1.0 - bent * bent
            z = softcap * bent
        # the largest logit first: its sum with the log of the sum would be rounded where logits are far from zero
        gradient = -total * tl.exp(z - top) / sum_of_row
        for k in range(K):
            chosen = columns == tl.load(ids + row * K + k) - first_id
            coefficient = tl.load(coefficients + row * K + k)
            gradient += tl.where(chosen, coefficient, 0.0)
        tl.store(logits + columns, gradient * slope, mask=inside)


class PartialStatistics(NamedTuple):
    """Of one part of a vocabulary: (C,) largest logits, (C,) sums of exp(logit - largest), (C, K) logits of the ids, -inf for those elsewhere."""

    largest: Tensor
    sums: Tensor
    selected: Tensor


def partial_statistics(logits_CV: Tensor, ids_CK: Tensor, softcap: float | None = None, first_id: int = 0) -> PartialStatistics:
    """What one part of the vocabulary, which begins with `first_id`, says of the rows; float32."""
    rows, k = ids_CK.shape
    options: dict[str, Any] = {"dtype": torch.float32, "device": logits_CV.device}
    found = PartialStatistics(torch.empty(rows, **options), torch.empty(rows, **options), torch.empty(rows, k, **options))
    cast("Any", statistics_kernel)[(rows,)](
        logits_CV, ids_CK.contiguous(), *found, logits_CV.shape[1], first_id, logits_CV.stride(0), softcap or 1.0,
        K=k, CAPPED=softcap is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return found


def merge(parts: Sequence[PartialStatistics]) -> PartialStatistics:
    """The statistics of all parts together; on several devices an all-reduce (max, sum, max) of the same three values."""
    largest_C = torch.stack([part.largest for part in parts]).amax(0)
    sums_C = torch.stack([part.sums * (part.largest - largest_C).exp() for part in parts]).sum(0)
    return PartialStatistics(largest_C, sums_C, torch.stack([part.selected for part in parts]).amax(0))


def logprobs(statistics: PartialStatistics) -> Tensor:
    """(C, K) log-probs, nats, at most 0, from the statistics of the whole vocabulary."""
    return statistics.selected - statistics.largest[:, None] - statistics.sums.log()[:, None]


def gradients_(
    logits_CV: Tensor,
    ids_CK: Tensor,
    statistics: PartialStatistics,
    gradient_CK: Tensor,
    *,
    softcap: float | None = None,
    first_id: int = 0,
) -> None:
    """Overwrite the logits of one part of the vocabulary by gradients by them; the statistics are those of the whole."""
    rows, k = ids_CK.shape
    cast("Any", gradient_kernel)[(rows,)](
        logits_CV, ids_CK.contiguous(), statistics.largest, statistics.sums, gradient_CK.contiguous(),
        logits_CV.shape[1], first_id, logits_CV.stride(0), softcap or 1.0,
        K=k, CAPPED=softcap is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


@final
class TritonRows:
    """`Rows` on a CUDA device.

    Args:
        buffer_CV: of logits, float32, bfloat16 or float16.
        softcap: of the head.
        dtype: of statistics, float32.
    """

    def __init__(self, buffer_CV: Tensor, softcap: float | None, dtype: torch.dtype) -> None:
        del dtype
        self._buffer_CV = buffer_CV
        self._softcap = softcap

    def logprobs(self, place: slice, ids_CK: Tensor, *, entropy: bool = False) -> Statistics:
        """Leaves the logits in the rows."""
        found = partial_statistics(self._buffer_CV[place], ids_CK, self._softcap)
        return Statistics(logprobs(found), found.largest, found.sums, self._entropies(place, found) if entropy else None)

    def _entropies(self, place: slice, found: PartialStatistics) -> Tensor:
        """In plain torch, row by row so that no copy of the buffer is made: few objectives ask."""
        parts = []
        for row_V, largest, total in zip(self._buffer_CV[place], found.largest, found.sums, strict=True):
            logits_V = row_V.float() if self._softcap is None else self._softcap * torch.tanh(row_V.float() / self._softcap)
            parts.append(entropies_of((logits_V - largest).exp_()[None], total[None]))
        return torch.cat(parts)

    def gradients(self, place: slice, ids_CK: Tensor, statistics: Statistics, gradient_CK: Tensor) -> Tensor:
        """In place, with scales of 1."""
        # the logits of the ids play no part in it
        known = PartialStatistics(statistics.largest, statistics.sums, statistics.logprobs)
        gradients_(self._buffer_CV[place], ids_CK, known, gradient_CK.float(), softcap=self._softcap)
        return torch.ones(len(ids_CK), dtype=torch.float32, device=ids_CK.device)
