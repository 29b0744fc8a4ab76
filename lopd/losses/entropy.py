"""An entropy bonus beside any objective, with its gradient through every logit."""

from typing import final

from attrs import evolve, field, frozen
from torch import Tensor

from lopd.losses.objective import Objective, OfObjective, TokenLosses
from lopd.losses.tokens import Tokens
from lopd.records.checks import check_number, to_real


def _to_coefficient(coefficient: float) -> float:
    own = to_real("Entropy bonus", "coefficient", coefficient)
    check_number("Entropy bonus", "coefficient", coefficient, abs(own) < float("inf"), "finite")
    return own


@final
@frozen
class EntropyBonus(OfObjective):
    r"""Another objective minus \(\alpha H(\pi_\theta)\) at every counted token: `FusedLoss(EntropyBonus(OPDObjective(clip=5.0), 0.05))`.

    H is the entropy over the whole vocabulary, and its gradient is exact: \(\partial H / \partial z_v = -p_v (\log p_v + H)\) joins the gradient
    by the logits where they are, so a fused loss stays at three matrix products if the other objective does.

    A bonus is opt-in: its fixed point is not the teacher, but a distribution that is flatter.

    Args:
        objective: what it is added to.
        coefficient: \(\alpha\); less than 0 sharpens the student.

    Raises:
        InvalidRecordError: the coefficient is not finite.

    Source: LSPD (arXiv 2609.35505): a Huber loss of \(\ell_\theta - \ell_T\) that is \(d^2\) within 5 nats, minus 0.1 H, without a ratio.  That has
    twice the gradient of `EntropyBonus(OPDObjective(clip=5.0), 0.05)`.
    """

    objective: Objective
    coefficient: float = field(default=0.05, converter=_to_coefficient)

    wants_entropy = True

    @property
    def per_token(self) -> bool:
        """Whether the other objective is."""
        return self.objective.per_token

    def ids(self, tokens: Tokens, /) -> Tensor:
        """Return the ids that the other objective needs."""
        return self.objective.ids(tokens)

    def __call__(self, logprobs_MK: Tensor, tokens: Tokens, /) -> TokenLosses:
        """See the class."""
        losses = self.objective(logprobs_MK, tokens)
        return evolve(losses, loss=losses.loss - self.coefficient * tokens.weight * tokens.entropies(gradient=True))
