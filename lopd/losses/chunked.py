r"""Log-probs of stored ids from hidden states, and their exact gradient, without ever holding (M, V) logits.

For any loss f that sees the student only through log-probs of the stored ids S of a token,

\[ \frac{\partial f}{\partial z} = \mathrm{scatter}(S, f') - \Big(\sum_{j \in S} f'_j\Big)\, \mathrm{softmax}(z), \]

and the entropy H adds \(-h\,p_v (\log p_v + H)\) for a derivative h.  So two ways lead to the gradient.  Where f' of a token follows from what the
student predicts of that token alone (`fused`), the gradient is made in the forward pass while the logits of a chunk are at hand: three matrix
products.  Otherwise (`selected_logprobs`) the backward pass computes the logits once more: four.

Memory: one buffer of `chunk_bytes`, float32 sums of the gradients, and blocks of 2 MiB (64 on CUDA) while rows are worked on.
The host waits for a GPU only where rows are to be left out.

Shape suffixes: M tokens, C tokens of a chunk, K selected ids each, D hidden size, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, final

import torch
from attrs import evolve, frozen
from torch import Tensor

from lopd.errors import GradientError, InvalidRecordError
from lopd.losses.chunking import DEFAULT_CHUNKING, Chunking, chunk_rows, dtypes_of, sum_dtype
from lopd.losses.products import Products
from lopd.losses.rows import Rows, Statistics, TorchRows, in_front
from lopd.losses.tokens import check_ids, naming_ids
from lopd.records.devices import check_device, has_bfloat16
from lopd.records.steps import LMHead

_LOG = logging.getLogger(__name__)
_ALIGNED = 64  # entries: rows of a GPU's buffer begin at places from which it reads fast, whatever the vocabulary


@final
class ChunkedHead:
    """Hidden states and a head, met chunk by chunk in one buffer, and sums of gradients that are made on the way.

    Args:
        hidden_MD: hidden states of the tokens that count.
        head: the last layer.
        chunking: memory and precision.
        wanted: whether the gradients by hidden states, weight and bias are.

    Raises:
        InvalidRecordError: hidden states of another size than the head's; logits, perhaps.
        ModelError: hidden states on a device without float64.
    """

    def __init__(self, hidden_MD: Tensor, head: LMHead, chunking: Chunking, wanted: Sequence[bool] = (False, False, False)) -> None:
        if hidden_MD.ndim != 2 or hidden_MD.shape[1] != head.weight.shape[1]:
            raise InvalidRecordError(
                f"Loss: hidden states have shape {tuple(hidden_MD.shape)}, expected (tokens, {head.weight.shape[1]}) as the head's weight "
                f"has shape {tuple(head.weight.shape)}; pass what goes into the head, not logits."
            )
        check_device("Loss", hidden_MD.device)
        self._hidden_MD, vocabulary = hidden_MD.detach(), head.weight.shape[0]
        operands, self._sum_dtype = dtypes_of(chunking, hidden_MD, head)
        self._products = Products(head.weight.detach(), operands, self._sum_dtype, head.scale)
        self._bias_V = None if head.bias is None else head.bias.detach().to(self._sum_dtype) * head.scale
        # the first rows overwrite the sums of weight and bias, so nothing fills those with zeros where there are rows
        new = torch.empty_like if len(hidden_MD) else torch.zeros_like
        of = zip((torch.zeros_like, new, new), (hidden_MD, head.weight, head.bias), wanted, strict=True)
        #: Gradients by hidden states (M, D), weight (V, D) and bias (V,), float32 or better; None where none is wanted.
        self.sums = [make(t.detach(), dtype=self._sum_dtype) if want and t is not None else None for make, t, want in of]
        # how large it may be depends on memory that is free, so the sums come before
        width = vocabulary + (-vocabulary % _ALIGNED if hidden_MD.is_cuda else 0)
        row_bytes = width * self._sum_dtype.itemsize * (1 if head.softcap is None else 2)
        self._rows = chunk_rows(chunking, len(hidden_MD), row_bytes, hidden_MD.device)
        self._buffer_CV = hidden_MD.new_empty(self._rows, width, dtype=self._sum_dtype)[:, :vocabulary]
        self._gradient_CV = in_front(self._buffer_CV, operands)
        self._work = rows_for(self._buffer_CV, head.softcap, operands)
        self._first = True
        #: Scalar: the sum of the 1-norms of those gradients by the logits that were left out, or more.
        self.neglected = self.zeros()
        self._kept: list[tuple[Tensor, Tensor]] = []  # rows whose gradients by the logits wait at the front of the buffer, and their scales
        self._used = 0

    def zeros(self, *shape: int) -> Tensor:
        """Return zeros in the dtype of the sums: float32, or float64 if hidden states or weight are."""
        return self._hidden_MD.new_zeros(shape, dtype=self._sum_dtype)

    def dtype_of(self, found: Statistics) -> torch.dtype:
        """Return the dtype in which an objective is given these: what several probabilities leave of 1 would be lost in float32."""
        return found.logprobs.dtype if found.logprobs.shape[1] > 1 else self._sum_dtype

    def chunks(self, ids_MK: Tensor, *, entropy: bool = False) -> Iterator[tuple[slice, Statistics]]:
        """Yield the rows of each chunk and the statistics of their logits, without a gradient: one matrix product.

        Where gradients are wanted, call `add` before the next chunk.

        Raises:
            InvalidRecordError: the ids are not a row for each hidden state or, on a CPU, not in the vocabulary.
        """
        self._ids_MK = ids_MK = check_ids(ids_MK, len(self._hidden_MD))
        first, count = 0, len(self._hidden_MD)
        while first < count:
            rows = slice(first, min(first + self._rows - self._used, count))
            place = slice(self._used, self._used + rows.stop - first)
            self._products.logits(self._hidden_MD[rows], self._bias_V, self._buffer_CV[place])
            with naming_ids(ids_MK, self._buffer_CV.shape[1]):
                self._chunk = rows, place, self._work.logprobs(place, ids_MK[rows], entropy=entropy)
            yield rows, self._chunk[2]
            first = rows.stop

    def add(self, gradient_CK: Tensor, entropy_C: Tensor | None = None, *, least_C: Tensor | float | None = None) -> None:
        """Add the gradients of a loss whose derivatives by log-probs and entropies of the present chunk are given: two more matrix products.

        With `least_C`, rows whose gradient by the logits has a 1-norm of at most twice that skip them.  Which these are comes to the host, so that
        it waits for the device once a chunk; without it, nothing comes to the host.
        """
        rows, place, found = self._chunk
        scale_C = self._work.gradients(place, self._ids_MK[rows], found, gradient_CK, entropy_C).to(self._sum_dtype)
        if least_C is None:
            self._add_gradients(rows, scale_C)
            return
        # |f'| (1 - p): the gradient of log p by the logits has a 1-norm of 2 (1 - p)
        size_C = (gradient_CK * found.logprobs.expm1()).abs().sum(-1)
        if entropy_C is not None and found.entropies is not None:
            # that of H has one of at most 2 H: p (log p + H) sums to 0, and where it is positive it is at most p H
            size_C = size_C + entropy_C.abs() * found.entropies
        small_C = size_C <= least_C
        self.neglected += 2 * size_C.masked_fill(~small_C, 0.0).sum()
        index_R = (~small_C).nonzero().squeeze(-1)
        if len(index_R) < len(size_C):
            self._close_up(index_R)
        self._kept.append((index_R + rows.start, scale_C[index_R]))
        self._used += len(index_R)
        if self._used > self._rows // 2 or rows.stop == len(self._hidden_MD):
            self._add_gradients(*(torch.cat(parts) for parts in zip(*self._kept, strict=True)))
            self._kept, self._used = [], 0

    def _close_up(self, index_R: Tensor) -> None:
        """Move the rows that are kept to the front, so that the next logits go behind them and the products stay large."""
        for place, row in enumerate(index_R.tolist()):
            if place != row:
                self._gradient_CV[self._used + place].copy_(self._gradient_CV[self._used + row])

    def _add_gradients(self, rows: slice | Tensor, scale_R: Tensor) -> None:
        """Add the share of the rows in the buffer to the sums."""
        gradient_RV, scale_R1, first = self._gradient_CV[: len(scale_R)], scale_R[:, None], self._first
        self._first = False
        hidden_MD, weight_VD, bias_V = self.sums
        if hidden_MD is not None:
            part_RD = hidden_MD.new_empty(len(scale_R), hidden_MD.shape[1])
            self._products.hidden_gradient(gradient_RV, part_RD)
            hidden_MD[rows] = part_RD.mul_(scale_R1)
        if weight_VD is not None:
            self._products.weight_gradient(gradient_RV, self._hidden_MD[rows].to(self._sum_dtype) * scale_R1, weight_VD, first=first)
        if bias_V is not None:
            self._products.weight_gradient(gradient_RV, scale_R1, bias_V[:, None], first=first)


def rows_for(buffer_CV: Tensor, softcap: float | None, operands: torch.dtype) -> Rows:
    """Return Triton's kernels for float32 logits on CUDA where they start, plain torch otherwise."""
    kernels = _triton_rows(buffer_CV.device, operands) if buffer_CV.is_cuda and buffer_CV.dtype == torch.float32 else None
    return (kernels or TorchRows)(buffer_CV, softcap, operands)


@cache
def _triton_rows(device: torch.device, operands: torch.dtype) -> Callable[[Tensor, float | None, torch.dtype], Rows] | None:
    """Return the kernels if Triton is installed and both run on this device: it is tried once, as it needs a C compiler and the headers of Python.

    Raises:
        torch.OutOfMemoryError: nothing was found, and the next call tries again.
    """
    # a card without bfloat16 is not tried: where the compiler ends the process, nothing can be caught
    if not find_spec("triton") or (operands == torch.bfloat16 and not has_bfloat16(device)):
        return None
    try:
        from lopd.losses.triton_rows import TritonRows

        rows, ids_CK = TritonRows(torch.zeros(1, 8, device=device), None, operands), torch.zeros(1, 1, dtype=torch.int64, device=device)
        rows.gradients(slice(1), ids_CK, rows.logprobs(slice(1), ids_CK), torch.zeros(1, 1, device=device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # those of Triton's own derive from nothing narrower
        text = "Losses on %s, %s: they are computed in plain torch, since Triton does not start (%.200s); it needs a C compiler and Python's headers"
        _LOG.warning(text, device, operands, " ".join(str(error).split()))
        return None
    return TritonRows


def refuse_second_order() -> None:
    """Refuse `create_graph`, with which torch runs a backward pass with gradients enabled, by a GradientError."""
    if torch.is_grad_enabled():
        raise GradientError(
            "Loss: a gradient of its gradient was asked for (create_graph), expected first order only; use ReferenceOPDLoss for that."
        )


@frozen(eq=False)
class _Selection:
    """What `_SelectedLogprobs` is asked for."""

    head: LMHead
    ids: Tensor
    chunking: Chunking
    entropy: bool
    skipping: bool


class _SelectedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, job: _Selection) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(hidden_MD, weight_VD, bias_V)
        ctx.set_materialize_grads(False)
        ctx.job = job
        chunked = ChunkedHead(hidden_MD, job.head, job.chunking)
        found = [statistics for _, statistics in chunked.chunks(job.ids, entropy=job.entropy)]
        logprobs = [part.logprobs.to(chunked.dtype_of(part)) for part in found] or [chunked.zeros(0, job.ids.shape[1])]
        entropies = [part.entropies.to(chunked.dtype_of(part)) for part in found if part.entropies is not None] or [chunked.zeros(0)]
        return torch.cat(logprobs), torch.cat(entropies) if job.entropy else None

    @staticmethod
    def backward(ctx: Any, upstream_MK: Tensor | None, upstream_M: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        hidden_MD, weight_VD, bias_V = ctx.saved_tensors
        head = evolve(ctx.job.head, weight=weight_VD, bias=bias_V)
        chunked = ChunkedHead(hidden_MD, head, ctx.job.chunking, ctx.needs_input_grad[:3])
        gradient_MK = chunked.zeros(*ctx.job.ids.shape) if upstream_MK is None else upstream_MK
        for rows, _statistics in chunked.chunks(ctx.job.ids, entropy=upstream_M is not None):
            chunked.add(gradient_MK[rows], None if upstream_M is None else upstream_M[rows], least_C=0.0 if ctx.job.skipping else None)
        return (*chunked.sums, None)  # autograd rounds each once to the dtype of what it is the gradient of


def selected_logprobs(hidden_MD: Tensor, head: LMHead, ids: Tensor, chunking: Chunking = DEFAULT_CHUNKING) -> Tensor:
    r"""Return log-probs of stored ids under the head, differentiable, for any loss downstream: \(z_S - \log\sum_v \exp z_v\).

    The backward pass computes the logits again; with the forward pass that makes four matrix products.  `FusedOPDLoss` needs three.

    Args:
        hidden_MD: (M, D) hidden states below the head; leave out tokens that do not count.
        head: the last layer; no gradient is computed for a frozen one.
        ids: (M,) or (M, K) int64.
        chunking: memory and precision.

    Returns:
        Log-probs in the shape of `ids`, nats, at most 0; float64 if hidden states or weight are, float32 otherwise.

    Raises:
        InvalidRecordError: hidden states of another size than the head's, ids that are not one, or a row, for each of them, or ids
            without a row in the head, which are looked for on a CPU.
        ModelError: hidden states on a device without float64, such as an Apple GPU.
        GradientError: in a backward pass with `create_graph`.

    Memory: `chunk_bytes`, never M * V.

    >>> head = LMHead(torch.tensor([[1.0], [0.0]]))
    >>> selected_logprobs(torch.tensor([[0.0]]), head, torch.tensor([1])).exp()
    tensor([0.5000])
    """
    logprobs_MK, _ = logprobs_and_entropies(hidden_MD, head, ids[:, None] if ids.ndim == 1 else ids, chunking)
    logprobs_MK = logprobs_MK.to(sum_dtype(hidden_MD, head.weight))
    return logprobs_MK.squeeze(-1) if ids.ndim == 1 else logprobs_MK


def logprobs_and_entropies(
    hidden_MD: Tensor, head: LMHead, ids_MK: Tensor, chunking: Chunking, *, entropy: bool = False, skipping: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return the (M, K) log-probs of `selected_logprobs`; and, if asked for, the (M,) entropies of the distributions, nats, differentiable too.

    Those of several ids are float64, see `ChunkedHead.dtype_of`.  With `skipping`, rows without any gradient cost one product less than others
    in the backward pass, and the host waits for which they are.
    """
    found: tuple[Tensor, Tensor | None] = _SelectedLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden_MD, head.weight, head.bias, _Selection(head, ids_MK, chunking, entropy, skipping)
    )
    return found
