"""The losses in plain torch, readable beside their equations: the truth that every faster path is compared with.

Memory: logits of all counted tokens of a micro-batch, M * V * 4 bytes, a few times over.
"""

from collections.abc import Sequence
from typing import final

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from lopd.errors import ArgumentError, InvalidRecordError
from lopd.losses.beside import OfObjective, OfParts, check_objective
from lopd.losses.objective import Objective, OPDObjective, OPDSettings
from lopd.losses.tokens import Tokens, check_ids, counted_rows, naming_ids
from lopd.protocols import OPDLoss
from lopd.protocols.doors import check_noun
from lopd.records.checks import to_finite
from lopd.records.steps import Batch, LMHead, LossOutput


@final
@frozen
class ReferenceLoss(OfObjective):
    """Any objective, in plain torch, in the dtype of its arguments; what a tail below 1e-7 gives to a gradient, `FusedLoss` alone keeps in float32.

    Args:
        objective: which loss.

    Raises:
        ArgumentError: the objective is something else, such as a loss.
    """

    objective: Objective = field(validator=check_objective)

    def __call__(self, hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
        """Return weighted sums over the counted tokens.

        Raises:
            InvalidRecordError: the objective, or a function in it, gives another shape than one value a token, or ids that are not a row for each
                or, on a CPU, without a row in the head.
        """
        tokens = Tokens.counted(batch)
        logprobs_MV = head.logits(counted_rows(hidden_ND, batch)).log_softmax(-1)
        if self.objective.wants_entropy:
            finite_MV = logprobs_MV.clamp(min=torch.finfo(logprobs_MV.dtype).min)
            tokens = evolve(tokens, student_entropies=-(logprobs_MV.exp() * finite_MV).sum(-1))
        ids_MK = check_ids(self.objective.ids(tokens), len(logprobs_MV))
        with naming_ids(ids_MK, logprobs_MV.shape[1]):
            logprobs_MK = logprobs_MV.gather(-1, ids_MK)
        return self._losses(logprobs_MK, tokens).sums()


@final
@frozen
class ReferenceOPDLoss(OPDSettings):
    """Lightning OPD in plain torch, with the arguments of `lopd.losses.objective.OPDSettings`."""

    def __call__(self, hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
        """Return weighted sums over the counted tokens.

        Raises:
            MissingScoresError: the batch has no teacher column, or no ref column though the ratio is asked for.
            InvalidRecordError: a transform gives another shape than one value a token.
        """
        return ReferenceLoss(self.objective())(hidden_ND, head, batch)


@final
@frozen
class SFTLoss:
    r"""Supervised fine-tuning: \(\sum_t w_t\, (-\ell_\theta(a_t))\).  Needs no scores.

    Source: Lightning OPD (arXiv 2604.13010v2), eq. 6.
    """

    ignores_labels = True

    def __call__(self, hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
        """Return weighted sums over the counted tokens; the reverse KL of a loss without a teacher is 0."""
        return ReferenceLoss(OPDObjective.sft())(hidden_ND, head, batch)


def _to_terms(terms: Sequence[tuple[float, OPDLoss]]) -> tuple[tuple[float, OPDLoss], ...]:
    if not terms:
        raise InvalidRecordError("WeightedLoss: it has 0 terms, expected at least 1; pass (coefficient, loss) pairs.")
    try:
        unpacked = [(coefficient, loss) for coefficient, loss in terms]
    except (TypeError, ValueError):
        raise ArgumentError(f"WeightedLoss: its terms are {terms!r:.80}, expected (coefficient, loss) pairs; pass such pairs.") from None
    pairs = tuple((to_finite("WeightedLoss", "coefficient", coefficient), loss) for coefficient, loss in unpacked)
    for _, loss in pairs:
        check_noun(loss, OPDLoss)
    return pairs


@final
@frozen
class WeightedLoss(OfParts):
    """A sum of losses, each with its coefficient; what is reported beside the loss comes from the first term.

    Args:
        terms: (coefficient, loss) pairs, for example `[(1.0, ReferenceOPDLoss()), (0.1, SFTLoss())]`.

    Raises:
        InvalidRecordError: there are 0 terms, or a coefficient is not a finite number.
        ArgumentError: the terms are not pairs, or a loss is something else, such as an objective.
    """

    terms: tuple[tuple[float, OPDLoss], ...] = field(converter=_to_terms)

    def _parts(self) -> Sequence[object]:
        return [loss for _, loss in self.terms]

    def __call__(self, hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
        """Return weighted sums over the counted tokens."""
        outputs = [(coefficient, loss(hidden_ND, head, batch)) for coefficient, loss in self.terms]
        total = torch.stack([coefficient * output.loss_sum for coefficient, output in outputs]).sum()
        first = outputs[0][1]
        neglected = [abs(coefficient) * output.neglected_sum for coefficient, output in outputs if output.neglected_sum is not None]
        return evolve(first, loss_sum=total, neglected_sum=torch.stack(neglected).sum() if neglected else None)
