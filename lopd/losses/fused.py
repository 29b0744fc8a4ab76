r"""The losses of `reference` in the memory of one chunk: the same objectives, with gradients made in the forward pass.

Shape suffixes: N tokens of a batch, M of them that count, C of a chunk, K selected ids each, D hidden size, V vocabulary.
"""

import math
from typing import Any, final

import torch
from attrs import define, evolve, field, frozen
from torch import Tensor

from lopd.errors import GradientError
from lopd.losses.chunked import (
    DEFAULT_CHUNKING,
    ChunkedHead,
    Chunking,
    Gradients,
    Needs,
    refuse_second_order,
    selected_logprobs,
    selected_logprobs_and_entropies,
)
from lopd.losses.objective import Objective, OPDObjective, TokenLosses, Tokens, Transform, check_clip, to_transforms
from lopd.records.checks import check_number
from lopd.records.steps import Batch, LMHead, LossOutput


@define(eq=False)
class _Job:
    """One micro-batch on its way through `_LossSum`; keeps what the objective said of each chunk."""

    head: LMHead
    objective: Objective
    tokens: Tokens
    chunking: Chunking
    epsilon: float
    said: list[TokenLosses] = field(factory=list)
    neglected: Tensor | None = None

    def coefficients(self, logprobs_CK: Tensor, rows: slice) -> Tensor:
        """The derivative of the chunk's loss, by autograd on (C, K) values: each equation is written once, in its objective."""
        with torch.enable_grad():
            leaf_CK = logprobs_CK.detach().requires_grad_()
            losses = self.objective(leaf_CK, self.tokens.where(rows))
            (gradient_CK,) = torch.autograd.grad(losses.loss.sum(), leaf_CK)
        self.said.append(losses.detach())
        return gradient_CK


class _LossSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, job: _Job) -> Tensor:
        chunked = ChunkedHead(hidden_MD, job.head, job.chunking)
        least_M = job.epsilon * job.tokens.weight
        ctx.sums = chunked.gradients(job.objective.ids(job.tokens), job.coefficients, Needs(*ctx.needs_input_grad[:3]), least_M)
        job.neglected = ctx.sums.neglected
        ctx.dtypes = (hidden_MD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        return torch.stack([chunk.loss.sum() for chunk in job.said]).sum() if job.said else chunked.zero()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        sums: Gradients | None = ctx.sums
        if sums is None:
            raise GradientError("Loss: its backward pass is run a second time, expected once; compute the loss again.")
        ctx.sums = None
        return (*sums.scaled(upstream, ctx.dtypes), None)


@final
@frozen
class FusedLoss:
    r"""Any objective in the memory of one chunk of logits.

    Args:
        objective: which loss.  One whose tokens depend on each other costs a fourth matrix product.
        chunking: memory and precision.
        epsilon: tokens with \(\lvert f'\rvert(1 - p) \le \epsilon\), f' being the derivative of the unweighted loss by the log-prob and p the
            probability, skip two of the three products; with several stored ids their sum.  0 is exact: then only tokens whose gradient is
            0 skip them.  `LossOutput.neglected_sum` bounds what is left out.  For objectives that cost a fourth product it does nothing.

    Raises:
        InvalidRecordError: epsilon is less than 0 or not finite.
    """

    objective: Objective
    chunking: Chunking = DEFAULT_CHUNKING
    epsilon: float = 0.0

    def __attrs_post_init__(self) -> None:
        check_number("FusedLoss", "epsilon", self.epsilon, 0 <= self.epsilon < math.inf, "finite and at least 0")

    def __call__(self, hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
        """Weighted sums over the counted tokens.

        Raises:
            InvalidRecordError: hidden states of another size than the head's.
            GradientError: in a backward pass that is the second one, or has `create_graph`.
        """
        on_N = batch.weight > 0
        # where all tokens count, selecting them would copy hidden states, and their gradient once more
        tokens, hidden_MD = Tokens.counted(batch), hidden_ND if bool(on_N.all()) else hidden_ND[on_N]
        trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden_MD, head.weight, head.bias))
        if not (trained and self.objective.per_token):
            logprobs_MK, tokens = self._statistics(hidden_MD, head, tokens)
            return self.objective(logprobs_MK, tokens).sums()
        job = _Job(head, self.objective, tokens, self.chunking, self.epsilon)
        loss_sum: Tensor = _LossSum.apply(hidden_MD, head.weight, head.bias, job)  # type: ignore[no-untyped-call]
        reverse_kl_M, clipped_M, logprobs_M = (
            torch.cat([loss_sum.detach().new_zeros(0), *(getattr(chunk, name) for chunk in job.said)])
            for name in ("reverse_kl", "clipped", "logprobs")
        )
        return LossOutput(loss_sum, reverse_kl_M.sum(), clipped_M.sum(), job.neglected, logprobs_M)

    def _statistics(self, hidden_MD: Tensor, head: LMHead, tokens: Tokens) -> tuple[Tensor, Tokens]:
        """(M, K) log-probs with their gradient, and the tokens with what else the objective wants to know."""
        ids_MK = self.objective.ids(tokens)
        if not self.objective.wants_entropy:
            return selected_logprobs(hidden_MD, head, ids_MK, self.chunking), tokens
        logprobs_MK, entropies_M = selected_logprobs_and_entropies(hidden_MD, head, ids_MK, self.chunking)
        return logprobs_MK, evolve(tokens, student_entropies=entropies_M)


@final
@frozen
class FusedOPDLoss:
    r"""`ReferenceOPDLoss` in the memory of one chunk of logits, at the price of three matrix products.

    \(\sum_t w_t\, (-A_t\, \ell_\theta(a_t))\), \(A_t = \mathrm{clip}(\ell_T - \mathrm{sg}[\ell_\theta], \pm\tau)\).

    Args:
        clip, ratio_to_ref, transforms, advantage, kl_baseline: as in `ReferenceOPDLoss`.  A transform without the mark `per_token` needs whole
            rollouts, and costs a fourth product.
        chunking: memory and precision.
        epsilon: tokens whose advantage times (1 - probability) is at most this skip two of the three products (see `FusedLoss`); 0 is exact.

    Raises:
        InvalidRecordError: `clip` is neither None nor finite and more than 0, or epsilon makes no sense.

    Memory: `chunking.chunk_bytes`, and float32 sums of the gradients; tokens that do not count take none.

    Source: Lightning OPD (arXiv 2604.13010v2), eq. 2, 4 and algorithm 1.
    """

    clip: float | None = 10.0
    ratio_to_ref: bool = False
    transforms: tuple[Transform, ...] = field(default=(), converter=to_transforms)
    advantage: float | None = None
    kl_baseline: bool = False
    chunking: Chunking = DEFAULT_CHUNKING
    epsilon: float = 0.0

    def __attrs_post_init__(self) -> None:
        check_clip("FusedOPDLoss", self.clip)
        check_number("FusedOPDLoss", "epsilon", self.epsilon, 0 <= self.epsilon < math.inf, "finite and at least 0")

    def __call__(self, hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
        """Weighted sums over the counted tokens.

        Raises:
            MissingScoresError: the batch has no teacher column, or no ref column though the ratio is asked for.
            InvalidRecordError: hidden states of another size than the head's.
            GradientError: in a backward pass that is the second one, or has `create_graph`.
        """
        objective = OPDObjective(self.clip, self.ratio_to_ref, self.transforms, self.advantage, self.kl_baseline)
        return FusedLoss(objective, self.chunking, self.epsilon)(hidden_ND, head, batch)


@final
@frozen
class FusedSFTLoss:
    r"""`SFTLoss` in the memory of one chunk of logits: \(\sum_t w_t\, (-\ell_\theta(a_t))\).

    Args:
        chunking: memory and precision.

    Source: Lightning OPD (arXiv 2604.13010v2), eq. 6.
    """

    chunking: Chunking = DEFAULT_CHUNKING

    def __call__(self, hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
        """Weighted sums over the counted tokens; the reverse KL of a loss without a teacher is 0."""
        return FusedLoss(OPDObjective.sft(), self.chunking)(hidden_ND, head, batch)
