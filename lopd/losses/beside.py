"""What stands on any objective, or beside it: an entropy bonus, with its gradient through every logit, and the ratio of the tokens before."""

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from attrs import evolve, field, fields, frozen
from torch import Tensor

from lopd.losses.objective import Objective, Signal, TokenLosses
from lopd.losses.tokens import Tokens, check_per_token
from lopd.losses.variants import window_ratio
from lopd.protocols import StatesBaseline, StatesCorrection, StatesLabels, StatesRatio
from lopd.records.checks import check_bound, check_kind, check_number, own_numbers


def check_objective(owner: object, _: Any, objective: Any) -> None:
    """Refuse what is not an objective, such as a loss or a divergence.

    Raises:
        ArgumentError: it lacks a name of one.
    """
    remedy = "pass an objective: `OPDObjective(...)`, or `TopKObjective(divergence)`"
    check_kind(f"{type(owner).__name__}: objective", objective, Objective, remedy)


class OfParts:
    """What a loss or an objective that is made of others states of itself: what those do."""

    __slots__ = ()

    def _parts(self) -> Sequence[object]:
        """Return what it is made of, at least one."""
        raise NotImplementedError

    @property
    def uncorrected(self) -> bool:
        """Whether any of its parts is (`lopd.protocols.StatesCorrection`)."""
        return any(isinstance(part, StatesCorrection) and part.uncorrected for part in self._parts())

    @property
    def ratioless(self) -> bool:
        """Whether any of its parts is (`lopd.protocols.StatesRatio`)."""
        return any(isinstance(part, StatesRatio) and part.ratioless for part in self._parts())

    @property
    def baselined(self) -> bool:
        """Whether any of its parts is (`lopd.protocols.StatesBaseline`)."""
        return any(isinstance(part, StatesBaseline) and part.baselined for part in self._parts())

    @property
    def ignores_labels(self) -> bool:
        """Whether all of its parts do (`lopd.protocols.StatesLabels`)."""
        return all(isinstance(part, StatesLabels) and part.ignores_labels for part in self._parts())


class OfObjective(OfParts):
    """A loss on an objective, or an objective beside another one, which is its only part."""

    __slots__ = ()
    objective: Objective

    def _parts(self) -> Sequence[object]:
        return (self.objective,)

    def _losses(self, logprobs_MK: Tensor, tokens: Tokens) -> TokenLosses:
        """Return what its objective gives, checked: one value a token of each."""
        losses = self.objective(logprobs_MK, tokens)
        for part in fields(TokenLosses):
            check_per_token(f"Objective {type(self.objective).__name__}: {part.name}", getattr(losses, part.name, None), tokens)
        return losses


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
        ArgumentError: the objective is something else.

    Source: LSPD (arXiv 2609.35505): a Huber loss of \(\ell_\theta - \ell_T\) that is \(d^2\) within 5 nats, minus 0.1 H, without a ratio.  That has
    twice the gradient of `EntropyBonus(OPDObjective(clip=5.0), 0.05)`.
    """

    objective: Objective = field(validator=check_objective)
    coefficient: float = 0.05

    wants_entropy = True

    def __attrs_post_init__(self) -> None:
        own_numbers(self, "Entropy bonus")
        check_number("Entropy bonus", "coefficient", self.coefficient, abs(self.coefficient) < math.inf, "finite")

    @property
    def per_token(self) -> bool:
        """Whether the other objective is."""
        return self.objective.per_token

    def ids(self, tokens: Tokens, /) -> Tensor:
        """Return the ids that the other objective needs."""
        return self.objective.ids(tokens)

    def __call__(self, logprobs_MK: Tensor, tokens: Tokens, /) -> TokenLosses:
        """See the class."""
        losses = self._losses(logprobs_MK, tokens)
        return evolve(losses, loss=losses.loss - self.coefficient * tokens.weight * tokens.entropies(gradient=True))


@final
@frozen
class WindowRatio(OfObjective):
    r"""Another objective, each token's loss times the ratio of the tokens before: `FusedLoss(WindowRatio(TopKObjective(reverse_kl, residual=True)))`.

    \[ L_t\, \min\Big(\prod_{k=t-L}^{t-1} \pi_\theta(a_k|s_k) / q(a_k|s_k),\; c\Big) \]

    `lopd.losses.variants.window_ratio`, for objectives that take no variants.  A reverse KL that is unbiased on the stored states has, without
    a cap, the expected gradient at states of which q wrote all tokens but the last L, and the student those; with L at least the length of
    a response, the online gradient; both under `by_token`, as the weight of a token must not depend on later ones.  What a step reports stays that
    of the stored states.

    Args:
        objective: whose losses are weighed.
        window: \(L\), at least 1: counted tokens of the same rollout.
        cap: \(c\), more than 0; None for none but that which keeps the ratio finite.

    Raises:
        InvalidRecordError: `window` is less than 1, or the cap not more than 0.
        ArgumentError: the objective is something else.

    Source: per-decision importance sampling (Precup et al. 2000), truncated in time and in size.
    """

    objective: Objective = field(validator=check_objective)
    window: int = 8
    cap: float | None = field(default=4.0, validator=check_bound)

    per_token = False

    def __attrs_post_init__(self) -> None:
        own_numbers(self, "WindowRatio", window=1)

    @property
    def wants_entropy(self) -> bool:
        """Whether the other objective does."""
        return self.objective.wants_entropy

    def ids(self, tokens: Tokens, /) -> Tensor:
        """Return the ids that the other objective needs."""
        return self.objective.ids(tokens)

    def __call__(self, logprobs_MK: Tensor, tokens: Tokens, /) -> TokenLosses:
        """See the class."""
        losses = self._losses(logprobs_MK, tokens)
        ones_M = torch.ones_like(losses.logprobs)
        before = window_ratio(Signal(ones_M, ones_M, losses.logprobs, tokens), self.window, self.cap)
        return evolve(losses, loss=losses.loss * before.weight)
