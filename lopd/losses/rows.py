r"""What is done to each row of a buffer of logits: log-probs of stored ids, then the gradient by the logits in their place.

Shape suffixes: C rows of a chunk, R of a block, K selected ids each, V vocabulary.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol, cast, final

import torch
from torch import Tensor

_BLOCK_BYTES, _GPU_BLOCK_BYTES = 2 << 20, 64 << 20  # what fits into a cache; what is worth the start of a few kernels


def _block_rows(rows: Tensor, row_bytes: int) -> int:
    return max(1, (_GPU_BLOCK_BYTES if rows.is_cuda else _BLOCK_BYTES) // row_bytes)


class Statistics(NamedTuple):
    """(C, K) log-probs in nats, (C,) sums of exp(logit - largest), (C,) largest logits, and (C,) entropies in nats if they were asked for.

    All but the largest are float64: what the K leave of 1 would be lost in float32, and with it a gradient that leads there.
    """

    logprobs: Tensor
    sums: Tensor
    largest: Tensor
    entropies: Tensor | None = None


def selected_logprobs_of(ids_CK: Tensor, logits_CK: Tensor, largest_C: Tensor, rest_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return (C, K) log-probs and (C,) sums of exp(logit - largest), of whose terms `rest` has all but the selected ones.

    Added to the selected ones before, terms far below them would be rounded away.
    """
    below_CK = logits_CK.double() - largest_C[:, None]
    times_CK = _sums_by_id(ids_CK, torch.ones_like(below_CK))
    sums_C = rest_C + (below_CK.exp() / times_CK).sum(-1)
    return below_CK - sums_C.log()[:, None], sums_C


def selected_gradients(ids_CK: Tensor, found: Statistics, gradient_CK: Tensor, entropy_C: Tensor | None) -> Tensor:
    """Return (C, K): the gradient by the logits of the selected ids, the same where an id comes twice.

    The share of the log-probs and that of the softmax may cancel, so they meet in float64.
    """
    gradient_CK = gradient_CK.to(found.logprobs.dtype)
    by_id_CK = _sums_by_id(ids_CK, gradient_CK)
    by_softmax_C = gradient_CK.sum(-1)[:, None]
    if entropy_C is not None:
        by_softmax_C = by_softmax_C + entropy_C[:, None] * (found.logprobs + cast("Tensor", found.entropies)[:, None])
    return by_id_CK - by_softmax_C * found.logprobs.exp()


def row_factors(found: Statistics, gradient_CK: Tensor, entropy_C: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (C,) a and b: with e = exp(logit - largest), the gradient by a logit that is not selected is a e - b e log e."""
    share_C = -gradient_CK.sum(-1) / found.sums
    if entropy_C is None:
        return share_C, torch.zeros_like(share_C)
    slope_C = entropy_C / found.sums
    return share_C - slope_C * (cast("Tensor", found.entropies) - found.sums.log()), slope_C


def in_front(buffer_CV: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the (C, V) entries of this dtype at the front of the memory of each row: where gradients go that are narrower than logits."""
    return buffer_CV.view(dtype)[:, : buffer_CV.shape[1]]


def _sums_by_id(ids_CK: Tensor, values_CK: Tensor) -> Tensor:
    """Return (C, K): the sum of the values of the same id in its row.  A row takes K * K numbers meanwhile, so few rows are compared at a time."""
    rows = _block_rows(ids_CK, max(1, 9 * ids_CK.shape[1] ** 2))  # float64 values, and whether they are summed
    parts = zip(ids_CK.split(rows), values_CK.split(rows), strict=True)
    return torch.cat([torch.where(ids_RK[:, :, None] == ids_RK[:, None], values_RK[:, None], 0.0).sum(-1) for ids_RK, values_RK in parts])


class Rows(Protocol):
    """Works in place on rows of one buffer; `logprobs` first, then `gradients` of the same rows."""

    def logprobs(self, place: slice, ids_CK: Tensor, /, *, entropy: bool = False) -> Statistics:
        """Return log-probs of the logits in these rows of the buffer, which it may overwrite with whatever `gradients` needs."""
        ...

    def gradients(
        self, place: slice, ids_CK: Tensor, statistics: Statistics, gradient_CK: Tensor, /, entropy_C: Tensor | None = None
    ) -> Tensor:
        """Overwrite the rows by gradients by the logits, each divided by a scale, at the front of each row (`in_front`); gives the (C,) scales.

        The loss has derivatives (C, K) by the log-probs and (C,) by the entropies; the latter only where `logprobs` was asked for entropies.
        """
        ...


@final
class TorchRows:
    """In plain torch, in blocks of rows that fit into a cache: the passes cost a few per cent of the matrix products.

    Args:
        buffer_CV: buffer of logits, in the dtype of statistics.
        softcap: the head's soft-cap; with one, a second buffer holds its slopes.
        dtype: to which gradients are rounded.
    """

    def __init__(self, buffer_CV: Tensor, softcap: float | None, dtype: torch.dtype) -> None:
        self._buffer_CV, self._gradient_CV = buffer_CV, in_front(buffer_CV, dtype)
        self._softcap = softcap
        self._slope_CV = None if softcap is None else torch.empty_like(buffer_CV)
        self._block_rows = _block_rows(buffer_CV, buffer_CV.shape[1] * buffer_CV.itemsize)

    def logprobs(self, place: slice, ids_CK: Tensor, *, entropy: bool = False) -> Statistics:
        """Return log-probs, and leave exp(logit - largest) in the rows."""
        buffer_CV = self._buffer_CV[place]
        entropies_C = torch.empty(len(buffer_CV), dtype=torch.float64, device=buffer_CV.device) if entropy else None
        largest_C, rest_C = (buffer_CV.new_empty(len(buffer_CV)) for _ in range(2))
        selected_CK = buffer_CV.new_empty(ids_CK.shape)
        for block in self._blocks(len(buffer_CV)):
            logits_RV = buffer_CV[block]
            if self._slope_CV is not None and self._softcap is not None:
                logits_RV.div_(self._softcap).tanh_()
                torch.sub(1.0, logits_RV.square(), out=self._slope_CV[place][block])
                logits_RV.mul_(self._softcap)
            torch.amax(logits_RV, -1, out=largest_C[block])
            torch.gather(logits_RV, -1, ids_CK[block], out=selected_CK[block])
            shares_RV = logits_RV.sub_(largest_C[block, None]).exp_()
            selected_RK = shares_RV.gather(-1, ids_CK[block])
            torch.sum(shares_RV.scatter_(-1, ids_CK[block], 0.0), -1, out=rest_C[block])
            shares_RV.scatter_(-1, ids_CK[block], selected_RK)
            if entropies_C is not None:
                # log S - (sum of e log e) / S, where e is exp(logit - largest), and S their sum
                sums_R = shares_RV.sum(-1)
                entropies_C[block] = sums_R.log() + torch.special.entr(shares_RV).sum(-1) / sums_R
        return Statistics(*selected_logprobs_of(ids_CK, selected_CK, largest_C, rest_C), largest_C, entropies_C)

    def gradients(
        self, place: slice, ids_CK: Tensor, statistics: Statistics, gradient_CK: Tensor, entropy_C: Tensor | None = None
    ) -> Tensor:
        """Return gradients up to a scale of each row: that one is applied to hidden states, which saves a pass over the buffer.

        With one id a row, the row that sums to zero is `(exp - sum * onehot)` times `-f' / sum`.
        """
        buffer_CV = self._buffer_CV[place]
        scale_C, slope_C = row_factors(statistics, gradient_CK, entropy_C)
        if ids_CK.shape[1] == 1 and entropy_C is None:
            # sum * (p - 1), exact also where p is nearly 1
            buffer_CV.scatter_(-1, ids_CK, (statistics.logprobs.expm1() * statistics.sums[:, None]).to(buffer_CV.dtype))
        else:
            if entropy_C is None:
                buffer_CV.mul_(scale_C.to(buffer_CV.dtype)[:, None])
            else:
                self._with_logs(buffer_CV, scale_C.to(buffer_CV.dtype), slope_C.to(buffer_CV.dtype))
            buffer_CV.scatter_(-1, ids_CK, selected_gradients(ids_CK, statistics, gradient_CK, entropy_C).to(buffer_CV.dtype))
            scale_C = torch.ones_like(scale_C)
        if self._slope_CV is not None:
            buffer_CV.mul_(self._slope_CV[place])
        if self._gradient_CV.dtype != buffer_CV.dtype:
            for block in self._blocks(len(buffer_CV)):
                # by way of a copy: what is written lies where other entries of the same rows are read
                self._gradient_CV[place][block] = buffer_CV[block].to(self._gradient_CV.dtype)
        return scale_C

    def _with_logs(self, buffer_CV: Tensor, share_C: Tensor, slope_C: Tensor) -> None:
        """Overwrite each e by a e - b e log e."""
        for block in self._blocks(len(buffer_CV)):
            shares_RV = buffer_CV[block]
            logs_RV = torch.special.entr(shares_RV).mul_(slope_C[block, None])
            buffer_CV[block] = logs_RV.addcmul_(shares_RV, share_C[block, None])

    def _blocks(self, rows: int) -> Iterator[slice]:
        return (slice(first, first + self._block_rows) for first in range(0, rows, self._block_rows))
