"""The ratio of the tokens before, beside any objective: an answer to states that the student has left."""

import math
from typing import final

import torch
from attrs import evolve, frozen
from torch import Tensor

from lopd.losses.objective import Objective, OfObjective, Signal, TokenLosses
from lopd.losses.tokens import Tokens
from lopd.losses.variants import window_ratio
from lopd.records.checks import check_at_least, check_number, own_numbers


@final
@frozen
class WindowRatio(OfObjective):
    r"""Another objective, each token's loss times the ratio of the tokens before: `WindowRatio(TopKObjective(reverse_kl, residual=True))`.

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

    Source: per-decision importance sampling (Precup et al. 2000), truncated in time and in size.
    """

    objective: Objective
    window: int = 8
    cap: float | None = 4.0

    per_token = False

    def __attrs_post_init__(self) -> None:
        own_numbers(self, "WindowRatio")
        check_at_least("WindowRatio", "window", self.window, 1)
        check_number("WindowRatio", "cap", self.cap, self.cap is None or 0 < self.cap < math.inf, "None, or finite and more than 0")

    @property
    def wants_entropy(self) -> bool:
        """Whether the other objective does."""
        return self.objective.wants_entropy

    def ids(self, tokens: Tokens, /) -> Tensor:
        """Return the ids that the other objective needs."""
        return self.objective.ids(tokens)

    def __call__(self, logprobs_MK: Tensor, tokens: Tokens, /) -> TokenLosses:
        """See the class."""
        losses = self.objective(logprobs_MK, tokens)
        ones_M = torch.ones_like(losses.logprobs)
        before = window_ratio(Signal(ones_M, ones_M, losses.logprobs, tokens), self.window, self.cap)
        return evolve(losses, loss=losses.loss * before.weight)
