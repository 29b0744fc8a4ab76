r"""Log-probs of stored ids from hidden states, and their exact gradient, without ever holding (M, V) logits.

For any loss f that sees the student only through log-probs of the stored ids S of a token,

\[ \frac{\partial f}{\partial z} = \mathrm{scatter}(S, f') - \Big(\sum_{j \in S} f'_j\Big)\, \mathrm{softmax}(z), \]

so two ways lead to the gradient.  Where f' of a token follows from the log-probs of that token alone (`fused`), the gradient is made in the
forward pass while the logits of a chunk are at hand: three matrix products.  Otherwise (`selected_logprobs`) the backward pass computes the
logits once more: four.

Memory: one buffer of `chunk_bytes`, and float32 sums of the gradients.

Shape suffixes: M tokens, C tokens of a chunk, K selected ids each, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, final

import torch
from attrs import evolve, frozen
from torch import Tensor

from lopd.errors import GradientError, InvalidRecordError
from lopd.losses.products import Products, sum_dtype
from lopd.losses.rows import Rows, Statistics, TorchRows
from lopd.records.checks import check_at_least, check_number
from lopd.records.steps import LMHead

#: Enough rows of a large vocabulary to keep the matrix products busy (240 of 151,936 entries).
CHUNK_BYTES = 144 << 20
_LEAST_ROWS = 16

#: d loss / d log-probs (C, K) of the rows, from their log-probs (C, K).
Coefficients = Callable[[Tensor, slice], Tensor]


@frozen
class Chunking:
    """How a fused path spends memory and precision; what it computes stays the same.

    Args:
        chunk_bytes: for the buffer of logits; at least 16 rows are taken whatever their size.
        matmul_dtype: of the three matrix products.  None is float32 (float64 for float64 inputs); torch.bfloat16 rounds logits to about
            0.02 nats, and is faster where the processor multiplies bfloat16 faster.  Statistics and sums are float32 in any case.

    Raises:
        InvalidRecordError: no byte, or a dtype of no use.
    """

    chunk_bytes: int = CHUNK_BYTES
    matmul_dtype: torch.dtype | None = None

    def __attrs_post_init__(self) -> None:
        check_at_least("Chunking", "chunk_bytes", self.chunk_bytes, 1)
        # float16 cannot hold the small factors of rows
        fits = self.matmul_dtype in (None, torch.float32, torch.float64, torch.bfloat16)
        check_number("Chunking", "matmul_dtype", self.matmul_dtype, fits, "None, torch.float32, torch.float64 or torch.bfloat16")


DEFAULT_CHUNKING = Chunking()


@frozen(eq=False)
class Needs:
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


@frozen(eq=False)
class Gradients:
    """Sums in float32 or better; None where no gradient was wanted.

    Args:
        hidden: (M, D).
        weight: (V, D).
        bias: (V,).
        neglected: scalar; sum of the 1-norms of those gradients by the logits that were left out, or more.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    neglected: Tensor

    def scaled(self, by: Tensor | None, dtypes: Sequence[torch.dtype | None]) -> list[Tensor | None]:
        """The sums, in place, times a scalar, and then rounded once to the dtypes of what they are gradients of."""
        sums = (self.hidden, self.weight, self.bias)
        return [
            None if total is None else (total if by is None else total.mul_(by)).to(dtype)
            for total, dtype in zip(sums, dtypes, strict=True)
        ]


@final
class ChunkedHead:
    """Hidden states and a head, met chunk by chunk in one buffer.

    Args:
        hidden_MD: of the tokens that count.
        head: the last layer.
        chunking: memory and precision.

    Raises:
        InvalidRecordError: hidden states of another size than the head's; logits, perhaps.
    """

    def __init__(self, hidden_MD: Tensor, head: LMHead, chunking: Chunking) -> None:
        if hidden_MD.ndim != 2 or hidden_MD.shape[1] != head.weight.shape[1]:
            raise InvalidRecordError(
                f"Loss: hidden states have shape {tuple(hidden_MD.shape)}, expected (tokens, {head.weight.shape[1]}) as the head's weight "
                f"has shape {tuple(head.weight.shape)}; pass what goes into the head, not logits."
            )
        self.head = head
        self.sum_dtype = sum_dtype(hidden_MD, head.weight)
        dtype = chunking.matmul_dtype or self.sum_dtype
        self._products = Products(head.weight.detach(), dtype)
        self._hidden_MD = hidden_MD.detach()
        self._bias_V = None if head.bias is None else (head.bias.detach().to(self.sum_dtype) * head.scale).to(dtype)
        vocabulary = head.weight.shape[0]
        buffers = 1 if head.softcap is None else 2
        self._rows = _rows_of_chunk(len(hidden_MD), vocabulary * dtype.itemsize * buffers, chunking.chunk_bytes)
        self._buffer_CV = hidden_MD.new_empty(self._rows, vocabulary, dtype=dtype)
        self._work = rows_for(self._buffer_CV, head.softcap, self.sum_dtype)
        self._added = False

    def zero(self) -> Tensor:
        """The sum over no tokens."""
        return self._hidden_MD.new_zeros((), dtype=self.sum_dtype)

    def logprobs(self, ids_MK: Tensor, entropies_M: Tensor | None = None) -> Tensor:
        """(M, K) log-probs, nats, without a gradient: one matrix product.  Entropies are put where they are wanted, at the price of a log."""
        parts = []
        for first in range(0, len(self._hidden_MD), self._rows):
            rows = slice(first, first + self._rows)
            found = self._logprobs(rows, ids_MK[rows], 0, entropy=entropies_M is not None)
            if entropies_M is not None and found.entropies is not None:
                entropies_M[rows] = found.entropies
            parts.append(found.logprobs)
        return torch.cat(parts) if parts else self._hidden_MD.new_zeros(ids_MK.shape, dtype=self.sum_dtype)

    def gradients(self, ids_MK: Tensor, coefficients: Coefficients, needs: Needs, least_M: Tensor | None = None) -> Gradients:
        """The gradient of a loss whose derivative by the selected log-probs is given by `coefficients`: three matrix products.

        Rows whose gradient by the logits has a 1-norm of at most twice `least` (0 if None) skip two of them.
        """
        sums = self._empty_sums(needs)
        neglected, first, used = self.zero(), 0, 0
        kept: list[tuple[Tensor, Tensor]] = []
        while first < len(self._hidden_MD):
            rows = slice(first, min(first + self._rows - used, len(self._hidden_MD)))
            ids_CK = ids_MK[rows]
            found = self._logprobs(rows, ids_CK, used)
            gradient_CK = coefficients(found.logprobs, rows)
            scale_C = self._work.gradients(slice(used, used + len(ids_CK)), ids_CK, found, gradient_CK)
            # |f'| (1 - p): the gradient of log p by the logits has a 1-norm of 2 (1 - p)
            size_C = (gradient_CK * found.logprobs.expm1()).abs().sum(-1)
            small_C = size_C <= (0.0 if least_M is None else least_M[rows])
            neglected += 2 * size_C.masked_fill(~small_C, 0.0).sum()
            index_R = (~small_C).nonzero().squeeze(-1)
            if len(index_R) < len(size_C):
                self._close_up(index_R, used)
            kept.append((index_R + first, scale_C[index_R]))
            first, used = rows.stop, used + len(index_R)
            if used > self._rows // 2 or first == len(self._hidden_MD):
                self._add_gradients(sums, *(torch.cat(parts) for parts in zip(*kept, strict=True)))
                kept, used = [], 0
        return evolve(sums, neglected=neglected)

    def _close_up(self, index_R: Tensor, used: int) -> None:
        """Move the rows that are kept to the front, so that the next logits go behind them and the products stay large."""
        for place, row in enumerate(index_R.tolist()):
            if place != row:
                self._buffer_CV[used + place].copy_(self._buffer_CV[used + row])

    def _empty_sums(self, needs: Needs) -> Gradients:
        # what the first chunk overwrites is not filled with zeros, where there is one
        new = torch.empty if len(self._hidden_MD) else torch.zeros
        vocabulary, size = self.head.weight.shape
        options: dict[str, Any] = {"dtype": self.sum_dtype, "device": self._hidden_MD.device}
        return Gradients(
            hidden=torch.zeros(self._hidden_MD.shape, **options) if needs.hidden else None,
            weight=new(vocabulary, size, **options) if needs.weight else None,
            bias=new(vocabulary, **options) if needs.bias else None,
            neglected=self.zero(),
        )

    def _hidden(self, rows: slice | Tensor) -> Tensor:
        """(C, D) rows times the head's scale, in the dtype of the sums."""
        hidden_CD = self._hidden_MD[rows].to(self.sum_dtype)
        return hidden_CD if self.head.scale == 1.0 else hidden_CD * self.head.scale

    def _logprobs(self, rows: slice, ids_CK: Tensor, used: int, *, entropy: bool = False) -> Statistics:
        """Logits of the rows into the buffer, behind those in use, and their statistics."""
        place = slice(used, used + len(ids_CK))
        self._products.logits(self._hidden(rows).to(self._buffer_CV.dtype), self._bias_V, self._buffer_CV[place])
        return self._work.logprobs(place, ids_CK, entropy=entropy)

    def _add_gradients(self, sums: Gradients, index_R: Tensor, scale_R: Tensor) -> None:
        """The share of the rows in the buffer."""
        buffer_RV, first = self._buffer_CV[: len(index_R)], not self._added
        self._added = True
        scale_R1 = (scale_R * self.head.scale)[:, None]
        if sums.hidden is not None:
            gradient_RD = torch.zeros(len(index_R), sums.hidden.shape[1], dtype=self.sum_dtype, device=index_R.device)
            self._products.hidden_gradient(buffer_RV, gradient_RD)
            sums.hidden[index_R] = gradient_RD.mul_(scale_R1)
        if sums.weight is not None:
            scaled_RD = self._hidden(index_R).mul(scale_R[:, None]).to(buffer_RV.dtype)
            self._products.weight_gradient(buffer_RV, scaled_RD, sums.weight, first=first)
        if sums.bias is not None:
            self._products.weight_gradient(buffer_RV, scale_R1.to(buffer_RV.dtype), sums.bias[:, None], first=first)


def rows_for(buffer_CV: Tensor, softcap: float | None, dtype: torch.dtype) -> Rows:
    """Triton's kernels for float32 statistics on CUDA where Triton is installed, plain torch otherwise."""
    if buffer_CV.is_cuda and dtype == torch.float32 and find_spec("triton"):
        from lopd.losses.triton_rows import TritonRows

        return TritonRows(buffer_CV, softcap, dtype)
    return TorchRows(buffer_CV, softcap, dtype)


def _rows_of_chunk(rows: int, row_bytes: int, chunk_bytes: int) -> int:
    """Rows of equal chunks that fit into the bytes, a multiple of 16 where there are more."""
    fitting = max(chunk_bytes // row_bytes // _LEAST_ROWS * _LEAST_ROWS, _LEAST_ROWS)
    chunks = max(-(-rows // fitting), 1)
    return max(min(-(-rows // (chunks * _LEAST_ROWS)) * _LEAST_ROWS, rows), 1)


def refuse_second_order() -> None:
    """Refuse `create_graph`: with `create_graph`, torch runs a backward pass with gradients enabled.

    Raises:
        GradientError: it does.
    """
    if torch.is_grad_enabled():
        raise GradientError(
            "Loss: a gradient of its gradient was asked for (create_graph), expected first order only; use ReferenceOPDLoss for that."
        )


@frozen(eq=False)
class _Selection:
    """What `_SelectedLogprobs` is asked for; entropies go into the tensor, if there is one."""

    head: LMHead
    ids: Tensor
    chunking: Chunking
    entropies: Tensor | None = None


class _SelectedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, job: _Selection) -> Tensor:
        ctx.save_for_backward(hidden_MD, weight_VD, bias_V)
        ctx.job = job
        return ChunkedHead(hidden_MD, job.head, job.chunking).logprobs(job.ids, job.entropies)

    @staticmethod
    def backward(ctx: Any, upstream_MK: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        hidden_MD, weight_VD, bias_V = ctx.saved_tensors
        job: _Selection = ctx.job
        chunked = ChunkedHead(hidden_MD, LMHead(weight_VD, bias_V, job.head.softcap, job.head.scale), job.chunking)
        sums = chunked.gradients(job.ids, lambda _, rows: upstream_MK[rows], Needs(*ctx.needs_input_grad[:3]))
        return (*sums.scaled(None, (hidden_MD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)), None)


def selected_logprobs(hidden_MD: Tensor, head: LMHead, ids: Tensor, chunking: Chunking = DEFAULT_CHUNKING) -> Tensor:
    r"""Log-probs of stored ids under the head, differentiable, for any loss downstream: \(z_S - \log\sum_v \exp z_v\).

    The backward pass computes the logits again; with the forward pass that makes four matrix products.  `FusedOPDLoss` needs three.

    Args:
        hidden_MD: (M, D) hidden states below the head; leave out tokens that do not count.
        head: the last layer; no gradient is computed for a frozen one.
        ids: (M,) or (M, K) int64.
        chunking: memory and precision.

    Returns:
        Log-probs in the shape of `ids`, nats, at most 0; float64 if hidden states or weight are, float32 otherwise.

    Raises:
        InvalidRecordError: hidden states of another size than the head's.
        GradientError: in a backward pass with `create_graph`.

    Memory: `chunk_bytes`, never M * V.

    >>> head = LMHead(torch.tensor([[1.0], [0.0]]))
    >>> selected_logprobs(torch.tensor([[0.0]]), head, torch.tensor([1])).exp()
    tensor([0.5000])
    """
    ids_MK = ids if ids.ndim == 2 else ids[:, None]
    logprobs_MK: Tensor = _SelectedLogprobs.apply(hidden_MD, head.weight, head.bias, _Selection(head, ids_MK, chunking))  # type: ignore[no-untyped-call]
    return logprobs_MK if ids.ndim == 2 else logprobs_MK.squeeze(-1)


def selected_logprobs_and_entropies(hidden_MD: Tensor, head: LMHead, ids_MK: Tensor, chunking: Chunking) -> tuple[Tensor, Tensor]:
    """The same (M, K) log-probs, and the (M,) entropies of the whole distributions, nats, without a gradient."""
    entropies_M = hidden_MD.new_zeros(len(hidden_MD), dtype=sum_dtype(hidden_MD, head.weight))
    job = _Selection(head, ids_MK, chunking, entropies_M)
    logprobs_MK: Tensor = _SelectedLogprobs.apply(hidden_MD, head.weight, head.bias, job)  # type: ignore[no-untyped-call]
    return logprobs_MK, entropies_M
