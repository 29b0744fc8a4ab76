r"""The same work on rows as Triton kernels: one read of the logits for log-probs and entropies, one read and one write for the gradient.

A program owns one row, whatever the vocabulary; there are as many programs as rows of a chunk.  Places in the buffer are 64-bit integers.
A gradient that is narrower than the logits goes to the front of its own row's memory, behind what is still to be read.
The matrix products stay with the vendor's library: a hand-written one has been a few times slower in every project that measured both.

Shape suffixes: C rows, K selected ids each, V vocabulary.
"""

from typing import Any, final

import torch
import triton
import triton.language as tl
from torch import Tensor

from lopd.losses.rows import Statistics, in_front, row_factors, selected_gradients, selected_logprobs_of

BLOCK, WARPS = 4096, 8


@triton.jit
def statistics_kernel(
    logits, ids, largest, rests, selected, sums, logs, vocabulary, row_stride, softcap, K,
    CAPPED: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    # minus infinity, and never 0: logits may all be far below
    top = tl.full((), float("-inf"), tl.float32)
    rest, total, log_total = tl.zeros((), tl.float32), tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    for begin in range(0, vocabulary, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        z = tl.load(logits + columns, mask=columns < vocabulary, other=float("-inf"))
        if CAPPED:
            z = tl.where(columns < vocabulary, softcap * (2.0 / (1.0 + tl.exp(-2.0 * z / softcap)) - 1.0), float("-inf"))
        higher = tl.maximum(top, tl.max(z, 0))
        # where all logits so far are minus infinity there is nothing to rescale
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shares = tl.exp(z - base)
        rescale = tl.exp(top - base)
        if ENTROPY:
            # of e log e, where e was exp(z - top) and is exp(z - base): what was summed up moves with its base
            moved = tl.where(top == float("-inf"), 0.0, top - base)
            # a log of minus infinity times a share of 0 would not be a number
            log_total = rescale * (log_total + moved * total) + tl.sum(shares * tl.maximum(z - base, -1000.0), 0)
            total = rescale * total + tl.sum(shares, 0)
        for k in range(K):
            shares = tl.where(columns == tl.load(ids + row * K + k), 0.0, shares)
        rest = rest * rescale + tl.sum(shares, 0)
        top = higher
    tl.store(largest + row, top)
    tl.store(rests + row, rest)
    if ENTROPY:
        tl.store(sums + row, total)
        tl.store(logs + row, log_total)
    for k in range(K):
        place = tl.load(ids + row * K + k)
        # not a number for an id beyond the vocabulary, and never another row's logit
        z = tl.load(logits + place, mask=place < vocabulary, other=float("nan"))
        if CAPPED:
            z = softcap * (2.0 / (1.0 + tl.exp(-2.0 * z / softcap)) - 1.0)
        tl.store(selected + row * K + k, z)


@triton.jit
def gradient_kernel(
    logits, gradients, ids, largest, selected, factors, slopes, vocabulary, row_stride, gradient_stride, softcap, K,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    gradients += row * gradient_stride
    top, factor, log_factor = tl.load(largest + row), tl.load(factors + row), tl.load(slopes + row)
    for begin in range(0, vocabulary, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        z = tl.load(logits + columns, mask=inside, other=float("-inf"))
        slope = tl.full((BLOCK,), 1.0, tl.float32)
        if CAPPED:
            bent = 2.0 / (1.0 + tl.exp(-2.0 * z / softcap)) - 1.0
            slope = 1.0 - bent * bent
            z = softcap * bent
        # the largest logit first: its sum with the log of the sum would be rounded where logits are far from zero
        # and a share of 0 has a finite log, as above
        gradient = tl.exp(z - top) * (factor - log_factor * tl.maximum(z - top, -1000.0))
        for k in range(K):
            chosen = columns == tl.load(ids + row * K + k)
            gradient = tl.where(chosen, tl.load(selected + row * K + k), gradient)
        # narrower entries go where other threads of this program read this block, or one before: all have read when one writes
        tl.debug_barrier()
        tl.store(gradients + columns, gradient * slope, mask=inside)


@final
class TritonRows:
    """`Rows` on a CUDA device.

    Args:
        buffer_CV: logits, float32.
        softcap: the cap of the head, or None.
        dtype: to which gradients are rounded.
    """

    def __init__(self, buffer_CV: Tensor, softcap: float | None, dtype: torch.dtype) -> None:
        self._buffer_CV, self._gradient_CV = buffer_CV, in_front(buffer_CV, dtype)
        self._softcap = softcap

    def logprobs(self, place: slice, ids_CK: Tensor, *, entropy: bool = False) -> Statistics:
        """Return log-probs, and leave the logits in the rows."""
        logits_CV = self._buffer_CV[place]
        largest_C, rest_C, total_C, logs_C = (logits_CV.new_empty(len(ids_CK)) for _ in range(4))
        selected_CK = logits_CV.new_empty(ids_CK.shape)
        of_rows = (ids_CK.contiguous(), largest_C, rest_C, selected_CK, total_C, logs_C)
        self._run(statistics_kernel, ids_CK, (logits_CV, *of_rows), (logits_CV.stride(0),), ENTROPY=entropy)
        logprobs_CK, sums_C = selected_logprobs_of(ids_CK, selected_CK, largest_C, rest_C)
        entropies_C = total_C.to(sums_C.dtype).log() - logs_C / total_C if entropy else None
        return Statistics(logprobs_CK, sums_C, largest_C, entropies_C)

    def _run(self, kernel: Any, ids_CK: Tensor, tensors: tuple[Tensor, ...], strides: tuple[int, ...], **options: bool) -> None:
        rows, vocabulary = tensors[0].shape
        # Triton launches on the current card, whatever card its tensors are on
        with torch.cuda.device_of(tensors[0]):
            kernel[(rows,)](
                *tensors, vocabulary, *strides, self._softcap or 1.0,
                K=ids_CK.shape[1], CAPPED=self._softcap is not None, BLOCK=BLOCK, num_warps=WARPS, **options,
            )  # fmt: skip

    def gradients(
        self, place: slice, ids_CK: Tensor, statistics: Statistics, gradient_CK: Tensor, entropy_C: Tensor | None = None
    ) -> Tensor:
        """Return gradients with scales of 1."""
        selected_CK = selected_gradients(ids_CK, statistics, gradient_CK, entropy_C)
        of_rows = (selected_CK, *row_factors(statistics, gradient_CK, entropy_C))
        logits_CV, gradient_CV = self._buffer_CV[place], self._gradient_CV[place]
        tensors = (logits_CV, gradient_CV, ids_CK.contiguous(), statistics.largest, *(values.float().contiguous() for values in of_rows))
        self._run(gradient_kernel, ids_CK, tensors, (logits_CV.stride(0), gradient_CV.stride(0)))
        return logits_CV.new_ones(len(ids_CK))
