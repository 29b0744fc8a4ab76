"""The losses in plain torch, readable beside their equations: the truth that every faster path is compared with.

Memory: logits of all counted tokens of a micro-batch, M * V * 4 bytes, a few times over.
"""

import math
from collections.abc import Sequence
from typing import final

import torch
from attrs import field, frozen
from torch import Tensor

from lopd.checks import check_number
from lopd.errors import InvalidRecordError, MissingScoresError
from lopd.losses import functional
from lopd.protocols import OPDLoss
from lopd.types import Batch, LMHead, LossOutput


def _counted(batch: Batch) -> Tensor:
    """(N,) bool: tokens that count.  Others are dropped before any arithmetic, so nothing of theirs can leak through a mask."""
    return batch.weight > 0


def _student_logprobs(hidden_ND: Tensor, head: LMHead, batch: Batch) -> Tensor:
    """(M,) log-probs, nats, of the counted targets; carries the gradient."""
    counted_N = _counted(batch)
    logprobs_MV = head.logits(hidden_ND[counted_N]).log_softmax(-1)
    return logprobs_MV.gather(-1, batch.targets[counted_N][:, None]).squeeze(-1)


def _column(values_N: Tensor | None, name: str, batch: Batch) -> Tensor:
    if values_N is None:
        raise MissingScoresError(
            f"Batch: {name} is None, expected a score column; name it in `batches({name.removesuffix('_logprobs')}=...)`."
        )
    return values_N[_counted(batch)]


@final
@frozen
class ReferenceOPDLoss:
    r"""Lightning OPD: \(\sum_t w_t\, (-A_t\, \ell_\theta(a_t))\), \(A_t = \mathrm{clip}(\ell_T - \mathrm{sg}[\ell_\theta], \pm\tau)\).

    Args:
        clip: \(\tau\) in nats, finite and more than 0; or None for no clipping.
        ratio_to_ref: multiply by the per-token importance ratio to the `ref` column (`functional.lightning_with_ratio`).

    Raises:
        InvalidRecordError: `clip` is neither.

    Source: Lightning OPD (arXiv 2604.13010v2), eq. 2, 4 and algorithm 1.
    """

    clip: float | None = 10.0
    ratio_to_ref: bool = False

    def __attrs_post_init__(self) -> None:
        fits = self.clip is None or 0 < self.clip < math.inf
        check_number("ReferenceOPDLoss", "clip", self.clip, fits, "None, or finite and more than 0 nats")

    def __call__(self, hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
        """Weighted sums over the counted tokens.

        Raises:
            MissingScoresError: the batch has no teacher column, or no ref column though the ratio is asked for.
        """
        teacher_M = _column(batch.teacher_logprobs, "teacher_logprobs", batch)
        weight_M = batch.weight[_counted(batch)]
        student_M = _student_logprobs(hidden_ND, head, batch)
        advantages_M = functional.advantages(teacher_M, student_M, self.clip)
        if self.ratio_to_ref:
            ref_M = _column(batch.ref_logprobs, "ref_logprobs", batch)
            loss_M = functional.lightning_with_ratio(student_M, advantages_M, ref_M)
        else:
            loss_M = functional.lightning(student_M, advantages_M)
        gap_M = student_M.detach() - teacher_M
        clipped_M = torch.zeros_like(gap_M) if self.clip is None else (gap_M.abs() > self.clip).to(gap_M.dtype)
        return LossOutput((weight_M * loss_M).sum(), (weight_M * gap_M).sum(), (weight_M * clipped_M).sum())


@final
@frozen
class SFTLoss:
    r"""Supervised fine-tuning: \(\sum_t w_t\, (-\ell_\theta(a_t))\).  Needs no scores.

    Source: Lightning OPD (arXiv 2604.13010v2), eq. 6.
    """

    def __call__(self, hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
        """Weighted sums over the counted tokens; the reverse KL of a loss without a teacher is 0."""
        weight_M = batch.weight[_counted(batch)]
        loss_M = functional.negative_log_likelihood(_student_logprobs(hidden_ND, head, batch))
        zero = torch.zeros((), device=loss_M.device)
        return LossOutput((weight_M * loss_M).sum(), zero, zero)


def _to_terms(terms: Sequence[tuple[float, OPDLoss]]) -> tuple[tuple[float, OPDLoss], ...]:
    if not terms:
        raise InvalidRecordError("WeightedLoss: it has 0 terms, expected at least 1; pass (coefficient, loss) pairs.")
    return tuple(terms)


@final
@frozen
class WeightedLoss:
    """A sum of losses, each with its coefficient; what is reported beside the loss comes from the first term.

    Args:
        terms: (coefficient, loss) pairs, for example `[(1.0, ReferenceOPDLoss()), (0.1, SFTLoss())]`.
    """

    terms: tuple[tuple[float, OPDLoss], ...] = field(converter=_to_terms)

    def __call__(self, hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
        """Weighted sums over the counted tokens."""
        outputs = [(coefficient, loss(hidden_ND, head, batch)) for coefficient, loss in self.terms]
        total = torch.stack([coefficient * output.loss_sum for coefficient, output in outputs]).sum()
        first = outputs[0][1]
        return LossOutput(total, first.reverse_kl_sum, first.clipped_sum)
