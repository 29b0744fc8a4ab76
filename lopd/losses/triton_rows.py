r"""The same work on rows as Triton kernels: one read of the logits for log-probs, one read and one write for the gradient.

A program owns one row, whatever the vocabulary; there are as many programs as rows of a chunk.  Places in the buffer are 64-bit integers.
The matrix products stay with the vendor's library: a hand-written one has been a few times slower in every project that measured both.

Shape suffixes: C rows, K selected ids each, V vocabulary.
"""

from typing import Any, final

import torch
import triton
import triton.language as tl
from torch import Tensor

from lopd.losses.rows import Statistics, entropies_of, row_factors, selected_gradients, selected_logprobs_of

BLOCK, WARPS = 4096, 8


@triton.jit
def statistics_kernel(logits, ids, largest, rests, selected, vocabulary, row_stride, softcap, K, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    # minus infinity, and never 0: logits may all be far below
    top = tl.full((), float("-inf"), tl.float32)
    rest = tl.zeros((), tl.float32)
    for begin in range(0, vocabulary, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        z = tl.load(logits + columns, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)
        if CAPPED:
            z = tl.where(columns < vocabulary, softcap * (2.0 / (1.0 + tl.exp(-2.0 * z / softcap)) - 1.0), float("-inf"))
        higher = tl.maximum(top, tl.max(z, 0))
        # where all logits so far are minus infinity there is nothing to rescale
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shares = tl.exp(z - base)
        for k in range(K):
            shares = tl.where(columns == tl.load(ids + row * K + k), 0.0, shares)
        rest = rest * tl.exp(top - base) + tl.sum(shares, 0)
        top = higher
    tl.store(largest + row, top)
    tl.store(rests + row, rest)
    for k in range(K):
        place = tl.load(ids + row * K + k)
        # not a number for an id beyond the vocabulary, and never another row's logit
        z = tl.load(logits + place, mask=place < vocabulary, other=float("nan")).to(tl.float32)
        if CAPPED:
            z = softcap * (2.0 / (1.0 + tl.exp(-2.0 * z / softcap)) - 1.0)
        tl.store(selected + row * K + k, z)


@triton.jit
def gradient_kernel(
    logits, ids, largest, selected, factors, slopes, vocabulary, row_stride, softcap, K, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    top, factor, log_factor = tl.load(largest + row), tl.load(factors + row), tl.load(slopes + row)
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
        # a log of minus infinity times a share of 0 would not be a number
        gradient = tl.exp(z - top) * (factor - log_factor * tl.maximum(z - top, -1000.0))
        for k in range(K):
            chosen = columns == tl.load(ids + row * K + k)
            gradient = tl.where(chosen, tl.load(selected + row * K + k), gradient)
        tl.store(logits + columns, gradient * slope, mask=inside)


@final
class TritonRows:
    """`Rows` on a CUDA device.

    Args:
        buffer_CV: logits, float32, bfloat16 or float16.
        softcap: the cap of the head, or None.
    """

    def __init__(self, buffer_CV: Tensor, softcap: float | None) -> None:
        self._buffer_CV = buffer_CV
        self._softcap = softcap

    def logprobs(self, place: slice, ids_CK: Tensor, *, entropy: bool = False) -> Statistics:
        """Leaves the logits in the rows."""
        options: dict[str, Any] = {"dtype": torch.float32, "device": ids_CK.device}
        largest_C, rest_C = torch.empty(len(ids_CK), **options), torch.empty(len(ids_CK), **options)
        selected_CK = torch.empty(ids_CK.shape, **options)
        self._run(statistics_kernel, place, ids_CK, largest_C, rest_C, selected_CK)
        logprobs_CK, sums_C = selected_logprobs_of(ids_CK, selected_CK, largest_C, rest_C)
        return Statistics(logprobs_CK, sums_C, largest_C, self._entropies(place, largest_C, sums_C) if entropy else None)

    def _run(self, kernel: Any, place: slice, ids_CK: Tensor, *of_rows: Tensor) -> None:
        logits_CV = self._buffer_CV[place]
        kernel[(len(ids_CK),)](
            logits_CV, ids_CK.contiguous(), *of_rows, logits_CV.shape[1], logits_CV.stride(0), self._softcap or 1.0,
            K=ids_CK.shape[1], CAPPED=self._softcap is not None, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip

    def _entropies(self, place: slice, largest_C: Tensor, sums_C: Tensor) -> Tensor:
        """In plain torch, row by row so that no copy of the buffer is made: few objectives ask."""
        parts = []
        for row_V, largest, total in zip(self._buffer_CV[place], largest_C, sums_C, strict=True):
            logits_V = row_V.float() if self._softcap is None else self._softcap * torch.tanh(row_V.float() / self._softcap)
            parts.append(entropies_of((logits_V - largest).exp_()[None], total[None]))
        return torch.cat(parts)

    def gradients(
        self, place: slice, ids_CK: Tensor, statistics: Statistics, gradient_CK: Tensor, entropy_C: Tensor | None = None
    ) -> Tensor:
        """In place, with scales of 1."""
        selected_CK = selected_gradients(ids_CK, statistics, gradient_CK, entropy_C)
        of_rows = (selected_CK, *row_factors(statistics, gradient_CK, entropy_C))
        self._run(gradient_kernel, place, ids_CK, statistics.largest, *(values.float().contiguous() for values in of_rows))
        return torch.ones(len(ids_CK), dtype=torch.float32, device=ids_CK.device)
