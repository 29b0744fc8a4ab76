"""The losses in plain torch, readable beside their equations: the truth that every faster path is compared with.

Memory: logits of all counted tokens of a micro-batch, M * V * 4 bytes, a few times over.
"""

from collections.abc import Sequence
from typing import final

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from lopd.errors import InvalidRecordError
from lopd.losses.objective import Objective, OPDObjective, Tokens, Transform, check_clip, to_transforms
from lopd.protocols import OPDLoss
from lopd.records.steps import Batch, LMHead, LossOutput


@final
@frozen
class ReferenceLoss:
    """Any objective, in plain torch.

    Args:
        objective: which loss.
    """

    objective: Objective

    def __call__(self, hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
        """Weighted sums over the counted tokens."""
        tokens = Tokens.counted(batch)
        logprobs_MV = head.logits(hidden_ND[batch.weight > 0]).log_softmax(-1)
        if self.objective.wants_entropy:
            tokens = evolve(tokens, student_entropies=torch.special.entr(logprobs_MV.detach().exp()).sum(-1))
        return self.objective(logprobs_MV.gather(-1, self.objective.ids(tokens)), tokens).sums()


@final
@frozen
class ReferenceOPDLoss:
    r"""Lightning OPD: \(\sum_t w_t\, (-A_t\, \ell_\theta(a_t))\), \(A_t = \mathrm{clip}(\ell_T - \mathrm{sg}[\ell_\theta], \pm\tau)\).

    Args:
        clip: \(\tau\) in nats, finite and more than 0; or None for no clipping.
        ratio_to_ref: multiply by the per-token importance ratio to the `ref` column (`functional.lightning_with_ratio`).  The paper's loss has
            none; start with it all the same: as good where the paper's works, and it holds where that one fails (`benchmarks/RESULTS.md`).
        transforms: variants of advantages and weights, in their order (`lopd.losses.variants`); the clip comes after them.
        advantage: a constant in the place of teacher minus student; then no teacher is needed.
        kl_baseline: add KL(student, teacher) to the advantage, as a baseline (vOPD); needs `batches(top_k=True)`.

    Raises:
        InvalidRecordError: `clip` is neither.

    Source: Lightning OPD (arXiv 2604.13010v2), eq. 2, 4 and algorithm 1.
    """

    clip: float | None = 10.0
    ratio_to_ref: bool = False
    transforms: tuple[Transform, ...] = field(default=(), converter=to_transforms)
    advantage: float | None = None
    kl_baseline: bool = False

    def __attrs_post_init__(self) -> None:
        check_clip("ReferenceOPDLoss", self.clip)

    def __call__(self, hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
        """Weighted sums over the counted tokens.

        Raises:
            MissingScoresError: the batch has no teacher column, or no ref column though the ratio is asked for.
        """
        objective = OPDObjective(self.clip, self.ratio_to_ref, self.transforms, self.advantage, self.kl_baseline)
        return ReferenceLoss(objective)(hidden_ND, head, batch)


@final
@frozen
class SFTLoss:
    r"""Supervised fine-tuning: \(\sum_t w_t\, (-\ell_\theta(a_t))\).  Needs no scores.

    Source: Lightning OPD (arXiv 2604.13010v2), eq. 6.
    """

    def __call__(self, hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
        """Weighted sums over the counted tokens; the reverse KL of a loss without a teacher is 0."""
        return ReferenceLoss(OPDObjective.sft())(hidden_ND, head, batch)


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
        neglected = [abs(coefficient) * output.neglected_sum for coefficient, output in outputs if output.neglected_sum is not None]
        return evolve(first, loss_sum=total, neglected_sum=torch.stack(neglected).sum() if neglected else None)
